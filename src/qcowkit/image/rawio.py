"""A guest disk as a Python file object."""

from __future__ import annotations

import io
import os
from typing import Any, Protocol

from qcowkit.errors import RequestError


class ReadableDisk(Protocol):
    """What the adapter needs of a disk. `size` in guest bytes."""

    @property
    def size(self) -> int: ...

    def read_into(self, buffer: memoryview, *, offset: int) -> None: ...


class DiskFile(io.RawIOBase):
    """Read-only. The cursor is the file object's own: the disk has none.

    Closing it leaves the disk open; wrap it in io.BufferedReader for many small reads."""

    def __init__(self, disk: ReadableDisk) -> None:
        super().__init__()
        self._disk = disk
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the cursor; a negative result raises RequestError."""
        self._check_open()
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._disk.size}
        if whence not in base:
            raise RequestError(f"whence {whence} is not one of 0, 1, 2")
        position = base[whence] + offset
        if position < 0:
            raise RequestError(f"file position {position} is negative")
        self._position = position
        return position

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer as far as the disk reaches; 0 at its end."""
        self._check_open()
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._disk.size - self._position))
        if count:
            self._disk.read_into(view[:count], offset=self._position)
            self._position += count
        return count

    def _check_open(self) -> None:
        # The exception that every file object of Python raises then.
        if self.closed:
            raise ValueError("the file is closed")
