"""What a commit copies: what the layers above the base decide, data as data, zeros as zeros."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcowkit.engine.batches import plan_batches, rows_of
from qcowkit.engine.executor import BufferPool, ProgressReport, RateLimit, Workers
from qcowkit.extents.algebra import clip
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import ExtentTable, Flag
from qcowkit.image.chain import Chain
from qcowkit.operations.resize import check_size
from qcowkit.units import MiB

WINDOW = 2 * MiB
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """A part of the disk: where the base gets data, and where zeros."""

    table: ExtentTable
    data: RangeSet
    zeros: RangeSet


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """A guest range to be read together. pieces: the parts of it that are written."""

    table: ExtentTable
    start: int
    stop: int
    pieces: tuple[tuple[int, int], ...]


class CommitCopy:
    """The copy. copied, zeroed: bytes."""

    def __init__(
        self,
        above: Chain,
        base: Chain,
        *,
        rate: int | None,
        threads: int | None,
        progress: ProgressReport,
        cancel: threading.Event | None,
    ) -> None:
        self._above = above
        self._base = base
        self._rate, self._threads = rate, threads
        self._progress = progress
        self._cancel = cancel
        self._pool = BufferPool(WINDOW)
        # What a short layer between the two does not reach is zero, whatever the base holds.
        self._reach = min(image.size for image in above.images)
        # What is added to the base reads as zeros already.
        self._old_size = base.size
        self.copied = self.zeroed = 0

    def grow(self) -> None:
        """Make the base as large as the top's disk."""
        if self._base.size < self._above.size:
            check_size(self._above.size, format=self._base.format)
            self._base.resize(self._above.size)

    def run(self) -> None:
        """Write what the layers above decide; durable on return."""
        limit = RateLimit(self._rate)
        with Workers(self._threads, cancel=self._cancel) as workers:
            for window in self._windows():
                workers.check_cancelled()
                for start, stop in window.zeros:
                    self._base.write_zeroes(offset=start, length=stop - start, unmap=True)
                    self.zeroed += stop - start
                work = workers.map_ordered(self._read, _batches(window))
                with contextlib.closing(work) as batches:
                    for batch, buffer in batches:
                        limit.spend(self._write(batch, buffer))
                        self._pool.give(buffer)
                        self._progress(batch.stop, self._above.size)
                self._progress(window.table.end, self._above.size)
        self._base.flush()

    def _windows(self) -> Iterator[_Window]:
        for table in self._above.iter_extents(align=WINDOW):
            zeros = rows_of(table, Flag.ZERO)
            missing = rows_of(table, Flag.PRESENT).complement(table.begin, table.end)
            hidden = missing.clip(max(table.begin, self._reach), table.end)
            unseen = RangeSet.of([self._old_size], [max(self._old_size, table.end)])
            yield _Window(
                table=table,
                data=rows_of(table, Flag.DATA, without=Flag.ZERO),
                zeros=zeros.union(hidden).difference(unseen),
            )

    def _read(self, batch: _Batch) -> tuple[_Batch, Bytes]:
        """The bytes of a batch in a buffer of the pool. Runs in workers."""
        buffer = self._pool.take()
        part = clip(batch.table, batch.start, batch.stop)
        self._above.read_table(part, buffer.data[: batch.stop - batch.start])
        return batch, buffer

    def _write(self, batch: _Batch, buffer: Bytes) -> int:
        """Write the pieces of a batch, and nothing of what lies between them; their bytes."""
        done = 0
        for start, stop in batch.pieces:
            self._base.write(buffer[start - batch.start : stop - batch.start].data, offset=start)
            done += stop - start
        self.copied += done
        return done


def _batches(window: _Window) -> Iterator[_Batch]:
    """What lies within one WINDOW of the guest each; gaps cost nothing where nothing is decided."""
    data = window.data
    starts, stops = plan_batches(data, window=WINDOW)
    firsts = np.searchsorted(data.stop, starts, side="right")
    lasts = np.searchsorted(data.start, stops, side="left")
    columns = (starts.tolist(), stops.tolist(), firsts.tolist(), lasts.tolist())
    for start, stop, first, last in zip(*columns, strict=True):
        low = np.maximum(data.start[first:last], start).tolist()
        high = np.minimum(data.stop[first:last], stop).tolist()
        pieces = tuple(zip(low, high, strict=True))
        yield _Batch(table=window.table, start=start, stop=stop, pieces=pieces)
