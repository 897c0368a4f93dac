"""The check at the beginning of a repair: what is wrong, and what may be done about it."""

from __future__ import annotations

import numpy as np

from qcowkit.codecs.qcow2.entries import Uint64Array
from qcowkit.engine.findings import Effort, FindingLog, Severity
from qcowkit.engine.qcow2.counters import SATURATED, Window
from qcowkit.engine.qcow2.l2_audit import Links
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.recount import Recount
from qcowkit.engine.qcow2.references import Survey, TableSet
from qcowkit.engine.qcow2.repair_entries import sort_entries
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage

REFCOUNT_NAMES = ("refcount table", "refcount block")
_MAX_REASONS = 20
_NONE = np.zeros(0, dtype=np.int64)


class Audit(Recount):
    """A recount that also takes down what a repair has to know.

    raised, lowered: counts that differ from the references. lost: entries that lead nowhere; while
    there are any, clusters without references may be what they have lost. spare: those of them that
    hold no data, which are not among the lost. beyond: the lowest place
    behind the end of the file that something refers to. rebuild: why the refcount structures cannot
    be used, the first reasons. shared: structures that something else uses as well, by their names.
    used_end: one past the last host cluster with a reference."""

    def __init__(
        self,
        storage: Storage,
        metadata: Qcow2Metadata,
        found: Survey,
        *,
        log: FindingLog,
        effort: Effort,
        window_clusters: int,
    ) -> None:
        super().__init__(
            storage, metadata, found, log=log, effort=effort, window_clusters=window_clusters
        )
        self.raised = self.lowered = self.used_end = 0
        self.lost, self.spare = found.dangling, 0
        self.beyond = found.beyond
        self.shared: set[str] = set()
        self.rebuild: list[str] = []
        self._shared_tables: list[Int64Array] = []
        if not metadata.header.refcount_table_clusters:
            self.rebuild.append("there is no refcount table")
        if found.bad_blocks:
            self.rebuild.append(f"{found.bad_blocks} entries of the refcount table are faulty")

    @property
    def bad_runs(self) -> int:
        """Contiguous runs that the tables contradict."""
        return 0 if self.runs is None else self.runs.wrong

    @property
    def astray(self) -> bool:
        """Whether entries lead nowhere, with data or without."""
        return self.lost > 0 or self.spare > 0

    @property
    def clean(self) -> bool:
        """Nothing was found that is wrong."""
        return not any(self.log.count(severity) for severity in Severity)

    @property
    def shared_tables(self) -> Int64Array:
        """Host offsets of L2 tables that share their cluster with something else."""
        return np.concatenate(self._shared_tables) if self._shared_tables else _NONE

    def see_tables(
        self, tables: TableSet, entries: Uint64Array, bitmaps: Uint64Array | None, links: Links
    ) -> None:
        """Look for entries that lead nowhere."""
        super().see_tables(tables, entries, bitmaps, links)
        found = sort_entries(entries, bitmaps, rules=self.rules)
        nowhere = found.host[found.lost | found.spare]
        if len(nowhere):
            self.lost += int(np.count_nonzero(found.lost))
            self.spare += int(np.count_nonzero(found.spare))
            outside = nowhere[nowhere >= self.rules.file_size]
            if len(outside):
                self.beyond = min(self.beyond, int(outside.min()))

    def see_window(self, window: Window, *, first: bool) -> None:
        """Compare counts, and see who shares."""
        super().see_window(window, first=first)
        last = window.last_used(window.base + window.size, stored=False)
        self.used_end = max(self.used_end, last + 1)
        self.lowered += int(np.count_nonzero(window.stored > window.computed))
        low = np.flatnonzero(window.stored < window.computed) + window.base
        self.raised += len(low)
        self._find_uncounted(low)
        self._find_shared(window)

    def _find_uncounted(self, low: Int64Array) -> None:
        """Clusters with references that no refcount block counts."""
        block, blocks = low // self.geometry.refcounts_per_block, self.found.blocks
        there = np.zeros(len(low), dtype=np.bool_)
        inside = block < len(blocks)
        there[inside] = blocks[block[inside]] != 0
        for cluster in low[~there][:_MAX_REASONS].tolist():
            place = cluster << self.bits
            self._add_reason(f"no refcount block counts the cluster at host offset {place:#x}")

    def _find_shared(self, window: Window) -> None:
        claims = self.found.claims
        for clusters, owner in claims.clusters(window.base, window.base + window.size):
            shared = window.computed_of(clusters) > 1
            if not shared.any():
                continue
            clusters, owner = clusters[shared], owner[shared]
            owners, first = np.unique(owner, return_index=True)
            for one, index in zip(owners.tolist(), first.tolist(), strict=True):
                name, place = claims.names[one], int(clusters[index]) << self.bits
                if name in REFCOUNT_NAMES:
                    self._add_reason(f"the {name} at host offset {place:#x} is not used alone")
                else:
                    self.shared.add(name)
        tables = self.found.tables
        own, weight = tables.offset >> self.bits, tables.weight
        mask = window.inside(own)
        if mask is not None:
            own, weight = own[mask], weight[mask]
        more = window.computed_of(own) > np.minimum(weight, SATURATED)
        if more.any():
            self._shared_tables.append(own[more] << self.bits)

    def _add_reason(self, text: str) -> None:
        if len(self.rebuild) < _MAX_REASONS:
            self.rebuild.append(text)
