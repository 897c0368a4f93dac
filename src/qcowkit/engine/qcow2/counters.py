"""Reference counters of a bounded window of host clusters. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcowkit.extents.table import Int64Array
from qcowkit.units import MiB

# Clusters counted at once: 64 MiB of counters. A multiple of what any refcount block counts.
WINDOW = 1 << 24
SATURATED = 0xFFFF_FFFF

CountArray = npt.NDArray[np.uint32]


class Window:
    """Counters of host clusters [base, base + size), and what the file says of them.

    stored: refcounts of any unsigned type, shape (size,). computed: uint32, stops at SATURATED.
    packed: the part of it that refers to compressed data, None while there is none."""

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
        exact = self._added <= SATURATED
        index = clusters - self.base if self.base else clusters
        _accumulate(self.computed, index, weights, exact=exact)
        if packed:
            if self.packed is None:
                self.packed = np.zeros(self.size, dtype=np.uint32)
            _accumulate(self.packed, index, weights, exact=exact)

    def stored_of(self, clusters: Int64Array) -> npt.NDArray[Any]:
        """Stored refcounts of clusters in the window."""
        return self.stored.take(clusters - self.base if self.base else clusters)

    def computed_of(self, clusters: Int64Array) -> Int64Array:
        """Computed refcounts of clusters in the window."""
        return self.computed.take(clusters - self.base).astype(np.int64)

    def last_used(self, limit: int, *, stored: bool = True) -> int:
        """The highest cluster below `limit` with either count, -1 for none.

        stored: whether the stored count alone will do."""
        stop = min(self.size, max(0, limit - self.base))
        for end in range(stop, 0, -MiB):
            begin = max(0, end - MiB)
            counted = self.computed[begin:end] != 0
            if stored:
                counted |= self.stored[begin:end] != 0
            used = np.flatnonzero(counted)
            if len(used):
                return self.base + begin + int(used[-1])
        return -1


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
    counts[places] = np.minimum(sums, SATURATED)
