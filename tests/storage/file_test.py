"""Files as storage: the conformance suite, what may be opened, and failing hosts."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qcowkit.errors import StorageError
from qcowkit.storage import ioctls
from qcowkit.storage.file import FileStorage
from qcowkit.testing.storage_suite import StorageSuite, data_bytes, failure_of
from qcowkit.units import KiB, MiB


class TestFileStorage(StorageSuite):
    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> Iterator[None]:
        self.directory = tmp_path
        self.opened: list[FileStorage] = []
        yield
        for storage in self.opened:
            storage.close()

    def make(self, content: bytes) -> FileStorage:
        path = self.directory / f"file{len(self.opened)}"
        path.write_bytes(content)
        storage = FileStorage.open(path, writable=True)
        self.opened.append(storage)
        return storage


class TestFileStorageOnAHostWithoutSpaceIoctls(TestFileStorage):
    @pytest.fixture(autouse=True)
    def _bare_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "not here")

        for name in ("punch_hole", "zero_range", "clone_range"):
            monkeypatch.setattr(ioctls, name, refuse)
        monkeypatch.setattr(os, "copy_file_range", refuse)


class TestFileStorageWithShortTransfers(TestFileStorage):
    """A host that moves at most 1000 bytes a call, as pipes, signals and network files do."""

    @pytest.fixture(autouse=True)
    def _slow_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pread, pwrite = os.pread, os.pwrite

        def short_preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
            data = pread(fd, min(1000, len(buffers[0])), offset)
            buffers[0][: len(data)] = data
            return len(data)

        def short_pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:
            return pwrite(fd, b"".join(buffers)[:1000], offset)

        monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 1000), at))
        monkeypatch.setattr(os, "preadv", short_preadv)
        monkeypatch.setattr(os, "pwritev", short_pwritev)
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1000], at))


def test_zero_with_unmap_gives_the_space_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * MiB)
    with FileStorage.open(path, writable=True) as storage:
        before = storage.allocated()
        storage.zero(offset=0, length=512 * KiB, unmap=True)
        assert storage.allocated() < before
        assert list(storage.iter_data(offset=0, length=MiB)) == [(512 * KiB, 512 * KiB)]


def test_a_hole_is_not_data(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 1 << 40)
    with FileStorage.open(path) as storage:
        assert list(storage.iter_data(offset=0, length=1 << 41)) == []
        assert storage.allocated() == 0


def test_a_host_that_knows_no_holes_reports_data_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "no holes here")

    path = tmp_path / "file"
    path.write_bytes(bytes(100) + b"x")
    with FileStorage.open(path) as storage:
        monkeypatch.setattr(os, "lseek", refuse)
        assert list(storage.iter_data(offset=10, length=1000)) == [(10, 91)]
        assert data_bytes(storage, offset=0, length=101) == bytes(100) + b"x"


def test_the_cursor_of_the_descriptor_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcdef")
    with FileStorage.open(path) as storage:
        pieces = storage.iter_data(offset=0, length=6)
        os.lseek(storage.fileno(), 5, os.SEEK_SET)
        assert list(pieces) == [(0, 6)]
        assert storage.pread(2, offset=0) == b"ab"


def test_a_read_only_file_refuses_every_change(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcdef")
    with FileStorage.open(path) as storage:
        assert not storage.caps.writable
        assert failure_of(lambda: storage.pwrite([b"x"], offset=0)) == errno.EBADF
        assert failure_of(lambda: storage.zero(offset=0, length=1, unmap=True)) == errno.EBADF
        assert failure_of(lambda: storage.discard(offset=0, length=1)) == errno.EBADF
    assert path.read_bytes() == b"abcdef"


def test_a_missing_file_is_named_with_its_errno(tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    with pytest.raises(StorageError) as caught:
        FileStorage.open(path)
    assert str(caught.value) == f"{path}: open: No such file or directory (ENOENT)"
    assert (caught.value.errno, caught.value.path) == (errno.ENOENT, str(path))


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        StorageError,
        match=r"is a directory, expected a regular file or a block device \(EISDIR\)",
    ):
        FileStorage.open(tmp_path)


@pytest.mark.parametrize("writable", [False, True])
def test_a_pipe_is_refused_without_waiting_for_its_peer(tmp_path: Path, writable: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="is a pipe, expected a regular file"):
        FileStorage.open(tmp_path / "pipe", writable=writable)


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Short, since the name of a socket has room for 107 bytes only.
    monkeypatch.chdir(tmp_path)
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind("socket")
        with pytest.raises(StorageError, match="socket: open: is a socket or a pipe"):
            FileStorage.open("socket")


def test_a_character_device_is_refused() -> None:
    with pytest.raises(StorageError, match="/dev/null: open: is a character device"):
        FileStorage.open("/dev/null")


def test_a_name_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(StorageError, match="no file name can hold"):
        FileStorage.open("a\0b")
    with pytest.raises(StorageError, match="no file name can hold"):
        FileStorage.open("a\ud800b")


def test_no_descriptor_is_left_behind_by_a_refusal(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in (str(tmp_path), "/dev/null"):
        with pytest.raises(StorageError):
            FileStorage.open(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_descriptor_is_not_inherited(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with FileStorage.open(tmp_path / "file") as storage:
        assert fcntl.fcntl(storage.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_opening_never_truncates_and_create_makes_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with FileStorage.open(path, writable=True, create=True) as storage:
        storage.pwrite([b"abc"], offset=0)
    with FileStorage.open(path, writable=True, create=True) as storage:
        assert storage.size() == 3


def test_exclusive_refuses_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    call = lambda: FileStorage.open(path, writable=True, exclusive=True)  # noqa: E731
    assert failure_of(call) == errno.EEXIST


def test_a_link_is_not_followed_where_that_was_asked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    FileStorage.open(tmp_path / "link").close()
    assert failure_of(lambda: FileStorage.open(tmp_path / "link", follow=False)) == errno.ELOOP


def test_all_names_of_a_file_share_one_identity(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "other").touch()
    os.link(tmp_path / "file", tmp_path / "hard")
    with (
        FileStorage.open(tmp_path / "file") as file,
        FileStorage.open(tmp_path / "hard") as hard,
        FileStorage.open(tmp_path / "other") as other,
    ):
        assert file.identity == hard.identity != other.identity


def test_a_descriptor_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    fd = os.open(path, os.O_RDONLY)
    storage = FileStorage.from_fd(fd, name="<stdin>")
    assert (storage.name, storage.caps.writable) == ("<stdin>", False)
    assert storage.pread(3, offset=0) == b"abc"
    storage.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_pipe_as_descriptor_is_refused() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    with pytest.raises(StorageError, match="<stdin>: open: is a pipe"):
        FileStorage.from_fd(reader, name="<stdin>")


def test_offsets_beyond_what_the_host_can_address_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with FileStorage.open(tmp_path / "file", writable=True) as storage:
        assert failure_of(lambda: storage.pread(1, offset=1 << 63)) == errno.EFBIG
        assert failure_of(lambda: storage.pwrite([b"x"], offset=1 << 64)) == errno.EFBIG
        assert failure_of(lambda: storage.truncate(1 << 63)) == errno.EFBIG


def test_a_failed_flush_is_never_followed_by_a_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "the page is lost")

    (tmp_path / "file").touch()
    with FileStorage.open(tmp_path / "file", writable=True) as storage:
        with monkeypatch.context() as broken:
            broken.setattr(os, "fdatasync", fail)
            assert failure_of(storage.flush) == errno.EIO
        with pytest.raises(StorageError, match="flush: an earlier flush failed: Input/output"):
            storage.flush()


def test_a_write_that_makes_no_progress_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with FileStorage.open(tmp_path / "file", writable=True) as storage:
        monkeypatch.setattr(os, "pwrite", lambda *_: 0)
        monkeypatch.setattr(os, "pwritev", lambda *_: 0)
        assert failure_of(lambda: storage.pwrite([b"x"], offset=0)) == errno.EIO


def test_a_copy_from_a_source_that_ends_early_fails(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "b").touch()
    with (
        FileStorage.open(tmp_path / "a") as source,
        FileStorage.open(tmp_path / "b", writable=True) as target,
    ):
        call = lambda: source.copy_to(target, offset=0, length=200, target_offset=0)  # noqa: E731
        assert failure_of(call) == errno.EIO
        assert not source.copy_to(target, offset=100, length=1, target_offset=0)
