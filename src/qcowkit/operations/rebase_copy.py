"""What a rebase copies: units of which the overlay has nothing, where the two chains differ."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qcowkit.engine.batches import plan_batches, rows_of, runs_of
from qcowkit.engine.executor import BufferPool, ProgressReport, Workers
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import Flag
from qcowkit.extents.zeros import zero_units
from qcowkit.image.chain import Chain
from qcowkit.operations.pairs import Bytes, Mask, Pair, compare_part, iter_pairs, only_within
from qcowkit.units import MiB

WINDOW = 2 * MiB
_MOST_ENTRIES = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """A range that is read from both chains; wanted: where the two may differ in what counts."""

    pair: Pair
    start: int
    stop: int
    wanted: RangeSet


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What the old chain shows in a range, and by unit: where that differs, where it is zero."""

    start: int
    stop: int
    buffer: Bytes
    differs: Mask
    zero: Mask


class RebaseCopy:
    """The copy. copied, zeroed, compared: bytes."""

    def __init__(
        self,
        top: Chain,
        below: Chain | None,
        other: Chain | None,
        *,
        compress: bool,
        threads: int | None,
        progress: ProgressReport,
        cancel: threading.Event | None,
    ) -> None:
        image = top.images[0]
        metadata = image.metadata
        assert isinstance(metadata, Qcow2Metadata), "checked before"
        self._top, self._below, self._other = top, below, other
        self._image = image
        self._compress, self._threads = compress, threads
        self._progress = progress
        self._cancel = cancel
        self._cluster = metadata.cluster_size
        # The least that can be there while the rest shows the base.
        self._unit = metadata.geometry.subcluster_size
        # Without a base version 2 leaves zeros unallocated, where the new base would show.
        self._has_zeros = metadata.header.version >= 3
        self._pool = BufferPool(max(WINDOW, self._cluster))
        self.copied = self.zeroed = self.compared = 0

    def run(self) -> None:
        """Copy; durable on return."""
        window = max(WINDOW, self._cluster)
        with Workers(self._threads, cancel=self._cancel) as workers:
            for pair in iter_pairs(self._below, self._other, size=self._top.size, align=window):
                workers.check_cancelled()
                work = workers.map_ordered(self._compare, self._batches(pair, window))
                with contextlib.closing(work) as parts:
                    for found in parts:
                        self._store(found)
                        self._pool.give(found.buffer)
                        self._progress(found.stop, self._top.size)
                self._progress(pair.stop, self._top.size)
        self._top.flush()

    def _batches(self, pair: Pair, window: int) -> Iterator[_Batch]:
        """Whole units that the top leaves to the chain below, and that may differ."""
        if not len(pair.suspects):
            return
        units = pair.suspects.scale_outward(self._unit).scale_up(self._unit)
        units = units.clip(pair.start, pair.stop)
        wanted = units.difference(self._present(pair.start, pair.stop))
        reach = wanted
        if self._compress:
            # A cluster is compressed as a whole.
            reach = wanted.scale_outward(self._cluster).scale_up(self._cluster)
            reach = reach.clip(pair.start, pair.stop)
        self.compared += reach.total
        asked = only_within(pair, reach)
        starts, stops = plan_batches(reach, window=window)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            yield _Batch(pair=asked, start=start, stop=stop, wanted=wanted)

    def _present(self, start: int, stop: int, *, placed: bool = False) -> RangeSet:
        """What the top decides itself. placed: and what has a host cluster without deciding."""
        found, at = RangeSet.empty(), start
        while at < stop:
            table = self._image.extents(start=at, length=stop - at, limit=_MOST_ENTRIES)
            found = found.union(rows_of(table, Flag.PRESENT))
            if placed:
                chosen = table.start[table.host >= 0]
                ends = (table.start + table.length)[table.host >= 0]
                found = found.union(RangeSet.of(chosen, ends))
            at = table.end
        return found

    def _compare(self, batch: _Batch) -> _Found:
        """Runs in workers."""
        length = batch.stop - batch.start
        left, right = self._pool.take(), self._pool.take()
        try:
            differs = compare_part(
                (self._below, self._other),
                (batch.pair.first, batch.pair.second),
                (left, right),
                start=batch.start,
                stop=batch.stop,
                unit=self._unit,
            )
        finally:
            self._pool.give(right)
        begins = batch.start + np.arange(len(differs), dtype=np.int64) * self._unit
        differs &= batch.wanted.contains(begins)
        return _Found(
            start=batch.start,
            stop=batch.stop,
            buffer=left,
            differs=differs,
            zero=zero_units(left[:length], self._unit) & self._has_zeros,
        )

    def _store(self, found: _Found) -> None:
        """Write into the top what the old chain shows, where the new one differs."""
        packed = self._compressible(found)
        for first, last in zip(*runs_of(packed), strict=True):
            self._write(found, first, last, compress=True)
        for first, last in zip(*runs_of(found.differs & found.zero), strict=True):
            start, stop = self._place(found, first, last)
            self._top.write_zeroes(offset=start, length=stop - start)
            self.zeroed += stop - start
        for first, last in zip(*runs_of(found.differs & ~found.zero & ~packed), strict=True):
            self._write(found, first, last, compress=False)

    def _write(self, found: _Found, first: int, last: int, *, compress: bool) -> None:
        start, stop = self._place(found, first, last)
        data = found.buffer[start - found.start : stop - found.start].data
        write = self._top.write_compressed if compress else self._top.write
        write(data, offset=start)
        self.copied += stop - start

    def _place(self, found: _Found, first: int, last: int) -> tuple[int, int]:
        start = found.start + first * self._unit
        return start, min(found.start + last * self._unit, found.stop)

    def _compressible(self, found: _Found) -> Mask:
        """The units of whole clusters with differing data of which the top has nothing yet."""
        packed = np.zeros_like(found.differs)
        if not self._compress:
            return packed
        per_cluster = self._cluster // self._unit
        taken = self._present(found.start, found.stop, placed=True)
        taken = taken.scale_outward(self._cluster).scale_up(self._cluster)
        for first in range(0, len(packed), per_cluster):
            units = slice(first, first + per_cluster)
            wanted = bool((found.differs[units] & ~found.zero[units]).any())
            if wanted and (found.start + first * self._unit) not in taken:
                packed[units] = True
        found.differs[packed] = False
        return packed
