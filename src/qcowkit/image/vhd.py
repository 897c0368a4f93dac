"""A VHD file as one layer of guest address space, read-only."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from qcowkit.engine.ranges import check_range
from qcowkit.engine.vhd.mapping import BlockMap
from qcowkit.engine.vhd.metadata import VhdMetadata
from qcowkit.extents.table import Extent, ExtentTable, Hit
from qcowkit.image.plain import map_flat, read_plain
from qcowkit.storage.protocol import Storage


class VhdImage:
    """A fixed, dynamic or differencing disk. The block table is read on first use.

    `cluster_size` is the block size; 512 for fixed disks."""

    def __init__(self, metadata: VhdMetadata, storage: Storage) -> None:
        self.metadata = metadata
        self.cluster_size = metadata.cluster_size
        self.data_storage = storage
        self._blocks: BlockMap | None = None
        self._loading = threading.Lock()

    @property
    def size(self) -> int:
        """Guest bytes."""
        return self.metadata.virtual_size

    def extents(self, *, start: int, length: int, limit: int | None = None) -> ExtentTable:
        """See `Image.extents`. A fixed disk shows the holes of its file as ZERO."""
        check_range(start=start, length=length, size=self.size)
        if self.metadata.dynamic_header is None:
            return map_flat(self.data_storage, start=start, length=length, limit=limit)
        return self._block_map().extents(start=start, length=length, limit=limit)

    def lookup(self, offset: int) -> tuple[Hit, int, int]:
        """See `Image.lookup`. Where sectors decide for themselves only a table tells. Raises
        RequestError beyond the end, which a resize may have moved."""
        if self.metadata.dynamic_header is None:
            return Hit.DATA, offset, self.size - offset
        blocks = self._block_map()
        check_range(start=offset, length=1, size=blocks.size)
        return blocks.lookup(offset)

    def read_runs(self, runs: Sequence[Extent], buffer: memoryview, *, base: int) -> None:
        """See `Image.read_runs`."""
        read_plain(self.data_storage, runs, buffer, base=base)

    def close(self) -> None:
        self.data_storage.close()

    def _block_map(self) -> BlockMap:
        if self._blocks is None:
            with self._loading:
                if self._blocks is None:
                    self._blocks = BlockMap.load(self.metadata, self.data_storage)
        return self._blocks
