"""Persistent bitmaps of an image: their bits read, and all of them replaced by one switch.

What changes is written anew beside what is there: bits, tables, a directory. Then the header's
extension leads to the new directory, and only after that the old one is given up. Marking bitmaps
as in use is the one change in place (docs/adr/0017)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qcowkit.budget import Budget
from qcowkit.codecs.qcow2.bitmaps import BitmapEntry, BitmapFlag, encode_bitmap_directory
from qcowkit.codecs.qcow2.bitmaps_data import bitmap_offsets
from qcowkit.codecs.qcow2.extensions import BitmapsExtension
from qcowkit.codecs.qcow2.header import Autoclear
from qcowkit.engine.qcow2.bitmap_bits import load_bits
from qcowkit.engine.qcow2.first_cluster import rewrite_first_cluster
from qcowkit.engine.qcow2.metadata import load_bitmap_table
from qcowkit.engine.qcow2.state import WriteState
from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.extents.bits import GranuleBits
from qcowkit.extents.table import Int64Array
from qcowkit.units import ceil_div

# Clusters of bits that are written by one call.
_TOGETHER = 256

# (first, count) of host clusters.
_Run = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBitmap:
    """A bitmap as it is to be stored. bits: None leaves table and bits as they are in the file."""

    entry: BitmapEntry
    bits: GranuleBits | None = None


class BitmapStore:
    """The bitmaps of an image that is open for writing. The caller holds its lock.

    Methods raise StorageError, CorruptMetadata and RequestError; the file then has all bitmaps as
    they were before."""

    def __init__(self, state: WriteState) -> None:
        self._state = state
        self._size = state.geometry.cluster_size

    @property
    def entries(self) -> tuple[BitmapEntry, ...]:
        """The directory, as the file has it."""
        return self._state.metadata.bitmaps

    def load(self, entry: BitmapEntry, *, size: int, budget: Budget) -> GranuleBits:
        """See `load_bits`."""
        state = self._state
        return load_bits(state.storage, entry, geometry=state.geometry, size=size, budget=budget)

    def mark_in_use(self, names: Collection[str]) -> None:
        """Whoever opens the image after a crash takes these bitmaps for inconsistent; durable.

        Flags alone change, each within a sector, so any part of this write is a sound directory."""
        state, extension = self._state, self._state.metadata.extensions.bitmaps
        assert extension is not None
        self._check_directory(extension)
        entries = tuple(
            replace(one, flags=one.flags | BitmapFlag.IN_USE) if one.name in names else one
            for one in self.entries
        )
        raw = encode_bitmap_directory(entries)
        assert len(raw) == extension.directory_size
        state.barriers.pending = True
        state.storage.pwrite([raw], offset=extension.directory_offset)
        state.barriers.wait("bitmaps in use before the first change")
        state.metadata = replace(state.metadata, bitmaps=entries)

    def replace(self, items: Sequence[StoredBitmap]) -> None:
        """All bitmaps are these from now on; durable. Nothing of the mapping is staged."""
        state = self._state
        old = self._old_clusters({one.entry.table_offset for one in items if one.bits is None})
        grants: list[_Run] = []
        try:
            entries = [self._write_bitmap(one, grants) for one in items]
            extension = self._write_directory(entries, grants) if entries else None
            state.store_refcounts()
        except BaseException:
            self._give_up(grants)
            raise
        # Whatever else ends this early may leak one of the two, and gives away nothing in use.
        try:
            self._switch(extension)
        except RequestError:
            # There is no room in the first cluster, which is found before anything is written.
            self._give_up(grants)
            state.release()
            raise
        self._give_up(old)
        state.release()

    def _give_up(self, runs: Sequence[_Run]) -> None:
        punch = self._state.options.pass_discard_other
        for first, count in runs:
            self._state.allocator.free(first, count, punch=punch)

    def _switch(self, extension: BitmapsExtension | None) -> None:
        state = self._state
        header, found = state.header.header, state.metadata.extensions
        features = header.autoclear_features & ~Autoclear.BITMAPS
        if extension is not None:
            features |= Autoclear.BITMAPS
        after = rewrite_first_cluster(
            state.storage,
            state.metadata,
            barriers=state.barriers,
            header=replace(header, autoclear_features=int(features)),
            extensions=replace(found, bitmaps=extension),
        )
        state.adopt(after)

    # What is there

    def _old_clusters(self, kept: set[int]) -> list[_Run]:
        """The host clusters that nothing leads to after a switch. kept: tables that stay."""
        state, extension = self._state, self._state.metadata.extensions.bitmaps
        if not self.entries or extension is None:
            return []
        found = [self._clusters_of(one) for one in self.entries if one.table_offset not in kept]
        clusters = np.sort(np.concatenate([np.empty(0, np.int64), *found]))
        state.guard.check_many(clusters)
        return [self._check_directory(extension), *((one, 1) for one in clusters.tolist())]

    def _check_directory(self, extension: BitmapsExtension) -> _Run:
        """The clusters of the directory, which nothing else may have."""
        first = extension.directory_offset // self._size
        count = ceil_div(extension.directory_size, self._size)
        self._state.guard.check(first=first, count=count, ignore="bitmap-directory")
        return first, count

    def _clusters_of(self, entry: BitmapEntry) -> Int64Array:
        """The clusters of one bitmap; none where its table is malformed: they leak then."""
        state = self._state
        try:
            table = load_bitmap_table(state.storage, entry, geometry=state.geometry)
        except CorruptMetadata:
            return np.empty(0, dtype=np.int64)
        offsets = bitmap_offsets(np.frombuffer(table, dtype=np.uint64))
        first = entry.table_offset // self._size
        own = np.arange(first, first + ceil_div(entry.table_bytes, self._size), dtype=np.int64)
        return np.concatenate((offsets[offsets > 0] // self._size, own))

    # What is new

    def _write_bitmap(self, item: StoredBitmap, grants: list[_Run]) -> BitmapEntry:
        if item.bits is None:
            return item.entry
        words = self._write_bits(item.bits, grants)
        raw = words.tobytes()
        place = self._write_run(raw, grants)
        return replace(item.entry, table_offset=place, table_entries=len(words))

    def _write_bits(
        self, bits: GranuleBits, grants: list[_Run]
    ) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """Clusters with set bits; returns the table, as it lies in the file."""
        state, size, raw = self._state, self._size, bits.raw
        count = max(1, ceil_div(len(raw), size))
        words = np.zeros(count, dtype=">u8")
        if not len(raw):
            return words
        used = np.flatnonzero(np.logical_or.reduceat(raw, np.arange(0, len(raw), size)))
        while len(used):
            grant = state.allocator.allocate(min(len(used), _TOGETHER))
            grants.append((grant.first, grant.count))
            now, used = used[: grant.count], used[grant.count :]
            pieces = [raw[index * size : (index + 1) * size].tobytes() for index in now.tolist()]
            pieces[-1] = pieces[-1].ljust(size, b"\0")
            state.barriers.pending = True
            state.storage.pwrite(pieces, offset=grant.first * size)
            words[now] = (grant.first + np.arange(grant.count)) * size
        return words

    def _write_directory(
        self, entries: Sequence[BitmapEntry], grants: list[_Run]
    ) -> BitmapsExtension:
        raw = encode_bitmap_directory(entries)
        place = self._write_run(raw, grants)
        self._state.guard.note(
            "bitmap-directory", first=place // self._size, count=ceil_div(len(raw), self._size)
        )
        return BitmapsExtension(
            bitmap_count=len(entries), directory_size=len(raw), directory_offset=place
        )

    def _write_run(self, raw: bytes, grants: list[_Run]) -> int:
        """Put bytes into clusters of their own, one behind the other; the host offset."""
        state, count = self._state, ceil_div(len(raw), self._size)
        if count == 1:
            first = state.allocator.allocate(1).first
        else:
            first = state.allocator.allocate_run(count)
        grants.append((first, count))
        state.barriers.pending = True
        state.storage.pwrite([raw.ljust(count * self._size, b"\0")], offset=first * self._size)
        return first * self._size
