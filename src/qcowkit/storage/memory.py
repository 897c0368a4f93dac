"""Storage in memory: for tests, and for small artefacts that never need a file."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qcowkit.errors import StorageError
from qcowkit.storage.protocol import Storage, StorageCaps

if TYPE_CHECKING:
    from typing_extensions import Buffer


class MemoryStorage:
    """Storage over a bytearray. Every byte takes memory, so `allocated` is `size`."""

    def __init__(
        self, data: Buffer = b"", *, name: str = "<memory>", writable: bool = True
    ) -> None:
        """Start with a copy of `data`."""
        self._data = bytearray(data)
        self._name = name
        self._caps = StorageCaps(writable=writable)
        self._closed = False
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """For messages."""
        return self._name

    @property
    def caps(self) -> StorageCaps:
        """Fixed from the start."""
        return self._caps

    def to_bytes(self) -> bytes:
        """A copy of the content; also after `close`."""
        with self._lock:
            return bytes(self._data)

    def size(self) -> int:
        """Bytes."""
        self._check("size")
        return len(self._data)

    def allocated(self) -> int:
        """Bytes of memory that the content takes."""
        return self.size()

    def pread_into(self, buffer: Buffer, *, offset: int) -> int:
        """Fill the buffer; returns its length, or less only where the storage ends."""
        view = memoryview(buffer).cast("B")
        data = self.pread(len(view), offset=offset)
        view[: len(data)] = data
        return len(data)

    def pread(self, length: int, *, offset: int) -> bytes:
        """`length` bytes, or fewer only where the storage ends."""
        self._check("read", offset=offset, length=length)
        with self._lock:
            return bytes(self._data[offset : offset + length])

    def pwrite(self, buffers: Sequence[Buffer], *, offset: int) -> None:
        """All buffers, one behind the other; the storage grows where needed."""
        joined = b"".join(memoryview(buffer).cast("B") for buffer in buffers)
        self._check("write", offset=offset, change=True)
        with self._lock:
            self._grow(offset + len(joined) if joined else 0, operation="write")
            self._data[offset : offset + len(joined)] = joined

    def zero(self, *, offset: int, length: int, unmap: bool) -> None:
        """Make the range read as zeros."""
        self._check("zero", offset=offset, length=length, change=True)
        with self._lock:
            size = len(self._data)
            self._grow(offset + length if length else 0, operation="zero")
            # What growing adds is zero already.
            stop = min(offset + length, size)
            if offset < stop:
                self._data[offset:stop] = bytes(stop - offset)

    def discard(self, *, offset: int, length: int) -> None:
        """Zero what lies within the storage."""
        self._check("discard", offset=offset, length=length, change=True)
        stop = min(offset + length, len(self._data))
        if offset < stop:
            self.zero(offset=offset, length=stop - offset, unmap=True)

    def allocate(self, *, offset: int, length: int) -> None:
        """Grow to hold the range."""
        self._check("allocate", offset=offset, length=length, change=True)
        with self._lock:
            self._grow(offset + length if length else 0, operation="allocate")

    def truncate(self, size: int) -> None:
        """Cut, or grow with zeros."""
        self._check("truncate", offset=size, change=True)
        with self._lock:
            del self._data[size:]
            self._grow(size, operation="truncate")

    def flush(self) -> None:
        """Nothing to do: memory is as durable as it will ever be."""
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
        """Later calls fail as on a closed file; a second close does nothing."""
        self._closed = True

    def _grow(self, size: int, *, operation: str) -> None:
        missing = size - len(self._data)
        if missing <= 0:
            return
        try:
            self._data.extend(bytes(missing))
        except (MemoryError, OverflowError) as error:
            raise StorageError(operation, path=self._name, errno=errno.ENOMEM) from error

    def _check(
        self, operation: str, *, offset: int = 0, length: int = 0, change: bool = False
    ) -> None:
        """The answers that the kernel gives for a closed or read-only descriptor and bad ranges."""
        if self._closed or (change and not self._caps.writable):
            raise StorageError(operation, path=self._name, errno=errno.EBADF)
        if offset < 0 or length < 0:
            raise StorageError(operation, path=self._name, errno=errno.EINVAL)
