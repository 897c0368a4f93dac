"""The guest address space of one image file. No image opens or calls another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from qcowkit.extents.table import Extent, ExtentTable
    from qcowkit.image.metadata import Metadata
    from qcowkit.storage.protocol import Storage


class Image(Protocol):
    """One layer. `size`: guest bytes. `cluster_size`: bytes of its allocation unit."""

    @property
    def metadata(self) -> Metadata: ...

    @property
    def size(self) -> int: ...

    @property
    def cluster_size(self) -> int: ...

    @property
    def data_storage(self) -> Storage:
        """Where the host offsets of plain extents lie."""

    def extents(self, *, start: int, length: int, limit: int | None = None) -> ExtentTable:
        """Map [start, start + length) in this layer only; the backing chain is not consulted.

        The table begins at `start` and covers the range, or less of it (but something) once more
        than `limit` table entries would have to be decoded. Raises RequestError past the disk's
        end, CorruptMetadata for a malformed entry."""

    def read_runs(self, runs: Sequence[Extent], buffer: memoryview, *, base: int) -> None:
        """Put DATA extents of this layer's own table into the buffer, whose first byte is guest
        offset `base`. The rest of the buffer is left alone."""

    def close(self) -> None: ...
