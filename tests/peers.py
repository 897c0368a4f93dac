"""Tools of other projects that our files are shown to, and whose files we are shown."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.variants import Variant, vary_qemu_img

# Set by conftest: under which options qemu-img makes its images.
variant: Variant | None = None


# Debian has the command under either name.
_OTHER_NAMES = {"7z": "7zz"}


def find_peer(name: str) -> str | None:
    """The path of a command, under whatever name it is installed; None for none."""
    return shutil.which(name) or shutil.which(_OTHER_NAMES.get(name, name))


def peer(name: str) -> str:
    """The path of a command, or a skip that names it."""
    path = find_peer(name)
    if path is None:
        pytest.skip(f"peer {name} is not installed")
    return path


def run_peer(name: str, *arguments: object, status: int = 0) -> str:
    """The standard output of a peer that must end with `status`.

    qemu-img makes images of the variant that is chosen; see tests/variants.py."""
    words = [str(word) for word in arguments]
    if name == "qemu-img":
        words = vary_qemu_img(variant, words)
    command = [peer(name), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == status, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout
