"""A raw disk: guest offsets are host offsets."""

from __future__ import annotations

from collections.abc import Sequence

from qcowkit.engine.ranges import check_range
from qcowkit.extents.table import Extent, ExtentTable, Hit
from qcowkit.image.metadata import RawMetadata
from qcowkit.image.plain import map_flat, read_plain
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR


class RawImage:
    """A file or device as a disk. `cluster_size` is the host's block size."""

    def __init__(self, metadata: RawMetadata, storage: Storage) -> None:
        self.metadata = metadata
        self.cluster_size = storage.caps.block_size
        self.data_storage = storage

    @property
    def size(self) -> int:
        """Guest bytes."""
        return self.metadata.virtual_size

    def extents(self, *, start: int, length: int, limit: int | None = None) -> ExtentTable:
        """Data and holes as the host reports them; see `Image.extents`."""
        check_range(start=start, length=length, size=self.size)
        return map_flat(self.data_storage, start=start, length=length, limit=limit)

    def lookup(self, offset: int) -> tuple[Hit, int, int]:
        """See `Image.lookup`."""
        return Hit.DATA, offset, self.size - offset

    def read_runs(self, runs: Sequence[Extent], buffer: memoryview, *, base: int) -> None:
        """See `Image.read_runs`."""
        # More than the rest of a sector can only be missing if the file was cut meanwhile.
        read_plain(self.data_storage, runs, buffer, base=base, cluster_size=SECTOR)

    def close(self) -> None:
        self.data_storage.close()
