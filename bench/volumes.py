"""A file system with reflink: XFS in a file, mounted for the time of a row."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.images import MiB, find_tool
from bench.measure import CommandFailed, run_quietly

_CLONE_NEWNS = 0x20000


class NoVolume(Exception):
    """Why the file system cannot be had here."""


@contextmanager
def mounted_xfs(folder: Path, *, size: int) -> Iterator[Path]:
    """Mount a new XFS of `size` bytes below `folder`; unmounted and removed in any case.

    The mount is seen by this process and its children only, so that not even a kill leaves one
    behind. Raises NoVolume with the reason."""
    make = find_tool("mkfs.xfs")
    if os.geteuid() != 0:
        raise NoVolume("mounting needs root")
    if make is None:
        raise NoVolume("mkfs.xfs is missing (package xfsprogs)")
    file, place = folder / "xfs.img", folder / "xfs"
    try:
        with file.open("wb") as content:
            content.truncate(max(size, 512 * MiB))
        place.mkdir()
        try:
            run_quietly(make, "-q", "-m", "reflink=1", file)
            _leave_mounts_of_others()
            run_quietly("mount", "-o", "loop,discard", file, place)
        except (CommandFailed, OSError) as error:
            raise NoVolume(str(error)) from error
        try:
            yield place
        finally:
            run_quietly("umount", place)
    finally:
        if place.is_dir() and not place.is_mount():
            place.rmdir()
        file.unlink(missing_ok=True)


def _leave_mounts_of_others() -> None:
    """From now on what we mount is ours alone. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    run_quietly("mount", "--make-rprivate", "/")
