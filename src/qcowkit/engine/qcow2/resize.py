"""Growing and shrinking the disk of a qcow2 image.

Growing: tables first, the size last. Shrinking: what lies behind the new end is given up durably,
then the size changes, then the file is cut. Guest bytes below both sizes are never touched."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from qcowkit.codecs.qcow2.entries import READS_ZERO
from qcowkit.codecs.qcow2.geometry import MAX_L1_BYTES
from qcowkit.codecs.qcow2.transitions import hosts_of, preallocate, put_entries, slice_columns
from qcowkit.engine import preallocate as host_space
from qcowkit.engine.qcow2.erase import Eraser
from qcowkit.engine.qcow2.old_content import OldContent
from qcowkit.engine.qcow2.state import WriteState
from qcowkit.engine.qcow2.write import Writer
from qcowkit.errors import RequestError, StorageError
from qcowkit.units import SECTOR, align_down, align_up

# Runs of clusters that wait for their release: beyond that many they take too much memory.
_MANY = 1 << 18

Preallocation = Literal["off", "metadata", "falloc", "full"]


class Resizer:
    """Changes the size of one image. The caller holds the lock."""

    def __init__(self, state: WriteState, writer: Writer, eraser: Eraser, old: OldContent) -> None:
        self._state = state
        self._writer = writer
        self._eraser = eraser
        self._old = old
        self._geometry = state.geometry
        self._size = state.geometry.cluster_size

    def resize(self, size: int, *, shrink: bool, preallocation: str, expose: bool = False) -> None:
        """See `WritableImage.resize`; `check` was asked before. expose: what is added shows what
        the layers below hold there."""
        before = self._state.mapping.size
        if size > before:
            if self._state.metadata.data_file_raw and preallocation == "off":
                # Others may write the data file as the raw disk that it is: all of it is mapped.
                preallocation = "metadata"
            self._grow(before, size, preallocation, expose=expose)
        elif size < before:
            self._shrink(before, size)

    def check(self, size: int, *, shrink: bool, preallocation: str, expose: bool = False) -> None:
        """Raise RequestError for what is refused, before anything changes."""
        state, before = self._state, self._state.mapping.size
        if preallocation not in get_args(Preallocation):
            known = ", ".join(get_args(Preallocation))
            raise RequestError(f"preallocation {preallocation!r} is unknown; known are {known}")
        if size < 0 or size % SECTOR:
            raise RequestError(f"size {size} is not a multiple of {SECTOR}")
        if self._geometry.l1_entries(size) * 8 > MAX_L1_BYTES:
            limit = MAX_L1_BYTES // 8 * self._geometry.l2_coverage
            raise RequestError(
                f"size {size} is above {limit}, the most that clusters of {self._size} bytes can do"
            )
        if expose and (self._old.below is None or size <= before):
            found = "no backing file" if self._old.below is None else f"a disk of {before} bytes"
            raise RequestError(
                f"only what is added over a backing file can show it, found {found} and the new "
                f"size {size}"
            )
        if size < before:
            self._check_shrink(size, before, shrink=shrink, preallocation=preallocation)
        elif preallocation != "off" and state.cipher and state.header.header.version < 3:
            raise RequestError(
                f"preallocation={preallocation} of an encrypted image needs compat=1.1: "
                "only its clusters can read as zeros before they are written"
            )
        elif preallocation != "off" and self._old.below and not self._geometry.has_subclusters:
            raise RequestError(
                f"preallocation={preallocation} over a backing file needs subclusters "
                "(extended_l2=on): without them preallocated clusters would hide the backing file"
            )

    def _check_shrink(self, size: int, before: int, *, shrink: bool, preallocation: str) -> None:
        if not shrink:
            raise RequestError(
                f"size {size} is below the disk's {before}: shrinking drops what lies behind the "
                "new end, and has to be asked for (--shrink)"
            )
        if preallocation != "off":
            raise RequestError("preallocation has no meaning when a disk shrinks")
        metadata = self._state.metadata
        if metadata.snapshots and metadata.header.version < 3:
            raise RequestError(
                "version 2 snapshots do not keep a size of their own: the disk cannot shrink "
                "while there are any"
            )

    # Growing

    def _grow(self, before: int, size: int, preallocation: str, *, expose: bool) -> None:
        state = self._state
        mapping, tables = state.mapping, state.tables
        try:
            self._cover(self._geometry.l1_entries(size))
            mapping.size = size
            self._clear_added(before, size, expose=expose)
            # Preallocation works in clusters; a data file ends with the disk.
            end = max(size, state.data.size())
            if preallocation != "off":
                self._preallocate(align_down(before, self._size), size, preallocation)
            if state.external and state.data.size() != end:
                state.data.truncate(end)
                state.barriers.pending = True
            state.commit()
            state.barriers.wait("tables before the new size")
            state.header.set_size(size)
            state.barriers.pending = True
            state.barriers.wait("new size")
        except BaseException:
            # Whoever interrupts after the switch leaves a disk that has grown.
            mapping.size = state.header.header.size
            raise
        assert len(tables.l1) >= self._geometry.l1_entries(size)

    def _cover(self, entries: int) -> None:
        """The L1 table reaches to `entries` entries, in memory and in the file."""
        state = self._state
        if entries <= len(state.tables.l1):
            return
        stored = state.l1_entries_stored
        if entries > stored:
            state.move_l1(entries=entries)
            return
        # Behind the disk there may be entries of a VM state, which `_clear_added` gives up.
        table = state.load_stored_l1(entries)
        table[: len(state.tables.l1)] = state.tables.l1
        state.tables.l1 = table

    def _clear_added(self, before: int, size: int, *, expose: bool) -> None:
        """What is added reads as zeros, whatever entries or a longer base have there; expose: as
        the base, whatever entries are there."""
        first = align_up(before, self._size)
        head = min(first, size)
        if before < head and expose:
            self._expose_head(before, head)
        elif before < head and not self._old.is_zero(before, head):
            self._writer.write(memoryview(bytes(head - before)), offset=before)
        if first >= size:
            return
        self._eraser.erase(first, align_up(size, self._size), self._eraser.rules(full=True))
        below = self._old.below
        if below is not None and below.size > first and not expose:
            end = min(size, align_up(below.size, self._size))
            self._eraser.write_zeroes(first, end - first, unmap=False, fallback=True)

    def _expose_head(self, before: int, head: int) -> None:
        """The rest of the last cluster as the base has it: where the cluster is this image's own,
        it holds what a longer disk once held."""
        below, wanted = self._old.below, bytearray(head - before)
        if below is not None and below.size > before:
            end = min(head, below.size)
            below.read_into(memoryview(wanted)[: end - before], offset=before)
        if self._old.read(before, head - before) != wanted:
            self._writer.write(memoryview(wanted), offset=before)

    def _preallocate(self, begin: int, size: int, mode: str) -> None:
        """Give every cluster of [begin, size) that has none a place in the file."""
        state, bits = self._state, self._geometry.cluster_bits
        span = state.tables.slice_entries << bits
        position, end = begin, align_up(size, self._size)
        while position < end:
            stop = min(end, align_down(position, span) + span)
            self._preallocate_slice(position, stop, mode)
            state.settle()
            position = stop

    def _preallocate_slice(self, begin: int, end: int, mode: str) -> None:
        state, bits = self._state, self._geometry.cluster_bits
        number, first = divmod(begin >> bits, state.tables.slice_entries)
        last = first + ((end - begin) >> bits)
        state.ensure_table(number // state.tables.slices_per_table)
        entries, _ = slice_columns(state.slice(number), geometry=self._geometry)
        empty = np.flatnonzero(hosts_of(entries[first:last]) == 0) + first
        if self._state.external:
            empty = np.flatnonzero(entries[first:last] == 0) + first
        for run in np.split(empty, np.flatnonzero(np.diff(empty) != 1) + 1):
            index, left = (int(run[0]), len(run)) if len(run) else (0, 0)
            while left:
                count = self._preallocate_run(number, index, left, mode)
                index, left = index + count, left - count

    def _preallocate_run(self, number: int, index: int, count: int, mode: str) -> int:
        state, bits = self._state, self._geometry.cluster_bits
        guest = (number * state.tables.slice_entries + index) << bits
        if state.external:
            host, zero = guest, state.reads_zero_beyond(guest)
        else:
            grant = state.allocator.allocate(count)
            host, count, zero = grant.first << bits, grant.count, grant.zero
        length = count << bits
        state.barriers.pending = True
        try:
            if not zero:
                # They hold what somebody else left there.
                state.data.zero(offset=host, length=length, unmap=mode == "metadata")
            if not state.external:
                state.cover(host + length)
            host_space.preallocate(state.data, offset=host, length=length, mode=mode)
            words = state.edit(number, first=index, last=index + count)
        except BaseException:
            if not state.external:
                state.allocator.free(host >> bits, count, punch=False)
            raise
        entries, bitmaps = (
            None if column is None else column[index : index + count].copy()
            for column in slice_columns(words, geometry=self._geometry)
        )
        assert entries is not None
        preallocate(entries, bitmaps, host=host, cluster_size=self._size)
        if state.cipher is not None and bitmaps is None:
            # Zeros of the file are none of the guest's: they must be said.
            entries |= np.uint64(READS_ZERO)
        put_entries(words, first=index, entries=entries, bitmaps=bitmaps)
        return count

    # Shrinking

    def _shrink(self, before: int, size: int) -> None:
        state = self._state
        first_table = self._geometry.l1_entries(size)
        kept_end = min(first_table * self._geometry.l2_coverage, align_up(before, self._size))
        begin = align_up(size, self._size)
        self._read_tables(first_table)
        if begin < kept_end:
            self._eraser.erase(begin, kept_end, self._eraser.rules(full=True))
        # Slices are written to where their L1 entry leads: before those entries go.
        state.commit()
        self._drop_tables(first_table)
        state.commit()
        state.barriers.wait("tables before the smaller size")
        state.header.set_size(size)
        state.barriers.pending = True
        state.barriers.wait("smaller size")
        # The L1 table in memory keeps its length: somebody may be reading behind the new end.
        state.mapping.size = size
        self._cut_file(size)

    def _read_tables(self, first: int) -> None:
        """What cannot be read, or contradicts itself, is found before anything is given up."""
        state, per_table = self._state, self._state.tables.slices_per_table
        used = np.flatnonzero(hosts_of(state.tables.l1[first:])) + first
        for index in used.tolist():
            for number in range(index * per_table, (index + 1) * per_table):
                state.slice(number)

    def _drop_tables(self, first: int) -> None:
        """Give up whole L2 tables, and all that they refer to."""
        state, per_table = self._state, self._state.tables.slices_per_table
        used = np.flatnonzero(hosts_of(state.tables.l1[first:])) + first
        for index in used.tolist():
            # All of a table is read before any of it is given up: reading may fail.
            slices = range(index * per_table, (index + 1) * per_table)
            columns = [slice_columns(state.slice(one), geometry=self._geometry) for one in slices]
            entries = np.concatenate([column for column, _ in columns])
            table = int(hosts_of(state.tables.l1[index : index + 1])[0])
            state.drop_table(index)
            self._writer.give_up(entries, punch=True)
            state.allocator.free(table // self._size, 1, punch=True)
            if state.allocator.quarantined > _MANY:
                state.commit()

    def _cut_file(self, size: int) -> None:
        """The tail that nobody uses goes; where that fails, it only stays."""
        state = self._state
        try:
            if state.external:
                state.data.truncate(size)
                state.barriers.pending = True
            # Lazy or not: what is cut off must be what the counts say, all of them.
            state.store_refcounts()
            state.drop_empty_blocks()
            clusters = state.allocator.end_of_use()
            if clusters * self._size < state.storage.size():
                state.releases += 1
                state.storage.truncate(clusters * self._size)
                state.barriers.pending = True
                state.allocator.cut(clusters)
            state.barriers.wait("cut of the file")
        except StorageError:
            if state.barriers.failed:
                raise
