"""A test whose peer is missing is skipped by name, and fails the run where peers are required."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
MARKED = """
import pytest

@pytest.mark.peer("no-such-command")
def test_with_a_peer():
    raise AssertionError

def test_without():
    pass
"""
WHOLE_MODULE = """
import pytest

pytest.skip("peer no-such-command is missing", allow_module_level=True)
"""
OTHER_REASON = """
import pytest

def test_elsewhere():
    pytest.skip("this machine has no block devices")
"""


def run(folder: Path, content: str, *, required: bool) -> tuple[int, str]:
    """A test run of its own; returns its exit code and output."""
    (folder / "conftest.py").write_bytes(CONFTEST.read_bytes())
    (folder / "some_test.py").write_text(content, encoding="utf-8")
    (folder / "pytest.ini").write_text(
        "[pytest]\npython_files = *_test.py\nmarkers = peer\n", encoding="utf-8"
    )
    environment = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    environment["QCOWKIT_REQUIRE_PEERS"] = "1" if required else ""
    # The conftest of the project imports from its own tests.
    environment["PYTHONPATH"] = os.pathsep.join([str(CONFTEST.parent.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("content", [MARKED, WHOLE_MODULE + MARKED])
def test_a_missing_peer_fails_the_run_where_peers_are_required(
    tmp_path: Path, content: str
) -> None:
    code, text = run(tmp_path, content, required=True)
    assert code == 1
    assert "peer no-such-command is missing" in text


def test_a_missing_peer_is_skipped_by_name_elsewhere(tmp_path: Path) -> None:
    code, text = run(tmp_path, MARKED, required=False)
    assert code == 0
    assert "peer no-such-command is missing" in text


def test_another_reason_to_skip_is_no_failure(tmp_path: Path) -> None:
    assert run(tmp_path, OTHER_REASON, required=True)[0] == 0
