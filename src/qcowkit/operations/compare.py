"""Compare: do two guest disks have the same content?"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcowkit.engine.batches import plan_batches, rows_of
from qcowkit.engine.executor import BufferPool, ProgressReport, Workers, ignore_progress
from qcowkit.extents.algebra import clip
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import ExtentTable, Flag
from qcowkit.image.chain import WINDOW_ENTRIES, Chain
from qcowkit.units import MiB, align_down

WINDOW = 2 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareResult:
    """The verdict. offset: the first guest byte that differs, None where sizes alone do.

    reason: one line for people. sizes: of the two disks, bytes."""

    same: bool
    reason: str
    offset: int | None
    sizes: tuple[int, int]

    def as_json(self) -> dict[str, Any]:
        """Keys: identical, reason, offset (where one is known), sizes."""
        found: dict[str, Any] = {"identical": self.same, "reason": self.reason}
        if self.offset is not None:
            found["offset"] = self.offset
        return {**found, "sizes": list(self.sizes)}

    def render(self) -> list[str]:
        """The lines to print."""
        lines = []
        if self.same and self.sizes[0] != self.sizes[1]:
            lines.append(
                f"the sizes differ, {self.sizes[0]} and {self.sizes[1]} bytes; the rest is zero"
            )
        return [*lines, self.reason]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """The same guest range of both disks; a table may be shorter where its disk ends."""

    start: int
    stop: int
    first: ExtentTable
    second: ExtentTable


def compare(
    first: Chain,
    second: Chain,
    *,
    strict: bool = False,
    progress: ProgressReport = ignore_progress,
    threads: int | None = None,
    cancel: threading.Event | None = None,
) -> CompareResult:
    """Compare two disks; what one has beyond the other's end must be zero.

    strict: sizes must be equal, and both must have allocated the same ranges. Raises what reading
    raises, and Cancelled."""
    sizes = (first.size, second.size)

    def verdict(offset: int | None, reason: str) -> CompareResult:
        same = offset is None and reason == "the disks are identical"
        return CompareResult(same=same, reason=reason, offset=offset, sizes=sizes)

    if strict and first.size != second.size:
        return verdict(None, f"the sizes differ: {first.size} and {second.size} bytes")
    total = max(sizes)
    pool = BufferPool(WINDOW)
    work = _Comparison(first=first, second=second, pool=pool)
    with Workers(threads, cancel=cancel) as workers:
        for pair in _windows(first, second):
            if strict:
                at = _allocation_difference(pair.first, pair.second)
                if at is not None:
                    return verdict(at, f"the allocation differs at offset {at}")
            with contextlib.closing(
                workers.map_ordered(work.difference, _read_batches(pair))
            ) as differences:
                for found in differences:
                    if found is not None:
                        return verdict(found, f"the content differs at offset {found}")
            progress(pair.stop, total)
    progress(total, total)
    return verdict(None, "the disks are identical")


def _windows(first: Chain, second: Chain) -> Iterator[_Pair]:
    """Bounded tables of both disks over the same ranges, cut at multiples of WINDOW."""
    start, stop = 0, max(first.size, second.size)
    while start < stop:
        upper, lower = _map_until(first, start, stop), _map_until(second, start, stop)
        # A disk that ends here imposes nothing on the other.
        ends = [
            table.end
            for table, disk in ((upper, first), (lower, second))
            if len(table) and table.end < disk.size
        ]
        end = min([stop, *ends])
        if end < stop and align_down(end, WINDOW) > start:
            end = align_down(end, WINDOW)
        yield _Pair(start=start, stop=end, first=upper, second=lower)
        start = end


def _map_until(disk: Chain, start: int, stop: int) -> ExtentTable:
    length = min(stop, disk.size) - start
    return disk.extents(start=min(start, disk.size), length=max(0, length), limit=WINDOW_ENTRIES)


def _read_batches(pair: _Pair) -> Iterator[_Pair]:
    """Only where at least one of the two may hold something else than zeros."""
    first = clip(pair.first, pair.start, pair.stop)
    second = clip(pair.second, pair.start, pair.stop)
    data = rows_of(first, Flag.DATA, without=Flag.ZERO).union(
        rows_of(second, Flag.DATA, without=Flag.ZERO)
    )
    starts, stops = plan_batches(data, window=WINDOW)
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        yield _Pair(start=start, stop=stop, first=first, second=second)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Comparison:
    first: Chain
    second: Chain
    pool: BufferPool

    def difference(self, pair: _Pair) -> int | None:
        """The first guest offset of the range that differs. Runs in workers."""
        left = self._read(self.first, pair.first, pair)
        right = self._read(self.second, pair.second, pair)
        length = pair.stop - pair.start
        try:
            at = first_difference(left[:length], right[:length])
        finally:
            self.pool.give(left)
            self.pool.give(right)
        return None if at is None else pair.start + at

    def _read(self, disk: Chain, table: ExtentTable, pair: _Pair) -> npt.NDArray[np.uint8]:
        buffer = self.pool.take()
        part = clip(table, pair.start, pair.stop)
        count = part.end - part.begin
        if count:
            disk.read_table(part, buffer.data[:count])
        buffer[count : pair.stop - pair.start] = 0
        return buffer


def first_difference(left: npt.NDArray[np.uint8], right: npt.NDArray[np.uint8]) -> int | None:
    """The index of the first byte that differs, None if none does; equal shapes (n,)."""
    whole = len(left) & -8
    words = left[:whole].view(np.uint64) != right[:whole].view(np.uint64)
    if words.any():
        begin = int(words.argmax()) * 8
    elif whole < len(left):
        begin = whole
    else:
        return None
    unequal = left[begin : begin + 8] != right[begin : begin + 8]
    return begin + int(unequal.argmax()) if unequal.any() else None


def _allocation_difference(first: ExtentTable, second: ExtentTable) -> int | None:
    """Where the first range begins that one of the two has allocated and the other has not."""
    stop = min(first.end, second.end)
    mine, yours = (rows_of(table, Flag.PRESENT).clip(0, stop) for table in (first, second))
    found = _either_only(mine, yours)
    return int(found.start[0]) if len(found) else None


def _either_only(one: RangeSet, other: RangeSet) -> RangeSet:
    return one.difference(other).union(other.difference(one))
