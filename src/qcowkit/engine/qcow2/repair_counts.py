"""Stored refcounts made to agree with the references, in the blocks that are there."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.refcount_block import encode_refcounts, view_refcounts
from qcowkit.engine.qcow2.counters import SATURATED, Window
from qcowkit.engine.qcow2.counting import Counting
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.repair_run import RepairRun
from qcowkit.engine.repairs import ChangeKind, StrictLog
from qcowkit.extents.table import Int64Array
from qcowkit.units import SECTOR, align_up

# Counts that are compared at once, to keep memory small.
_AT_ONCE = 1 << 20


def raise_counts(run: RepairRun, metadata: Qcow2Metadata) -> None:
    """Bring counts below the references up to them, as far as their width allows. The caller waits
    for a barrier."""
    _adjust(run, metadata, lower=False)


def lower_counts(run: RepairRun, metadata: Qcow2Metadata) -> None:
    """Bring counts above the references down to them. The caller waits for a barrier."""
    _adjust(run, metadata, lower=True)


def _adjust(run: RepairRun, metadata: Qcow2Metadata, *, lower: bool) -> None:
    _Adjustment(run, metadata, lower=lower).run()


class _Adjustment(Counting):
    """A counting that writes what it finds."""

    def __init__(self, run: RepairRun, metadata: Qcow2Metadata, *, lower: bool) -> None:
        effort = run.effort()
        super().__init__(
            run.storage,
            metadata,
            run.survey(metadata, effort),
            log=StrictLog(),
            effort=effort,
            window_clusters=run.window_clusters,
        )
        self._run = run
        self._lower = lower
        self._most = min(self.geometry.refcount_max, SATURATED)

    def see_window(self, window: Window, *, first: bool) -> None:
        """Change the counts of a window."""
        step = max(_AT_ONCE, self.geometry.refcounts_per_block)
        for begin in range(0, window.size, step):
            self._adjust(window, begin, min(begin + step, window.size))

    def _adjust(self, window: Window, begin: int, end: int) -> None:
        computed, stored = window.computed[begin:end], window.stored[begin:end]
        wanted = np.minimum(computed, np.uint32(self._most))
        index = np.flatnonzero(wanted < stored if self._lower else wanted > stored)
        if not len(index):
            return
        stored, target = stored[index], wanted[index]
        clusters = index + (window.base + begin)

        def make(number: int) -> str:
            place = int(clusters[number]) << self.bits
            return (
                f"cluster at host offset {place:#x}: refcount {int(stored[number])} -> "
                f"{int(target[number])}"
            )

        kind = ChangeKind.LOWERED if self._lower else ChangeKind.RAISED
        self._run.changes.add_many(kind, len(index), make)
        self._store(clusters, target)

    def _store(self, clusters: Int64Array, counts: npt.NDArray[np.uint32]) -> None:
        """clusters: ascending; every one has a block."""
        block, place = np.divmod(clusters, self.geometry.refcounts_per_block)
        edges = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(block)]
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            offset = int(self.found.blocks[block[begin]])
            assert offset, "a count without a block"
            self._store_block(offset, place[begin:end], counts[begin:end])

    def _store_block(self, offset: int, places: Int64Array, counts: npt.NDArray[np.uint32]) -> None:
        """Write the sectors of one block from the first count that changes to the last."""
        raw = self.reader.read(offset, self.geometry.cluster_size, "refcount block")
        order = self.geometry.refcount_order
        changed: npt.NDArray[Any] = view_refcounts(raw.data, order).copy()
        changed[places] = counts
        first = (int(places[0]) << order >> 3) // SECTOR * SECTOR
        last = align_up((int(places[-1]) << order >> 3) + 1, SECTOR)
        begin, end = (first << 3) >> order, (last << 3) >> order
        self._run.write(encode_refcounts(changed[begin:end], order), offset=offset + first)
