"""Writing a whole new VHD, block by block in ascending order."""

from __future__ import annotations

import time
import uuid
from array import array

import numpy as np

from qcowkit.codecs.vhd.bat import UNUSED, encode_bat
from qcowkit.codecs.vhd.dynamic_header import DEFAULT_BLOCK_SIZE, sector_bitmap_size
from qcowkit.codecs.vhd.footer import EPOCH, FOOTER_SIZE
from qcowkit.engine.vhd.layout import (
    CREATOR,
    NewSubformat,
    ParentLink,
    plan_disk_size,
    plan_layout,
)
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR

_WINDOW_ENTRIES = 1 << 18


class VhdBulkWriter:
    """A new fixed, dynamic or differencing VHD on an empty storage.

    The caller places blocks in ascending order from one thread, writes their data at the offsets
    it gets, from as many threads as it likes, and calls `finish` once that is done. Until then
    the file is no VHD. What is not written reads as zeros, so the storage must hold none but
    zeros at the start.

    size: guest bytes; `force_size` as in `plan_disk_size`, whose result is the attribute `size`.
    parent: makes the disk differencing. unique_id, timestamp (seconds since 2000-01-01 UTC): of
    the footer; a random one and now. Raises RequestError for what no VHD can be."""

    def __init__(
        self,
        storage: Storage,
        *,
        size: int,
        subformat: NewSubformat = "dynamic",
        block_size: int = DEFAULT_BLOCK_SIZE,
        parent: ParentLink | None = None,
        force_size: bool = True,
        unique_id: uuid.UUID | None = None,
        timestamp: int | None = None,
        creator: bytes = CREATOR,
    ) -> None:
        self.size = plan_disk_size(size, force_size=force_size)
        self.layout = plan_layout(
            self.size, subformat=subformat, block_size=block_size, parent=parent
        )
        self.unit = block_size
        self.unique_id = unique_id or uuid.uuid4()
        self._timestamp = int(time.time()) - EPOCH if timestamp is None else timestamp
        self._creator = creator
        self._storage = storage
        self._bitmap_size = sector_bitmap_size(block_size)
        # Blocks of less than 4096 sectors do not fill the bitmap's last sector.
        ones = b"\xff" * (block_size // SECTOR // 8)
        self._ones = ones.ljust(self._bitmap_size, b"\0")
        self._placed = array("I")

    @property
    def blocks(self) -> int:
        """How many blocks have been placed; always 0 for a fixed disk."""
        return len(self._placed)

    def place(self, block_index: int, *, bitmap: bytes | None = None) -> int:
        """The host offset for the `unit` bytes of a block; its bitmap is written here.

        Indices ascend. bitmap: as `encode_bitmap` gives it; None sets every sector, so that even
        over a parent the block counts as a whole. A fixed disk has its blocks in place and
        bitmaps are ignored."""
        if self.layout.subformat == "fixed":
            return block_index * self.unit
        assert block_index < self.layout.table_entries, f"block {block_index} is beyond the disk"
        assert not self._placed or block_index > self._placed[-1], "blocks must ascend"
        assert bitmap is None or len(bitmap) == self._bitmap_size, "a bitmap fills its sectors"
        offset = self.layout.block_offset(len(self._placed))
        self._storage.pwrite([bitmap or self._ones], offset=offset)
        self._placed.append(block_index)
        return offset + self._bitmap_size

    def finish(self) -> None:
        """Write table, header and footers, and set the size of the file. Does not flush."""
        layout = self.layout
        footer = layout.footer(
            unique_id=self.unique_id, timestamp=self._timestamp, creator=self._creator
        ).encode()
        file_size = layout.file_size(self.blocks)
        self._storage.truncate(file_size)
        if layout.subformat == "dynamic":
            self._write_table()
            header = layout.header().encode()
            self._storage.pwrite([footer, header, layout.names_data()], offset=0)
        self._storage.pwrite([footer], offset=file_size - FOOTER_SIZE)

    def _write_table(self) -> None:
        """The table by windows: blocks were placed in order, so an entry follows from its rank."""
        layout = self.layout
        placed = np.array(self._placed, dtype=np.int64)
        sectors = (
            layout.first_block + np.arange(len(placed), dtype=np.int64) * layout.block_stride
        ) // SECTOR
        # The padding is unused entries as well.
        total = layout.table_bytes // 4
        for start in range(0, total, _WINDOW_ENTRIES):
            stop = min(start + _WINDOW_ENTRIES, total)
            window = np.full(stop - start, UNUSED, dtype=np.int64)
            low, high = np.searchsorted(placed, (start, stop))
            window[placed[low:high] - start] = sectors[low:high]
            self._storage.pwrite([encode_bat(window)], offset=layout.table_offset + start * 4)
