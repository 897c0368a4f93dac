"""A block device in memory: as long as it is, full of what was there before."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qcowkit.errors import StorageError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import StorageCaps
from qcowkit.units import SECTOR

if TYPE_CHECKING:
    from typing_extensions import Buffer


class MemoryDevice(MemoryStorage):
    """`MemoryStorage` with the ways of a block device: it never changes its size."""

    def __init__(self, data: Buffer, *, size: int, noise: int = 0xA5) -> None:
        """`data`, and behind it bytes of `noise` up to `size`."""
        content = bytes(memoryview(data)).ljust(size, bytes([noise]))
        super().__init__(content, name="<device>")
        self._caps = StorageCaps(writable=True, block_device=True, block_size=SECTOR)

    def pwrite(self, buffers: Sequence[Buffer], *, offset: int) -> None:
        """As memory; ENOSPC beyond the end."""
        length = sum(memoryview(buffer).nbytes for buffer in buffers)
        self._check_end("write", offset + length)
        super().pwrite(buffers, offset=offset)

    def zero(self, *, offset: int, length: int, unmap: bool) -> None:
        """As memory; ENOSPC beyond the end."""
        self._check_end("zero", offset + length)
        super().zero(offset=offset, length=length, unmap=unmap)

    def discard(self, *, offset: int, length: int) -> None:
        """Old bytes stay, as on a device that cannot use it."""

    def allocate(self, *, offset: int, length: int) -> None:
        """A device has all of its space."""

    def truncate(self, size: int) -> None:
        """ENOSPC for a growth; a device is never cut."""
        self._check_end("truncate", size)

    def _check_end(self, operation: str, end: int) -> None:
        if end > self.size():
            raise StorageError(operation, path=self.name, errno=errno.ENOSPC)
