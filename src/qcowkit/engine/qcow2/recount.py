"""Refcounts recomputed from all references of a qcow2 file and compared with the stored ones.

Host clusters are counted in windows of bounded size; every L2 table is read once for each window
that it refers to, which is once for all but the largest files. Reliability reference, "costs"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.entries import EntryRules, split_words
from qcowkit.codecs.qcow2.refcount_block import view_refcounts
from qcowkit.engine.findings import Effort, FindingLog
from qcowkit.engine.memory import keep_freed_memory
from qcowkit.engine.qcow2.counters import SATURATED, WINDOW, Window
from qcowkit.engine.qcow2.l2_audit import Links, find_links, ignore_faults
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.references import Survey, TableSet, survey
from qcowkit.engine.qcow2.verdicts import (
    check_l1_flags,
    check_shared,
    compare_counts,
    entry_reporter,
    report_copied,
)
from qcowkit.errors import StorageError
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage
from qcowkit.units import MiB, ceil_div

# Read and decoded at once: it should stay in the cache of a processor.
_BATCH_BYTES = MiB
_MAX_CUT = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Of the active disk, in clusters, as qemu counts them. image_end: bytes of the file up to the
    last cluster in use.

    fragmented: the host cluster is not the one behind that of the entry before; compressed ones
    always are."""

    total: int = 0
    allocated: int = 0
    fragmented: int = 0
    compressed: int = 0
    image_end: int = 0


def recount(
    storage: Storage,
    metadata: Qcow2Metadata,
    *,
    log: FindingLog,
    effort: Effort,
    window_clusters: int = WINDOW,
) -> Statistics:
    """Compare stored with computed refcounts and judge every entry on the way.

    What is wrong goes into `log`. Counts above 2**32 - 1 are taken as that. window_clusters: a
    power of two that is a multiple of what a refcount block counts. Raises StorageError,
    OperationError where the image is too complex, and Cancelled."""
    assert window_clusters % metadata.geometry.refcounts_per_block == 0
    keep_freed_memory()
    found = survey(storage, metadata, log=log, effort=effort)
    return _Recount(storage, metadata, found, log, effort, window_clusters).run()


class _Recount:
    def __init__(
        self,
        storage: Storage,
        metadata: Qcow2Metadata,
        found: Survey,
        log: FindingLog,
        effort: Effort,
        window_clusters: int,
    ) -> None:
        self.storage = storage
        self.metadata = metadata
        self.geometry = metadata.geometry
        self.found = found
        self.log = log
        self.effort = effort
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
        self.allocated = self.fragmented = self.compressed = self.image_end = 0

    def run(self) -> Statistics:
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
        return Statistics(
            total=self.geometry.clusters(self.metadata.virtual_size),
            allocated=self.allocated,
            fragmented=self.fragmented,
            compressed=self.compressed,
            image_end=self.image_end,
        )

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
        place = self.metadata.header.l1_table_offset
        check_l1_flags(self.log, window, self.found.links, bits=self.bits, host_offset=place)
        check_shared(self.log, window, self.found.claims, self.found.tables, bits=self.bits)
        cut = np.concatenate(self.cut) if self.cut else np.zeros(0, dtype=np.int64)
        compare_counts(self.log, window, bits=self.bits, file_clusters=self.file_clusters, cut=cut)
        end = (window.last_used(self.file_clusters) + 1) << self.bits
        self.image_end = max(self.image_end, end)

    # What the file says

    def _load_stored(self, base: int, size: int) -> npt.NDArray[Any]:
        """Refcounts of [base, base + size) in a narrow type; wide ones stop at the largest."""
        order, per_block = self.geometry.refcount_order, self.geometry.refcounts_per_block
        stored = np.zeros(size, dtype=(np.uint8, np.uint16, np.uint32)[max(0, min(order, 5) - 3)])
        first = base // per_block
        blocks = self.found.blocks[first : first + ceil_div(size, per_block)]
        used = np.flatnonzero(blocks)
        for begin, count in _runs(blocks[used], self.geometry.cluster_size, used):
            place = int(used[begin]) * per_block
            raw = self._read(int(blocks[used[begin]]), count << self.bits, "refcount block")
            counts = view_refcounts(raw.data, order)[: size - place]
            if order == 6:
                counts = np.minimum(counts, SATURATED)
            stored[place : place + len(counts)] = counts
        return stored

    def _load_tables(self, offsets: Int64Array) -> npt.NDArray[np.uint64]:
        """Words of whole L2 tables, one behind the other, native."""
        size = self.geometry.cluster_size
        parts = [
            self._read(int(offsets[begin]), count * size, "L2 table")
            for begin, count in _runs(offsets, size)
        ]
        raw = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return raw.view(">u8").astype(np.uint64)

    def _read(self, offset: int, length: int, structure: str) -> npt.NDArray[np.uint8]:
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

    # References

    def _count_tables(self, window: Window, *, first: bool) -> None:
        """The L2 tables themselves, and what they refer to: the active ones, then the others."""
        tables = self.found.tables
        self._add(window, tables.offset >> self.bits, tables.weight)
        low, high = self.reach
        wanted = (high >= window.base) & (low < window.base + window.size)
        if first:
            wanted[:] = True
        active = tables.guest >= 0
        per_batch = max(1, _BATCH_BYTES >> self.bits)
        for chosen in (np.flatnonzero(wanted & active), np.flatnonzero(wanted & ~active)):
            for begin in range(0, len(chosen), per_batch):
                batch = chosen[begin : begin + per_batch]
                self._count_batch(window, batch, first=first)
                if first:
                    self._report_progress(len(batch))

    def _count_batch(self, window: Window, chosen: npt.NDArray[np.intp], *, first: bool) -> None:
        """Tables by their index; all of them active, or none."""
        tables, per_table = self.found.tables.take(chosen), self.geometry.l2_entries
        active, external = bool(tables.guest[0] >= 0), self.rules.external_data
        entries, bitmaps = split_words(self._load_tables(tables.offset), geometry=self.geometry)
        links = find_links(
            entries,
            bitmaps,
            rules=self.rules,
            starts=self._starts(tables) if external and active else None,
            report=entry_reporter(self.log, tables, per_table=per_table)
            if first
            else ignore_faults,
        )
        if first and active:
            self._take_statistics(links, len(chosen))
        if external:
            # Its clusters are counted nowhere; COPIED means only that they are there.
            missing = np.flatnonzero(~links.copied)
            if first and active:
                report_copied(self.log, tables, links, missing, None, per_table=per_table)
            return
        plain, packed = links.host >> self.bits, _touched(links, self.bits)
        if first:
            self._note_reach(chosen, links, plain, packed)
        weights = tables.weight if int(tables.weight.max()) > 1 else None
        for clusters, where in ((plain, links.where), *packed):
            chosen_weights = None if weights is None else weights[where // per_table]
            self._add(window, clusters, chosen_weights, packed=clusters is not plain)
        if active:
            self._check_copied(window, tables, links, plain)

    @staticmethod
    def _add(
        window: Window, clusters: Int64Array, weights: Int64Array | None, *, packed: bool = False
    ) -> None:
        mask = window.inside(clusters)
        if mask is not None:
            clusters = clusters[mask]
            weights = None if weights is None else weights[mask]
        window.add(clusters, weights, packed=packed)

    def _check_copied(
        self, window: Window, tables: TableSet, links: Links, plain: Int64Array
    ) -> None:
        mask = window.inside(plain)
        index = None if mask is None else np.flatnonzero(mask)
        stored = window.stored_of(plain if index is None else plain[index])
        copied = links.copied if index is None else links.copied[index]
        wrong = np.flatnonzero((stored == 1) != copied)
        if len(wrong):
            counts = stored[wrong]
            wrong = wrong if index is None else index[wrong]
            per_table = self.geometry.l2_entries
            report_copied(self.log, tables, links, wrong, counts, per_table=per_table)

    def _starts(self, tables: TableSet) -> Int64Array:
        """Guest offsets of all entries of active tables."""
        entries = np.arange(self.geometry.l2_entries, dtype=np.int64) << self.bits
        return (tables.guest[:, None] * self.geometry.l2_coverage + entries).ravel()

    def _note_reach(
        self,
        chosen: npt.NDArray[np.intp],
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

    def _take_statistics(self, links: Links, tables: int) -> None:
        """Neighbours are compared within one table only, as qemu does."""
        apart = links.host[1:] != links.host[:-1] + self.geometry.cluster_size
        starts = np.arange(1, tables, dtype=np.int64) * self.geometry.l2_entries
        edges = np.searchsorted(links.where, starts)
        edges = edges[(edges > 0) & (edges < len(links.where)) & (np.diff(edges, prepend=0) > 0)]
        fragmented = int(np.count_nonzero(apart)) - int(np.count_nonzero(apart[edges - 1]))
        self.allocated += len(links.host) + links.packed
        self.compressed += links.packed
        self.fragmented += fragmented + links.packed


def _touched(links: Links, bits: int) -> list[tuple[Int64Array, Int64Array]]:
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


def _runs(
    offsets: Int64Array, size: int, numbers: npt.NDArray[np.intp] | None = None
) -> list[tuple[int, int]]:
    """(index, count) of pieces that follow one another in the file, a megabyte at most.

    numbers: of the pieces, which must follow one another too."""
    if not len(offsets):
        return []
    most = max(1, _BATCH_BYTES // size)
    breaks = offsets[1:] != offsets[:-1] + size
    if numbers is not None:
        breaks |= np.diff(numbers) != 1
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(offsets)]
    return [
        (index, min(most, end - index))
        for begin, end in zip(edges[:-1], edges[1:], strict=True)
        for index in range(begin, end, most)
    ]
