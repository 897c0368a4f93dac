"""Guest writes into a qcow2 image: where each byte goes, and what has to be copied beside it.

docs/architecture.md, "How a write flows". A request is cut where L2 slices end; within a slice the
clusters form pieces, each of which is one write to the file."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from qcowkit.codecs.qcow2.entries import (
    ALL_ALLOCATED,
    OFFSET_MASK,
    Uint64Array,
)
from qcowkit.codecs.qcow2.transitions import (
    CopyPlan,
    compressed,
    compressed_clusters,
    data_entry,
    hosts_of,
    in_place,
    is_compressed,
    kept,
    link_data,
    plan_copy,
    put_entries,
    put_entry,
    slice_columns,
)
from qcowkit.engine.crypt import PIECE, DataCipher
from qcowkit.engine.qcow2.old_content import OldContent
from qcowkit.engine.qcow2.state import WriteState
from qcowkit.units import SECTOR, align_down, align_up

Part = memoryview | bytes | bytearray
IN_PLACE, KEPT, MOVED = range(3)
# Head and tail are read with what lies between them, which is cheaper than a second read.
_READ_THROUGH = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Neighbouring clusters of one slice that are written alike, and whose hosts are neighbours.

    first, count: clusters of the guest. host: host offset of the first. kind: IN_PLACE, KEPT (the
    host stays, entries change) or MOVED. zero: the host clusters read as zeros now. head, tail:
    plans of the first and the last cluster; the same one if there is but one."""

    first: int
    count: int
    host: int
    kind: int
    zero: bool
    head: CopyPlan
    tail: CopyPlan


class Writer:
    """Plain writes of one image. Not safe from several threads: the caller holds the lock."""

    def __init__(self, state: WriteState, old: OldContent) -> None:
        self._state = state
        self._old = old
        self._geometry = state.geometry
        self._bits = state.geometry.cluster_bits
        self._size = state.geometry.cluster_size
        self._all_allocated = ALL_ALLOCATED if state.geometry.has_subclusters else 0
        self._slice_span = state.tables.slice_entries << self._bits

    def write(self, view: memoryview, *, offset: int) -> None:
        """Write the bytes at a guest offset. Raises StorageError, CorruptMetadata, RequestError;
        what was given out for a part that fails is given back."""
        position, stop = offset, offset + len(view)
        while position < stop:
            end = min(stop, position - position % self._slice_span + self._slice_span)
            self._write_in_slice(view[position - offset : end - offset], position)
            self._state.settle()
            position = end

    def _write_in_slice(self, view: memoryview, offset: int) -> None:
        state = self._state
        stop = offset + len(view)
        number = offset // self._slice_span
        state.ensure_table(number // state.tables.slices_per_table)
        words = state.slice(number)
        state.owned.add(number)
        first, last = offset >> self._bits, (stop - 1) >> self._bits
        if first == last:
            self._write_cluster(words, first, view, offset)
            return
        base = number * state.tables.slice_entries
        entries, bitmaps = slice_columns(words, geometry=self._geometry)
        entries, bitmaps = (
            entries[first - base : last + 1 - base],
            None if bitmaps is None else bitmaps[first - base : last + 1 - base],
        )
        head = self._plan(words, first, offset, (first + 1) << self._bits)
        tail = self._plan(words, last, last << self._bits, stop)
        kinds = self._kinds(entries, bitmaps, head, tail, offset, stop)
        edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
        hosts = hosts_of(entries).tolist()
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            kind = int(kinds[begin])
            while begin < end:
                count = end - begin if kind == MOVED else _contiguous(hosts, begin, end, self._size)
                count = self._write_piece(
                    first + begin, count, hosts[begin], kind, head, tail, view, offset
                )
                begin += count

    def _kinds(
        self,
        entries: Uint64Array,
        bitmaps: Uint64Array | None,
        head: CopyPlan,
        tail: CopyPlan,
        offset: int,
        stop: int,
    ) -> np.ndarray[tuple[int], np.dtype[np.int8]]:
        """IN_PLACE, KEPT or MOVED by cluster; the edges as their plans say."""
        external = self._state.external
        kinds = np.full(len(entries), MOVED, dtype=np.int8)
        kinds[kept(entries, external=external)] = KEPT
        kinds[in_place(entries, bitmaps, external=external)] = IN_PLACE
        kinds[0] = self._kind(head, offset & (self._size - 1), self._size, int(kinds[0]))
        kinds[-1] = self._kind(tail, 0, (stop - 1) % self._size + 1, int(kinds[-1]))
        return kinds

    @staticmethod
    def _kind(plan: CopyPlan, begin: int, end: int, whole: int) -> int:
        """What the plan of a cluster means; `whole`: what its entry would mean if all of it were
        written."""
        if not plan.keep:
            return MOVED
        # Subclusters in the middle may have to change even where the edges do not.
        exact = plan.begin == begin and plan.end == end
        return IN_PLACE if exact and whole == IN_PLACE else KEPT

    def _plan(self, words: array[int], cluster: int, begin: int, end: int) -> CopyPlan:
        """The plan for guest bytes [begin, end) of one cluster."""
        index = cluster % self._state.tables.slice_entries
        start = cluster << self._bits
        if self._geometry.has_subclusters:
            entry, bitmap = words[2 * index], words[2 * index + 1]
        else:
            entry, bitmap = words[index], 0
        return plan_copy(
            entry,
            bitmap,
            begin=begin - start,
            end=end - start,
            geometry=self._geometry,
            external=self._state.external,
        )

    def _write_cluster(
        self, words: array[int], cluster: int, view: memoryview, offset: int
    ) -> None:
        """A request within one cluster, without a detour over arrays."""
        index = cluster % self._state.tables.slice_entries
        extended = self._geometry.has_subclusters
        entry = words[2 * index] if extended else words[index]
        plan = self._plan(words, cluster, offset, offset + len(view))
        kind = MOVED
        if plan.keep:
            if extended:
                unchanged = plan.bitmap == words[2 * index + 1]
            else:
                unchanged = entry == data_entry(entry & OFFSET_MASK)
            begin = offset & (self._size - 1)
            exact = plan.begin == begin and plan.end == begin + len(view)
            kind = IN_PLACE if exact and unchanged else KEPT
        self._write_piece(cluster, 1, entry & OFFSET_MASK, kind, plan, plan, view, offset)

    # Pieces

    def _write_piece(
        self,
        first: int,
        count: int,
        host: int,
        kind: int,
        head: CopyPlan,
        tail: CopyPlan,
        view: memoryview,
        offset: int,
    ) -> int:
        """Write `count` clusters, or fewer where free space is in pieces; returns how many."""
        state, zero = self._state, False
        granted = None
        if kind == MOVED and state.external:
            host = first << self._bits
            zero = state.reads_zero_beyond(host)
        elif kind == MOVED:
            state.barriers.observe("cluster_alloc")
            granted = state.allocator.allocate(count)
            host, count, zero = granted.first << self._bits, granted.count, granted.zero
        elif not state.external:
            # A cluster that counted as free may have become a table since it was judged.
            state.guard.check(first=host >> self._bits, count=count)
        piece = self._shape(first, count, host, kind, zero, head, tail, view, offset)
        low = max(first << self._bits, offset)
        high = min((first + count) << self._bits, offset + len(view))
        words = None
        try:
            self._write_data(piece, view[low - offset : high - offset], low)
            if kind != IN_PLACE:
                index = first % state.tables.slice_entries
                number = first // state.tables.slice_entries
                words = state.edit(number, first=index, last=index + count)
        except BaseException:
            if granted is not None:
                state.allocator.free(granted.first, granted.count, punch=False)
            raise
        if words is not None:
            self._link(piece, words)
        return count

    def _shape(
        self,
        first: int,
        count: int,
        host: int,
        kind: int,
        zero: bool,
        head: CopyPlan,
        tail: CopyPlan,
        view: memoryview,
        offset: int,
    ) -> Piece:
        """The piece with the plans of its own edges, which are the request's or whole clusters."""
        whole = CopyPlan(keep=kind != MOVED, begin=0, end=self._size, bitmap=self._all_allocated)
        edges = {(offset + len(view) - 1) >> self._bits: tail, offset >> self._bits: head}
        if len(edges) == 1:
            edges = {first: head}
        last = first + count - 1
        return Piece(
            first=first,
            count=count,
            host=host,
            kind=kind,
            zero=zero,
            head=edges.get(first, whole),
            tail=edges.get(last, whole),
        )

    def _write_data(self, piece: Piece, data: memoryview, offset: int) -> None:
        """Head, data and tail as one write."""
        state = self._state
        state.barriers.pending = True
        start = piece.first << self._bits
        last = (piece.first + piece.count - 1) << self._bits
        begin, end = start + piece.head.begin, last + piece.tail.end
        stop = offset + len(data)
        if state.external:
            # A data file ends with the disk, also where that is within a cluster.
            end = min(end, max(stop, state.mapping.size))
        if state.cipher is not None:
            if piece.kind == IN_PLACE:
                begin, end = offset, stop
            self._encrypt_data(state.cipher, piece, data, offset, begin, end)
            return
        if piece.kind == IN_PLACE or (begin == offset and end == stop):
            state.data.pwrite((data,), offset=piece.host + offset - start)
            return
        buffers, begin = self._surround(piece, data, offset, begin, end)
        state.barriers.observe("cow_write")
        state.data.pwrite(buffers, offset=piece.host + begin - start)

    def _encrypt_data(
        self,
        cipher: DataCipher,
        piece: Piece,
        data: memoryview,
        offset: int,
        begin: int,
        end: int,
    ) -> None:
        """The same where sectors are encrypted: whole ones, with all that they hold beside the
        guest's bytes, in one buffer each time. Zeros are written too: zeros of the file are none of
        the guest's."""
        state = self._state
        start = piece.first << self._bits
        begin, end = align_down(begin, SECTOR), align_up(end, SECTOR)
        if begin < offset or end > offset + len(data):
            state.barriers.observe("cow_write")
        while begin < end:
            to = min(end, begin + PIECE)
            buffer = self._around(data, offset, begin, to)
            host = piece.host + begin - start
            cipher.encrypt_in_place(buffer, host=host, guest=begin)
            state.data.pwrite((buffer,), offset=host)
            begin = to

    def _around(self, data: memoryview, offset: int, begin: int, end: int) -> bytearray:
        """Guest bytes [begin, end) as they shall be, `data` at `offset` among them."""
        buffer = bytearray(end - begin)
        low = min(max(begin, offset), end)
        high = min(max(begin, offset + len(data)), end)
        buffer[low - begin : high - begin] = data[low - offset : high - offset]
        for start, stop in ((begin, low), (high, end)):
            old = self._old.read_or_none(start, stop - start)
            if old is not None:
                buffer[start - begin : stop - begin] = old
        return buffer

    def _surround(
        self, piece: Piece, data: memoryview, offset: int, begin: int, end: int
    ) -> tuple[list[Part], int]:
        """The buffers of guest bytes [begin, end), and where they begin: zeros that are there
        already are not written."""
        stop = offset + len(data)
        old = self._old
        if piece.count == 1 and begin < offset and stop < end and len(data) <= _READ_THROUGH:
            if old.is_zero(begin, end):
                head = tail = None
            else:
                raw = old.read(begin, end - begin)
                head, tail = raw[: offset - begin], raw[stop - begin :]
        else:
            head = old.read_or_none(begin, offset - begin)
            tail = old.read_or_none(stop, end - stop)
        buffers: list[Part] = [data]
        if head is not None or (begin < offset and not piece.zero):
            buffers.insert(0, bytes(offset - begin) if head is None else head)
        else:
            begin = offset
        if tail is not None or (stop < end and not piece.zero):
            buffers.append(bytes(end - stop) if tail is None else tail)
        return buffers, begin

    def _link(self, piece: Piece, words: array[int]) -> None:
        """Change the entries of a piece, and give up what they referred to."""
        index = piece.first % self._state.tables.slice_entries
        if piece.count == 1:
            self._link_one(words, index, piece)
            return
        columns = slice_columns(words, geometry=self._geometry)
        old, bitmaps = (
            None if column is None else column[index : index + piece.count].copy()
            for column in columns
        )
        assert old is not None
        entries = old.copy()
        link_data(entries, bitmaps, host=piece.host, cluster_size=self._size)
        if bitmaps is not None:
            bitmaps[0], bitmaps[-1] = piece.head.bitmap, piece.tail.bitmap
        put_entries(words, first=index, entries=entries, bitmaps=bitmaps)
        if piece.kind == MOVED:
            self.give_up(old)

    def _link_one(self, words: array[int], index: int, piece: Piece) -> None:
        extended = self._geometry.has_subclusters
        old = words[2 * index] if extended else words[index]
        bitmap = piece.head.bitmap if extended else None
        put_entry(words, index, entry=data_entry(piece.host), bitmap=bitmap)
        if piece.kind == MOVED and not self._state.external and old:
            self.give_up_entry(old)

    def give_up_entry(self, entry: int, *, punch: bool = False) -> None:
        """Free what one old entry referred to."""
        if is_compressed(entry):
            self._free(*compressed_clusters(entry, geometry=self._geometry), punch=punch)
        elif entry & OFFSET_MASK:
            self._free((entry & OFFSET_MASK) >> self._bits, 1, punch=punch)

    def _free(self, first: int, count: int, *, punch: bool) -> None:
        """Give up clusters of data, which must not be those of tables too."""
        self._state.guard.check(first=first, count=count)
        self._state.allocator.free(first, count, punch=punch)

    def give_up(self, entries: Uint64Array, *, punch: bool = False) -> None:
        """Free what old entries referred to. punch: the host gets the space back."""
        if self._state.external:
            return
        packed = compressed(entries)
        for entry in entries[packed].tolist():
            self.give_up_entry(entry, punch=punch)
        hosts = hosts_of(entries[~packed])
        clusters = hosts[hosts > 0] >> self._bits
        breaks = np.flatnonzero(np.diff(clusters) != 1) + 1
        for run in np.split(clusters, breaks):
            if len(run):
                self._free(int(run[0]), len(run), punch=punch)


def _contiguous(hosts: list[int], begin: int, end: int, size: int) -> int:
    """How many clusters from `begin` on lie behind one another."""
    count = 1
    while begin + count < end and hosts[begin + count] == hosts[begin] + count * size:
        count += 1
    return count
