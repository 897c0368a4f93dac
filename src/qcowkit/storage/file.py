"""A regular file or a block device. Positional calls only, so one object serves many threads.

Short transfers are continued, EINTR is retried by the interpreter (PEP 475), and every OSError
becomes a StorageError that keeps the errno. Source: the manual pages of section 2 that the calls
are named after; reliability reference, sections 4.1 and 4.3."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Self

from qcowkit.errors import StorageError
from qcowkit.storage import ioctls
from qcowkit.storage.protocol import Storage, StorageCaps
from qcowkit.units import MiB, align_down, align_up

if TYPE_CHECKING:
    from typing_extensions import Buffer

_IOV_MAX = 1024
_COPY_STEP = 1024 * MiB
_ZEROS = bytes(1 * MiB)
_KINDS = {
    stat.S_IFDIR: ("is a directory", errno.EISDIR),
    stat.S_IFIFO: ("is a pipe", errno.EINVAL),
    stat.S_IFSOCK: ("is a socket", errno.EINVAL),
    stat.S_IFCHR: ("is a character device", errno.EINVAL),
    stat.S_IFBLK: ("is a block device", errno.EINVAL),
    stat.S_IFLNK: ("is a symbolic link", errno.ELOOP),
}


def check_kind(mode: int, *, path: str, devices: bool = True) -> None:
    """Raise StorageError unless `mode` is a regular file's, or a block device's if allowed."""
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFREG or (devices and kind == stat.S_IFBLK):
        return
    text, number = _KINDS.get(kind, ("is of an unknown kind", errno.EINVAL))
    expected = "a regular file or a block device" if devices else "a regular file"
    reason = f"{text}, expected {expected}"
    raise StorageError("open", path=path, errno=number, reason=reason)


def open_descriptor(
    path: str | os.PathLike[str], flags: int, *, mode: int = 0o666, dir_fd: int | None = None
) -> int:
    """os.open that never waits (for the peer of a pipe) and is never inherited. Raises OSError."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, mode, dir_fd=dir_fd)


def _check_offset(offset: int) -> None:
    # To preadv2 and pwritev2, which may stand behind these calls, -1 means the cursor.
    if offset < 0:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


class FileStorage:
    """Storage over one file descriptor, which it owns. Offsets and lengths in bytes."""

    def __init__(self, fd: int, *, path: str, name: str | None, writable: bool) -> None:
        """Take over `fd`, already known to be a regular file or a block device; see `open`."""
        status = os.fstat(fd)
        self._fd = fd
        self._path = path
        self._name = name or path
        self._device = stat.S_ISBLK(status.st_mode)
        self._identity = (status.st_dev, status.st_ino)
        if self._device:
            # Two nodes in two directories may stand for one device.
            self._identity = (-1, status.st_rdev)
        self._caps = StorageCaps(
            writable=writable,
            block_device=self._device,
            block_size=os.fstatvfs(fd).f_frsize or 4096,
        )
        self._flush_failure: int | None = None
        # Calls that this file system has refused once are not tried again.
        self._refused: set[Callable[..., None]] = set()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        writable: bool = False,
        create: bool = False,
        exclusive: bool = False,
        follow: bool = True,
        devices: bool = True,
        mode: int = 0o666,
        dir_fd: int | None = None,
        name: str | None = None,
    ) -> Self:
        """Open `path` (relative to `dir_fd` when given); never truncates, never waits.

        create: make the file where there is none; exclusive: there must be none. Both need
        `writable`. follow: whether the last component may be a symbolic link. devices: whether a
        block device will do. name: what messages call it, `path` if not given; with a `dir_fd` it
        is also the path of the result, since the relative one says nothing by itself.
        Raises StorageError, also for directories, pipes, sockets and character devices."""
        label = name or os.fsdecode(path)
        flags = os.O_RDWR if writable else os.O_RDONLY
        flags |= os.O_CREAT if create or exclusive else 0
        flags |= os.O_EXCL if exclusive else 0
        flags |= 0 if follow else os.O_NOFOLLOW
        try:
            fd = open_descriptor(path, flags, mode=mode, dir_fd=dir_fd)
        except OSError as error:
            if error.errno == errno.ENXIO:
                reason = "is a socket or a pipe, expected a regular file"
                raise StorageError("open", path=label, errno=errno.ENXIO, reason=reason) from error
            raise StorageError.wrap(error, operation="open", path=label) from error
        except (ValueError, UnicodeError) as error:
            reason = "the name holds a character that no file name can hold"
            raise StorageError(
                "open", path=repr(label), errno=errno.EINVAL, reason=reason
            ) from error
        shown = label if dir_fd is not None else os.fsdecode(path)
        return cls._adopt(fd, path=shown, name=name, writable=writable, devices=devices)

    @classmethod
    def from_fd(cls, fd: int, *, name: str | None = None, writable: bool | None = None) -> Self:
        """Take over an open descriptor; `writable` is asked of the kernel when it is None.

        The descriptor is closed if it is refused. Raises StorageError."""
        path = name or f"<descriptor {fd}>"
        try:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        except OSError as error:
            raise StorageError.wrap(error, operation="open", path=path) from error
        can_write = flags & os.O_ACCMODE != os.O_RDONLY
        return cls._adopt(
            fd, path=path, name=name, writable=can_write if writable is None else writable
        )

    @classmethod
    def _adopt(
        cls, fd: int, *, path: str, name: str | None, writable: bool, devices: bool = True
    ) -> Self:
        try:
            check_kind(os.fstat(fd).st_mode, path=name or path, devices=devices)
            return cls(fd, path=path, name=name, writable=writable)
        except OSError as error:
            os.close(fd)
            raise StorageError.wrap(error, operation="open", path=name or path) from error
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FileStorage({self._path!r})"

    @property
    def name(self) -> str:
        """What messages call this file."""
        return self._name

    @property
    def path(self) -> str:
        """The path as it was opened."""
        return self._path

    @property
    def identity(self) -> tuple[int, int]:
        """(st_dev, st_ino), the same under all names of a file; (-1, st_rdev) of a device."""
        return self._identity

    @property
    def caps(self) -> StorageCaps:
        """Fixed when the file was opened."""
        return self._caps

    def fileno(self) -> int:
        """The descriptor, for locks; it stays ours. -1 once closed."""
        return self._fd

    def size(self) -> int:
        """Bytes, asked of the host each time."""
        try:
            # The end of a device is only known to its cursor, which nothing here ever reads.
            return os.lseek(self._fd, 0, os.SEEK_END) if self._device else self._stat().st_size
        except OSError as error:
            raise self._failure("size", error) from error

    def allocated(self) -> int:
        """Bytes of the blocks that the host has allocated; the whole of a device."""
        if self._device:
            return self.size()
        try:
            return self._stat().st_blocks * 512
        except OSError as error:
            raise self._failure("stat", error) from error

    def modified(self) -> int:
        """When the content was last modified, in seconds of Unix time."""
        try:
            return int(self._stat().st_mtime)
        except OSError as error:
            raise self._failure("stat", error) from error

    def _stat(self) -> os.stat_result:
        return os.fstat(self._fd)

    def pread_into(self, buffer: Buffer, *, offset: int) -> int:
        """Fill the buffer; returns its length, or less only where the file ends."""
        view = memoryview(buffer).cast("B")
        done = 0
        try:
            _check_offset(offset)
            while done < len(view):
                count = os.preadv(self._fd, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
        except (OSError, OverflowError) as error:
            raise self._failure("read", error) from error
        return done

    def pread(self, length: int, *, offset: int) -> bytes:
        """`length` bytes, or fewer only where the file ends."""
        try:
            data = os.pread(self._fd, length, offset)
            while data and len(data) < length:
                more = os.pread(self._fd, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except (OSError, OverflowError) as error:
            raise self._failure("read", error) from error
        return data

    def pwrite(self, buffers: Sequence[Buffer], *, offset: int) -> None:
        """All buffers, one behind the other; the file grows where needed."""
        if len(buffers) == 1 and offset >= 0:
            # Most are one buffer that the kernel takes at once.
            view = memoryview(buffers[0])
            try:
                count = os.pwrite(self._fd, view, offset)
            except (OSError, OverflowError) as error:
                raise self._failure("write", error) from error
            if count == view.nbytes:
                return
            buffers, offset = [view.cast("B")[count:]], offset + count
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        index = 0
        try:
            _check_offset(offset)
            while index < len(views):
                batch = views[index : index + _IOV_MAX]
                count = os.pwritev(self._fd, batch, offset)
                if count == 0 and any(len(view) for view in batch):
                    raise OSError(errno.EIO, "nothing was written")
                offset += count
                while index < len(views) and count >= len(views[index]):
                    count -= len(views[index])
                    index += 1
                if count:
                    views[index] = views[index][count:]
        except (OSError, OverflowError) as error:
            raise self._failure("write", error) from error

    def zero(self, *, offset: int, length: int, unmap: bool) -> None:
        """Make the range read as zeros; with `unmap` its space may go back to the host."""
        end = offset + length
        if length <= 0:
            return
        size = self.size()
        if not self._device and end > size:
            # What growing adds reads as zeros already.
            self.truncate(end)
            end = max(size, offset)
        try:
            self._zero_inside(offset, end, unmap=unmap)
        except (OSError, OverflowError) as error:
            raise self._failure("zero", error) from error

    def _zero_inside(self, offset: int, end: int, *, unmap: bool) -> None:
        if self._device:
            calls: tuple[Callable[..., None], ...] = (ioctls.zero_blocks,)
        else:
            calls = (ioctls.punch_hole, ioctls.zero_range) if unmap else (ioctls.zero_range,)
        # A device takes whole blocks only; the ragged ends are written.
        unit = self._caps.block_size if self._device else 1
        first, last = align_up(offset, unit), align_down(end, unit)
        if first < last and any(self._try(call, offset=first, end=last) for call in calls):
            self._write_zeros(offset, first)
            self._write_zeros(last, end)
        else:
            self._write_zeros(offset, end)

    def _try(self, call: Callable[..., None], *, offset: int, end: int) -> bool:
        """Whether the host carried `call` out; False, and remembered, where it does not know it."""
        if call in self._refused:
            return False
        try:
            call(self._fd, offset=offset, length=end - offset)
        except OSError as error:
            if not self._caps.writable or error.errno not in ioctls.UNSUPPORTED:
                raise
            self._refused.add(call)
            return False
        return True

    def _write_zeros(self, offset: int, end: int) -> None:
        zeros = memoryview(_ZEROS)
        while offset < end:
            count = os.pwrite(self._fd, zeros[: end - offset], offset)
            if count == 0:
                raise OSError(errno.EIO, "nothing was written")
            offset += count

    def discard(self, *, offset: int, length: int) -> None:
        """The content is no longer needed; nothing is done where the host cannot use that."""
        end = min(offset + length, self.size())
        unit = self._caps.block_size if self._device else 1
        first, last = align_up(offset, unit), align_down(end, unit)
        if first >= last:
            return
        try:
            call = ioctls.discard_blocks if self._device else ioctls.punch_hole
            self._try(call, offset=first, end=last)
        except (OSError, OverflowError) as error:
            raise self._failure("discard", error) from error

    def allocate(self, *, offset: int, length: int) -> None:
        """Reserve space for the range; the file grows to hold it. A device has all of its own."""
        if length <= 0 or self._device:
            return
        try:
            os.posix_fallocate(self._fd, offset, length)
        except (OSError, OverflowError) as error:
            raise self._failure("allocate", error) from error

    def truncate(self, size: int) -> None:
        """Cut, or grow with zeros. A device cannot change; a size within it is accepted."""
        try:
            if not self._device:
                os.ftruncate(self._fd, size)
            elif size > self.size():
                raise OSError(errno.ENOSPC, "a device does not grow")
        except (OSError, OverflowError) as error:
            raise self._failure("truncate", error) from error

    def flush(self) -> None:
        """Data, and the metadata to find it, are durable when this returns.

        After one failure every later call fails as well: the kernel has dropped the pages and
        reports the loss only once, so a second success would be a lie."""
        if self._flush_failure is not None:
            reason = f"an earlier flush failed: {os.strerror(self._flush_failure)}"
            raise StorageError("flush", path=self._name, errno=self._flush_failure, reason=reason)
        if self._fd < 0:
            raise self._failure("flush", OSError(errno.EBADF, "closed"))
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._flush_failure = error.errno or errno.EIO
            raise self._failure("flush", error) from error

    def iter_data(self, *, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Ascending (offset, length) of what may hold data within the range and the file.

        Threads may do this side by side: lseek moves the cursor, but answers with its result."""
        end = min(offset + length, self.size())
        while offset < end:
            start, stop = self._next_data(offset, end)
            if start >= end:
                return
            yield start, stop - start
            offset = stop

    def _next_data(self, offset: int, end: int) -> tuple[int, int]:
        """The first piece of data in [offset, end), or (end, end)."""
        try:
            start = os.lseek(self._fd, offset, os.SEEK_DATA)
            if start >= end:
                return end, end
            stop = os.lseek(self._fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return end, end
            if error.errno in ioctls.UNSUPPORTED and self._fd >= 0:
                return offset, end
            raise self._failure("seek for data", error) from error
        return start, min(stop, end) if stop > start else end

    def clone_to(self, target: Storage, *, offset: int, length: int, target_offset: int) -> bool:
        """Share the host's blocks with `target`. False where the two cannot share."""
        if not isinstance(target, FileStorage):
            return False
        operation = f"clone from {self._name}"
        if min(self._fd, target._fd) < 0:
            raise target._failure(operation, OSError(errno.EBADF, "closed"))
        try:
            ioctls.clone_range(
                self._fd,
                target._fd,
                offset=offset,
                length=length,
                target_offset=target_offset,
            )
        except OSError as error:
            if error.errno in ioctls.UNSUPPORTED:
                return False
            raise target._failure(operation, error) from error
        return True

    def copy_to(self, target: Storage, *, offset: int, length: int, target_offset: int) -> bool:
        """Copy within the host. False, and nothing done, where it cannot.

        Raises StorageError also when the source ends before `length` bytes."""
        if not isinstance(target, FileStorage):
            return False
        done = 0
        try:
            while done < length:
                step = min(length - done, _COPY_STEP)
                count = os.copy_file_range(
                    self._fd, target._fd, step, offset + done, target_offset + done
                )
                if count == 0 and done == 0:
                    return False
                if count == 0:
                    raise OSError(errno.EIO, "the source ended")
                done += count
        except OSError as error:
            unsupported = error.errno in ioctls.UNSUPPORTED and min(self._fd, target._fd) >= 0
            if done == 0 and unsupported:
                return False
            raise target._failure(f"copy from {self._name}", error) from error
        return True

    def close(self) -> None:
        """Give the descriptor back; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            os.close(fd)
        except OSError as error:
            raise self._failure("close", error) from error

    def _failure(self, operation: str, error: OSError | OverflowError) -> StorageError:
        if isinstance(error, OverflowError):
            # Beyond what the kernel can address.
            return StorageError(operation, path=self._name, errno=errno.EFBIG)
        return StorageError.wrap(error, operation=operation, path=self._name)
