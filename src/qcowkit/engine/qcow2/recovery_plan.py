"""What a crash with lazy refcounts has left uncounted, as far as the record of dirty tables tells.

Since the dirty bit was set, references have come about only in recorded L2 tables and in their
entries of the active L1 table, and only to clusters that nothing else refers to; all older ones are
counted in the file (docs/adr/0013). So it is enough to look at these. Reads only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.dirty_tables import DirtyTables
from qcowkit.codecs.qcow2.entries import (
    COPIED,
    OFFSET_MASK,
    EntryRules,
    Uint64Array,
    split_words,
)
from qcowkit.codecs.qcow2.refcount_block import RESERVED_TABLE_BITS
from qcowkit.engine.findings import Effort
from qcowkit.engine.qcow2.counting import BATCH_BYTES, TableReader, touched
from qcowkit.engine.qcow2.l2_audit import Links, find_links
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.refcount_store import RefcountStore
from qcowkit.engine.qcow2.tables import load_l1
from qcowkit.engine.repairs import StrictLog
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage

# Entries of recorded tables that are looked at; with more of them counting everything is as good,
# and takes less memory.
MAX_ENTRIES = 1 << 21
# Host clusters of structures that the header and its tables name.
MAX_FIXED = 1 << 21
# Flags that are put right one by one.
MAX_FLAGS = 1 << 12

BoolArray = npt.NDArray[np.bool_]
_NONE = np.zeros(0, dtype=np.int64)


class FullRepairNeeded(Exception):
    """Internal: the recorded tables are not as a writer leaves them; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """clusters: host clusters whose refcount is too low, int64, ascending; counts: what it has to
    be at least, uint64; both (n,). words: (host offset, word) of table entries that are no longer
    COPIED. end: one past the last host cluster that is referred to."""

    clusters: Int64Array
    counts: npt.NDArray[np.uint64]
    words: tuple[tuple[int, int], ...]
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entries:
    """Words that refer to one host cluster each, all (n,). place: host offsets of the words."""

    place: Int64Array
    word: Uint64Array
    cluster: Int64Array

    @property
    def copied(self) -> BoolArray:
        flags: BoolArray = (self.word & np.uint64(COPIED)) != 0
        return flags


def load_recovery_plan(
    storage: Storage, metadata: Qcow2Metadata, record: DirtyTables, *, refcounts: RefcountStore
) -> RecoveryPlan:
    """Look at what `record` names. refcounts: as they are stored.

    Raises FullRepairNeeded and CorruptMetadata where everything has to be looked at, and
    StorageError."""
    return _Planner(storage, metadata, record, refcounts).run()


class _Planner:
    def __init__(
        self,
        storage: Storage,
        metadata: Qcow2Metadata,
        record: DirtyTables,
        refcounts: RefcountStore,
    ) -> None:
        self._storage = storage
        self._metadata = metadata
        self._record = record
        self._refcounts = refcounts
        self._geometry = metadata.geometry
        self._bits = metadata.geometry.cluster_bits
        self._rules = EntryRules(
            geometry=metadata.geometry,
            version=metadata.header.version,
            external_data=metadata.data_file,
            file_size=storage.size(),
        )

    def run(self) -> RecoveryPlan:
        l1 = self._load_l1()
        fixed = self._fixed_clusters()
        everywhere = l1.cluster[l1.cluster > 0]
        taken = np.sort(np.concatenate([fixed, self._block_clusters(), everywhere]))
        _require_distinct(taken, "metadata share a cluster")
        index = self._recorded_entries(l1)
        tables = _Entries(place=l1.place[index], word=l1.word[index], cluster=l1.cluster[index])
        plain, packed = self._read_tables(index, tables.cluster)
        self._check_apart(plain.cluster, packed, taken)
        once = np.concatenate([fixed, tables.cluster, plain.cluster])
        clusters, counts = _count(once, packed)
        return self._compare(clusters, counts, (tables, plain))

    # What there is

    def _load_l1(self) -> _Entries:
        header = self._metadata.header
        words = load_l1(
            self._storage,
            offset=header.l1_table_offset,
            count=header.l1_size,
            geometry=self._geometry,
            file_size=self._rules.file_size,
        )
        offsets = (words & np.uint64(OFFSET_MASK)).view(np.int64)
        place = header.l1_table_offset + np.arange(len(words), dtype=np.int64) * 8
        return _Entries(place=place, word=words, cluster=offsets >> self._bits)

    def _recorded_entries(self, l1: _Entries) -> Int64Array:
        """Indices of recorded L1 entries that have a table."""
        ranges = [
            np.arange(part.start, min(part.stop, len(l1.word)), dtype=np.int64)
            for part in self._record.iter_entries()
        ]
        named = np.concatenate([_NONE, *ranges])
        index: Int64Array = named[l1.cluster[named] > 0]
        if len(index) * self._geometry.l2_entries > MAX_ENTRIES:
            raise FullRepairNeeded(f"{len(index)} L2 tables are recorded, which is too many")
        return index

    def _fixed_clusters(self) -> Int64Array:
        """Clusters of structures whose place the header and its tables say."""
        metadata, header, bits = self._metadata, self._metadata.header, self._bits
        extensions = metadata.extensions
        runs = [
            (0, metadata.cluster_size),
            (header.l1_table_offset, header.l1_bytes),
            (header.refcount_table_offset, header.refcount_table_clusters << bits),
            (header.snapshots_offset, metadata.snapshot_table_bytes),
        ]
        runs += [(one.l1_offset, one.l1_bytes) for one in metadata.snapshots]
        runs += [(one.table_offset, one.table_bytes) for one in metadata.bitmaps]
        if extensions.crypto is not None:
            runs.append((extensions.crypto.offset, extensions.crypto.length))
        if extensions.bitmaps is not None and metadata.bitmaps:
            runs.append((extensions.bitmaps.directory_offset, extensions.bitmaps.directory_size))
        spans = [
            (offset >> bits, ((offset + length - 1) >> bits) + 1)
            for offset, length in runs
            if length
        ]
        count = sum(last - first for first, last in spans)
        if count > MAX_FIXED:
            raise FullRepairNeeded(f"snapshots and bitmaps have {count} clusters of tables")
        return np.concatenate([np.arange(first, last, dtype=np.int64) for first, last in spans])

    def _block_clusters(self) -> Int64Array:
        """Clusters of refcount blocks, which are counted before anything leads to them."""
        words = np.frombuffer(self._refcounts.table, dtype=np.uint64)
        offsets: Int64Array = words[words != 0].view(np.int64)
        wrong = (offsets & np.int64((self._geometry.cluster_size - 1) | RESERVED_TABLE_BITS)) != 0
        wrong |= (offsets < 0) | (offsets >= self._rules.file_size)
        if wrong.any():
            raise FullRepairNeeded("the refcount table has faulty entries")
        clusters: Int64Array = offsets >> self._bits
        return clusters

    # What the tables say

    def _read_tables(self, index: Int64Array, tables: Int64Array) -> tuple[_Entries, Int64Array]:
        """Plain entries of the tables, and the clusters of compressed data, once for each
        reference. Both are empty with an external data file, whose clusters are not counted."""
        plain, packed = [_Entries(place=_NONE, word=_NONE.view(np.uint64), cluster=_NONE)], [_NONE]
        for offsets, links, entries in self._iter_links(index, tables):
            if self._rules.external_data:
                continue
            table, entry = np.divmod(links.where, self._geometry.l2_entries)
            plain.append(
                _Entries(
                    place=offsets[table] + entry * self._geometry.l2_entry_size,
                    word=entries[links.where],
                    cluster=links.host >> self._bits,
                )
            )
            packed += [clusters for clusters, _ in touched(links, self._bits)]
        joined = _Entries(
            place=np.concatenate([part.place for part in plain]),
            word=np.concatenate([part.word for part in plain]),
            cluster=np.concatenate([part.cluster for part in plain]),
        )
        return joined, np.sort(np.concatenate(packed))

    def _iter_links(
        self, index: Int64Array, tables: Int64Array
    ) -> Iterator[tuple[Int64Array, Links, Uint64Array]]:
        """(host offsets of tables, their links, their entries), some tables at a time."""
        geometry = self._geometry
        effort = Effort(stored=self._storage.allocated())
        reader = TableReader(self._storage, geometry.cluster_size, log=StrictLog(), effort=effort)
        inside = np.arange(geometry.l2_entries, dtype=np.int64) << self._bits
        most = max(1, BATCH_BYTES >> self._bits)
        for begin in range(0, len(index), most):
            offsets = tables[begin : begin + most] << self._bits
            words = reader.load_tables(offsets)
            entries, bitmaps = split_words(words, geometry=geometry)
            starts = index[begin : begin + most, None] * geometry.l2_coverage + inside
            links = find_links(
                entries,
                bitmaps,
                rules=self._rules,
                starts=starts.ravel() if self._rules.external_data else None,
                report=_refuse_fault,
            )
            yield offsets, links, entries

    @staticmethod
    def _check_apart(plain: Int64Array, packed: Int64Array, taken: Int64Array) -> None:
        """Nothing but compressed data may share a cluster."""
        ordered = np.sort(plain)
        _require_distinct(ordered, "two entries lead to one cluster")
        if _meet(taken, ordered) or _meet(taken, packed):
            raise FullRepairNeeded("data lie where metadata are")
        if _meet(ordered, packed):
            raise FullRepairNeeded("plain and compressed data share a cluster")

    # What is wrong

    def _compare(
        self,
        clusters: Int64Array,
        counts: npt.NDArray[np.uint64],
        links: tuple[_Entries, ...],
    ) -> RecoveryPlan:
        if int(counts.max()) > self._geometry.refcount_max:
            raise FullRepairNeeded("a cluster has more references than its refcount can say")
        stored = self._refcounts.counts_of(clusters)
        final = np.maximum(stored, counts)
        words: list[tuple[int, int]] = []
        for entries in links:
            words += self._untrue_flags(entries, final[np.searchsorted(clusters, entries.cluster)])
        low = stored < counts
        return RecoveryPlan(
            clusters=clusters[low],
            counts=counts[low],
            words=tuple(words),
            end=int(clusters[-1]) + 1,
        )

    @staticmethod
    def _untrue_flags(entries: _Entries, counts: npt.NDArray[np.uint64]) -> list[tuple[int, int]]:
        """Words that say COPIED of a cluster with several counts, without the flag.

        Such a cluster was free for the writer, but what it had counted before was not taken back in
        the file. It keeps the count, which is a leak at most: to lower it would be a risk."""
        alone = counts == 1
        if (alone & ~entries.copied).any():
            raise FullRepairNeeded("a cluster with a single reference is not COPIED")
        wrong = np.flatnonzero(entries.copied & ~alone)
        if len(wrong) > MAX_FLAGS:
            raise FullRepairNeeded(f"{len(wrong)} COPIED flags are untrue, which is too many")
        mended = entries.word[wrong] & np.uint64(COPIED - 1)
        return list(zip(entries.place[wrong].tolist(), mended.tolist(), strict=True))


def _refuse_fault(where: Int64Array, values: Int64Array, text: str) -> None:
    """The reporter of entries, none of which may be faulty."""
    raise FullRepairNeeded(text.format(int(values[0]) & ((1 << 64) - 1)))


def _count(once: Int64Array, packed: Int64Array) -> tuple[Int64Array, npt.NDArray[np.uint64]]:
    """(clusters, references): distinct and ascending. packed: sorted."""
    # Not numpy.unique: its first call loads modules for longer than a recovery takes.
    first = np.flatnonzero(np.diff(packed, prepend=-1))
    clusters = np.concatenate([once, packed[first]])
    times = np.diff(first, append=len(packed))
    counts = np.concatenate([np.ones(len(once), dtype=np.uint64), times.astype(np.uint64)])
    order = np.argsort(clusters, kind="stable")
    return clusters[order], counts[order]


def _require_distinct(ordered: Int64Array, reason: str) -> None:
    if (ordered[1:] == ordered[:-1]).any():
        raise FullRepairNeeded(reason)


def _meet(ordered: Int64Array, values: Int64Array) -> bool:
    """Whether any of the values is among the ordered ones."""
    if not len(ordered) or not len(values):
        return False
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return bool((ordered[place] == values).any())
