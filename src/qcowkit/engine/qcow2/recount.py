"""Refcounts recomputed from all references of a qcow2 file and compared with the stored ones.

How references are counted is in `counting`; here the counts and every entry are judged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcowkit.codecs.qcow2.entries import Uint64Array
from qcowkit.engine.findings import Effort, FindingLog
from qcowkit.engine.qcow2.counters import WINDOW, Window
from qcowkit.engine.qcow2.counting import Counting
from qcowkit.engine.qcow2.l2_audit import Links, Reporter
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.references import TableSet, survey
from qcowkit.engine.qcow2.runs import RunAudit, usable_runs
from qcowkit.engine.qcow2.verdicts import (
    check_l1_flags,
    check_shared,
    compare_counts,
    entry_reporter,
    report_copied,
)
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage
from qcowkit.units import INT64_MAX


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
    found = survey(storage, metadata, log=log, effort=effort)
    judge = Recount(
        storage, metadata, found, log=log, effort=effort, window_clusters=window_clusters
    )
    judge.run()
    return judge.statistics


class Recount(Counting):
    """A counting whose findings are written into the log. `statistics`: when it has run."""

    allocated = fragmented = compressed = image_end = 0
    runs: RunAudit | None = None

    def run(self) -> None:
        """Count, and compare the record of contiguous runs with what was seen."""
        found = usable_runs(self.metadata, data_size=self._data_size)
        if found is not None:
            self.runs = RunAudit(
                found,
                cluster_size=self.geometry.cluster_size,
                l2_entries=self.geometry.l2_entries,
            )
        super().run()
        if self.runs is not None:
            self.runs.report(self.log)

    @property
    def _data_size(self) -> int:
        """Of an external data file nothing is known here."""
        return INT64_MAX if self.metadata.data_file else self.storage.size()

    @property
    def statistics(self) -> Statistics:
        """Of what was seen so far."""
        return Statistics(
            total=self.geometry.clusters(self.metadata.virtual_size),
            allocated=self.allocated,
            fragmented=self.fragmented,
            compressed=self.compressed,
            image_end=self.image_end,
        )

    def reporter(self, tables: TableSet) -> Reporter:
        """The log."""
        return entry_reporter(self.log, tables, per_table=self.geometry.l2_entries)

    def see_tables(
        self, tables: TableSet, entries: Uint64Array, bitmaps: Uint64Array | None, links: Links
    ) -> None:
        """Take statistics of active tables. Neighbours are compared within one table only, as qemu
        does."""
        if tables.guest[0] < 0:
            return
        if self.runs is not None:
            self.runs.see(tables, entries, bitmaps, links)
        apart = links.host[1:] != links.host[:-1] + self.geometry.cluster_size
        starts = np.arange(1, len(tables.offset), dtype=np.int64) * self.geometry.l2_entries
        edges = np.searchsorted(links.where, starts)
        edges = edges[(edges > 0) & (edges < len(links.where)) & (np.diff(edges, prepend=0) > 0)]
        fragmented = int(np.count_nonzero(apart)) - int(np.count_nonzero(apart[edges - 1]))
        self.allocated += len(links.host) + links.packed
        self.compressed += links.packed
        self.fragmented += fragmented + links.packed

    def see_active(
        self, window: Window, tables: TableSet, links: Links, plain: Int64Array, *, first: bool
    ) -> None:
        """COPIED flags against stored refcounts."""
        per_table = self.geometry.l2_entries
        if self.rules.external_data:
            # COPIED means only that the cluster is there.
            if first:
                missing = np.flatnonzero(~links.copied)
                report_copied(self.log, tables, links, missing, None, per_table=per_table)
            return
        mask = window.inside(plain)
        index = None if mask is None else np.flatnonzero(mask)
        stored = window.stored_of(plain if index is None else plain[index])
        copied = links.copied if index is None else links.copied[index]
        wrong = np.flatnonzero((stored == 1) != copied)
        if len(wrong):
            counts = stored[wrong]
            wrong = wrong if index is None else index[wrong]
            report_copied(self.log, tables, links, wrong, counts, per_table=per_table)

    def see_window(self, window: Window, *, first: bool) -> None:
        """Everything that only complete counts tell."""
        bits, found = self.bits, self.found
        place = self.metadata.header.l1_table_offset
        check_l1_flags(self.log, window, found.links, bits=bits, host_offset=place)
        check_shared(self.log, window, found.claims, found.tables, bits=bits)
        cut = np.concatenate(self.cut) if self.cut else np.zeros(0, dtype=np.int64)
        compare_counts(self.log, window, bits=bits, file_clusters=self.file_clusters, cut=cut)
        end = (window.last_used(self.file_clusters) + 1) << bits
        self.image_end = max(self.image_end, end)
