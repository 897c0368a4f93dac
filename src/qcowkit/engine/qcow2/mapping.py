"""Guest ranges of one qcow2 layer to extents, a bounded number of L2 entries at a time."""

from __future__ import annotations

import numpy as np

from qcowkit.codecs.qcow2.entries import (
    OFFSET_MASK,
    BadEntry,
    EntryRules,
    Uint64Array,
    classify_cluster,
    classify_subcluster,
    map_entries,
    split_words,
)
from qcowkit.engine.qcow2.tables import L2Tables
from qcowkit.errors import CorruptMetadata
from qcowkit.extents.algebra import clip
from qcowkit.extents.table import (
    ExtentTable,
    Flag,
    Hit,
    Int64Array,
    concatenate,
    make_table,
    single,
)

# Entries decoded at once: some tens of megabytes of columns at the worst.
WINDOW_ENTRIES = 1 << 18
_L1_STEP = 1 << 16


class Mapping:
    """The tables of one address space: the active disk or a snapshot. `size`: guest bytes.

    Reads only; a writer changes `size`, `rules` and the tables under it."""

    def __init__(self, *, tables: L2Tables, rules: EntryRules, size: int) -> None:
        self.tables = tables
        self.rules = rules
        self.size = size
        geometry = rules.geometry
        # Bound once: a lookup counts nanoseconds.
        self._bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._extended = geometry.has_subclusters
        self._entries = tables.slice_entries
        self._find = tables.cache.find

    def lookup(self, offset: int) -> tuple[Hit, int, int]:
        """What one guest byte is: (kind, host offset, bytes for which that holds); the scalar twin
        of `extents`. The run ends with the cluster, or where there is no L2 table with that of its
        L1 entry. OTHER is for `extents` to judge: compressed, or malformed."""
        cluster = offset >> self._bits
        number = cluster // self._entries
        words = self._find(number)
        if words is None:
            coverage = self.rules.geometry.l2_coverage
            if not int(self.tables.l1[offset // coverage]) & OFFSET_MASK:
                return Hit.NONE, -1, coverage - offset % coverage
            words = self.tables.slice(number)
        index = cluster - number * self._entries
        if self._extended:
            # In one step: no writer comes in between the two.
            entry, bitmap = words[2 * index : 2 * index + 2]
            return classify_subcluster(entry, bitmap, offset=offset, rules=self.rules)
        return classify_cluster(words[index], offset=offset, rules=self.rules)

    def extents(self, *, start: int, length: int, limit: int | None = None) -> ExtentTable:
        """As `Image.extents`: covers less than asked once about `limit` rows may have come."""
        stop = start + length
        parts: list[ExtentTable] = []
        # An entry may become as many rows as its cluster has subclusters.
        weight = self.rules.geometry.subcluster_count
        position, spent = start, 0
        while position < stop and (limit is None or spent < limit):
            rows = WINDOW_ENTRIES if limit is None else min(WINDOW_ENTRIES, limit - spent)
            table, used = self._window(position, stop, max(1, rows // weight))
            parts.append(table)
            position, spent = table.end, spent + used * weight
        return concatenate(parts)

    def _window(self, start: int, stop: int, entries: int) -> tuple[ExtentTable, int]:
        """Map as much of [start, stop) as `entries` L2 entries allow; and how many were decoded."""
        geometry = self.rules.geometry
        coverage = geometry.l2_coverage
        first, last = start // coverage, (stop - 1) // coverage
        if first == last:
            return self._one_table(first, start, stop, entries)
        most = entries // geometry.l2_entries
        used = self._used_tables(first, last + 1, most + 1)
        if len(used) > most:
            # Everything up to the first table that no longer fits.
            last = int(used[most]) - 1 if most or used[0] > first else first
            used = used[:most]
            stop = min(stop, (last + 1) * coverage)
        if first == last:
            return self._one_table(first, start, stop, entries)
        if len(used) == 0:
            return single(start, stop - start, Flag.NONE), 0
        table = self._fill_gaps(self._tables(used), first * coverage, (last + 1) * coverage)
        return clip(table, start, stop), len(used) * geometry.l2_entries

    def _used_tables(self, first: int, stop: int, most: int) -> Int64Array:
        """The first `most` L1 indices in [first, stop) with a table; looks no further than that."""
        found: list[Int64Array] = []
        count = 0
        while first < stop and count < most:
            part = self.tables.l1[first : min(stop, first + _L1_STEP)] & np.uint64(OFFSET_MASK)
            used = (np.flatnonzero(part) + first).astype(np.int64)
            found.append(used)
            first, count = first + _L1_STEP, count + len(used)
        return np.concatenate(found)[:most]

    def _one_table(
        self, index: int, start: int, stop: int, entries: int
    ) -> tuple[ExtentTable, int]:
        """A range below one L1 entry: only the words needed are loaded."""
        geometry = self.rules.geometry
        word = int(self.tables.l1[index])
        if not word & OFFSET_MASK:
            return single(start, stop - start, Flag.NONE), 0
        bits = geometry.cluster_bits
        cluster = start >> bits
        count = min(((stop - 1) >> bits) + 1 - cluster, entries)
        stop = min(stop, (cluster + count) << bits)
        first = geometry.l2_index(start)
        words = self.tables.load_part(index, first=first, count=count)
        starts = (cluster + np.arange(count, dtype=np.int64)) << bits
        table = self._decode(words, starts, np.array([word], dtype=np.uint64), skipped=first)
        return clip(table, start, stop), count

    def _tables(self, used: Int64Array) -> ExtentTable:
        geometry = self.rules.geometry
        l1_entries = self.tables.l1[used]
        words = self.tables.load_whole(used)
        clusters = np.arange(geometry.l2_entries, dtype=np.int64) << geometry.cluster_bits
        starts = (used.astype(np.int64)[:, None] * geometry.l2_coverage + clusters).ravel()
        return self._decode(words, starts, l1_entries, skipped=0)

    def _decode(
        self, words: Uint64Array, starts: Int64Array, l1_entries: Uint64Array, *, skipped: int
    ) -> ExtentTable:
        geometry = self.rules.geometry
        entries, bitmaps = split_words(words, geometry=geometry)
        try:
            return map_entries(entries, bitmaps, starts, rules=self.rules)
        except BadEntry as error:
            table, index = divmod(error.index + skipped, geometry.l2_entries)
            raise CorruptMetadata(
                "L2 table",
                host_offset=int(l1_entries[table]) & OFFSET_MASK,
                index=index,
                reason=error.reason,
            ) from None

    @staticmethod
    def _fill_gaps(table: ExtentTable, start: int, stop: int) -> ExtentTable:
        """Unallocated rows where the L1 table has no entry."""
        ends = table.start + table.length
        gap_start = np.concatenate(([start], ends))
        gap_end = np.concatenate((table.start, [stop]))
        real = gap_end > gap_start
        if not real.any():
            return table
        gaps = make_table(gap_start[real], (gap_end - gap_start)[real], Flag.NONE)
        # Merge two sorted lists: each row's place is its rank in both.
        joined = concatenate([table, gaps])
        return joined.take(np.argsort(joined.start, kind="stable"))
