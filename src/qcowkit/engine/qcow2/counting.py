"""References counted beside stored refcounts, a window of host clusters at a time.

Windows have a bounded size; every L2 table is read once for each window that it refers to, which is
once for all but the largest files. Reliability reference, "costs". What is made of the counts is
up to subclasses: `recount` judges them, `repair_*` change what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.entries import EntryRules, Uint64Array, split_words
from qcowkit.codecs.qcow2.refcount_block import view_refcounts
from qcowkit.engine.findings import Effort, FindingLog
from qcowkit.engine.memory import keep_freed_memory
from qcowkit.engine.qcow2.counters import SATURATED, WINDOW, Window
from qcowkit.engine.qcow2.l2_audit import Links, Reporter, find_links, ignore_faults
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.references import Survey, TableSet
from qcowkit.errors import StorageError
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage
from qcowkit.units import MiB, ceil_div

# Read and decoded at once: it should stay in the cache of a processor.
BATCH_BYTES = MiB
# References behind the end of the file that are remembered.
_MAX_CUT = 1 << 20

IndexArray = npt.NDArray[np.intp]


class TableReader:
    """Reads whole tables by their host offsets; what cannot be read goes into the log."""

    def __init__(
        self, storage: Storage, cluster_size: int, *, log: FindingLog, effort: Effort
    ) -> None:
        self.storage = storage
        self.cluster_size = cluster_size
        self.log = log
        self.effort = effort

    def load_tables(self, offsets: Int64Array) -> Uint64Array:
        """Words of whole L2 tables, one behind the other, native."""
        size = self.cluster_size
        parts = [
            self.read(int(offsets[begin]), count * size, "L2 table")
            for begin, count in find_runs(offsets, size)
        ]
        raw = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return raw.view(">u8").astype(np.uint64)

    def read(self, offset: int, length: int, structure: str) -> npt.NDArray[np.uint8]:
        """Bytes of tables; what is behind the end of the file, or cannot be read, is zeros."""
        self.effort.spend(length)
        raw = np.empty(length, dtype=np.uint8)
        count = 0
        try:
            count = self.storage.pread_into(raw.data, offset=offset)
        except StorageError as error:
            self.log.failure(structure, error, host_offset=offset)
        raw[count:] = 0
        return raw


class Counting:
    """One walk over all references of a file. `see_*` are called on the way and do nothing here.

    end: one past the last host cluster that is looked at. cut: clusters behind the end of the file
    that entries refer to."""

    def __init__(
        self,
        storage: Storage,
        metadata: Qcow2Metadata,
        found: Survey,
        *,
        log: FindingLog,
        effort: Effort,
        window_clusters: int = WINDOW,
    ) -> None:
        """window_clusters: a power of two, a multiple of what a refcount block counts."""
        assert window_clusters % metadata.geometry.refcounts_per_block == 0
        keep_freed_memory()
        self.storage = storage
        self.metadata = metadata
        self.geometry = metadata.geometry
        self.found = found
        self.log = log
        self.effort = effort
        self.reader = TableReader(storage, self.geometry.cluster_size, log=log, effort=effort)
        self.step = window_clusters
        self.bits = self.geometry.cluster_bits
        self.rules = EntryRules(
            geometry=self.geometry,
            version=metadata.header.version,
            external_data=metadata.data_file,
            file_size=storage.size(),
        )
        self.file_clusters = ceil_div(self.rules.file_size, self.geometry.cluster_size)
        per_block = self.geometry.refcounts_per_block
        blocks = np.flatnonzero(found.blocks)
        counted = (int(blocks[-1]) + 1) * per_block if len(blocks) else 0
        # Refcounts behind the end of the file are looked at too.
        self.end = max(self.file_clusters, counted)
        self.windows = set((blocks * per_block // self.step).tolist()) | {0}
        # The lowest and highest cluster that each L2 table refers to.
        self.reach = np.full((2, len(found.tables.offset)), -1, dtype=np.int64)
        self.cut: list[Int64Array] = []
        self.done = 0

    def run(self) -> None:
        """Window by window; the first one discovers which others there are."""
        claims, tables = self.found.claims, self.found.tables
        for clusters, _ in claims.clusters(self.step, self.end):
            self._discover(clusters)
        self._discover(tables.offset >> self.bits)
        done: set[int] = set()
        while waiting := self.windows - done:
            number = min(waiting)
            self._run_window(number * self.step, first=not done)
            done.add(number)
        self._report_progress(len(tables.offset) - self.done)

    # What subclasses look at

    def reporter(self, tables: TableSet) -> Reporter:
        """Who is told of faulty entries of a batch; each is told once."""
        return ignore_faults

    def see_tables(
        self, tables: TableSet, entries: Uint64Array, bitmaps: Uint64Array | None, links: Links
    ) -> None:
        """A batch of tables, all of them active or none; each is shown once."""

    def see_active(
        self, window: Window, tables: TableSet, links: Links, plain: Int64Array, *, first: bool
    ) -> None:
        """Active tables that may refer to the window. plain: clusters of `links.host`."""

    def see_window(self, window: Window, *, first: bool) -> None:
        """All references to the window are counted."""

    # The walk

    def _report_progress(self, tables: int) -> None:
        self.done += tables
        self.effort.report(self.done << self.bits, len(self.found.tables.offset) << self.bits)

    def _discover(self, clusters: Int64Array) -> None:
        if len(clusters) and int(clusters.max()) >= self.step:
            self.windows.update(np.unique(clusters // self.step).tolist())

    def _run_window(self, base: int, *, first: bool) -> None:
        size = min(self.step, self.end - base)
        if size <= 0:
            return
        self.effort.spend(size)
        window = Window(base, size, self._load_stored(base, size))
        for clusters, _ in self.found.claims.clusters(base, base + size):
            window.add(clusters, None)
        self._count_tables(window, first=first)
        self.see_window(window, first=first)

    def _load_stored(self, base: int, size: int) -> npt.NDArray[Any]:
        """Refcounts of [base, base + size) in a narrow type; wide ones stop at the largest."""
        order, per_block = self.geometry.refcount_order, self.geometry.refcounts_per_block
        stored = np.zeros(size, dtype=(np.uint8, np.uint16, np.uint32)[max(0, min(order, 5) - 3)])
        first = base // per_block
        blocks = self.found.blocks[first : first + ceil_div(size, per_block)]
        used = np.flatnonzero(blocks)
        for begin, count in find_runs(blocks[used], self.geometry.cluster_size, used):
            place = int(used[begin]) * per_block
            raw = self.reader.read(int(blocks[used[begin]]), count << self.bits, "refcount block")
            counts = view_refcounts(raw.data, order)[: size - place]
            if order == 6:
                counts = np.minimum(counts, SATURATED)
            stored[place : place + len(counts)] = counts
        return stored

    def _count_tables(self, window: Window, *, first: bool) -> None:
        """The L2 tables themselves, and what they refer to: the active ones, then the others."""
        tables = self.found.tables
        self._add(window, tables.offset >> self.bits, tables.weight)
        wanted, active = self._reaching(window, first=first), tables.guest >= 0
        for chosen in (np.flatnonzero(wanted & active), np.flatnonzero(wanted & ~active)):
            for batch in self.batches(chosen):
                self._count_batch(window, batch, first=first)
                if first:
                    self._report_progress(len(batch))

    def _reaching(self, window: Window, *, first: bool) -> npt.NDArray[np.bool_]:
        """Which tables refer to the window; all of them as long as nobody knows."""
        low, high = self.reach
        if first:
            return np.ones(len(low), dtype=np.bool_)
        return (high >= window.base) & (low < window.base + window.size)

    def batches(self, chosen: IndexArray) -> Iterator[IndexArray]:
        """As many tables as are read at once, by their index."""
        per_batch = max(1, BATCH_BYTES >> self.bits)
        for begin in range(0, len(chosen), per_batch):
            yield chosen[begin : begin + per_batch]

    def iter_active(
        self, window: Window, *, first: bool
    ) -> Iterator[tuple[TableSet, Uint64Array, Links]]:
        """The active tables that refer to the window once more, when its counts are complete, with
        their words and links; in the first window of external data all of them."""
        unknown = first and (self.rules.external_data or self.end <= self.step)
        wanted = self._reaching(window, first=unknown)
        for batch in self.batches(np.flatnonzero(wanted & (self.found.tables.guest >= 0))):
            tables = self.found.tables.take(batch)
            words = self.reader.load_tables(tables.offset)
            entries, bitmaps = split_words(words, geometry=self.geometry)
            yield tables, words, self._find_links(tables, entries, bitmaps, ignore_faults)

    def _find_links(
        self,
        tables: TableSet,
        entries: Uint64Array,
        bitmaps: Uint64Array | None,
        report: Reporter,
    ) -> Links:
        wants_starts = self.rules.external_data and bool(tables.guest[0] >= 0)
        return find_links(
            entries,
            bitmaps,
            rules=self.rules,
            starts=self.starts(tables) if wants_starts else None,
            report=report,
        )

    def _count_batch(self, window: Window, chosen: IndexArray, *, first: bool) -> None:
        """Tables by their index; all of them active, or none."""
        tables = self.found.tables.take(chosen)
        active, external = bool(tables.guest[0] >= 0), self.rules.external_data
        words = self.reader.load_tables(tables.offset)
        entries, bitmaps = split_words(words, geometry=self.geometry)
        report = self.reporter(tables) if first else ignore_faults
        links = self._find_links(tables, entries, bitmaps, report)
        if first:
            self.see_tables(tables, entries, bitmaps, links)
        plain = links.host >> self.bits
        if not external:
            self._count_links(window, chosen, tables, links, plain, first=first)
        if active:
            self.see_active(window, tables, links, plain, first=first)

    def _count_links(
        self,
        window: Window,
        chosen: IndexArray,
        tables: TableSet,
        links: Links,
        plain: Int64Array,
        *,
        first: bool,
    ) -> None:
        """Not with an external data file, whose clusters are counted nowhere."""
        packed, per_table = touched(links, self.bits), self.geometry.l2_entries
        if first:
            self._note_reach(chosen, links, plain, packed)
        weights = tables.weight if int(tables.weight.max()) > 1 else None
        for clusters, where in ((plain, links.where), *packed):
            chosen_weights = None if weights is None else weights[where // per_table]
            self._add(window, clusters, chosen_weights, packed=clusters is not plain)

    @staticmethod
    def _add(
        window: Window, clusters: Int64Array, weights: Int64Array | None, *, packed: bool = False
    ) -> None:
        mask = window.inside(clusters)
        if mask is not None:
            clusters = clusters[mask]
            weights = None if weights is None else weights[mask]
        window.add(clusters, weights, packed=packed)

    def starts(self, tables: TableSet) -> Int64Array:
        """Guest offsets of all entries of active tables."""
        entries = np.arange(self.geometry.l2_entries, dtype=np.int64) << self.bits
        return (tables.guest[:, None] * self.geometry.l2_coverage + entries).ravel()

    def _note_reach(
        self,
        chosen: IndexArray,
        links: Links,
        plain: Int64Array,
        packed: list[tuple[Int64Array, Int64Array]],
    ) -> None:
        """Which windows tables refer to, unless there is only one; and what is cut off."""
        if len(links.beyond) and sum(map(len, self.cut)) < _MAX_CUT:
            self.cut.append(links.beyond >> self.bits)
        if self.end <= self.step:
            return
        low, high = self.reach
        for clusters, where in ((plain, links.where), *packed):
            if len(clusters):
                self._discover(clusters)
                owner = chosen[where // self.geometry.l2_entries]
                np.maximum.at(high, owner, clusters)
                low[owner] = np.where(low[owner] < 0, clusters.max(), low[owner])
                np.minimum.at(low, owner, clusters)


def touched(links: Links, bits: int) -> list[tuple[Int64Array, Int64Array]]:
    """(clusters, indices of their entries) of compressed data, which may reach into further host
    clusters."""
    if not len(links.packed_host):
        return []
    first = links.packed_host >> bits
    last = (links.packed_host + links.packed_length - 1) >> bits
    found = [(first, links.packed_where)]
    for step in range(1, int((last - first).max()) + 1):
        mask = last >= first + step
        found.append((first[mask] + step, links.packed_where[mask]))
    return found


def find_runs(
    offsets: Int64Array, size: int, numbers: IndexArray | None = None
) -> list[tuple[int, int]]:
    """(index, count) of pieces that follow one another in the file, a megabyte at most.

    numbers: of the pieces, which must follow one another too."""
    if not len(offsets):
        return []
    most = max(1, BATCH_BYTES // size)
    breaks = offsets[1:] != offsets[:-1] + size
    if numbers is not None:
        breaks |= np.diff(numbers) != 1
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(offsets)]
    return [
        (index, min(most, end - index))
        for begin, end in zip(edges[:-1], edges[1:], strict=True)
        for index in range(begin, end, most)
    ]
