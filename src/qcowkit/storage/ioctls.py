"""The ioctls of Linux that storage uses, as functions that raise OSError. Numbers as on x86, ARM,
RISC-V and s390; elsewhere the kernel answers ENOTTY and the caller falls back.

The three space ioctls do what fallocate(2) does and need no foreign function interface. Sources:
linux/falloc.h, linux/fs.h, ioctl_ficlonerange(2)."""

from __future__ import annotations

import errno
import fcntl
import struct

_UNRESVSP64 = 0x4030582B
_ZERO_RANGE = 0x40305839
_FICLONERANGE = 0x4020940D
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F

# struct space_resv: type, whence, start, length, and fields that the kernel ignores.
_SPACE = struct.Struct("=hh4xqqiI4i")
_CLONE = struct.Struct("=qQQQ")
_RANGE = struct.Struct("=QQ")

# Answers that mean "not here", as opposed to a failing disk.
UNSUPPORTED = frozenset(
    {
        errno.EOPNOTSUPP,
        errno.ENOTTY,
        errno.ENOSYS,
        errno.EINVAL,
        errno.EXDEV,
        errno.EBADF,
        errno.ETXTBSY,
        errno.EPERM,
        errno.EISDIR,
    }
)


def punch_hole(fd: int, *, offset: int, length: int) -> None:
    """Give the space of a range of a regular file back; the size stays."""
    fcntl.ioctl(fd, _UNRESVSP64, _SPACE.pack(0, 0, offset, length, 0, 0, 0, 0, 0, 0))


def zero_range(fd: int, *, offset: int, length: int) -> None:
    """Zero a range of a regular file and keep its space; the size stays."""
    fcntl.ioctl(fd, _ZERO_RANGE, _SPACE.pack(0, 0, offset, length, 0, 0, 0, 0, 0, 0))


def discard_blocks(fd: int, *, offset: int, length: int) -> None:
    """Tell a block device that the range is no longer needed; aligned to its sectors."""
    fcntl.ioctl(fd, _BLKDISCARD, _RANGE.pack(offset, length))


def zero_blocks(fd: int, *, offset: int, length: int) -> None:
    """Zero a range of a block device; aligned to its sectors."""
    fcntl.ioctl(fd, _BLKZEROOUT, _RANGE.pack(offset, length))


def clone_range(source: int, target: int, *, offset: int, length: int, target_offset: int) -> None:
    """Share the blocks of a range of `source` with `target`; all of it or an error."""
    fcntl.ioctl(target, _FICLONERANGE, _CLONE.pack(source, offset, length, target_offset))
