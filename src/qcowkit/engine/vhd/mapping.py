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
    Hit,
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
    """The decoded table of one dynamic or differencing VHD. Readers take no lock.

    sectors: int64, shape (blocks of the disk,): the sector of each block's bitmap, -1 for none.
    full: bool, same shape: blocks whose bitmap is known to have every bit that counts; once true
    it stays so. staged: bitmaps by block that are newer than those in the file.

    One writer at a time changes the three in place, element by element: what is known of a block's
    bitmap is there before its sector is. A disk of another size is another map (`resized`)."""

    def __init__(self, metadata: VhdMetadata, storage: Storage, sectors: Int64Array) -> None:
        assert metadata.dynamic_header is not None
        self.header: DynamicHeader = metadata.dynamic_header
        self.bitmap_size = self.header.bitmap_size
        self.size = metadata.virtual_size
        self.storage = storage
        self.sectors = sectors
        self.full = np.zeros(len(sectors), dtype=np.bool_)
        self.staged: dict[int, bytearray] = {}
        self._absent = _ABSENT[metadata.footer.disk_type]
        self._absent_hit = Hit.ZERO if self._absent & Flag.ZERO else Hit.NONE
        self._ones = b"\xff" * (self.header.block_size // SECTOR // 8)

    @classmethod
    def load(cls, metadata: VhdMetadata, storage: Storage) -> BlockMap:
        """Read and validate the whole table (row 51). Raises CorruptMetadata.

        It takes 8 bytes a block, which `load_vhd_metadata` has held against the budget."""
        sectors = load_bat(metadata, storage)
        check_bat(metadata, sectors)
        return cls(metadata, storage, sectors)

    def resized(self, metadata: VhdMetadata) -> BlockMap:
        """The map of the same blocks for a disk of another size; added blocks are unused.

        Staged bitmaps are shared. A block at the old end or the new one may have got more sectors,
        so its bitmap is looked at again."""
        kept = min(len(self.sectors), metadata.block_count)
        sectors = np.full(metadata.block_count, UNUSED, dtype=np.int64)
        sectors[:kept] = self.sectors[:kept]
        other = BlockMap(metadata, self.storage, sectors)
        known = max(kept - 1, 0)
        other.full[:known] = self.full[:known]
        other.staged = self.staged
        return other

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
        # A writer may go on meanwhile: all of the answer is of one moment.
        sectors = self.sectors[first:last].copy()
        tables: list[ExtentTable] = []
        done = first
        for block, bits in self._partial_blocks(first, sectors):
            tables.append(self._whole_blocks(done, sectors[done - first : block - first]))
            tables.append(self._by_sector(block, int(sectors[block - first]), bits))
            done = block + 1
        tables.append(self._whole_blocks(done, sectors[done - first :]))
        return clip(coalesce(concatenate([table for table in tables if len(table)])), start, stop)

    def bitmap(self, block: int) -> bytes:
        """The bitmap of a present block, without padding.

        Raises CorruptMetadata where the file was cut short behind our back."""
        while True:
            staged = self.staged.get(block)
            if staged is not None:
                return bytes(staged)
            sector = int(self.sectors[block])
            raw = self.storage.pread(len(self._ones), offset=sector * SECTOR)
            # A block that was moved meanwhile left a place that may be in other use by now.
            if int(self.sectors[block]) == sector:
                break
        if len(raw) < len(self._ones):
            raise CorruptMetadata(
                "sector bitmap",
                host_offset=sector * SECTOR,
                reason=f"the file ends after {len(raw)} of {len(self._ones)} bytes",
            )
        return raw

    def is_full(self, block: int) -> bool:
        """Whether a present block has all of its sectors; remembered where it has."""
        if self.full[block]:
            return True
        found = self.fills(block, self.bitmap(block))
        if found:
            self.full[block] = True
        return found

    def fills(self, block: int, bitmap: bytes | bytearray) -> bool:
        """Whether a bitmap has every bit that counts for a block."""
        if bitmap == self._ones:
            return True
        return bool(decode_bitmap(bytes(bitmap), count=self._sectors_of(block)).all())

    def data_offset(self, block: int) -> int:
        """The host offset of a present block's data."""
        return int(self.sectors[block]) * SECTOR + self.bitmap_size

    def lookup(self, offset: int) -> tuple[Hit, int, int]:
        """See `Image.lookup`; up to the end of the block. OTHER where a bitmap has clear bits."""
        block, begin = divmod(offset, self.header.block_size)
        run = min(self.header.block_size - begin, self.size - offset)
        sector = int(self.sectors[block])
        if sector == UNUSED:
            return self._absent_hit, NO_HOST, run
        if not (self.full[block] or self.is_full(block)):
            return Hit.OTHER, NO_HOST, run
        return Hit.DATA, sector * SECTOR + self.bitmap_size + begin, run

    def _within_block(self, block: int, *, start: int, stop: int) -> ExtentTable | None:
        """The scalar twin for small reads: one row, or None where the bitmap decides."""
        sector = int(self.sectors[block])
        if sector == UNUSED:
            return single(start, stop - start, self._absent)
        if not self.is_full(block):
            return None
        host = sector * SECTOR + self.bitmap_size + start - block * self.header.block_size
        return single(start, stop - start, _PRESENT, host=host)

    def _partial_blocks(
        self, first: int, sectors: Int64Array
    ) -> list[tuple[int, npt.NDArray[np.bool_]]]:
        """The present blocks whose bitmap has clear bits, ascending, with the bits that count."""
        unsure = np.flatnonzero((sectors != UNUSED) & ~self.full[first : first + len(sectors)])
        found = []
        for block in (unsure + first).tolist():
            raw = self.bitmap(block)
            if self.fills(block, raw):
                self.full[block] = True
            else:
                found.append((block, decode_bitmap(raw, count=self._sectors_of(block))))
        return found

    def _sectors_of(self, block: int) -> int:
        """Sectors of a block that lie within the disk."""
        block_size = self.header.block_size
        return min(block_size, self.size - block * block_size) // SECTOR

    def _whole_blocks(self, first: int, sectors: Int64Array) -> ExtentTable:
        """Blocks that are unused, or present with all of their sectors: a row each."""
        block_size = self.header.block_size
        used = sectors != UNUSED
        starts = np.arange(first, first + len(sectors), dtype=np.int64) * block_size
        host = np.where(used, sectors * SECTOR + self.bitmap_size, NO_HOST)
        return make_table(
            starts,
            np.minimum(block_size, self.size - starts),
            np.where(used, _PRESENT, self._absent),
            host=host,
        )

    def _by_sector(self, block: int, sector: int, bits: npt.NDArray[np.bool_]) -> ExtentTable:
        """One block at `sector`, by the runs of its bitmap. Clear sectors have a host offset too:
        their space is allocated, only its content does not count."""
        edges = np.flatnonzero(np.append(True, bits[1:] != bits[:-1]))
        present, starts = bits[edges], edges.astype(np.int64) * SECTOR
        data = sector * SECTOR + self.bitmap_size
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
