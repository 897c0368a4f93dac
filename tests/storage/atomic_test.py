"""Outputs that have no name until they are complete: success, every kind of failure, and kills."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qcowkit.errors import ImageBusy, RequestError, StorageError
from qcowkit.storage.atomic import AtomicOutput
from qcowkit.storage.file import FileStorage
from qcowkit.storage.locking import Role, acquire
from qcowkit.units import KiB, MiB

_ROOT = os.geteuid() == 0


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def write(path: Path, content: bytes, *, replace: bool = True) -> None:
    with AtomicOutput(path, replace=replace) as output:
        output.storage.pwrite([content], offset=0)
        output.commit()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"old")
    return path


def test_a_new_file_appears_when_it_is_committed(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with AtomicOutput(path) as output:
        output.storage.pwrite([b"new"], offset=0)
        assert not path.exists()
        output.commit()
        assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["disk.img"]


def test_a_part_lies_hidden_beside_its_target(tmp_path: Path) -> None:
    with AtomicOutput(tmp_path / "disk.img") as output:
        (part,) = names(tmp_path)
        assert part.startswith(".disk.img.")
        assert part.endswith(".part")
        assert output.part_path == str(tmp_path / part)


def test_leaving_without_a_commit_removes_the_part(target: Path) -> None:
    with AtomicOutput(target) as output:
        output.storage.pwrite([b"new"], offset=0)
    assert names(target.parent) == ["disk.img"]
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_removes_the_part(target: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with AtomicOutput(target) as output:
            output.storage.pwrite([b"new"], offset=0)
            raise error

    with pytest.raises(error):
        fail()
    assert names(target.parent) == ["disk.img"]
    assert target.read_bytes() == b"old"


def test_an_existing_target_is_replaced_and_keeps_its_mode(target: Path) -> None:
    target.chmod(0o640)
    write(target, b"new")
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


@pytest.mark.skipif(not _ROOT, reason="only root may give files away")
def test_an_existing_target_keeps_its_owner(target: Path) -> None:
    os.chown(target, 1234, 4321)
    write(target, b"new")
    assert (target.stat().st_uid, target.stat().st_gid) == (1234, 4321)


def test_a_secret_target_is_not_readable_by_others_while_it_grows(target: Path) -> None:
    target.chmod(0o600)
    with AtomicOutput(target) as output:
        assert stat.S_IMODE(os.stat(output.part_path).st_mode) == 0o600


def test_a_symbolic_link_survives_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to("store/disk.img")
    for content in (b"first", b"second"):
        write(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "store" / "disk.img").read_bytes() == content
    assert names(tmp_path) == ["link", "store"]
    assert names(tmp_path / "store") == ["disk.img"]


def test_without_replace_an_existing_target_is_refused_at_once(target: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"disk.img: create: File exists \(EEXIST\)"),
        AtomicOutput(target, replace=False),
    ):
        pytest.fail("entered")
    assert names(target.parent) == ["disk.img"]


def test_without_replace_a_new_target_appears(tmp_path: Path) -> None:
    write(tmp_path / "disk.img", b"new", replace=False)
    assert names(tmp_path) == ["disk.img"]
    assert (tmp_path / "disk.img").read_bytes() == b"new"


@pytest.mark.parametrize("modern", [True, False])
def test_without_replace_a_target_that_appears_meanwhile_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modern: bool
) -> None:
    path = tmp_path / "disk.img"
    if not modern:
        monkeypatch.setattr("qcowkit.storage.atomic._rename_to_new", lambda *_, **__: False)
    with AtomicOutput(path, replace=False) as output:
        output.storage.pwrite([b"new"], offset=0)
        path.write_bytes(b"theirs")
        with pytest.raises(StorageError, match="EEXIST"):
            output.commit()
    assert names(tmp_path) == ["disk.img"]
    assert path.read_bytes() == b"theirs"


def test_a_host_without_renameat2_links_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcowkit.storage.atomic._rename_to_new", lambda *_, **__: False)
    write(tmp_path / "disk.img", b"new", replace=False)
    assert names(tmp_path) == ["disk.img"]


@pytest.mark.parametrize("path", ["/dev/null", "."])
def test_a_target_that_is_no_regular_file_is_refused(path: str) -> None:
    with (
        pytest.raises(RequestError, match="is not a regular file, so it cannot be replaced"),
        AtomicOutput(path),
    ):
        pytest.fail("entered")


def test_a_missing_directory_is_named_by_the_target(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "disk.img"
    with pytest.raises(StorageError) as caught, AtomicOutput(path):
        pytest.fail("entered")
    assert str(caught.value) == f"{path}: create: No such file or directory (ENOENT)"


def test_the_longest_possible_name_still_has_a_part(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127)
    write(path, b"new")
    assert names(tmp_path) == [path.name]


def test_a_relative_target_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("disk.img"), b"new")
    assert names(tmp_path) == ["disk.img"]


def test_a_part_that_nobody_holds_is_removed_by_the_next_run(target: Path) -> None:
    stale = target.parent / ".disk.img.0123456789abcdef.part"
    stale.write_bytes(b"half")
    write(target, b"new")
    assert names(target.parent) == ["disk.img"]


def test_what_only_looks_like_a_part_stays(target: Path) -> None:
    others = [
        ".other.img.0123456789abcdef.part",
        ".disk.img.0123.part",
        ".disk.img.0123456789abcdef.part.bak",
        "disk.img.0123456789abcdef.part",
    ]
    for name in others:
        (target.parent / name).touch()
    (target.parent / "victim").touch()
    (target.parent / ".disk.img.00000000000000aa.part").symlink_to("victim")
    os.mkfifo(target.parent / ".disk.img.00000000000000bb.part")
    write(target, b"new")
    kept = [*others, "victim", ".disk.img.00000000000000aa.part", ".disk.img.00000000000000bb.part"]
    assert names(target.parent) == sorted([*kept, "disk.img"])


def test_the_part_of_a_running_output_is_left_alone(target: Path) -> None:
    target.unlink()
    with AtomicOutput(target) as first:
        first.storage.pwrite([b"first"], offset=0)
        write(target, b"second")
        assert os.path.exists(first.part_path)
        first.commit()
    assert target.read_bytes() == b"first"
    assert names(target.parent) == ["disk.img"]


def test_no_descriptor_is_left_behind(target: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    write(target, b"new")
    with pytest.raises(ValueError, match="stop"), AtomicOutput(target):
        raise ValueError("stop")
    with pytest.raises(StorageError), AtomicOutput(target, replace=False):
        pytest.fail("entered")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("call", ["fdatasync", "fsync", "rename", "fchmod"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_failing_host_leaves_the_old_target(
    target: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, "no")

    with AtomicOutput(target) as output:
        output.storage.pwrite([b"new"], offset=0)
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(StorageError) as caught:
            output.commit()
    assert caught.value.errno == number
    assert target.read_bytes() == b"old"
    assert names(target.parent) == ["disk.img"]


def test_a_file_size_limit_leaves_the_old_target(target: Path) -> None:
    script = """
import resource, signal, sys
from qcowkit.errors import StorageError
from qcowkit.storage.atomic import AtomicOutput
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    with AtomicOutput(sys.argv[1]) as output:
        output.storage.pwrite([bytes(200000)], offset=0)
        output.commit()
except StorageError as error:
    print(error)
"""
    done = _run(script, target)
    assert done.stdout == f"{target}: write: File too large (EFBIG)\n"
    assert target.read_bytes() == b"old"
    assert names(target.parent) == ["disk.img"]


@pytest.mark.skipif(not _ROOT, reason="only root may mount a small file system")
def test_a_full_disk_leaves_the_old_target(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        path = tmp_path / "disk.img"
        path.write_bytes(b"o" * (64 * KiB))
        with pytest.raises(StorageError) as caught:
            write(path, bytes(MiB))
        assert str(caught.value) == f"{path}: write: No space left on device (ENOSPC)"
        assert path.read_bytes() == b"o" * (64 * KiB)
        assert names(tmp_path) == ["disk.img"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_the_old_target_and_the_next_run_cleans_up(
    target: Path, kill: signal.Signals
) -> None:
    script = """
import sys
from qcowkit.storage.atomic import AtomicOutput
with AtomicOutput(sys.argv[1]) as output:
    output.storage.pwrite([b"half"], offset=0)
    print("ready", flush=True)
    sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(kill)
        child.wait()
    assert target.read_bytes() == b"old"
    assert len(names(target.parent)) == 2
    write(target, b"new")
    assert target.read_bytes() == b"new"
    assert names(target.parent) == ["disk.img"]


def _run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize("role", [Role.READER, Role.WRITER, Role.CREATOR])
def test_a_target_that_is_in_use_is_left_alone(target: Path, role: Role) -> None:
    with FileStorage.open(target, writable=True) as user:
        acquire(user, role, name="user")
        with pytest.raises(ImageBusy, match="elsewhere, so it cannot be replaced until"):
            write(target, b"new")
        assert target.read_bytes() == b"old"
        assert names(target.parent) == ["disk.img"]
    write(target, b"new")
    assert target.read_bytes() == b"new"


def test_a_target_of_a_reader_that_minds_nobody_is_replaced(target: Path) -> None:
    with FileStorage.open(target) as user:
        acquire(user, Role.SHARED, name="user")
        write(target, b"new")
        assert user.pread(3, offset=0) == b"old"
    assert target.read_bytes() == b"new"


def test_nobody_begins_to_use_a_target_that_will_be_replaced(target: Path) -> None:
    with AtomicOutput(target) as output, FileStorage.open(target) as user:
        with pytest.raises(ImageBusy):
            acquire(user, Role.READER, name="user")
        output.commit()
    with FileStorage.open(target) as user:
        acquire(user, Role.READER, name="user")


def test_a_target_that_came_later_is_not_taken_from_its_user(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with AtomicOutput(path) as output:
        path.write_bytes(b"came first")
        with FileStorage.open(path) as user:
            acquire(user, Role.READER, name="user")
            with pytest.raises(ImageBusy):
                output.commit()
    assert path.read_bytes() == b"came first"
    assert names(tmp_path) == ["disk.img"]


def test_a_target_that_took_the_place_of_another_is_held_too(target: Path) -> None:
    with AtomicOutput(target) as output:
        target.unlink()
        target.write_bytes(b"other")
        with FileStorage.open(target) as user:
            acquire(user, Role.READER, name="user")
            with pytest.raises(ImageBusy):
                output.commit()
        output.commit()
    assert names(target.parent) == ["disk.img"]


def test_a_target_in_use_is_replaced_without_locks_on_request(target: Path) -> None:
    with FileStorage.open(target) as user:
        acquire(user, Role.READER, name="user")
        with AtomicOutput(target, locking="off") as output:
            output.commit()
    assert target.read_bytes() == b""
