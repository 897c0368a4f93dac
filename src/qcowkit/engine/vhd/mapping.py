"""From block allocation table and sector bitmaps to extents.

Sector bitmaps count in every type: a clear bit is the parent's sector in a differencing disk, and
zeros in a dynamic one. (qemu ignores the bitmaps of dynamic disks; writers keep both readings
equal by writing ones and zero-filled data, so only odd files show the difference.)"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.vhd.bat import ENTRY_SIZE, UNUSED, decode_bat, decode_bitmap
from qcowkit.codecs.vhd.dynamic_header import DynamicHeader
from qcowkit.codecs.vhd.footer import DiskType
from qcowkit.engine.vhd.metadata import VhdMetadata, metadata_regions
from qcowkit.errors import CorruptMetadata
from qcowkit.extents.algebra import clip, coalesce
from qcowkit.extents.table import (
    NO_HOST,
    ExtentTable,
    Flag,
    Int64Array,
    concatenate,
    make_table,
    single,
)
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, ceil_div

_TABLE = "block allocation table"
_WINDOW_ENTRIES = 1 << 18
_PRESENT = int(Flag.DATA | Flag.PRESENT)
# A dynamic disk decides all of its sectors; a differencing one leaves them to its parent.
_ABSENT = {
    DiskType.DYNAMIC: int(Flag.ZERO | Flag.PRESENT),
    DiskType.DIFFERENCING: int(Flag.NONE),
}


class BlockMap:
    """The decoded table of one dynamic or differencing VHD; immutable once loaded.

    sectors: int64, shape (blocks of the disk,): the sector of each block's bitmap, -1 for none."""

    def __init__(self, metadata: VhdMetadata, storage: Storage, sectors: Int64Array) -> None:
        assert metadata.dynamic_header is not None
        self.header: DynamicHeader = metadata.dynamic_header
        self.size = metadata.virtual_size
        self.storage = storage
        self.sectors = sectors
        self._absent = _ABSENT[metadata.footer.disk_type]
        self._ones = b"\xff" * (self.header.block_size // SECTOR // 8)

    @classmethod
    def load(cls, metadata: VhdMetadata, storage: Storage) -> BlockMap:
        """Read and validate the whole table (row 51). Raises CorruptMetadata.

        It takes 8 bytes a block, which `load_vhd_metadata` has held against the budget."""
        sectors = load_bat(metadata, storage)
        check_bat(metadata, sectors)
        return cls(metadata, storage, sectors)

    def extents(self, *, start: int, length: int, limit: int | None = None) -> ExtentTable:
        """Map a guest range within the disk; see `Image.extents`. `limit` counts blocks."""
        if length == 0:
            return concatenate([])
        block_size = self.header.block_size
        first, last = start // block_size, ceil_div(start + length, block_size)
        if limit is not None:
            last = min(last, first + max(limit, 1))
        stop = min(start + length, last * block_size)
        if last - first == 1 and (row := self._within_block(first, start=start, stop=stop)):
            return row
        partial = self._partial_blocks(first, self.sectors[first:last])
        tables: list[ExtentTable] = []
        done = first
        for block, bits in partial:
            tables.append(self._whole_blocks(done, block))
            tables.append(self._by_sector(block, bits))
            done = block + 1
        tables.append(self._whole_blocks(done, last))
        return clip(coalesce(concatenate([table for table in tables if len(table)])), start, stop)

    def _within_block(self, block: int, *, start: int, stop: int) -> ExtentTable | None:
        """The scalar twin for small reads: one row, or None where the bitmap decides."""
        sector = int(self.sectors[block])
        if sector == UNUSED:
            return single(start, stop - start, self._absent)
        host = sector * SECTOR
        if self.storage.pread(len(self._ones), offset=host) != self._ones:
            return None
        host += self.header.bitmap_size + start - block * self.header.block_size
        return single(start, stop - start, _PRESENT, host=host)

    def _partial_blocks(
        self, first: int, sectors: Int64Array
    ) -> list[tuple[int, npt.NDArray[np.bool_]]]:
        """The present blocks whose bitmap has clear bits, ascending, with the bits that count."""
        ones, pread = self._ones, self.storage.pread
        used = np.flatnonzero(sectors != UNUSED)
        found = []
        for index, offset in zip(used.tolist(), (sectors[used] * SECTOR).tolist(), strict=True):
            raw = pread(len(ones), offset=offset)
            if raw == ones:
                continue
            block = first + index
            bits = decode_bitmap(raw.ljust(len(ones), b"\0"), count=self._sectors_of(block))
            if not bits.all():
                found.append((block, bits))
        return found

    def _sectors_of(self, block: int) -> int:
        """Sectors of a block that lie within the disk."""
        block_size = self.header.block_size
        return min(block_size, self.size - block * block_size) // SECTOR

    def _whole_blocks(self, first: int, last: int) -> ExtentTable:
        """Blocks that are unused, or present with all of their sectors: a row each."""
        block_size = self.header.block_size
        sectors = self.sectors[first:last]
        used = sectors != UNUSED
        starts = np.arange(first, last, dtype=np.int64) * block_size
        host = np.where(used, sectors * SECTOR + self.header.bitmap_size, NO_HOST)
        return make_table(
            starts,
            np.minimum(block_size, self.size - starts),
            np.where(used, _PRESENT, self._absent),
            host=host,
        )

    def _by_sector(self, block: int, bits: npt.NDArray[np.bool_]) -> ExtentTable:
        """One block by the runs of its bitmap. Clear sectors have a host offset too: their space
        is allocated, only its content does not count."""
        edges = np.flatnonzero(np.append(True, bits[1:] != bits[:-1]))
        present, starts = bits[edges], edges.astype(np.int64) * SECTOR
        data = int(self.sectors[block]) * SECTOR + self.header.bitmap_size
        return make_table(
            starts + block * self.header.block_size,
            np.diff(starts, append=len(bits) * SECTOR),
            np.where(present, _PRESENT, self._absent),
            host=starts + data,
        )


def load_bat(metadata: VhdMetadata, storage: Storage) -> Int64Array:
    """The entries of the disk's blocks as int64 sectors, read in bounded windows."""
    assert metadata.dynamic_header is not None
    offset, count = metadata.dynamic_header.table_offset, metadata.block_count
    sectors = np.empty(count, dtype=np.int64)
    for first in range(0, count, _WINDOW_ENTRIES):
        entries = min(_WINDOW_ENTRIES, count - first)
        raw = storage.pread(entries * ENTRY_SIZE, offset=offset + first * ENTRY_SIZE)
        if len(raw) < entries * ENTRY_SIZE:
            reason = f"the file ends after {len(raw)} of {entries * ENTRY_SIZE} bytes"
            raise CorruptMetadata(
                _TABLE, host_offset=offset, index=first + len(raw) // ENTRY_SIZE, reason=reason
            )
        sectors[first : first + entries] = decode_bat(raw)
    return sectors


def check_bat(metadata: VhdMetadata, sectors: Int64Array) -> None:
    """Row 51: whole blocks, behind the table, before the footer, sharing no sector with each other
    or with another structure. Raises CorruptMetadata naming the first offending entry found."""
    header = metadata.dynamic_header
    assert header is not None
    used = sectors[sectors != UNUSED]
    if not len(used):
        return
    span = header.bitmap_size + header.block_size
    used.sort()
    lowest, highest = int(used[0]), int(used[-1])
    table_end = ceil_div(header.table_offset + header.max_table_entries * ENTRY_SIZE, SECTOR)
    if lowest < table_end:
        reason = f"block at sector {lowest}, expected {table_end} or more, behind the table"
        raise _bad_entry(header, sectors, lowest, reason)
    if highest * SECTOR + span > metadata.data_end:
        reason = (
            f"block at sector {highest} ends at {highest * SECTOR + span:#x}, "
            f"expected at most {metadata.data_end:#x}"
        )
        raise _bad_entry(header, sectors, highest, reason)
    close = np.flatnonzero(np.diff(used) < span // SECTOR)
    if len(close):
        lower, upper = int(used[close[0]]), int(used[close[0] + 1])
        reason = f"block at sector {upper} shares sectors with the block at sector {lower}"
        raise _bad_entry(header, sectors, upper, reason)
    for name, start, stop in metadata_regions(metadata):
        index = int(np.searchsorted(used, ceil_div(stop, SECTOR))) - 1
        if index >= 0 and int(used[index]) * SECTOR + span > start:
            reason = f"block at sector {int(used[index])} overlaps the {name} at {start:#x}"
            raise _bad_entry(header, sectors, int(used[index]), reason)


def _bad_entry(
    header: DynamicHeader, sectors: Int64Array, sector: int, reason: str
) -> CorruptMetadata:
    """The last entry with this value: of two equal ones the second is the culprit."""
    index = int(np.flatnonzero(sectors == sector)[-1])
    return CorruptMetadata(_TABLE, host_offset=header.table_offset, index=index, reason=reason)
