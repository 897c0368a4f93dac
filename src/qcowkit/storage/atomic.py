"""A file that has no name until it is complete. Reliability reference, section 4.3, first row.

The content grows in `.<name>.<random>.part` beside its target, under a lock that the kernel drops
when the writer dies. A later run for the same target removes every part that nobody holds. The
target is locked too, as qemu locks images: a disk that a machine uses is not taken away from it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import stat
from typing import Self

from qcowkit.errors import RequestError, StorageError
from qcowkit.storage.file import FileStorage, open_descriptor
from qcowkit.storage.locking import LockMode, Role, acquire

_NAME_MAX = 255
_RANDOM_BYTES = 8
_SUFFIX = ".part"
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_RENAME_NOREPLACE = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class AtomicOutput:
    """Context manager around `storage`; `commit` gives it its name, anything else removes it.

    path: the target; a symbolic link is followed, so that the link itself survives.
    replace: whether an existing target gives way. It keeps its mode, and its owner where we may
    set one; access lists and extended attributes are not copied. It is held until the end, so that
    nobody begins to use what goes away; see `storage/locking.py`, also for `locking`.
    Raises RequestError for a target that is not a regular file, ImageBusy for one that is in use,
    StorageError for all else. Only a failure to make the rename durable, the very last step, finds
    the new file in place."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        replace: bool = True,
        locking: LockMode = "auto",
    ) -> None:
        """Nothing is touched before the `with` statement is entered."""
        self._path = os.fsdecode(path)
        self._replace = replace
        self._locking = locking
        self._target: FileStorage | None = None
        self._directory_fd = -1
        self._name = ""
        self._part = ""
        self._storage: FileStorage | None = None
        self._committed = False

    @property
    def storage(self) -> FileStorage:
        """The new, empty, writable file. Its name in messages is the target's."""
        assert self._storage is not None, "the output was not entered"
        return self._storage

    @property
    def part_path(self) -> str:
        """Where the content lies for now."""
        return os.path.join(os.path.dirname(self._resolved()), self._part)

    def __enter__(self) -> Self:
        try:
            self._open_directory()
            target = self._target_status()
            if target is not None and not self._replace:
                raise StorageError("create", path=self._path, errno=errno.EEXIST)
            self._hold_target()
            self._remove_stale_parts()
            # Until it may be as readable as its predecessor, nobody else can read it.
            self._create_part(mode=0o666 if target is None else 0o600)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def commit(self) -> None:
        """Make the content durable, then give it its name. Nothing to undo if this raises."""
        assert not self._committed, "the output was committed before"
        self.storage.flush()
        # What lies there by now may have come later than we did.
        self._hold_target()
        try:
            self._copy_status()
            os.fsync(self.storage.fileno())
            self._publish()
            self._committed = True
            os.fsync(self._directory_fd)
        except OSError as error:
            raise StorageError.wrap(error, operation="create", path=self._path) from error

    def _resolved(self) -> str:
        return os.path.realpath(self._path)

    def _open_directory(self) -> None:
        try:
            directory, self._name = os.path.split(self._resolved())
            if not self._name:
                raise OSError(errno.EISDIR, "no file name")
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            self._directory_fd = os.open(directory, flags)
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None) or errno.EINVAL
            raise StorageError("create", path=self._path, errno=number) from error

    def _target_status(self) -> os.stat_result | None:
        """The target's status, None where there is none. Raises RequestError if it is no file."""
        try:
            found = os.stat(self._name, dir_fd=self._directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError.wrap(error, operation="create", path=self._path) from error
        if not stat.S_ISREG(found.st_mode):
            raise RequestError(
                f"{self._path}: exists and is not a regular file, so it cannot be replaced; "
                "it can only be written in place"
            )
        return found

    def _hold_target(self) -> None:
        """Hold what has the target's name, if that may be replaced and is not held already."""
        while self._replace and self._locking != "off" and self._target_status() is not None:
            if self._target is None:
                self._target = self._open_target()
                continue
            if _is_named(self._target.fileno(), self._name, dir_fd=self._directory_fd):
                return
            target, self._target = self._target, None
            target.close()

    def _open_target(self) -> FileStorage | None:
        """The target under its lock, None where it is gone again."""
        try:
            target = FileStorage.open(
                self._name, follow=False, dir_fd=self._directory_fd, name=self._path
            )
        except StorageError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        try:
            acquire(target, Role.CREATOR, name=self._path, mode=self._locking)
        except BaseException:
            target.close()
            raise
        return target

    def _create_part(self, *, mode: int) -> None:
        while self._storage is None:
            self._part = _prefix(self._name) + os.urandom(_RANDOM_BYTES).hex() + _SUFFIX
            storage = FileStorage.open(
                self._part,
                writable=True,
                exclusive=True,
                dir_fd=self._directory_fd,
                mode=mode,
                name=self._path,
            )
            try:
                _lock(storage.fileno(), wait=True)
                # Before the lock was ours, another run may have taken the part for a stale one.
                if _is_named(storage.fileno(), self._part, dir_fd=self._directory_fd):
                    self._storage = storage
            except OSError as error:
                raise StorageError.wrap(error, operation="create", path=self._path) from error
            finally:
                if self._storage is None:
                    self._drop(storage)

    def _drop(self, storage: FileStorage) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._part, dir_fd=self._directory_fd)
        with contextlib.suppress(StorageError):
            storage.close()

    def _remove_stale_parts(self) -> None:
        """Whatever cannot be listed, locked or removed is left for another day."""
        pattern = re.compile(
            re.escape(_prefix(self._name)) + f"[0-9a-f]{{{2 * _RANDOM_BYTES}}}{re.escape(_SUFFIX)}"
        )
        with contextlib.suppress(OSError):
            for name in os.listdir(self._directory_fd):
                if pattern.fullmatch(name):
                    _remove_if_stale(name, dir_fd=self._directory_fd)

    def _copy_status(self) -> None:
        target = self._target_status()
        if target is None:
            return
        fd = self.storage.fileno()
        if os.geteuid() == 0:
            os.fchown(fd, target.st_uid, target.st_gid)
        os.fchmod(fd, stat.S_IMODE(target.st_mode))

    def _publish(self) -> None:
        directory = self._directory_fd
        if self._replace:
            os.rename(self._part, self._name, src_dir_fd=directory, dst_dir_fd=directory)
            return
        if not _rename_to_new(self._part, self._name, dir_fd=directory):
            os.link(self._part, self._name, src_dir_fd=directory, dst_dir_fd=directory)
            os.unlink(self._part, dir_fd=directory)

    def _leave(self) -> None:
        storage, self._storage = self._storage, None
        if storage is not None and not self._committed:
            self._drop(storage)
        elif storage is not None:
            storage.close()
        target, self._target = self._target, None
        if target is not None:
            target.close()
        if self._directory_fd >= 0:
            os.close(self._directory_fd)
            self._directory_fd = -1


def _prefix(name: str) -> str:
    """What the names of all parts of the target `name` begin with; shortened to fit a file name."""
    room = _NAME_MAX - len("..") - 2 * _RANDOM_BYTES - len(_SUFFIX)
    return "." + os.fsdecode(os.fsencode(name)[:room]) + "."


def _lock(fd: int, *, wait: bool) -> bool:
    """Whether we now hold the lock, or nobody can on this file system (then only with `wait`)."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if wait and error.errno not in _NO_LOCKS:
            raise
        return wait
    return True


def _is_named(fd: int, name: str, *, dir_fd: int) -> bool:
    """Whether `name` still stands for the open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=dir_fd, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove_if_stale(name: str, *, dir_fd: int) -> None:
    try:
        fd = open_descriptor(name, os.O_RDWR | os.O_NOFOLLOW, dir_fd=dir_fd)
    except OSError:
        return
    try:
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        if regular and _lock(fd, wait=False) and _is_named(fd, name, dir_fd=dir_fd):
            os.unlink(name, dir_fd=dir_fd)
    except OSError:
        return
    finally:
        os.close(fd)


def _rename_to_new(part: str, name: str, *, dir_fd: int) -> bool:
    """renameat2 that does not replace; False where the host lacks it. Raises OSError."""
    rename = getattr(_LIBC, "renameat2", None)
    if rename is None:
        return False
    old, new = os.fsencode(part), os.fsencode(name)
    if rename(dir_fd, old, dir_fd, new, _RENAME_NOREPLACE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number))
