"""Storage in memory over another storage that is only read: to try a change before it is made."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qcowkit.errors import StorageError
from qcowkit.storage.protocol import Storage, StorageCaps
from qcowkit.units import GiB, KiB

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PAGE = 4 * KiB
_ZEROS = bytes(_PAGE)


class OverlayStorage:
    """What `base` holds, with changes of its own that end with it. Safe from several threads.

    `limit`: bytes of memory for changes; a write above it fails as on a full disk."""

    def __init__(self, base: Storage, *, limit: int = GiB) -> None:
        """`base` is neither changed nor closed, and must not change meanwhile."""
        self._base = base
        self._caps = replace(base.caps, writable=True)
        self._size = base.size()
        # Bytes of the base that still count: what was cut off once is zeros when it grows again.
        self._visible = self._size
        self._pages: dict[int, bytes] = {}
        self._reserved = 0
        self._limit = limit // _PAGE
        self._closed = False
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The name of the base."""
        return self._base.name

    @property
    def caps(self) -> StorageCaps:
        """Those of the base, and writable."""
        return self._caps

    def size(self) -> int:
        """Bytes."""
        self._check("size")
        return self._size

    def allocated(self) -> int:
        """What the host has allocated for the base, and what is changed or reserved here."""
        self._check("size")
        return self._base.allocated() + len(self._pages) * _PAGE + self._reserved

    def pread_into(self, buffer: Buffer, *, offset: int) -> int:
        """Fill the buffer; returns its length, or less only where the storage ends."""
        view = memoryview(buffer).cast("B")
        self._check("read", offset=offset)
        with self._lock:
            count = max(0, min(len(view), self._size - offset))
            self._read(view[:count], offset)
        return count

    def pread(self, length: int, *, offset: int) -> bytes:
        """`length` bytes, or fewer only where the storage ends."""
        self._check("read", offset=offset, length=length)
        buffer = bytearray(max(0, min(length, self._size - offset)))
        self.pread_into(buffer, offset=offset)
        return bytes(buffer)

    def pwrite(self, buffers: Sequence[Buffer], *, offset: int) -> None:
        """All buffers, one behind the other, into memory."""
        data = b"".join(memoryview(buffer).cast("B") for buffer in buffers)
        self._check("write", offset=offset, change=True)
        with self._lock:
            self._write(data, offset)
            self._grow(offset + len(data) if data else 0)

    def zero(self, *, offset: int, length: int, unmap: bool) -> None:
        """Make the range read as zeros."""
        self._check("zero", offset=offset, length=length, change=True)
        with self._lock:
            for start in range(offset, offset + length, _PAGE):
                self._write(_ZEROS[: min(_PAGE, offset + length - start)], start)
            self._grow(offset + length if length else 0)

    def discard(self, *, offset: int, length: int) -> None:
        """The content stays as it is."""
        self._check("discard", offset=offset, length=length, change=True)

    def allocate(self, *, offset: int, length: int) -> None:
        """Grow to hold the range."""
        self._check("allocate", offset=offset, length=length, change=True)
        with self._lock:
            self._reserved += length
            self._grow(offset + length if length else 0)

    def truncate(self, size: int) -> None:
        """Cut, or grow with zeros."""
        self._check("truncate", offset=size, change=True)
        with self._lock:
            if size < self._size:
                self._cut(size)
            self._size = size

    def flush(self) -> None:
        """Nothing to do: nothing of this is meant to last."""
        self._check("flush")

    def iter_data(self, *, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The range, as far as the storage reaches, in one piece."""
        stop = min(offset + length, self.size())
        if offset < stop:
            yield offset, stop - offset

    def clone_to(self, target: Storage, *, offset: int, length: int, target_offset: int) -> bool:
        """False: memory has no blocks to share."""
        return False

    def copy_to(self, target: Storage, *, offset: int, length: int, target_offset: int) -> bool:
        """False: there is no host between the two."""
        return False

    def close(self) -> None:
        """Later calls fail as on a closed file; the base stays open."""
        self._closed = True

    def _read(self, view: memoryview, offset: int) -> None:
        """Bytes within the size: of the base, zeros behind what is visible of it, then pages."""
        count = max(0, min(len(view), self._visible - offset))
        if count:
            count = self._base.pread_into(view[:count], offset=offset)
        view[count:] = bytes(len(view) - count)
        if not self._pages:
            return
        stop = offset + len(view)
        for number in range(offset // _PAGE, -(-stop // _PAGE)):
            page = self._pages.get(number)
            if page is not None:
                first, last = max(offset, number * _PAGE), min(stop, (number + 1) * _PAGE)
                place = first - number * _PAGE
                view[first - offset : last - offset] = page[place : place + last - first]

    def _write(self, data: bytes, offset: int) -> None:
        stop = offset + len(data)
        for number in range(offset // _PAGE, -(-stop // _PAGE)):
            first, last = max(offset, number * _PAGE), min(stop, (number + 1) * _PAGE)
            page = bytearray(_PAGE)
            if last - first < _PAGE:
                self._read(memoryview(page), number * _PAGE)
            place = first - number * _PAGE
            page[place : place + last - first] = data[first - offset : last - offset]
            if number not in self._pages and len(self._pages) >= self._limit:
                raise StorageError("write", path=self.name, errno=errno.ENOSPC)
            self._pages[number] = bytes(page)

    def _grow(self, size: int) -> None:
        self._size = max(self._size, size)

    def _cut(self, size: int) -> None:
        self._visible = min(self._visible, size)
        number, rest = divmod(size, _PAGE)
        for index in [index for index in self._pages if index >= number + bool(rest)]:
            del self._pages[index]
        if rest and number in self._pages:
            self._pages[number] = self._pages[number][:rest].ljust(_PAGE, b"\0")

    def _check(
        self, operation: str, *, offset: int = 0, length: int = 0, change: bool = False
    ) -> None:
        if self._closed:
            raise StorageError(operation, path=self.name, errno=errno.EBADF)
        if offset < 0 or length < 0:
            raise StorageError(operation, path=self.name, errno=errno.EINVAL)
