"""Host clusters for what is new, and quarantine for what is old (docs/adr/0011).

Clusters come from a window: a run of free ones that was found once and is given out by counting.
What was given out is counted in the refcount blocks only when metadata are committed; what was
freed goes the other way once nothing durable refers to it any more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcowkit.engine.qcow2.overlap import OverlapGuard
from qcowkit.engine.qcow2.refcount_store import RefcountStore
from qcowkit.errors import CorruptMetadata, QcowkitError, RequestError
from qcowkit.units import INT64_MAX, ceil_div

NEVER = INT64_MAX
# Runs from here on are counted by themselves, shorter ones of a block together.
_LONG = 64

# (first, count, punch) of host clusters; punch: the host may have their space back.
Released = tuple[int, int, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Clusters given out. zero: they lie beyond what the file ever held and read as zeros."""

    first: int
    count: int
    zero: bool


class Allocator:
    """Gives out and takes back host clusters of one image. Not safe from several threads.

    file_clusters: clusters that the file has now, which may hold anything; NEVER where new ones
    do not read as zeros either (a device)."""

    def __init__(
        self, refcounts: RefcountStore, guard: OverlapGuard, *, file_clusters: int
    ) -> None:
        self.refcounts = refcounts
        self._guard = guard
        self._geometry = refcounts.geometry
        # The window, and its first cluster that was given out and is not in `_raised` yet.
        self._next = self._limit = self._first = 0
        self._scan = 0
        self._fresh = file_clusters
        self._end = 0 if file_clusters == NEVER else file_clusters
        self._end_of_grants = 0
        self._raised: list[list[int]] = []
        self._freed: list[tuple[int, int, bool]] = []
        self._cursor = 0
        self._cursor_count = 0

    @property
    def pending(self) -> bool:
        """Whether counts have still to change."""
        return bool(self._next > self._first or self._raised or self._freed)

    @property
    def end_of_grants(self) -> int:
        """One past the highest cluster that was given out."""
        return max(self._end_of_grants, self._next if self._next > self._first else 0)

    @property
    def quarantined(self) -> int:
        """Runs of clusters that wait for release."""
        return len(self._freed)

    def allocate(self, count: int) -> Grant:
        """`count` clusters or fewer, in one run. Raises RequestError where the file cannot grow,
        CorruptMetadata where what should be free holds metadata."""
        if self._next >= self._limit:
            self._open_window()
        first = self._next
        count = min(count, self._limit - first)
        self._next = stop = first + count
        zero = first >= self._fresh
        if stop > self._fresh:
            self._fresh = stop
        return Grant(first=first, count=count, zero=zero)

    def take_fresh(self) -> int:
        """One cluster that reads as zeros, if the next one is such; -1 if not. Cannot fail."""
        first = self._next
        if first >= self._limit or first < self._fresh:
            return -1
        self._next = self._fresh = first + 1
        return first

    def allocate_run(self, count: int) -> int:
        """`count` clusters in one run, behind everything that is in use; counted at once."""
        first = self._tail()
        blocks, table = self._plan_area(first, count)
        self._build_area(first, blocks=blocks, table=table)
        payload = first + blocks + table
        self.refcounts.add(payload, count, 1)
        self._fresh = max(self._fresh, payload + count)
        return payload

    def allocate_bytes(self, length: int) -> int:
        """A host offset for `length` compressed bytes, at most a cluster, packed behind the ones
        before where that can be."""
        size, limit = self._geometry.cluster_size, self._geometry.refcount_max
        cursor = self._cursor
        left = -cursor % size
        packs = cursor and self._cursor_count < limit
        if packs and length <= left:
            self._raise_again(cursor // size)
            return self._advance(cursor, length, self._cursor_count + 1)
        fresh = self.allocate(1).first
        if packs and left and (cursor + left) == fresh * size:
            self._raise_again(cursor // size)
            return self._advance(cursor, length, 1)
        return self._advance(fresh * size, length, 1)

    def _raise_again(self, cluster: int) -> None:
        self._raised.append([cluster, 1])

    def _advance(self, offset: int, length: int, count: int) -> int:
        end = offset + length
        # A full cluster leaves nothing to pack into.
        self._cursor = end if end % self._geometry.cluster_size else 0
        self._cursor_count = count
        return offset

    def free(self, first: int, count: int, *, punch: bool) -> None:
        """Give up a reference to each of the clusters, once that is durable. punch: the host may
        have their space back then."""
        size = self._geometry.cluster_size
        if first <= self._cursor // size < first + count:
            # What is packed next must not go where somebody else may come to live.
            self._cursor = 0
        freed = self._freed
        if freed and freed[-1][0] + freed[-1][1] == first and freed[-1][2] == punch:
            freed[-1] = (freed[-1][0], freed[-1][1] + count, punch)
        else:
            freed.append((first, count, punch))

    def apply_raised(self) -> None:
        """Count in the blocks what was given out, block by block: what could not be counted stays
        in the list. Raises StorageError and CorruptMetadata."""
        per_block = self.refcounts.per_block
        self._note_grants()
        while self._raised:
            run = self._raised[-1]
            first, count = run
            low = max(first, (first + count - 1) // per_block * per_block)
            self.refcounts.add(low, first + count - low, 1)
            if low > first:
                run[1] = low - first
            else:
                self._raised.pop()

    def release(self) -> list[Released]:
        """Count what was freed, now that nothing durable refers to it; returns the clusters that
        nobody refers to any more. They may be given out again.

        Block by block: where one cannot be read or written, the others are done, and what is left
        waits for the next call. Raises StorageError and CorruptMetadata."""
        assert not self._raised
        assert self._next == self._first
        released: list[Released] = []
        freed, self._freed = self._freed, []
        waiting: list[Released] = []
        try:
            for punch in (False, True):
                waiting = [run for run in freed if run[2] == punch]
                freed = [run for run in freed if run[2] != punch]
                self._count_down(waiting, released)
        finally:
            self._freed += waiting + freed
            for first, count, _ in released:
                self._guard.forget(first=first, count=count)
                self._scan = min(self._scan, first)
        return released

    def _count_down(self, waiting: list[Released], released: list[Released]) -> None:
        """Move runs, all of one wish, from `waiting` to `released` as far as it goes."""
        waiting.sort()
        while waiting:
            first, count, punch = waiting[-1]
            block = (first + count - 1) // self.refcounts.per_block
            # From the end on: what lies in the last block, of long runs only that part.
            low = max(first, block * self.refcounts.per_block)
            is_long = low > first or count >= _LONG
            begin = len(waiting) - 1 if is_long else self._first_of_block(waiting, block)
            # Counted at most once: what is interrupted in between leaks.
            runs = waiting[begin:]
            del waiting[begin:]
            try:
                if is_long:
                    zero = self.refcounts.add(low, first + count - low, -1)
                else:
                    parts = [np.arange(at, at + many, dtype=np.int64) for at, many, _ in runs]
                    zero = self.refcounts.add_scattered(np.sort(np.concatenate(parts)), -1)
            except QcowkitError:
                waiting += runs
                raise
            if low > first:
                waiting.append((first, low - first, punch))
            released += [(at, many, punch) for at, many in zero]

    def _first_of_block(self, waiting: list[Released], block: int) -> int:
        """The index of the first short run at the end of the list that lies in one block."""
        index = len(waiting) - 1
        floor = block * self.refcounts.per_block
        while index and waiting[index - 1][0] >= floor and waiting[index - 1][1] < _LONG:
            before = waiting[index - 1]
            if before[0] + before[1] > floor + self.refcounts.per_block:
                break
            index -= 1
        return index

    def forget_window(self) -> None:
        """Look for free clusters anew: refcount blocks have gone."""
        self.apply_raised()
        self._move_window(0, 0)
        self._scan = 0

    def cut(self, clusters: int) -> None:
        """The file was cut to `clusters` clusters: what lies behind is nobody's, and fresh."""
        self._move_window(0, 0)
        self._scan = min(self._scan, clusters)
        self._cursor = 0
        if self._fresh != NEVER:
            self._fresh = self._end = clusters

    def end_of_use(self) -> int:
        """One past the last cluster with a count."""
        self.apply_raised()
        return self.refcounts.last_in_use() + 1

    # Windows

    def _open_window(self) -> None:
        """Find the next free run; where blocks end, make another that describes itself."""
        per_block = self.refcounts.per_block
        # What was given out must not look free to a search that begins before it.
        self.apply_raised()
        first, count = self.refcounts.find_free(self._scan)
        if not count:
            first = self._start_block(first)
            count = (first // per_block + 1) * per_block - first
        self._check(first, count)
        self._move_window(first, first + count)
        self._scan = first + count

    def _move_window(self, first: int, limit: int) -> None:
        self._note_grants()
        self._first = self._next = first
        self._limit = limit

    def _note_grants(self) -> None:
        """What was given out of the window has to be counted."""
        if self._next > self._first:
            self._end_of_grants = self.end_of_grants
            self._raised.append([self._first, self._next - self._first])
            self._first = self._next

    def _start_block(self, cluster: int) -> int:
        """Put the missing block that describes `cluster` there; returns the next free cluster."""
        block = cluster // self.refcounts.per_block
        if block >= len(self.refcounts.table):
            blocks, table = self._plan_area(cluster, 1)
            self._build_area(cluster, blocks=blocks, table=table)
            cluster += blocks + table
        else:
            self._build_area(cluster, blocks=1, table=0)
            cluster += 1
        if not cluster % self.refcounts.per_block:
            # Blocks of a single entry or two describe nothing but themselves.
            return self._start_block(cluster)
        return cluster

    def _check(self, first: int, count: int) -> None:
        if not first:
            raise CorruptMetadata(
                "refcount block",
                index=0,
                reason="the cluster of the header counts as free, expected a refcount of 1",
            )
        bits = self._geometry.cluster_bits
        if (first + count) << bits > 1 << 56:
            raise RequestError("the image file would reach beyond 2**56 bytes")
        self._guard.check(first=first, count=count)

    # Areas behind everything

    def _tail(self) -> int:
        """The first cluster behind the file, the window and all counts."""
        used = (self.refcounts.last_used + 1) * self.refcounts.per_block
        last = self.refcounts.last_in_use() + 1 if used > self._end else 0
        tail = max(self._end, self._next, last, *(a + b for a, b in self._raised or [[0, 0]]))
        self._limit = max(self._next, min(self._limit, tail))
        return tail

    def _plan_area(self, first: int, count: int) -> tuple[int, int]:
        """Blocks that are missing, and clusters of a longer table if one is needed, for `count`
        clusters behind them: all of it describes itself."""
        store, per_block = self.refcounts, self.refcounts.per_block
        blocks = table = 0
        while True:
            end = ceil_div(first + blocks + table + count, per_block)
            missing = sum(not store.has_block(index) for index in range(first // per_block, end))
            longer = 0
            if end > len(store.table):
                longer = store.plan_entries(end) * 8 // self._geometry.cluster_size
            if (missing, longer) == (blocks, table):
                return blocks, table
            blocks, table = max(missing, blocks), max(longer, table)
            if (missing, longer) < (blocks, table) and missing <= blocks and longer <= table:
                # More than needed is needed to hold itself: one spare block does no harm.
                return blocks, table

    def _build_area(self, first: int, *, blocks: int, table: int) -> None:
        """Make the blocks that are missing from `first` on, and a longer table behind them.

        Raises StorageError; the image in memory is as before then, but for clusters that count
        without being used."""
        store = self.refcounts
        size = self._geometry.cluster_size
        self._check(first, blocks + table)
        old = (store.place // size, store.clusters, len(store.table))
        self._fresh = max(self._fresh, first + blocks + table)
        self._count_in_old_blocks(first, blocks + table)
        store.lengthen(table * size // 8)
        made: list[int] = []
        try:
            index = first // store.per_block
            while len(made) < blocks:
                if not store.has_block(index):
                    used = (first, blocks + table)
                    store.add_block(index, cluster=first + len(made), used=used)
                    made.append(index)
                index += 1
        except BaseException:
            store.take_back_blocks(made, entries=old[2])
            raise
        self._guard.note("refcount-block", first=first, count=blocks)
        if table:
            store.move_table(place=(first + blocks) * size)
            self._guard.note("refcount-table", first=first + blocks, count=table)
            self.free(old[0], old[1], punch=False)

    def _count_in_old_blocks(self, first: int, count: int) -> None:
        """Those clusters of a new area that blocks describe which are there already."""
        per_block, stop = self.refcounts.per_block, first + count
        while first < stop:
            end = min(stop, (first // per_block + 1) * per_block)
            if self.refcounts.has_block(first // per_block):
                self.refcounts.add(first, end - first, 1)
            first = end
