"""Interval sets of bytes or of cluster indices: sorted, disjoint, maximal. Pure.

Half-open inside; `pairs` and `from_pairs` are the inclusive view that allocation JSON uses. Every
operation costs time and memory by the number of runs, never by what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcowkit.extents.table import ExtentTable, Int64Array

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RangeSet:
    """Integers as runs [start, stop). Columns of shape (n,), ascending; no two runs touch."""

    start: Int64Array
    stop: Int64Array

    @classmethod
    def of(cls, start: npt.ArrayLike, stop: npt.ArrayLike) -> RangeSet:
        """From ranges in any order, overlapping or not; empty ones count for nothing."""
        starts = np.atleast_1d(np.asarray(start, dtype=np.int64))
        stops = np.atleast_1d(np.asarray(stop, dtype=np.int64))
        kept = stops > starts
        if not kept.all():
            starts, stops = starts[kept], stops[kept]
        if bool((starts[1:] < starts[:-1]).any()):
            order = np.argsort(starts, kind="stable")
            starts, stops = starts[order], stops[order]
        return _join_touching(starts, stops)

    @classmethod
    def empty(cls) -> RangeSet:
        """The set of nothing."""
        return cls.of([], [])

    @classmethod
    def from_pairs(cls, pairs: npt.ArrayLike) -> RangeSet:
        """From inclusive `[first, last]` pairs, shape (n, 2)."""
        array = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
        return cls.of(array[:, 0], array[:, 1] + 1)

    @classmethod
    def from_table(cls, table: ExtentTable, flag: int) -> RangeSet:
        """The guest bytes of the rows with any bit of `flag`."""
        chosen = (table.flags & flag) != 0
        start = table.start[chosen]
        return _join_touching(start, start + table.length[chosen])

    def __len__(self) -> int:
        """The number of runs."""
        return len(self.start)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Runs as (start, stop), plain integers."""
        return zip(self.start.tolist(), self.stop.tolist(), strict=True)

    def __contains__(self, value: int) -> bool:
        """By bisection."""
        index = int(np.searchsorted(self.start, value, side="right")) - 1
        return index >= 0 and value < int(self.stop[index])

    def __eq__(self, other: object) -> bool:
        """The same integers."""
        if not isinstance(other, RangeSet):
            return NotImplemented
        return np.array_equal(self.start, other.start) and np.array_equal(self.stop, other.stop)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """The first runs."""
        shown = ", ".join(f"[{start}, {stop})" for start, stop in zip(*self._head(), strict=True))
        return f"RangeSet({shown}{', ...' if len(self) > 4 else ''})"

    @property
    def total(self) -> int:
        """How many integers are in the set."""
        return int((self.stop - self.start).sum())

    def contains(self, values: npt.ArrayLike) -> BoolArray:
        """For each value, whether it is in the set; the values may have any order."""
        points = np.asarray(values, dtype=np.int64)
        if not len(self):
            return np.zeros(points.shape, dtype=np.bool_)
        index = np.searchsorted(self.start, points, side="right") - 1
        return np.asarray((index >= 0) & (points < self.stop[index]), dtype=np.bool_)

    def union(self, other: RangeSet) -> RangeSet:
        """What is in either."""
        return _combine(self, other, np.logical_or)

    def intersection(self, other: RangeSet) -> RangeSet:
        """What is in both."""
        return _combine(self, other, np.logical_and)

    def difference(self, other: RangeSet) -> RangeSet:
        """What is in this set and not in the other; exact within runs (seed S000-7)."""
        return _combine(self, other, np.greater)

    def complement(self, start: int, stop: int) -> RangeSet:
        """What of [start, stop) is not in the set."""
        return RangeSet.of([start], [stop]).difference(self)

    def clip(self, start: int, stop: int) -> RangeSet:
        """What of the set lies in [start, stop)."""
        return RangeSet.of(np.clip(self.start, start, stop), np.clip(self.stop, start, stop))

    def scale_outward(self, unit: int) -> RangeSet:
        """The indices of the units of `unit` that any member touches: floor of the start, ceiling
        of the stop, so that no partial unit is lost (seed S000-10)."""
        return _join_touching(self.start // unit, -(-self.stop // unit))

    def scale_up(self, unit: int) -> RangeSet:
        """Indices of units back to the bytes that they cover."""
        return RangeSet(start=self.start * unit, stop=self.stop * unit)

    def pairs(self) -> npt.NDArray[np.int64]:
        """Inclusive `[first, last]`, shape (n, 2)."""
        return np.stack((self.start, self.stop - 1), axis=1)

    def _head(self) -> tuple[list[int], list[int]]:
        return self.start[:4].tolist(), self.stop[:4].tolist()


def _join_touching(start: Int64Array, stop: Int64Array) -> RangeSet:
    """Runs with ascending starts made disjoint and maximal."""
    if len(start) > 1:
        reach = np.maximum.accumulate(stop)
        apart = start[1:] > reach[:-1]
        if not apart.all():
            first = np.append(True, apart)
            last = np.append(apart, True)
            start, stop = start[first], reach[last]
    return RangeSet(start=start, stop=stop)


def _combine(left: RangeSet, right: RangeSet, rule: Callable[..., Any]) -> RangeSet:
    """Between two neighbouring edges of either set membership is constant: ask there once."""
    edges = np.concatenate((left.start, left.stop, right.start, right.stop))
    # np.unique would do, but its first call imports a module as large as all of ours.
    edges.sort()
    edges = edges[np.append(True, edges[1:] != edges[:-1])] if len(edges) else edges
    begins, ends = edges[:-1], edges[1:]
    kept = rule(left.contains(begins), right.contains(begins))
    return _join_touching(begins[kept], ends[kept])
