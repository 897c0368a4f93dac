"""Guest writes into a dynamic or differencing VHD.

Data go out at once. Table entries of new blocks and bitmaps of sectors that are new in old blocks
are staged in memory, where readers see them, and reach the file in `commit`: behind a barrier, so
that nothing refers to data that a crash could take. docs/formats/vhd.md, "Order of writes"."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from qcowkit.codecs.vhd.bat import ENTRY_SIZE, UNUSED, encode_bat, has_bit, set_bits
from qcowkit.engine.barriers import Barriers, Observer, ignore_event
from qcowkit.engine.vhd.mapping import BlockMap
from qcowkit.engine.vhd.metadata import VhdMetadata, metadata_regions
from qcowkit.engine.vhd.pieces import Part, gather, plan_entry_runs, split_range, split_sectors
from qcowkit.engine.vhd.space import BlockSpace
from qcowkit.engine.vhd.underneath import Underneath
from qcowkit.errors import StorageError, UnsupportedFeature
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, MiB, ceil_div

if TYPE_CHECKING:
    from typing_extensions import Buffer

# One round of planning; bounds the plan's memory, not the request.
_WINDOW_BLOCKS = 256
# Staged bitmaps and entries beyond this are committed without waiting for a flush.
MAX_STAGED_BYTES = 4 * MiB
_ENTRY_COST = 64


@dataclass(slots=True, kw_only=True)
class _Change:
    """What one round does: first to the file, then in memory.

    writes, zeros: by host offset. fresh: blocks by the host offset of their bitmap. marks: sectors
    [first, end) of a block whose bits get set. bitmaps: of the blocks that have marks."""

    writes: list[tuple[int, Buffer]] = field(default_factory=list)
    zeros: list[tuple[int, int]] = field(default_factory=list)
    fresh: dict[int, int] = field(default_factory=dict)
    marks: list[tuple[int, int, int]] = field(default_factory=list)
    bitmaps: dict[int, bytearray] = field(default_factory=dict)


class BlockWriter:
    """A VHD with blocks that is open for writing. One thread at a time, beside any readers.

    blocks: the map that readers use, replaced whole when the disk changes its size. space: footers
    and room. underneath: what shows where the disk has nothing. releases: goes up before the place
    of a block is given to another use (docs/adr/0010)."""

    def __init__(
        self,
        storage: Storage,
        metadata: VhdMetadata,
        blocks: BlockMap,
        *,
        observe: Observer = ignore_event,
    ) -> None:
        """blocks: just loaded from the storage. observe: told of every barrier by name."""
        self.storage = storage
        self.blocks = blocks
        self.barriers = Barriers(storage, observe=observe)
        self.underneath = Underneath(differencing=metadata.parent_id is not None)
        self.space = BlockSpace(
            storage,
            metadata,
            blocks_end=find_end(metadata, blocks.sectors),
            barriers=self.barriers,
        )
        header = self.space.header
        self.block_size = header.block_size
        self.bitmap_size = header.bitmap_size
        self.span = header.bitmap_size + header.block_size
        self._bitmap_bytes = header.block_size // SECTOR // 8
        self._ones = (b"\xff" * self._bitmap_bytes).ljust(self.bitmap_size, b"\0")
        self.releases = 0
        # Blocks whose entry in the file is older than that in memory.
        self._unlinked: set[int] = set()

    @property
    def metadata(self) -> VhdMetadata:
        """Footer and header as they are now."""
        return self.space.metadata

    @property
    def pending(self) -> bool:
        """Whether anything is not durable yet."""
        return self.barriers.pending or bool(self._unlinked) or bool(self.blocks.staged)

    # What the guest does

    def write(self, data: memoryview, *, offset: int) -> None:
        """Bytes within the disk; on an error old or new ones are there, and nothing else changed.

        Raises StorageError, CorruptMetadata, and what reading a parent raises."""
        if not data or self._write_in_place(data, offset=offset):
            return
        self.begin()
        stop = offset + len(data)
        for start, end in self._windows(offset, stop):
            self._write_window(data[start - offset : end - offset], offset=start)
            self._commit_if_large()

    def write_zeroes(
        self, *, offset: int, length: int, unmap: bool = False, fallback: bool = True
    ) -> None:
        """The range reads as zeros. Unused blocks of a dynamic disk stay so; over a parent zeros
        need bits, and data where a sector is touched in part. Raises as `write`, and
        UnsupportedFeature for a differencing disk without `fallback`."""
        if not self.underneath.differencing:
            self.begin()
            self._zero_in_place(offset, offset + length, unmap=unmap)
            return
        if not fallback:
            reason = "a differencing VHD says zeros with data alone"
            raise UnsupportedFeature("zeros without data", reason=reason)
        head, whole, tail = split_sectors(offset=offset, length=length)
        if head:
            self.write(memoryview(bytes(head)), offset=offset)
        self.begin()
        for start, end in self._windows(offset + head, offset + head + whole):
            self._zero_window(start, end, unmap=unmap)
            self._commit_if_large()
        if tail:
            self.write(memoryview(bytes(tail)), offset=offset + head + whole)

    def discard(self, *, offset: int, length: int) -> None:
        """Whole blocks of a dynamic disk read as zeros and give their space back; they stay in the
        table. Over a parent nothing is done: its content would come back."""
        if self.underneath.differencing:
            return
        self.begin()
        stop = offset + length
        first = ceil_div(offset, self.block_size) * self.block_size
        if stop < self.blocks.size:
            stop = stop // self.block_size * self.block_size
        self._zero_in_place(first, stop, unmap=True)

    def flush(self) -> None:
        """All that was written before is durable when this returns, and both footers are sound."""
        self.begin()
        self.commit()
        self.barriers.wait("flush")

    def commit(self) -> None:
        """Write what is staged, durably. After an error it is staged still."""
        staged = self.blocks.staged
        if not self._unlinked and not staged:
            return
        self.space.settle()
        # Nothing in the file leads to these yet.
        for block in sorted(self._unlinked & staged.keys()):
            self._write_bitmap(block, whole=True)
        self.barriers.wait("blocks before what leads to them")
        for block in sorted(staged.keys() - self._unlinked):
            self._write_bitmap(block, whole=False)
        for first, end in plan_entry_runs(sorted(self._unlinked)):
            self._link(first, end)
        self.barriers.wait("bitmaps and table before more changes")
        self._unlinked.clear()
        staged.clear()

    # What `resize` needs as well

    def begin(self) -> None:
        """Before any change: nothing has failed for good, and the footers are in order."""
        self.barriers.check()
        self.space.settle()

    def write_entries(
        self, sectors: Int64Array, *, first: int, table_offset: int | None = None
    ) -> None:
        """Entries from index `first` on, of the table or of another at that host offset."""
        self.barriers.pending = True
        table = self.space.header.table_offset if table_offset is None else table_offset
        self.storage.pwrite([encode_bat(sectors)], offset=table + first * ENTRY_SIZE)

    def relocate(self, places: dict[int, int]) -> None:
        """Blocks were copied to the host offsets of `places`: use these, in memory from now on
        and durably when this returns."""
        for block, place in places.items():
            self.blocks.sectors[block] = place // SECTOR
        self._unlinked.update(places)
        self.commit()

    def replace_map(self, blocks: BlockMap) -> None:
        """Use another map. New blocks that it does not know are given up: the next commit says so
        in the table as well, which may have heard of them."""
        sectors = blocks.sectors
        for block in list(self._unlinked):
            beyond = block >= len(sectors)
            if beyond or int(sectors[block]) == UNUSED:
                blocks.staged.pop(block, None)
            if beyond:
                self._unlinked.discard(block)
        self.blocks = blocks

    # Planning and doing

    def _windows(self, start: int, stop: int) -> list[tuple[int, int]]:
        step = _WINDOW_BLOCKS * self.block_size
        edges = [start, *range((start // step + 1) * step, stop, step), stop]
        return [(begin, end) for begin, end in zip(edges, edges[1:], strict=False) if begin < end]

    def _write_in_place(self, data: memoryview, *, offset: int) -> bool:
        """The short way for what lies in one block that has all of its sectors."""
        block, begin = divmod(offset, self.block_size)
        if begin + len(data) > self.block_size or self.blocks.sectors[block] == UNUSED:
            return False
        self.begin()
        if not self.blocks.is_full(block):
            return False
        self.barriers.pending = True
        self.storage.pwrite([data], offset=self.blocks.data_offset(block) + begin)
        return True

    def _write_window(self, data: memoryview, *, offset: int) -> None:
        parts = list(split_range(offset=offset, length=len(data), block_size=self.block_size))
        change = self._reserve(parts)
        try:
            for part in parts:
                self._plan_data(change, part, data[part.at : part.at + part.end - part.begin])
            self._carry_out(change)
        except BaseException:
            self._give_back(change)
            raise

    def _zero_window(self, start: int, stop: int, *, unmap: bool) -> None:
        """Whole sectors over a parent."""
        below = self.underneath
        parts = [
            part
            for part in split_range(offset=start, length=stop - start, block_size=self.block_size)
            if self.blocks.sectors[part.block] != UNUSED
            or not below.is_zero(start=start + part.at, length=part.end - part.begin)
        ]
        change = self._reserve(parts)
        try:
            for part in parts:
                self._plan_zeros(change, part)
            self._carry_out(change, unmap=unmap)
        except BaseException:
            self._give_back(change)
            raise

    def _zero_in_place(self, start: int, stop: int, *, unmap: bool) -> None:
        """The blocks that are there, of a dynamic disk."""
        if start >= stop:
            return
        first, last = start // self.block_size, ceil_div(stop, self.block_size)
        used = np.flatnonzero(self.blocks.sectors[first:last] != UNUSED) + first
        for block in used.tolist():
            self.barriers.pending = True
            base = block * self.block_size
            begin, end = max(start - base, 0), min(stop - base, self.block_size)
            host = self.blocks.data_offset(block) + begin
            self.storage.zero(offset=host, length=end - begin, unmap=unmap)

    def _reserve(self, parts: list[Part]) -> _Change:
        change = _Change()
        fresh = [part.block for part in parts if self.blocks.sectors[part.block] == UNUSED]
        if fresh:
            place = self.space.reserve(len(fresh))
            change.fresh = {block: place + rank * self.span for rank, block in enumerate(fresh)}
        return change

    def _plan_data(self, change: _Change, part: Part, data: memoryview) -> None:
        place = change.fresh.get(part.block)
        if place is None:
            host = self.blocks.data_offset(part.block)
            if self.blocks.is_full(part.block):
                change.writes.append((host + part.begin, data))
                return
        else:
            host = place + self.bitmap_size
            self.space.clear(start=host, stop=host + part.begin)
            self.space.clear(start=host + part.end, stop=host + self.block_size)
            if not self.underneath.differencing:
                change.writes += [(place, self._ones), (host + part.begin, data)]
                return
        self._plan_sectors(change, part, data, host)

    def _plan_sectors(self, change: _Change, part: Part, data: memoryview, host: int) -> None:
        """Data for sectors whose bits may be clear: those touched in part are filled up with what
        shows there now."""
        bitmap = self._bitmap_of(change, part.block)
        base = part.block * self.block_size
        head, tail = part.begin % SECTOR, -part.end % SECTOR
        begin = part.begin
        if head and not has_bit(bitmap, begin // SECTOR):
            begin -= head
            filler = self.underneath.read(start=base + begin, length=head)
            change.writes.append((host + begin, filler))
        change.writes.append((host + part.begin, data))
        if tail and not has_bit(bitmap, part.end // SECTOR):
            filler = self.underneath.read(start=base + part.end, length=tail)
            change.writes.append((host + part.end, filler))
        change.marks.append((part.block, begin // SECTOR, ceil_div(part.end, SECTOR)))

    def _plan_zeros(self, change: _Change, part: Part) -> None:
        place = change.fresh.get(part.block)
        if place is not None:
            host = place + self.bitmap_size
            self.space.clear(start=host, stop=host + self.block_size)
        else:
            host = self.blocks.data_offset(part.block)
            change.zeros.append((host + part.begin, part.end - part.begin))
            if self.blocks.is_full(part.block):
                return
        self._bitmap_of(change, part.block)
        change.marks.append((part.block, part.begin // SECTOR, part.end // SECTOR))

    def _bitmap_of(self, change: _Change, block: int) -> bytearray:
        """A block's bitmap as it is now; read before anything is changed, so that nothing can fail
        behind the point of no return."""
        bitmap = change.bitmaps.get(block)
        if bitmap is None:
            old = bytes(self._bitmap_bytes) if block in change.fresh else self.blocks.bitmap(block)
            bitmap = change.bitmaps[block] = bytearray(old)
        return bitmap

    def _carry_out(self, change: _Change, *, unmap: bool = False) -> None:
        self.barriers.pending = True
        for offset, length in change.zeros:
            self.storage.zero(offset=offset, length=length, unmap=unmap)
        for offset, buffers in gather(change.writes):
            self.storage.pwrite(buffers, offset=offset)
        # The file has it all, and from here on only an interrupt ends this call: no place may be
        # given out again, and no entry may miss its link, before the table in memory refers to it.
        blocks = self.blocks
        self._unlinked.update(change.fresh)
        for place in change.fresh.values():
            self.space.take(place + self.span)
        for block, first, end in change.marks:
            set_bits(change.bitmaps[block], first=first, end=end)
        for block, bitmap in change.bitmaps.items():
            blocks.staged[block] = bitmap
            if blocks.fills(block, bitmap):
                blocks.full[block] = True
        for block, place in change.fresh.items():
            if block not in change.bitmaps:
                blocks.full[block] = True
            blocks.sectors[block] = place // SECTOR

    def _give_back(self, change: _Change) -> None:
        for place in change.fresh.values():
            self.space.spoil(place + self.span)

    def _link(self, first: int, end: int) -> None:
        """Entries [first, end) of the table become what they are in memory."""
        sectors = self.blocks.sectors[first:end]
        try:
            self.write_entries(sectors, first=first)
        except StorageError:
            # An entry of which half was written leads astray, and nobody may come back to it.
            with suppress(StorageError):
                self.write_entries(sectors, first=first)
            raise

    def _write_bitmap(self, block: int, *, whole: bool) -> None:
        """whole: with the padding, which an old block has already."""
        raw = bytes(self.blocks.staged[block])
        raw = raw.ljust(self.bitmap_size, b"\0") if whole else raw
        self.barriers.pending = True
        self.storage.pwrite([raw], offset=int(self.blocks.sectors[block]) * SECTOR)

    def _commit_if_large(self) -> None:
        staged = len(self.blocks.staged) * (self._bitmap_bytes + _ENTRY_COST)
        if staged + len(self._unlinked) * _ENTRY_COST > MAX_STAGED_BYTES:
            self.commit()


def find_end(metadata: VhdMetadata, sectors: Int64Array) -> int:
    """The host offset behind everything that is in use but the trailing footer."""
    header = metadata.dynamic_header
    assert header is not None
    ends = [stop for _, _, stop in metadata_regions(metadata)]
    if len(sectors) and (last := int(sectors.max())) != UNUSED:
        ends.append(last * SECTOR + header.bitmap_size + header.block_size)
    return max(ends)
