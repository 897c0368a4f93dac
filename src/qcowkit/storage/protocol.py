"""Storage: bytes at host offsets, blind to formats. Positional only: there is no cursor anywhere.

Whatever lies below an image (a file, a device, memory, a faulty disk of a test) is one of these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageCaps:
    """What a storage can do. `block_size`: bytes of the host's allocation unit."""

    writable: bool
    block_device: bool = False
    block_size: int = 4096


class Storage(Protocol):
    """Offsets and lengths in bytes. A failure is a StorageError, which keeps the errno."""

    @property
    def name(self) -> str:
        """For messages only: a path, or a word in angle brackets."""

    @property
    def caps(self) -> StorageCaps: ...

    def size(self) -> int:
        """The size now; asked of the host each time for files."""

    def allocated(self) -> int:
        """Bytes that the host has allocated."""

    def pread_into(self, buffer: Buffer, *, offset: int) -> int:
        """Fill the buffer; returns its length, or less only where the storage ends."""

    def pread(self, length: int, *, offset: int) -> bytes:
        """`length` bytes, or fewer only where the storage ends. The caller bounds the length."""

    def pwrite(self, buffers: Sequence[Buffer], *, offset: int) -> None:
        """All buffers, one behind the other. Extends the storage where needed."""

    def zero(self, *, offset: int, length: int, unmap: bool) -> None:
        """Make the range read as zeros; `unmap` lets the host give its space back."""

    def discard(self, *, offset: int, length: int) -> None:
        """The content is no longer needed; it reads as zeros or as before."""

    def allocate(self, *, offset: int, length: int) -> None:
        """Reserve host space for the range; its content does not change."""

    def truncate(self, size: int) -> None:
        """Cut, or grow with zeros."""

    def flush(self) -> None:
        """Whatever was written is durable when this returns."""

    def iter_data(self, *, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Ascending (offset, length) of what may hold data; all between them reads as zeros."""

    def clone_to(self, target: Storage, *, offset: int, length: int, target_offset: int) -> bool:
        """Share the host's blocks with `target` (reflink). False, and nothing done, where the two
        cannot share."""

    def copy_to(self, target: Storage, *, offset: int, length: int, target_offset: int) -> bool:
        """Copy within the host (copy_file_range). False, and nothing done, where it cannot."""

    def close(self) -> None: ...
