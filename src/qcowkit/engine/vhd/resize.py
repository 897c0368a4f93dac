"""Another size for a dynamic or differencing VHD: longer and shorter tables, crash-safe.

The size changes in one write, that of the leading footer. What must be there for the larger disk is
made before it, what the smaller one no longer needs goes after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from qcowkit.budget import TRUSTED
from qcowkit.codecs.vhd.bat import ENTRY_SIZE, UNUSED
from qcowkit.engine.vhd.layout import MAX_FILE_BYTES, plan_disk_size
from qcowkit.engine.vhd.metadata import MAP_ENTRY_BYTES, VhdMetadata, metadata_regions
from qcowkit.engine.vhd.writer import BlockWriter, find_end
from qcowkit.errors import CorruptMetadata, RequestError, UnsupportedFeature
from qcowkit.extents.table import Int64Array
from qcowkit.units import SECTOR, MiB, align_up

_WINDOW_ENTRIES = 1 << 18
_COPY_BYTES = 4 * MiB
_BATMAP_COOKIE = b"tdbatmap"
_TABLE = "block allocation table"


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePlan:
    """Where a table lies. offset, end: host bytes, with the padding to a sector; entries counts."""

    offset: int
    entries: int

    @property
    def end(self) -> int:
        """Behind the padding, where blocks may begin."""
        return self.offset + align_up(self.entries * ENTRY_SIZE, SECTOR)


def plan_table(metadata: VhdMetadata, *, entries: int) -> TablePlan:
    """The table for at least `entries` blocks: the present one where it is long enough or only
    blocks are in its way, else behind the structures that are. Pure."""
    header = metadata.dynamic_header
    assert header is not None
    present = TablePlan(offset=header.table_offset, entries=header.max_table_entries)
    if entries <= present.entries:
        return present
    regions = metadata_regions(metadata)
    others = [(start, stop) for name, start, stop in regions if name != _TABLE]
    wanted = TablePlan(offset=header.table_offset, entries=entries)
    if not _touching(wanted, others):
        return wanted
    # The old table stays whole until the header names the new one.
    others.append((present.offset, present.end))
    wanted = TablePlan(offset=present.end, entries=entries)
    while stops := _touching(wanted, others):
        wanted = TablePlan(offset=align_up(max(stops), SECTOR), entries=entries)
    return wanted


def _touching(plan: TablePlan, regions: list[tuple[int, int]]) -> list[int]:
    """Ends of the regions that share a byte with the table."""
    return [stop for start, stop in regions if start < plan.end and stop > plan.offset]


def check_size(size: int) -> None:
    """Raises RequestError for bytes that no VHD can have."""
    if size < 0 or size % SECTOR:
        raise RequestError(f"size {size} is not a multiple of {SECTOR}, which a VHD must be")
    plan_disk_size(size)


def resize_blocks(writer: BlockWriter, size: int, *, shrink: bool) -> None:
    """Make the disk `size` bytes long; what is added reads as zeros. Durable on return.

    Raises RequestError for a size that cannot be, or a smaller one without `shrink`,
    BudgetExceeded for a table that nobody would open again, UnsupportedFeature where header or
    batmap are in the way, and as `BlockWriter.write`. After an error the disk has one of the two
    sizes, and `metadata` says which."""
    check_size(size)
    old = writer.metadata.virtual_size
    if size == old:
        return
    if size < old and not shrink:
        raise RequestError(
            f"size {size} is below the disk's {old}, and shrinking was not asked for"
        )
    if size < old:
        _shrink(writer, size)
    else:
        _grow(writer, size)


def _grow(writer: BlockWriter, size: int) -> None:
    old_map, old_size = writer.blocks, writer.metadata.virtual_size
    grown = replace(writer.metadata, virtual_size=size)
    plan = plan_table(writer.metadata, entries=grown.block_count)
    if plan.end + grown.block_count * writer.span > MAX_FILE_BYTES:
        raise RequestError(f"block size {writer.block_size} is too small for a VHD of {size} bytes")
    # What nobody could open any more must not be made.
    map_bytes = grown.block_count * MAP_ENTRY_BYTES
    TRUSTED.spend(_TABLE, value=map_bytes, limit=TRUSTED.metadata_bytes)
    if plan.entries != writer.space.header.max_table_entries:
        _refuse_batmap(writer)
        _check_header(writer)
    writer.begin()
    writer.commit()
    _ensure_table(writer, plan, blocks=len(old_map.sectors))
    writer.replace_map(old_map.resized(replace(writer.metadata, virtual_size=size)))
    try:
        # The rest of the last block may hold anything, and a larger parent shows through.
        writer.write_zeroes(offset=old_size, length=size - old_size)
        writer.commit()
        writer.barriers.wait("added space before the size")
        writer.space.replace_size(size)
    except BaseException:
        writer.replace_map(old_map)
        raise
    writer.space.settle()
    writer.barriers.wait("flush")


def _shrink(writer: BlockWriter, size: int) -> None:
    header, old_map = writer.space.header, writer.blocks
    _refuse_batmap(writer)
    _check_header(writer)
    writer.begin()
    writer.commit()
    writer.space.replace_size(size)
    blocks = old_map.resized(writer.metadata)
    writer.replace_map(blocks)
    writer.releases += 1
    writer.space.settle()
    count = len(blocks.sectors)
    _write_unused(writer, first=count, end=header.max_table_entries)
    writer.space.replace_header(replace(header, max_table_entries=count))
    end = find_end(writer.metadata, blocks.sectors)
    dropped = old_map.sectors[count:]
    for sector in dropped[(dropped != UNUSED) & (dropped * SECTOR < end)].tolist():
        writer.storage.discard(offset=sector * SECTOR, length=writer.span)
    writer.space.cut(end)
    writer.barriers.wait("flush")


def _ensure_table(writer: BlockWriter, plan: TablePlan, *, blocks: int) -> None:
    """A table as planned, whose entries behind the first `blocks` are unused."""
    header = writer.space.header
    if plan.entries == header.max_table_entries:
        # Entries beyond the end of the disk mean nothing, so they may hold anything.
        _write_unused(writer, first=blocks, end=plan.entries)
        return
    _make_room(writer, plan.end)
    padded = (plan.end - plan.offset) // ENTRY_SIZE
    if plan.offset != header.table_offset:
        for first, sectors in _windows_of(writer.blocks.sectors, padded):
            writer.write_entries(sectors, first=first, table_offset=plan.offset)
    else:
        _write_unused(writer, first=blocks, end=padded)
    writer.barriers.wait("table before its header")
    writer.space.replace_header(
        replace(header, table_offset=plan.offset, max_table_entries=plan.entries)
    )


def _make_room(writer: BlockWriter, end: int) -> None:
    """Move the blocks that begin before `end` behind all others; their place is free on return."""
    sectors = writer.blocks.sectors
    inside = np.flatnonzero((sectors != UNUSED) & (sectors * SECTOR < end)).tolist()
    first = writer.space.reserve(len(inside), floor=end)
    places = {block: first + rank * writer.span for rank, block in enumerate(inside)}
    stop = first + len(inside) * writer.span
    try:
        for block, place in places.items():
            _copy(writer, int(sectors[block]) * SECTOR, place)
    except BaseException:
        writer.space.spoil(stop)
        raise
    writer.space.take(stop)
    if places:
        writer.relocate(places)
        writer.releases += 1


def _copy(writer: BlockWriter, source: int, target: int) -> None:
    """One block with its bitmap, within the file."""
    writer.barriers.pending = True
    for at in range(0, writer.span, _COPY_BYTES):
        length = min(_COPY_BYTES, writer.span - at)
        data = writer.storage.pread(length, offset=source + at)
        if len(data) < length:
            raise CorruptMetadata(
                "block",
                host_offset=source,
                reason=f"the file ends after {at + len(data)} of {writer.span} bytes",
            )
        writer.storage.pwrite([data], offset=target + at)


def _write_unused(writer: BlockWriter, *, first: int, end: int) -> None:
    for start in range(first, end, _WINDOW_ENTRIES):
        count = min(_WINDOW_ENTRIES, end - start)
        writer.write_entries(np.full(count, UNUSED, dtype=np.int64), first=start)


def _windows_of(sectors: Int64Array, count: int) -> Iterator[tuple[int, Int64Array]]:
    """(first, entries) of a table of `count`, unused behind the sectors that are given."""
    for first in range(0, count, _WINDOW_ENTRIES):
        window = np.full(min(_WINDOW_ENTRIES, count - first), UNUSED, dtype=np.int64)
        part = sectors[first : first + len(window)]
        window[: len(part)] = part
        yield first, window


def _check_header(writer: BlockWriter) -> None:
    """The header is rewritten by one sector, so that no crash can leave it in part."""
    offset = writer.metadata.footer.data_offset
    if offset % SECTOR:
        reason = f"lies at {offset:#x}, not on a sector: it cannot be changed at one stroke"
        raise UnsupportedFeature("dynamic header", reason=reason)


def _refuse_batmap(writer: BlockWriter) -> None:
    """XenServer keeps a map of full blocks where the table ends. It would be written over by a
    longer table, and be wrong about blocks that go and come back."""
    header = writer.space.header
    present = TablePlan(offset=header.table_offset, entries=header.max_table_entries)
    if writer.storage.pread(len(_BATMAP_COOKIE), offset=present.end) == _BATMAP_COOKIE:
        reason = f"lies at {present.end:#x}, right behind the table, which can then not change"
        raise UnsupportedFeature("batmap of XenServer", reason=reason)
