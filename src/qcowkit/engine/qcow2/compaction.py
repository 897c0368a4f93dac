"""An image file made shorter: what lies at its end moves into holes, and the file is cut.

One round moves data into clusters that nothing refers to, writes all tables anew into such
clusters, and switches to them by one write of the header (docs/adr/0014). Then the old tables are
holes themselves, and the next round uses them. After each round the image is sound: an interrupted
run has lost nothing, and the next one goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.entries import (
    COPIED,
    Uint64Array,
    compressed_extent,
    encode_compressed,
    split_words,
)
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.codecs.qcow2.snapshots import SnapshotEntry
from qcowkit.codecs.qcow2.transitions import compressed, hosts_of
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.crypt import DataCipher
from qcowkit.engine.executor import ProgressReport
from qcowkit.engine.findings import Effort
from qcowkit.engine.qcow2.census import Census, take_census
from qcowkit.engine.qcow2.layout import refcount_clusters
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.engine.qcow2.renewed_data import PACKING_ORDER
from qcowkit.engine.qcow2.room import Holes, NoRoom
from qcowkit.engine.qcow2.transform import Transform, Tree
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, MiB, ceil_div

_COPY = 4 * MiB
# Tries of a round with more room each time, before there is nothing to gain.
_TRIES = 6
# Bytes of data that one round moves; what it has moved is not lost by an interruption.
_ROUND_BYTES = 4096 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Compacted:
    """Sizes of the file in bytes, on a device those of the image, and what was done. moved: bytes
    of guest data."""

    before: int
    after: int
    moved: int
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compactor:
    """The rounds of one image. See `compact`."""

    storage: Storage
    barriers: Barriers
    make_effort: Callable[[], Effort]
    cipher: DataCipher | None = None
    progress: ProgressReport | None = None

    def run(self) -> Compacted:
        """Until there is nothing to gain."""
        before, moved, rounds = 0, 0, 0
        while True:
            metadata = load_qcow2_metadata(self.storage)
            census = take_census(self.storage, metadata, effort=self.make_effort())
            end = self._end(census, metadata.cluster_size)
            before = before or end
            done = self._run_round(metadata, census, moved)
            if done is None:
                return Compacted(before=before, after=end, moved=moved, rounds=rounds)
            moved, rounds = moved + done, rounds + 1

    def _end(self, census: Census, cluster_size: int) -> int:
        """Where the file ends, in bytes. A device is never cut: of that it is where the image
        ends."""
        if not self.storage.caps.block_device:
            return self.storage.size()
        return (int(np.flatnonzero(census.used)[-1]) + 1) * cluster_size

    def _run_round(self, metadata: Qcow2Metadata, census: Census, moved: int) -> int | None:
        """Bytes that were moved; None where a shorter file is not to be had. moved: before."""
        size, slack = metadata.cluster_size, census.packed // 64
        end = ceil_div(self._end(census, size), size)
        census = census.up_to(end)
        for _ in range(_TRIES):
            limit = plan_limit(census, metadata.geometry, slack=slack, most=_ROUND_BYTES // size)
            # Tables are written for it: it has to be worth that.
            if end - limit < max(1, census.tables // 4):
                return None
            room = Holes(np.flatnonzero(~census.used[:limit]), end=last_kept(census, limit) + 1)
            total = moved + int(np.count_nonzero(census.data[limit:])) * size
            run = Compaction(
                self.storage,
                metadata,
                room=room,
                limit=limit,
                end=end,
                barriers=self.barriers,
                effort=self.make_effort(),
                cipher=self.cipher,
                report=partial(self._report, moved, total),
            )
            try:
                run.run()
            except NoRoom:
                # Compressed data, tables that were shared, or runs of holes did not fit as counted.
                slack = 2 * slack + census.tables // 4 + 1
                continue
            _cut(self.storage, room.end * size, self.barriers)
            return run.moved
        return None

    def _report(self, before: int, total: int, done: int) -> None:
        if self.progress is not None:
            # Compressed data are less than the clusters that they touch.
            self.progress(min(before + done, total), total)


def compact(
    storage: Storage,
    *,
    barriers: Barriers,
    make_effort: Callable[[], Effort],
    cipher: DataCipher | None = None,
    progress: ProgressReport | None = None,
) -> Compacted:
    """Shorten the file as far as that can be. The image is recovered and closed to everybody else.

    cipher: of an image whose data are encrypted for their place. progress: of bytes that move.
    Raises RequestError for an image that has to be repaired first, CorruptMetadata, OperationError
    and StorageError; the image is sound at any moment."""
    return _Compactor(
        storage=storage,
        barriers=barriers,
        make_effort=make_effort,
        cipher=cipher,
        progress=progress,
    ).run()


def plan_limit(census: Census, geometry: Geometry, *, slack: int, most: int) -> int:
    """The lowest cluster from which on everything can move below it, or the end of the file.

    slack: clusters that are wanted besides. most: clusters of data that may move. Pure."""
    count = len(census.used)
    needed = census.tables + sum(refcount_clusters(geometry, count)) + slack
    free = np.concatenate([[0], np.cumsum(~census.used)])
    data = np.concatenate([[0], np.cumsum(census.data)])
    behind = int(data[-1]) - data
    fits = np.flatnonzero((free >= behind + needed) & (behind <= most))
    if not len(fits):
        return count
    fixed = np.flatnonzero(census.fixed)
    return max(int(fits[0]), int(fixed[-1]) + 1 if len(fixed) else 1)


def last_kept(census: Census, limit: int) -> int:
    """The last cluster below `limit` that stays where it is. Pure."""
    kept = np.flatnonzero((census.data | census.fixed)[:limit])
    return int(kept[-1]) if len(kept) else 0


def _cut(storage: Storage, size: int, barriers: Barriers) -> None:
    if storage.caps.block_device or storage.size() <= size:
        return
    storage.truncate(size)
    barriers.pending = True
    barriers.wait("cut of the file")


class Compaction(Transform):
    """One round. moved: bytes of guest data that were copied."""

    def __init__(
        self,
        storage: Storage,
        metadata: Qcow2Metadata,
        *,
        room: Holes,
        limit: int,
        end: int,
        barriers: Barriers,
        effort: Effort,
        report: Callable[[int], None],
        cipher: DataCipher | None = None,
    ) -> None:
        """limit: host cluster; data from there on move into `room`. end: one past the last that is
        used. report: told of the bytes that have moved. cipher: for data that are encrypted for
        their place."""
        super().__init__(
            storage,
            metadata,
            metadata.header,
            data=storage,
            read=_NoReader(),
            barriers=barriers,
            effort=effort,
            room=room,
        )
        self._limit = limit
        self._cipher = cipher
        self._report = report
        self._bits = metadata.geometry.cluster_bits
        self.moved = 0
        # Where clusters from the limit on have gone, -1 for nowhere yet.
        self._gone = np.full(max(0, end - limit), -1, dtype=np.int64)
        self._packed: dict[int, int] = {}
        self._cursor = self._stop = 0

    def recode(self, tree: Tree, words: Uint64Array, start: int) -> Uint64Array:
        """The same entries, for the new places."""
        entries, bitmaps = split_words(words, geometry=self._old)
        entries = entries.copy()
        self.judge(entries, bitmaps, tree, start)
        if not self._metadata.data_file:
            is_packed = compressed(entries)
            entries[~is_packed] &= ~np.uint64(COPIED)
            self._move_plain(entries, is_packed)
            for index in np.flatnonzero(is_packed).tolist():
                entries[index] = self._move_packed(int(entries[index]))
        columns = [entries] if bitmaps is None else [entries, bitmaps]
        return np.stack(columns, axis=1)

    def _move_plain(self, entries: Uint64Array, is_packed: npt.NDArray[np.bool_]) -> None:
        hosts = hosts_of(entries)
        tail = np.flatnonzero(~is_packed & (hosts >= self._limit << self._bits))
        if not len(tail):
            return
        old = hosts[tail] >> self._bits
        missing = old[self._gone[old - self._limit] < 0]
        if len(missing):
            new = self._room.take_scattered(len(missing))
            self._copy(missing, new)
            self._gone[missing - self._limit] = new
        shift = (self._gone[old - self._limit] - old) << self._bits
        entries[tail] = (entries[tail].view(np.int64) + shift).view(np.uint64)

    def _copy(self, old: Int64Array, new: Int64Array) -> None:
        """Clusters in runs that lie together here and there."""
        size = 1 << self._bits
        cuts = np.flatnonzero((np.diff(old) != 1) | (np.diff(new) != 1)) + 1
        edges = [0, *cuts.tolist(), len(old)]
        most = max(1, _COPY // size)
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            for at in range(begin, end, most):
                length = (min(end, at + most) - at) * size
                raw = bytearray(length)
                self._storage.pread_into(raw, offset=int(old[at]) * size)
                if self._cipher is not None:
                    # Its IVs count sectors of the file, whatever the guest offset.
                    self._cipher.decrypt(memoryview(raw), host=int(old[at]) * size, guest=0)
                    self._cipher.encrypt_in_place(raw, host=int(new[at]) * size, guest=0)
                self._storage.pwrite([raw], offset=int(new[at]) * size)
                self.moved += length
                self._report(self.moved)

    def _move_packed(self, entry: int) -> int:
        """A compressed descriptor whose data lie below the limit afterwards."""
        host, length = compressed_extent(entry, geometry=self._old)
        if host + length <= self._limit << self._bits:
            return entry
        known = self._packed.get(entry)
        if known is not None:
            return known
        raw = self._storage.pread(length, offset=host).ljust(length, b"\0")
        place = self._place_packed(length, inside=host % SECTOR)
        self._storage.pwrite([raw], offset=place)
        self.moved += length
        moved = encode_compressed(place, length, geometry=self._old)
        if self._metadata.snapshots:
            # They may have it too.
            self._packed[entry] = moved
        return moved

    def _place_packed(self, length: int, *, inside: int) -> int:
        """A place for compressed data that begins as many bytes behind a sector as before: their
        length is known by sectors only."""
        size = 1 << self._bits
        if self._old.refcount_order < PACKING_ORDER:
            self._cursor = self._stop = 0
        place = self._cursor + (inside - self._cursor) % SECTOR
        while place + length > self._stop:
            begin = int(self._room.take_scattered(1)[0]) * size
            if begin != self._stop:
                place = begin + inside
            self._stop = begin + size
        self._cursor = place + length
        return place


class _NoReader:
    """A move rewrites no content."""

    def __call__(
        self, snapshot: SnapshotEntry | None, buffer: npt.NDArray[np.uint8], *, offset: int
    ) -> None:
        raise AssertionError("a move rewrites no content")

    def cipher(self) -> DataCipher | None:
        """Asked by nobody."""
        return None
