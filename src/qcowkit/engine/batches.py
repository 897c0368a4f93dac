"""Plans of bulk copying: which guest ranges to read together. Pure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import ExtentTable, Int64Array


def plan_batches(
    ranges: RangeSet, *, window: int, barriers: RangeSet | None = None
) -> tuple[Int64Array, Int64Array]:
    """Cut and merge ranges so that each batch lies within one window of the guest.

    window: bytes, a power of two. Ranges of one window become one batch, gaps included, unless a
    barrier lies between them. Returns (start, stop), int64, ascending."""
    first = ranges.start // window
    counts = (ranges.stop - 1) // window - first + 1
    owner = np.repeat(np.arange(len(first)), counts)
    index = first[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = np.maximum(ranges.start[owner], index * window)
    stop = np.minimum(ranges.stop[owner], (index + 1) * window)
    if not len(start):
        return start, stop
    cut = np.append(True, index[1:] != index[:-1])
    if barriers is not None and len(barriers.start):
        before = np.searchsorted(barriers.start, start)
        cut[1:] |= before[1:] != before[:-1]
    heads = np.flatnonzero(cut)
    tails = np.append(heads[1:], len(start)) - 1
    return start[heads], stop[tails]


def rows_of(table: ExtentTable, flag: int, *, without: int = 0) -> RangeSet:
    """Where rows have any bit of `flag` and none of `without`."""
    chosen = ((table.flags & flag) != 0) & ((table.flags & without) == 0)
    start = table.start[chosen]
    return RangeSet.of(start, start + table.length[chosen])


def runs_of(mask: npt.NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """(first, end) indices of the runs of True in a mask of shape (n,)."""
    if mask.all():
        return ([0], [len(mask)]) if len(mask) else ([], [])
    edges = np.flatnonzero(np.diff(mask.view(np.int8), prepend=0, append=0))
    return edges[::2].tolist(), edges[1::2].tolist()
