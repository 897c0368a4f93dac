"""Bulk copying: a guest disk read by workers, placed in order, written by workers."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.compression import Compressor
from qcowkit.engine.batches import plan_batches, rows_of
from qcowkit.engine.executor import (
    BufferPool,
    ProgressReport,
    RateLimit,
    Turnstile,
    Workers,
    ignore_progress,
)
from qcowkit.engine.transfer import Blob, BulkTarget, Chunk, UnitState
from qcowkit.errors import StorageError
from qcowkit.extents.algebra import clip, units_with
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import Extent, ExtentTable, Flag
from qcowkit.extents.zeros import zero_units
from qcowkit.image.qcow2 import Qcow2Image
from qcowkit.image.views import Disk
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, KiB, MiB, align_down, align_up, ceil_div

# Bytes read together by one worker, and by all workers.
WINDOW = 4 * MiB
_MOST_BUFFERED = 64 * MiB
# Shorter runs are not worth a call into the host's file system of their own.
MIN_DIRECT = 64 * KiB

HostCopy = Callable[[Storage, Storage, int, int, int], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRules:
    """How to copy. compress: from cluster to blob, None for plain. cluster_size: of the target when
    it compresses. verbatim: images whose compressed clusters may be copied as they are.
    top_only: only what the top layer decides is copied, the rest stays ABSENT.
    zero_as_data: the target cannot say that a cluster is zero. everything: zeros are data too.
    host_copy: the host's own way of copying a run, None to read and write."""

    compress: Compressor | None = None
    cluster_size: int = 0
    verbatim: frozenset[int] = frozenset()
    top_only: bool = False
    zero_as_data: bool = False
    everything: bool = False
    host_copy: HostCopy | None = None
    rate: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A guest range to be read together, and what is known of it."""

    start: int
    stop: int
    table: ExtentTable


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroRange:
    """A guest range that only has to be told to be zero."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectRange:
    """A guest range that the host copies: one plain run of one layer."""

    start: int
    stop: int
    run: Extent


Work = Batch | ZeroRange | DirectRange


class Copier:
    """One bulk copy of `disk` to `target`.

    A worker reads an item, waits for its turn to place it, and writes it while it is still in the
    processor's cache. Placing in turn makes the result independent of the number of workers."""

    def __init__(
        self,
        disk: Disk,
        target: BulkTarget,
        *,
        rules: CopyRules,
        workers: Workers,
        progress: ProgressReport = ignore_progress,
    ) -> None:
        self._disk = disk
        self._target = target
        self._rules = rules
        self._workers = workers
        self._progress = progress
        self._window = max(plan_window(workers.threads), target.unit)
        self._pool = BufferPool(self._window)
        self._turnstile = Turnstile()

    def run(self) -> None:
        """Copy all of it. The caller finishes the target. Raises what reading or writing raises."""
        limit = RateLimit(self._rules.rate)
        total = self._disk.size
        work = self._workers.map_ordered(self._handle, enumerate(self._items()))
        with contextlib.closing(work) as items:
            for item in items:
                if self._rules.rate is not None:
                    limit.spend(item.stop - item.start)
                self._progress(item.stop, total)
        self._progress(total, total)

    def _handle(self, numbered: tuple[int, Work]) -> Work:
        """Read, place in turn, write. Runs in workers."""
        ticket, item = numbered
        if isinstance(item, Batch):
            self._copy_batch(ticket, item)
        elif isinstance(item, ZeroRange):
            with self._turnstile.turn(ticket):
                self._target.place_zeros(item.start, item.stop - item.start)
        else:
            self._copy_direct(ticket, item)
        return item

    def _copy_batch(self, ticket: int, item: Batch) -> None:
        buffer = self._pool.take()
        try:
            chunk = self._load(item, buffer)
        except BaseException:
            self._turnstile.give_up(ticket)
            raise
        with self._turnstile.turn(ticket):
            writes = self._target.place(chunk)
        for write in writes:
            write.run()
        self._pool.give(buffer)

    # What to do, in ascending order. Runs in the consuming thread.

    def _items(self) -> Iterator[Work]:
        for table in self._disk.iter_extents(align=self._window):
            yield from self._plan(table)

    def _plan(self, table: ExtentTable) -> Iterator[Work]:
        begin, end, unit = table.begin, table.end, self._target.unit
        shown = self._shown(table)
        if self._rules.everything:
            copied, zeros = RangeSet.of([begin], [end]), RangeSet.empty()
        else:
            copied = _outward(rows_of(shown, Flag.DATA, without=Flag.ZERO), unit).clip(begin, end)
            zeros = self._zeros(shown)
            if self._rules.zero_as_data:
                copied = copied.union(_outward(zeros, unit).clip(begin, end))
        direct = list(self._direct(table)) if self._rules.host_copy else []
        stops = [run.start + run.length for run in direct]
        taken = RangeSet.of([run.start for run in direct], stops)
        inner = _inward(zeros, unit, self._disk.size).difference(copied)
        copied = copied.union(_outward(zeros, unit).clip(begin, end).difference(inner))
        copied = copied.difference(taken)
        inner = inner.difference(taken)
        batches = plan_batches(copied, window=self._window, barriers=taken.union(inner))
        work: list[Work] = [
            Batch(start=start, stop=stop, table=table)
            for start, stop in zip(*(column.tolist() for column in batches), strict=True)
        ]
        if direct or len(inner):
            work += [ZeroRange(start=start, stop=stop) for start, stop in inner]
            work += [
                DirectRange(start=run.start, stop=run.start + run.length, run=run) for run in direct
            ]
            work.sort(key=lambda item: item.start)
        yield from work

    def _shown(self, table: ExtentTable) -> ExtentTable:
        """With `top_only`, what the target's own backing file will show is left out."""
        return only_top(table) if self._rules.top_only else table

    def _zeros(self, shown: ExtentTable) -> RangeSet:
        """What must be said to be zero. Without `top_only`, a hole is as zero as a zero cluster."""
        if not self._target.explicit_zeros:
            return RangeSet.empty()
        known = rows_of(shown, Flag.ZERO)
        if self._rules.top_only:
            return known
        data = rows_of(shown, Flag.DATA, without=Flag.ZERO)
        return data.complement(shown.begin, shown.end)

    def _direct(self, table: ExtentTable) -> Iterator[Extent]:
        """Plain runs, cut inward to what target and host can share."""
        opaque = Flag.COMPRESSED | Flag.ENCRYPTED
        plain = (table.flags & (Flag.DATA | Flag.ZERO | opaque)) == Flag.DATA
        if self._rules.top_only:
            plain &= table.layer == 0
        rows = table.take(plain & (table.length >= MIN_DIRECT))
        most = self._target.direct_limit
        for row in rows:
            source = self._disk.images[row.layer].data_storage
            block = max(self._target.unit, source.caps.block_size)
            start = align_up(row.start, block)
            # What the file lacks of its last cluster is zero, and nothing that the host could copy.
            stop = align_down(row.start + min(row.length, source.size() - row.host), block)
            host = row.host + start - row.start
            if stop - start < MIN_DIRECT or host % source.caps.block_size:
                continue
            for at in range(start, stop, most):
                length = min(most, stop - at)
                yield row._replace(start=at, length=length, host=host + at - start)

    # Reading. Runs in workers.

    def _load(self, item: Batch, buffer: npt.NDArray[np.uint8]) -> Chunk:
        table = clip(item.table, item.start, item.stop)
        length = item.stop - item.start
        view = buffer.data
        blobs: list[Blob | None] = []
        kept: dict[int, Blob] = {}
        if self._rules.verbatim:
            table, kept = self._keep_compressed(table)
        self._disk.read_table(table, view[:length])
        states = self._states(table, buffer[:length], kept)
        if self._rules.compress is not None:
            blobs = self._compress(buffer, length, states, kept)
        return Chunk(start=item.start, length=length, states=states, view=view, blobs=tuple(blobs))

    def _states(
        self, table: ExtentTable, data: npt.NDArray[np.uint8], kept: dict[int, Blob]
    ) -> npt.NDArray[np.uint8]:
        grain = self._target.grain
        count = ceil_div(len(data), grain)
        states = np.full(count, UnitState.DATA, dtype=np.uint8)
        if self._rules.everything:
            return states
        states[zero_units(data, grain)] = UnitState.ZERO
        if self._rules.zero_as_data:
            states[states == UnitState.ZERO] = UnitState.DATA
        if self._rules.top_only:
            touched = units_with(self._shown(table), Flag.DATA | Flag.ZERO, grain)
            states[~touched] = UnitState.ABSENT
        per_cluster = self._rules.cluster_size // grain if kept else 0
        for index in kept:
            states[index * per_cluster : (index + 1) * per_cluster] = UnitState.DATA
        return states

    def _keep_compressed(self, table: ExtentTable) -> tuple[ExtentTable, dict[int, Blob]]:
        """Clusters that travel as they are, by index in the batch; the rest of the table reads
        them as zeros. The bytes may end with up to 511 of a neighbour's, as in the source."""
        size = self._rules.cluster_size
        begin = table.begin
        whole = ((table.flags & Flag.COMPRESSED) != 0) & (table.length == size)
        whole &= (table.start % size) == 0
        kept: dict[int, Blob] = {}
        flags = table.flags.copy()
        for position in np.flatnonzero(whole).tolist():
            row = Extent(*next(table.take(slice(position, position + 1)).rows()))
            if row.layer not in self._rules.verbatim or (self._rules.top_only and row.layer):
                continue
            image = self._disk.images[row.layer]
            assert isinstance(image, Qcow2Image), "only qcow2 has compressed clusters"
            stored = image.clusters.read_stored(row)
            if len(stored) < size:
                kept[(row.start - begin) // size] = Blob(stored, row.host % SECTOR)
                flags[position] = Flag.ZERO | Flag.PRESENT
        shown = ExtentTable(
            start=table.start,
            length=table.length,
            flags=flags,
            layer=table.layer,
            host=table.host,
            stored=table.stored,
        )
        return shown, kept

    def _compress(
        self,
        buffer: npt.NDArray[np.uint8],
        length: int,
        states: npt.NDArray[np.uint8],
        kept: dict[int, Blob],
    ) -> list[Blob | None]:
        size, compress = self._rules.cluster_size, self._rules.compress
        assert compress is not None, "a compressing copy has a compressor"
        padded = ceil_div(length, size) * size
        buffer[length:padded] = 0
        view = buffer.data
        per_cluster = size // self._target.grain
        blobs: list[Blob | None] = []
        for index in range(padded // size):
            units = states[index * per_cluster : (index + 1) * per_cluster]
            if index in kept:
                blobs.append(kept[index])
            elif not (units == UnitState.DATA).any():
                blobs.append(None)
            else:
                blob = compress(view[index * size : (index + 1) * size])
                blobs.append(Blob(blob) if len(blob) < size else None)
        return blobs

    # Copying by the host.

    def _copy_direct(self, ticket: int, item: DirectRange) -> None:
        run, share = item.run, self._rules.host_copy
        assert share is not None, "direct ranges need a way to copy"
        source = self._disk.images[run.layer].data_storage
        with self._turnstile.turn(ticket):
            storage, host = self._target.place_direct(item.start, item.stop - item.start)
        if not share(source, storage, run.host, run.length, host):
            self._copy_plainly(source, storage, run, host)

    def _copy_plainly(self, source: Storage, target: Storage, run: Extent, host: int) -> None:
        """The host refused this run, which lay within the source when it was planned: read and
        write it. A source that has shrunk meanwhile is an error, never zeros."""
        for at in range(0, run.length, WINDOW):
            length = min(WINDOW, run.length - at)
            raw = source.pread(length, offset=run.host + at)
            if len(raw) < length:
                reason = f"the file ends after {len(raw)} of {length} bytes at {run.host + at:#x}"
                raise StorageError("read", path=source.name, errno=errno.EIO, reason=reason)
            target.pwrite([raw], offset=host + at)


def only_top(table: ExtentTable) -> ExtentTable:
    """The rows of the top layer; those of deeper layers as if nothing were there.

    What no layer decides has the layer of the deepest one that reaches so far: where that is the
    top, nothing lies below, and it is ZERO."""
    own = np.where((table.flags & Flag.PRESENT) != 0, table.flags, np.uint16(Flag.ZERO))
    return ExtentTable(
        start=table.start,
        length=table.length,
        flags=np.where(table.layer == 0, own, 0).astype(np.uint16),
        layer=table.layer,
        host=table.host,
        stored=table.stored,
    )


def plan_window(threads: int) -> int:
    """Bytes of a batch, a power of two: fewer for many workers, so that memory stays bounded."""
    share = max(1, _MOST_BUFFERED // threads)
    return max(MiB // 4, min(WINDOW, 1 << (share.bit_length() - 1)))


def _outward(ranges: RangeSet, unit: int) -> RangeSet:
    return ranges.scale_outward(unit).scale_up(unit)


def _inward(ranges: RangeSet, unit: int, size: int) -> RangeSet:
    """The whole units within the ranges; the last unit of the disk may be short."""
    stop = np.where(ranges.stop == size, align_up(size, unit), ranges.stop)
    inner = RangeSet.of(-(-ranges.start // unit) * unit, stop // unit * unit)
    return inner.clip(0, size)
