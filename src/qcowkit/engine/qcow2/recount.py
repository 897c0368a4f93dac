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
from qcowkit.engine.findings import Effort, Finding, FindingLog, Severity
from qcowkit.engine.qcow2.l2_audit import Links, Reporter, find_links, ignore_faults
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.references import Survey, TableSet, survey
from qcowkit.errors import StorageError
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage
from qcowkit.units import MiB, ceil_div

# Clusters counted at once: 64 MiB of counters. A multiple of what any refcount block counts.
WINDOW = 1 << 24
_SATURATED = 0xFFFF_FFFF
# L2 words decoded at once: they should stay in the cache of a processor.
_BATCH_BYTES = MiB

CountArray = npt.NDArray[np.uint32]


@dataclass(slots=True, kw_only=True)
class Statistics:
    """Of the active disk, in clusters, as qemu counts them; image_end: bytes, one past the last
    cluster in use.

    fragmented: the host cluster is not the one behind that of the entry before; compressed ones
    always are."""

    total: int = 0
    allocated: int = 0
    fragmented: int = 0
    compressed: int = 0
    image_end: int = 0


def recount(
    storage: Storage, metadata: Qcow2Metadata, *, log: FindingLog, effort: Effort
) -> Statistics:
    """Compare stored with computed refcounts and judge every entry on the way.

    What is wrong goes into `log`. Counts above 2**32 - 1 are taken as that. Raises StorageError,
    OperationError where the image is too complex, and Cancelled."""
    found = survey(storage, metadata, log=log, effort=effort)
    return _Recount(storage, metadata, found, log, effort).run()


class _Window:
    """Counters of host clusters [base, base + size), and what the file says of them."""

    def __init__(self, base: int, size: int, stored: npt.NDArray[Any]) -> None:
        self.base = base
        self.size = size
        self.stored = stored
        self.computed: CountArray = np.zeros(size, dtype=np.uint32)
        self.packed: CountArray | None = None
        self._added = 0

    def inside(self, clusters: Int64Array) -> npt.NDArray[np.bool_] | None:
        """Which clusters lie in the window; None for all."""
        if not len(clusters):
            return None
        if int(clusters.min()) >= self.base and int(clusters.max()) < self.base + self.size:
            return None
        return (clusters >= self.base) & (clusters < self.base + self.size)

    def add(
        self, clusters: Int64Array, weights: Int64Array | None, *, packed: bool = False
    ) -> None:
        """Count references to clusters, all in the window; each `weights` times, or once."""
        self._added += len(clusters) if weights is None else int(weights.sum())
        index = clusters - self.base if self.base else clusters
        _accumulate(self.computed, index, weights, exact=self._added <= _SATURATED)
        if packed:
            if self.packed is None:
                self.packed = np.zeros(self.size, dtype=np.uint32)
            _accumulate(self.packed, index, weights, exact=self._added <= _SATURATED)

    def stored_of(self, clusters: Int64Array) -> npt.NDArray[Any]:
        """Stored refcounts of clusters in the window."""
        return self.stored.take(clusters - self.base if self.base else clusters)

    def computed_of(self, clusters: Int64Array) -> npt.NDArray[Any]:
        """Computed refcounts of clusters in the window, int64."""
        return self.computed.take(clusters - self.base).astype(np.int64)


def _accumulate(
    counts: CountArray, index: Int64Array, weights: Int64Array | None, *, exact: bool
) -> None:
    """Add to counters; where they could overflow they stop at the largest value."""
    if exact:
        # The type matters: a Python int would take the path that is forty times slower.
        np.add.at(counts, index, np.uint32(1) if weights is None else weights.astype(np.uint32))
        return
    places, inverse = np.unique(index, return_inverse=True)
    sums = counts[places].astype(np.int64)
    np.add.at(sums, inverse, np.int64(1) if weights is None else weights)
    counts[places] = np.minimum(sums, _SATURATED)


class _Recount:
    def __init__(
        self,
        storage: Storage,
        metadata: Qcow2Metadata,
        found: Survey,
        log: FindingLog,
        effort: Effort,
    ) -> None:
        self.storage = storage
        self.metadata = metadata
        self.geometry = metadata.geometry
        self.found = found
        self.log = log
        self.effort = effort
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
        self.windows = set((blocks * per_block // WINDOW).tolist()) | {0}
        # The lowest and highest cluster that each L2 table refers to.
        self.reach = np.full((2, len(found.tables.offset)), -1, dtype=np.int64)
        self.statistics = Statistics(total=self.geometry.clusters(metadata.virtual_size))

    def run(self) -> Statistics:
        """Window by window; the first one discovers which others there are."""
        claims, tables = self.found.claims, self.found.tables
        for places in (claims.first, claims.first + claims.count - 1, tables.offset >> self.bits):
            self._discover(places)
        done: set[int] = set()
        while waiting := sorted(self.windows - done):
            self._run_window(waiting[0] * WINDOW, first=not done)
            done.add(waiting[0])
        self.effort.report(self._total, self._total)
        return self.statistics

    @property
    def _total(self) -> int:
        return len(self.found.tables.offset) << self.bits

    def _discover(self, clusters: Int64Array) -> None:
        if len(clusters) and int(clusters.max()) >= WINDOW:
            self.windows.update(np.unique(clusters // WINDOW).tolist())

    def _run_window(self, base: int, *, first: bool) -> None:
        size = min(WINDOW, self.end - base)
        if size <= 0:
            return
        self.effort.spend(size)
        window = _Window(base, size, self._load_stored(base, size))
        for clusters, _ in self.found.claims.clusters(base, base + size):
            window.add(clusters, None)
        self._count_tables(window, first=first)
        self._compare(window)
        self._check_claims(window)

    # Stored counts

    def _load_stored(self, base: int, size: int) -> npt.NDArray[Any]:
        """Refcounts of [base, base + size) in a narrow type; wide ones stop at the largest."""
        order, per_block = self.geometry.refcount_order, self.geometry.refcounts_per_block
        dtype = np.uint8 if order <= 3 else np.uint16 if order == 4 else np.uint32
        stored = np.zeros(size, dtype=dtype)
        first = base // per_block
        blocks = self.found.blocks[first : first + ceil_div(size, per_block)]
        used = np.flatnonzero(blocks)
        for begin, count in _runs(blocks[used], self.geometry.cluster_size, used):
            index = int(used[begin])
            raw = self._read(int(blocks[index]), count << self.bits, "refcount block")
            counts = view_refcounts(raw.data, order)[: size - index * per_block]
            if order == 6:
                counts = np.minimum(counts, _SATURATED)
            stored[index * per_block : index * per_block + len(counts)] = counts
        return stored

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

    def _count_tables(self, window: _Window, *, first: bool) -> None:
        """The L2 tables themselves, and what they refer to. Active ones first."""
        tables, bits = self.found.tables, self.bits
        own = tables.offset >> bits
        mask = window.inside(own)
        whole = mask is None
        window.add(
            own if whole else own[mask], tables.weight if whole else tables.weight[mask]
        )
        self._check_l1_flags(window)
        if not first:
            low, high = self.reach
            wanted = (high >= window.base) & (low < window.base + window.size)
        else:
            wanted = np.ones(len(own), dtype=bool)
        active = tables.guest >= 0
        per_batch = max(1, _BATCH_BYTES >> bits)
        for chosen in (np.flatnonzero(wanted & active), np.flatnonzero(wanted & ~active)):
            for begin in range(0, len(chosen), per_batch):
                self._count_batch(window, chosen[begin : begin + per_batch], first=first)

    def _count_batch(
        self, window: _Window, chosen: npt.NDArray[np.intp], *, first: bool
    ) -> None:
        tables = self.found.tables.take(chosen)
        active = bool(tables.guest[0] >= 0)
        words = self._load_tables(tables.offset)
        entries, bitmaps = split_words(words, geometry=self.geometry)
        links = find_links(
            entries,
            bitmaps,
            rules=self.rules,
            starts=self._starts(tables) if self.rules.external_data and active else None,
            report=self._reporter(tables) if first else ignore_faults,
        )
        if first and active:
            self._take_statistics(links, len(chosen))
        if self.rules.external_data:
            # Its clusters are counted nowhere; COPIED means only that they are there.
            if first:
                self._report_copied(tables, links, np.flatnonzero(~links.copied), None)
            return
        plain, packed = links.host >> self.bits, _touched(links, self.bits)
        if first:
            self._note_reach(chosen, links.where, plain)
            for clusters, where in packed:
                self._note_reach(chosen, where, clusters)
        weights = tables.weight if int(tables.weight.max()) > 1 else None
        self._count_plain(window, tables, links, plain, weights)
        for clusters, where in packed:
            self._count(window, clusters, where, weights, packed=True)
        self.effort.report(int(chosen[-1]) << self.bits, self._total)

    def _count_plain(
        self,
        window: _Window,
        tables: TableSet,
        links: Links,
        plain: Int64Array,
        weights: Int64Array | None,
    ) -> None:
        self._count(window, plain, links.where, weights, packed=False)
        if int(tables.guest[0]) < 0:
            return
        mask = window.inside(plain)
        index = None if mask is None else np.flatnonzero(mask)
        stored = window.stored_of(plain if index is None else plain[index])
        copied = links.copied if index is None else links.copied[index]
        wrong = np.flatnonzero((stored == 1) != copied)
        if len(wrong):
            counts = stored[wrong]
            self._report_copied(tables, links, wrong if index is None else index[wrong], counts)

    def _count(
        self,
        window: _Window,
        clusters: Int64Array,
        where: Int64Array,
        weights: Int64Array | None,
        *,
        packed: bool,
    ) -> None:
        mask = window.inside(clusters)
        if mask is not None:
            clusters, where = clusters[mask], where[mask]
        chosen = None if weights is None else weights[where // self.geometry.l2_entries]
        window.add(clusters, chosen, packed=packed)

    def _load_tables(self, offsets: Int64Array) -> npt.NDArray[np.uint64]:
        """Words of whole tables, one behind the other, native."""
        size = self.geometry.cluster_size
        parts = [
            self._read(int(offsets[begin]), count * size, "L2 table")
            for begin, count in _runs(offsets, size)
        ]
        raw = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return raw.view(">u8").astype(np.uint64)

    def _starts(self, tables: TableSet) -> Int64Array:
        """Guest offsets of all entries of active tables."""
        entries = np.arange(self.geometry.l2_entries, dtype=np.int64) << self.bits
        return (tables.guest[:, None] * self.geometry.l2_coverage + entries).ravel()

    def _note_reach(
        self, chosen: npt.NDArray[np.intp], where: Int64Array, clusters: Int64Array
    ) -> None:
        """Which windows tables refer to; nothing to note while one window holds the file."""
        if self.end <= WINDOW or not len(clusters):
            return
        self._discover(clusters)
        owner = chosen[where // self.geometry.l2_entries]
        low, high = self.reach
        np.maximum.at(high, owner, clusters)
        low[owner] = np.where(low[owner] < 0, clusters.max(), low[owner])
        np.minimum.at(low, owner, clusters)

    def _take_statistics(self, links: Links, tables: int) -> None:
        """Neighbours are compared within one table only, as qemu does."""
        apart = links.host[1:] != links.host[:-1] + self.geometry.cluster_size
        starts = np.arange(1, tables, dtype=np.int64) * self.geometry.l2_entries
        edges = np.unique(np.searchsorted(links.where, starts))
        edges = edges[(edges > 0) & (edges < len(links.where))]
        fragmented = int(np.count_nonzero(apart)) - int(np.count_nonzero(apart[edges - 1]))
        statistics = self.statistics
        statistics.allocated += len(links.host) + links.packed
        statistics.compressed += links.packed
        statistics.fragmented += fragmented + links.packed

    # Verdicts

    def _reporter(self, tables: TableSet) -> Reporter:
        per_table = self.geometry.l2_entries

        def report(where: Int64Array, values: Int64Array, text: str) -> None:
            def make(number: int) -> Finding:
                table, index = divmod(int(where[number]), per_table)
                return Finding(
                    severity=Severity.CORRUPTION,
                    structure="L2 table",
                    host_offset=int(tables.offset[table]),
                    index=index,
                    reason=text.format(int(values[number]) & (1 << 64) - 1),
                )

            self.log.add_many(Severity.CORRUPTION, len(where), make)

        return report

    def _report_copied(
        self,
        tables: TableSet,
        links: Links,
        wrong: npt.NDArray[np.intp],
        counts: npt.NDArray[Any] | None,
    ) -> None:
        """`wrong`: indices into the links; `counts`: their refcounts, None with a data file."""
        per_table = self.geometry.l2_entries

        def make(number: int) -> Finding:
            link = int(wrong[number])
            table, index = divmod(int(links.where[link]), per_table)
            return Finding(
                severity=Severity.CORRUPTION,
                structure="L2 table",
                host_offset=int(tables.offset[table]),
                index=index,
                reason=_copied_reason(
                    f"the data cluster at {int(links.host[link]):#x}",
                    copied=bool(links.copied[link]),
                    count=None if counts is None else int(counts[number]),
                ),
            )

        self.log.add_many(Severity.CORRUPTION, len(wrong), make)

    def _check_l1_flags(self, window: _Window) -> None:
        links = self.found.links
        clusters = links.offset >> self.bits
        mask = window.inside(clusters)
        index = np.arange(len(clusters)) if mask is None else np.flatnonzero(mask)
        stored = window.stored_of(clusters[index])
        wrong = np.flatnonzero((stored == 1) != links.copied[index])

        def make(number: int) -> Finding:
            link = int(index[wrong[number]])
            return Finding(
                severity=Severity.CORRUPTION,
                structure="L1 table",
                host_offset=self.metadata.header.l1_table_offset,
                index=int(links.index[link]),
                reason=_copied_reason(
                    f"the L2 table at {int(links.offset[link]):#x}",
                    copied=bool(links.copied[link]),
                    count=int(stored[wrong[number]]),
                ),
            )

        self.log.add_many(Severity.CORRUPTION, len(wrong), make)

    def _compare(self, window: _Window) -> None:
        """Stored against computed counts; and where the last cluster in use ends."""
        stored, computed = window.stored, window.computed
        wrong = np.flatnonzero(stored != computed)
        if len(wrong):
            more = stored[wrong] > computed[wrong]
            self._report_counts(window, wrong[more], Severity.LEAK)
            self._report_counts(window, wrong[~more], Severity.CORRUPTION)
        last = _last_used(stored, computed)
        if last >= 0:
            end = (window.base + last + 1) << self.bits
            self.statistics.image_end = max(self.statistics.image_end, end)

    def _report_counts(
        self, window: _Window, index: npt.NDArray[np.intp], severity: Severity
    ) -> None:
        def make(number: int) -> Finding:
            place = int(index[number])
            cluster = window.base + place
            beyond = ", beyond the end of the file" if cluster >= self.file_clusters else ""
            return Finding(
                severity=severity,
                structure="cluster",
                host_offset=cluster << self.bits,
                reason=f"refcount is {int(window.stored[place])}, expected "
                f"{int(window.computed[place])} by its references{beyond}",
            )

        self.log.add_many(severity, len(index), make)

    def _check_claims(self, window: _Window) -> None:
        """Clusters that two structures have for themselves, whatever their refcount says."""
        claims, tables = self.found.claims, self.found.tables
        for clusters, owner in claims.clusters(window.base, window.base + window.size):
            computed = window.computed_of(clusters)
            shared = np.flatnonzero(computed > 1)
            names = [claims.names[one] for one in owner[shared][:_MAX_NAMES].tolist()]
            self._report_shared(clusters[shared], computed[shared] - 1, names)
        own = tables.offset >> self.bits
        mask = window.inside(own)
        weight = tables.weight
        if mask is not None:
            own, weight = own[mask], weight[mask]
        more = window.computed_of(own) - np.minimum(weight, _SATURATED)
        shared = np.flatnonzero(more > 0)
        self._report_shared(own[shared], more[shared], ["L2 table"] * min(len(shared), _MAX_NAMES))
        if window.packed is not None:
            mixed = np.flatnonzero((window.packed > 0) & (window.packed != window.computed))
            extra = window.computed[mixed].astype(np.int64) - window.packed[mixed]
            names = ["compressed data"] * min(len(mixed), _MAX_NAMES)
            self._report_shared(mixed + window.base, extra, names)

    def _report_shared(self, clusters: Int64Array, extra: Int64Array, names: list[str]) -> None:
        def make(number: int) -> Finding:
            count = int(extra[number])
            others = "1 other reference uses" if count == 1 else f"{count} other references use"
            return Finding(
                severity=Severity.CORRUPTION,
                structure=names[number],
                host_offset=int(clusters[number]) << self.bits,
                reason=f"{others} the same cluster",
            )

        self.log.add_many(Severity.CORRUPTION, len(clusters), make)


_MAX_NAMES = 1000


def _copied_reason(what: str, *, copied: bool, count: int | None) -> str:
    state = "set" if copied else "clear"
    if count is None:
        return f"COPIED is {state} for {what} of an external data file, expected set"
    expected = "set" if count == 1 else "clear"
    return f"COPIED is {state} for {what} with refcount {count}, expected {expected}"


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


def _last_used(stored: npt.NDArray[Any], computed: CountArray) -> int:
    """The highest index with a count in either, -1 for none."""
    for end in range(len(stored), 0, -MiB):
        begin = max(0, end - MiB)
        used = np.flatnonzero((stored[begin:end] != 0) | (computed[begin:end] != 0))
        if len(used):
            return begin + int(used[-1])
    return -1
