"""The public names of the package: all there, resolved on first use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import qcowkit
from qcowkit.errors import QcowkitError
from qcowkit.image.registry import open_chain


@pytest.mark.parametrize("name", qcowkit.__all__)
def test_every_public_name_is_found(name: str) -> None:
    assert getattr(qcowkit, name) is not None
    assert name in dir(qcowkit)


def test_open_opens_a_chain() -> None:
    assert qcowkit.open is open_chain


def test_every_error_has_a_public_name() -> None:
    found = {error.__name__ for error in QcowkitError.__subclasses__()}
    assert {
        name for name in found if getattr(qcowkit, name).__module__ == "qcowkit.errors"
    } == found


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'qcowkit' has no attribute 'close'"):
        _ = qcowkit.close  # type: ignore[attr-defined]


def test_importing_the_package_loads_none_of_its_modules() -> None:
    script = "import sys, qcowkit; print([name for name in sys.modules if 'qcowkit.' in name])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "[]\n"
