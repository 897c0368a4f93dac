"""`qcow convert` never loses what was there: not when the source is bad, the disk is full, the
process is killed, or the target is the source."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qcowkit.image.gate import ReferenceGate
from qcowkit.image.registry import open_chain
from qcowkit.units import KiB, MiB
from tests.command import qcow

KILL_POINTS = Path(__file__).with_name("kill_points.py")
MAIN = "import sys; from qcowkit.cli.main import main; sys.exit(main())"
OLD = b"the old target" * 99


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    noise = random.Random(8)
    path = tmp_path / "disk.raw"
    path.write_bytes(b"".join(noise.randbytes(200 * KiB) + bytes(56 * KiB) for _ in range(12)))
    return path


def environment() -> dict[str, str]:
    """That of a child which finds the package wherever we did."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: these tests write durably, again and again."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="qcowkit-kill-", dir=memory) as name:
        yield Path(name)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def read(path: Path, format: str) -> bytes:
    with open_chain(path, format=format, gate=ReferenceGate.below_image()) as chain:
        return chain.read(offset=0, length=chain.size)


# Killed


def kill_everywhere(target: Path, *words: object) -> list[dict[str, Any]]:
    """What was seen after each run that was killed, and after the last, which was not."""
    command = [sys.executable, KILL_POINTS, target, *words]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# A VHD holds the time and an identity of its own: it is another in each run.
KILLED = {
    "raw": ["-O", "raw"],
    "qcow2": ["-O", "qcow2"],
    "compressed": ["-O", "qcow2", "-c"],
    "preallocated": ["-O", "qcow2", "-o", "preallocation=falloc"],
}


def check_kill_points(raw: Path, folder: Path, flags: list[str], *, old: bytes | None) -> int:
    """Kill, look, and begin again; returns how many points there were."""
    folder.mkdir()
    target = folder / "target"
    if old is not None:
        target.write_bytes(old)
    runs = kill_everywhere(target, "convert", "--threads", 1, "-f", "raw", *flags, raw, target)
    before = None if old is None else hashlib.sha256(old).hexdigest()
    after = runs[-1]["target"]
    assert runs[-1]["killed_at"] == 0
    assert after not in (None, before)
    found = [run["target"] for run in runs]
    assert set(found) == {before, after}
    # Once it is there it stays: no point lies between two states.
    assert found == sorted(found, key=lambda digest: digest == after)
    # A part of a run that died is removed by the next one.
    assert max(len(run["parts"]) for run in runs) == 1
    assert runs[-1]["parts"] == []
    return len(runs)


@pytest.mark.parametrize("kind", list(KILLED))
def test_a_kill_at_any_call_leaves_the_old_target_or_the_new_one(
    quick_folder: Path, kind: str
) -> None:
    raw = quick_folder / "small.raw"
    raw.write_bytes(random.Random(4).randbytes(100 * KiB) + bytes(MiB) + b"\x01" * 512)
    assert check_kill_points(raw, quick_folder / "out", KILLED[kind], old=OLD) > 10


def test_a_kill_at_any_call_leaves_a_new_target_or_none(quick_folder: Path) -> None:
    raw = quick_folder / "small.raw"
    raw.write_bytes(random.Random(4).randbytes(100 * KiB))
    assert check_kill_points(raw, quick_folder / "out", ["-O", "qcow2"], old=None) > 10


@pytest.mark.soak
@pytest.mark.parametrize("kind", list(KILLED))
def test_a_kill_at_any_call_of_a_longer_run(raw: Path, quick_folder: Path, kind: str) -> None:
    assert check_kill_points(raw, quick_folder / "out", KILLED[kind], old=OLD) > 10


def test_the_part_of_a_run_that_died_is_gone_after_the_next(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "target"
    stale = folder / ".target.0123456789abcdef.part"
    stale.write_bytes(b"half")
    other = folder / ".other.0123456789abcdef.part"
    other.write_bytes(b"of another target")
    qcow("convert", "-f", "raw", raw, target)
    assert names(folder) == {"target", other.name}


@pytest.mark.soak
@pytest.mark.parametrize("flags", [["-O", "qcow2"], ["-O", "qcow2", "-c"], ["-O", "raw"]])
def test_a_kill_at_any_time_leaves_the_old_target_or_the_new_one(
    raw: Path, tmp_path: Path, flags: list[str]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "target"
    qcow("convert", "-f", "raw", *flags, raw, target)
    after = target.read_bytes()
    noise = random.Random(2)
    words = ["convert", "-f", "raw", *flags, str(raw), str(target)]
    outcomes = set()
    for _ in range(334):
        target.write_bytes(OLD)
        child = subprocess.Popen([sys.executable, "-c", MAIN, *words], env=environment())
        try:
            child.wait(timeout=noise.uniform(0.05, 0.6))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        found = target.read_bytes()
        assert found in (OLD, after)
        outcomes.add(found)
        assert len(names(folder)) <= 2
    assert outcomes == {OLD, after}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_request_to_end_removes_the_part(tmp_path: Path, number: int) -> None:
    raw = tmp_path / "long.raw"
    raw.write_bytes(random.Random(9).randbytes(12 * MiB))
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "target"
    target.write_bytes(OLD)
    # So slow that it cannot have ended; the first line of progress says that it has begun.
    flags = ["--progress=json", "-r", "6M", "-f", "raw"]
    child = subprocess.Popen(
        [sys.executable, "-c", MAIN, "convert", *flags, str(raw), str(target)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background has these ignored, and so would the child.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert child.stderr is not None
    assert "done" in child.stderr.readline()
    child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert names(folder) == {"target"}
    assert target.read_bytes() == OLD


# No room


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.pinned("the message names the target", "data_file")
@pytest.mark.parametrize(
    "flags",
    [["-O", "raw"], ["-O", "qcow2"], ["-O", "qcow2", "-c"], ["-O", "vpc"], ["-S", "0"]],
)
def test_a_target_that_may_not_grow_is_named_with_its_errno(
    raw: Path, tmp_path: Path, flags: list[str]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "target"
    target.write_bytes(OLD)
    with file_size_limit(1 * MiB):
        done = qcow("convert", "-f", "raw", *flags, raw, target, code=1)
    assert done.err.startswith(f"qcow convert: {target}: ")
    assert done.err.endswith("File too large (EFBIG)\n")
    assert target.read_bytes() == OLD
    assert names(folder) == {"target"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.pinned("the message names the target", "data_file")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems")
@pytest.mark.parametrize(
    "flags",
    [
        ["-O", "raw"],
        ["-O", "qcow2"],
        ["-O", "qcow2", "-c"],
        ["-O", "vpc"],
        ["-O", "qcow2", "-o", "preallocation=falloc"],
        ["-C", "-O", "raw"],
    ],
)
def test_a_full_disk_leaves_the_old_target(raw: Path, small_disk: Path, flags: list[str]) -> None:
    target = small_disk / "target"
    target.write_bytes(OLD)
    done = qcow("convert", "-f", "raw", *flags, raw, target, code=1)
    assert done.err.startswith(f"qcow convert: {target}: ")
    assert done.err.endswith("No space left on device (ENOSPC)\n")
    assert target.read_bytes() == OLD
    assert names(small_disk) == {"target"}


# The target is the source


@pytest.mark.parametrize("format", ["raw", "qcow2", "vpc"])
def test_a_disk_is_not_converted_onto_itself(raw: Path, tmp_path: Path, format: str) -> None:
    before = raw.read_bytes()
    other = tmp_path / "other name"
    other.hardlink_to(raw)
    for target in (raw, other):
        done = qcow("convert", "-f", "raw", "-O", format, raw, target, code=1)
        assert "is one of the files that are read" in done.err
        assert raw.read_bytes() == before


def test_a_disk_is_not_written_in_place_onto_itself(raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qcow("convert", "-f", "raw", "-O", "qcow2", raw, image)
    link = tmp_path / "link"
    link.symlink_to(image)
    before = image.read_bytes()
    for target in (image, link):
        assert qcow("convert", "-n", "-f", "qcow2", image, target, code=1).err
        assert image.read_bytes() == before


@pytest.mark.parametrize("verb", ["convert", "create"])
def test_an_image_does_not_replace_its_own_base(raw: Path, tmp_path: Path, verb: str) -> None:
    base = tmp_path / "base.qcow2"
    qcow("convert", "-f", "raw", "-O", "qcow2", raw, base)
    before = base.read_bytes()
    if verb == "create":
        words = ["-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", base]
    else:
        words = ["-f", "raw", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", raw, base]
    assert qcow(verb, *words, code=1).err
    assert base.read_bytes() == before


@pytest.mark.parametrize("verb", ["convert", "create"])
def test_an_image_is_not_its_own_data_file(raw: Path, tmp_path: Path, verb: str) -> None:
    image = tmp_path / "image.qcow2"
    image.write_bytes(OLD)
    options = ["-o", "data_file=image.qcow2"]
    if verb == "create":
        words = ["-f", "qcow2", *options, image, "1M"]
    else:
        words = ["-f", "raw", "-O", "qcow2", *options, raw, image]
    assert qcow(verb, *words, code=1).err
    assert image.read_bytes() == OLD


# Names that cannot be


@pytest.mark.parametrize("flags", [[], ["-O", "qcow2"], ["-n"]])
def test_a_directory_is_no_target(raw: Path, tmp_path: Path, flags: list[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    done = qcow("convert", *flags, "-f", "raw", raw, folder, code=1)
    assert str(folder) in done.err
    assert done.err.count("\n") == 1
    assert names(folder) == set()


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(OLD)
    done = qcow("convert", tmp_path / "nowhere", target, code=1)
    assert done.err == (
        f"qcow convert: {tmp_path / 'nowhere'}: open: No such file or directory (ENOENT)\n"
    )
    assert target.read_bytes() == OLD


def test_a_missing_directory_is_named(raw: Path, tmp_path: Path) -> None:
    done = qcow("convert", raw, tmp_path / "none" / "target", code=1)
    assert done.err.endswith("No such file or directory (ENOENT)\n")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may do anything; another user may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_source_that_may_not_be_read_is_named(raw: Path, tmp_path: Path) -> None:
    raw.chmod(0)
    with as_nobody():
        done = qcow("convert", raw, tmp_path / "target", code=1)
    assert done.err == f"qcow convert: {raw}: open: Permission denied (EACCES)\n"


def test_a_directory_that_may_not_be_written_is_named(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with open_chain(raw, format="raw") as chain:
        assert chain.size
    # The source is opened first, which the other user may not do either: so it comes from /proc.
    with raw.open("rb") as source, as_nobody():
        done = qcow("convert", "-f", "raw", f"/dev/fd/{source.fileno()}", folder / "x", code=1)
    assert "(EACCES)" in done.err
