"""Diff: the ranges in which two disks differ.

Tables come first: where both lead to the same bytes of the same file, as layers of one chain and
snapshots of one image mostly do, nothing is read; nor where both have zeros."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcowkit.engine.batches import plan_batches, runs_of
from qcowkit.engine.executor import BufferPool, ProgressReport, Workers, ignore_progress
from qcowkit.errors import RequestError
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.zeros import zero_units
from qcowkit.image.chain import Chain
from qcowkit.operations.pairs import Mask, Pair, compare_part, iter_pairs, only_within
from qcowkit.units import SECTOR, KiB, MiB, format_size, is_power_of_two

WINDOW = 2 * MiB
DEFAULT_GRANULARITY = 4 * KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What a second disk has that a first one has not, in whole units of `granularity` bytes.

    data, zeros: guest ranges that differ, by what the second disk has there. sizes: of the two
    disks; beyond its end a disk reads as zeros. compared: bytes of each that were looked at."""

    data: RangeSet
    zeros: RangeSet
    sizes: tuple[int, int]
    granularity: int
    compared: int

    @property
    def same(self) -> bool:
        """Whether both show the same, whatever their sizes."""
        return not len(self.data) and not len(self.zeros)

    @property
    def changed(self) -> RangeSet:
        """All ranges that differ."""
        return self.data.union(self.zeros)

    def as_json(self) -> list[dict[str, Any]]:
        """Ascending objects with start, length (bytes), zero (of the second disk)."""
        found = [(start, stop, False) for start, stop in self.data]
        found += [(start, stop, True) for start, stop in self.zeros]
        return [
            {"start": start, "length": stop - start, "zero": zero}
            for start, stop, zero in sorted(found)
        ]

    def render(self) -> list[str]:
        """The lines to print."""
        lines = []
        if self.sizes[0] != self.sizes[1]:
            lines.append(f"the sizes differ: {self.sizes[0]} and {self.sizes[1]} bytes")
        read = f"{format_size(self.compared)} compared"
        if self.same:
            return [*lines, f"nothing differs, {read}"]
        count, changed = len(self.changed), self.changed
        data, zeros = format_size(self.data.total), format_size(self.zeros.total)
        first, last = int(changed.start[0]), int(changed.stop[-1])
        what = "1 range differs" if count == 1 else f"{count} ranges differ"
        place = f"between {first:#x} and {last:#x}"
        return [*lines, f"{what} {place}: {data} of data, {zeros} of zeros; {read}"]


def diff(
    first: Chain,
    second: Chain,
    *,
    granularity: int = DEFAULT_GRANULARITY,
    threads: int | None = None,
    progress: ProgressReport = ignore_progress,
    cancel: threading.Event | None = None,
) -> Difference:
    """Find what the second disk shows otherwise than the first.

    granularity: bytes of a unit, a power of two from 512 to 2 MiB; a unit differs as a whole.
    Raises RequestError for another one, what reading raises, and Cancelled."""
    if not is_power_of_two(granularity) or not SECTOR <= granularity <= WINDOW:
        raise RequestError(
            f"granularity is {granularity}, expected a power of two from {SECTOR} to {WINDOW}"
        )
    work = _Diff(first, second, granularity)
    size = max(first.size, second.size)
    with Workers(threads, cancel=cancel) as workers:
        for pair in iter_pairs(first, second, size=size, align=WINDOW):
            workers.check_cancelled()
            batches = work.batches(pair)
            with contextlib.closing(workers.map_ordered(work.compare, batches)) as results:
                for data, zeros in results:
                    work.note(data, zeros)
            progress(pair.stop, size)
    return work.result()


class _Diff:
    """The work and what has been found so far."""

    def __init__(self, first: Chain, second: Chain, granularity: int) -> None:
        self._first, self._second = first, second
        self._unit = granularity
        self._pool = BufferPool(WINDOW)
        self._data: list[RangeSet] = []
        self._zeros: list[RangeSet] = []
        self._compared = 0

    def batches(self, pair: Pair) -> Iterator[tuple[Pair, int, int]]:
        """Ranges to be read, within one WINDOW of the guest each."""
        units = pair.suspects.scale_outward(self._unit).scale_up(self._unit)
        units = units.clip(pair.start, pair.stop)
        self._compared += units.total
        asked = only_within(pair, units)
        starts, stops = plan_batches(units, window=WINDOW)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            yield asked, start, stop

    def compare(self, batch: tuple[Pair, int, int]) -> tuple[RangeSet, RangeSet]:
        """The units of a batch that differ, with data and with zeros. Runs in workers."""
        pair, start, stop = batch
        left, right = self._pool.take(), self._pool.take()
        differs = compare_part(
            (self._second, self._first),
            (pair.second, pair.first),
            (right, left),
            start=start,
            stop=stop,
            unit=self._unit,
        )
        zero = zero_units(right[: stop - start], self._unit)
        self._pool.give(left)
        self._pool.give(right)
        return self._ranges(differs & ~zero, start, stop), self._ranges(differs & zero, start, stop)

    def _ranges(self, units: Mask, start: int, stop: int) -> RangeSet:
        firsts, lasts = (np.array(edges, dtype=np.int64) for edges in runs_of(units))
        return RangeSet.of(
            start + firsts * self._unit, np.minimum(start + lasts * self._unit, stop)
        )

    def note(self, data: RangeSet, zeros: RangeSet) -> None:
        """Keep what was found."""
        self._data.append(data)
        self._zeros.append(zeros)

    def result(self) -> Difference:
        """All of it."""
        return Difference(
            data=_union(self._data),
            zeros=_union(self._zeros),
            sizes=(self._first.size, self._second.size),
            granularity=self._unit,
            compared=self._compared,
        )


def _union(parts: list[RangeSet]) -> RangeSet:
    if not parts:
        return RangeSet.empty()
    starts = np.concatenate([part.start for part in parts])
    return RangeSet.of(starts, np.concatenate([part.stop for part in parts]))
