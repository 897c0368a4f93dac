"""`qcow compact`: what it says, and what qemu finds afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.command import qcow
from tests.crypt_disks import KINDS, described
from tests.peers import run_peer

pytestmark = pytest.mark.pinned("its kinds of images are its own")


@pytest.fixture
def holey(tmp_path: Path) -> Path:
    """An image whose first half was given up."""
    path = tmp_path / "disk.qcow2"
    qcow("create", "-q", "-f", "qcow2", path, "16M")
    words = ("-c", "write -q -P 3 0 8M", "-c", "write -q -P 4 8M 4M", "-c", "discard -q 0 7M")
    qcow("io", "-d", "unmap", *words, path)
    return path


def test_it_says_what_was_gained(holey: Path) -> None:
    before = holey.stat().st_size
    done = qcow("compact", holey)
    assert done.out.decode().startswith(f"{holey}: 12.3 MiB to 5.")
    assert holey.stat().st_size < before // 2
    qcow("io", "-c", "read -q -P 3 7M 1M", "-c", "read -q -P 4 8M 4M", holey)
    qcow("check", "-q", holey)
    assert qcow("compact", holey).out.decode().endswith("nothing to gain\n")


def test_json_has_sizes_in_bytes(holey: Path) -> None:
    before = holey.stat().st_size
    found = qcow("compact", "--output=json", holey).json()
    assert found["size-before"] == before
    assert found["size"] == holey.stat().st_size
    assert found["moved"] > 0


def test_progress_counts_what_moves(holey: Path) -> None:
    lines = qcow("compact", "--progress=json", holey).err.splitlines()
    last = json.loads(lines[-1])
    assert last["done"] == last["total"] > 0


def test_quiet_says_nothing(holey: Path) -> None:
    assert qcow("compact", "-q", holey).out == b""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-U",), "an image that another process uses must not be compacted"),
        (("-f", "raw"), "raw images cannot be, qcow2 images can"),
    ],
)
def test_what_cannot_be_is_refused(holey: Path, words: tuple[str, ...], message: str) -> None:
    before = holey.read_bytes()
    assert message in qcow("compact", *words, holey, code=None).err
    assert holey.read_bytes() == before


@pytest.mark.peer("qemu-img")
def test_qemu_finds_the_same_disk_in_a_sound_image(holey: Path, tmp_path: Path) -> None:
    run_peer("qemu-img", "snapshot", "-c", "then", holey)
    qcow("io", "-c", "write -q -P 9 9M 1M", holey)
    before = tmp_path / "before.qcow2"
    shutil.copy(holey, before)
    qcow("compact", "-q", holey)
    run_peer("qemu-img", "check", "-q", holey)
    run_peer("qemu-img", "compare", "-q", before, holey)


@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_encrypted_data_are_encrypted_for_their_new_place(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "disk.qcow2"
    secret = ("--object", "secret,id=s,data=old")
    keys = KINDS[kind] + ",encrypt.key-secret=s"
    qcow("create", "-q", "-f", "qcow2", *secret, "-o", keys, path, "16M")
    words = ("-c", "write -q -P 3 0 8M", "-c", "write -q -P 4 8M 2M", "-c", "discard -q 0 7M")
    qcow("io", *secret, "--image-opts", "-d", "unmap", *words, described(path))
    if kind == "luks":
        before = path.read_bytes()
        assert "secret" in qcow("compact", path, code=1).err
        assert path.read_bytes() == before
    size = path.stat().st_size
    qcow("compact", "-q", *secret, "--image-opts", described(path))
    assert path.stat().st_size < size - (4 << 20)
    reads = ("-c", "read -q -P 3 7M 1M", "-c", "read -q -P 4 8M 2M")
    qcow("io", *secret, "--image-opts", *reads, described(path))
    qcow("check", "-q", path)
