"""Another set of metadata for the same clusters, written where nothing is and taken into use by one
write of the header: wholly before or wholly after, whatever is interrupted (docs/adr/0014).

New L2 tables, L1 table, snapshot table and refcounts lie behind the end of the file. Until the
header is written nothing refers to them, and nothing that is referred to has been touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.entries import COPIED, EntryRules, Uint64Array, split_words
from qcowkit.codecs.qcow2.geometry import MAX_REFCOUNT_TABLE_BYTES
from qcowkit.codecs.qcow2.header import Header
from qcowkit.codecs.qcow2.refcount_block import (
    decode_refcounts,
    encode_refcounts,
)
from qcowkit.codecs.qcow2.snapshots import SnapshotEntry, encode_snapshots
from qcowkit.codecs.qcow2.transitions import hosts_of, mark_copied
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.findings import Effort
from qcowkit.engine.qcow2.counters import WINDOW
from qcowkit.engine.qcow2.cutover import Cutover
from qcowkit.engine.qcow2.l2_audit import Links, find_links, raise_fault
from qcowkit.engine.qcow2.layout import refcount_clusters
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.refcounts import end_of_counts, iter_blocks, load_refcount_table
from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage
from qcowkit.units import MiB, ceil_div

_BATCH_BYTES = 4 * MiB
# Host clusters whose counts are in memory as numbers.
_COUNTED_TOGETHER = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """L2 tables by their host offsets, 0 for none, in the order of their L1 entries; int64."""

    tables: Int64Array

    @classmethod
    def of(cls, l1: Uint64Array) -> Tree:
        """The tables of an L1 table."""
        return cls(tables=hosts_of(l1).copy())


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What the new metadata are.

    active: the tree that is copied and becomes the guest's disk; its size is `size`, in bytes.
    added: trees whose clusters get a reference more; dropped: those that lose one, as their L2
    tables do. given_up: (host offset, bytes) of structures that nothing refers to any more, beside
    the tables that every change replaces. snapshots: all of them afterwards; an l1_offset of -1
    stands for `kept_l1`, a table that is written for the new one. in_place: the guest's tables stay
    where they are, since no count of what they refer to changes. target: the header afterwards, but
    for sizes and places; None for the one that there is. Its refcounts may have another width."""

    active: Tree
    size: int
    added: tuple[Tree, ...] = ()
    dropped: tuple[Tree, ...] = ()
    given_up: tuple[tuple[int, int], ...] = ()
    snapshots: tuple[SnapshotEntry, ...] = ()
    kept_l1: Uint64Array | None = None
    in_place: bool = False
    target: Header | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Host clusters of what is new, one behind the other; `end` is one past the last."""

    l2: int
    l1: int
    kept_l1: int
    snapshots: int
    blocks: int
    table: int
    table_clusters: int
    end: int


class Reform:
    """One change of the metadata of one image, which is closed to everybody else.

    `run` returns the header that is in use then. Raises CorruptMetadata where references and
    counts contradict one another, RequestError where a count would not fit, StorageError; in all
    of these the image is as it was before."""

    def __init__(
        self,
        storage: Storage,
        metadata: Qcow2Metadata,
        *,
        barriers: Barriers,
        effort: Effort,
    ) -> None:
        self._storage = storage
        self._metadata = metadata
        self._geometry = metadata.geometry
        # That of the new refcounts.
        self._wanted = metadata.geometry
        self._size = metadata.geometry.cluster_size
        self._bits = metadata.geometry.cluster_bits
        self._barriers = barriers
        self._effort = effort
        self._table = load_refcount_table(storage, metadata)
        self._first = end_of_counts(storage, self._table, geometry=self._geometry)
        if not storage.caps.block_device:
            self._first = max(self._first, ceil_div(storage.size(), self._size))
        # One bit a cluster: those that will have exactly one reference.
        self._single: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        self.freed: list[tuple[int, int]] = []
        self._rules = EntryRules(
            geometry=self._geometry,
            version=metadata.header.version,
            external_data=False,
            file_size=storage.size(),
        )

    def run(self, change: Change) -> Header:
        """Write, switch, and make that durable."""
        if change.target is not None:
            self._wanted = change.target.geometry
        table = encode_snapshots(self._placed(change, 0))
        places = self._plan(change, len(table))
        header = self._header(change, places)
        with Cutover(self._storage, self._metadata.header, barriers=self._barriers) as cutover:
            self._write(change, places)
            cutover.switch(header)
        return header

    # Where everything goes

    def _plan(self, change: Change, snapshot_bytes: int) -> _Places:
        # What a hostile image makes far larger than its file is refused before memory is taken.
        self._effort.spend(self._first)
        l2_count = int(np.count_nonzero(change.active.tables))
        l1_count = max(1, ceil_div(len(change.active.tables) * 8, self._size))
        if change.in_place:
            l2_count = l1_count = 0
        kept = 0 if change.kept_l1 is None else len(change.kept_l1)
        at = self._first
        l2, at = at, at + l2_count
        l1, at = at, at + l1_count
        kept_l1, at = at, at + ceil_div(kept * 8, self._size)
        snapshots, at = at, at + ceil_div(snapshot_bytes, self._size)
        blocks, table = refcount_clusters(self._wanted, at)
        if table * self._size > max(MAX_REFCOUNT_TABLE_BYTES, self._size):
            raise RequestError(
                f"the image would need a refcount table of {table * self._size} bytes, above the "
                f"{MAX_REFCOUNT_TABLE_BYTES} that readers accept"
            )
        end = at + blocks + table
        return _Places(
            l2=l2,
            l1=l1,
            kept_l1=kept_l1,
            snapshots=snapshots,
            blocks=at,
            table=at + blocks,
            table_clusters=table,
            end=end,
        )

    def _placed(self, change: Change, kept_l1: int) -> Sequence[SnapshotEntry]:
        return [
            replace(one, l1_offset=kept_l1 * self._size) if one.l1_offset < 0 else one
            for one in change.snapshots
        ]

    def _write(self, change: Change, places: _Places) -> None:
        # Counts first: what does not add up is found before much is written.
        self._write_counts(change, places)
        if not change.in_place:
            self._write_tree(change.active, places)
        if change.kept_l1 is not None:
            raw = change.kept_l1.astype(">u8").tobytes()
            self._storage.pwrite([raw], offset=places.kept_l1 * self._size)
        if change.snapshots:
            table = encode_snapshots(self._placed(change, places.kept_l1))
            self._storage.pwrite([table], offset=places.snapshots * self._size)

    def _header(self, change: Change, places: _Places) -> Header:
        header = replace(
            change.target or self._metadata.header,
            refcount_table_offset=places.table * self._size,
            refcount_table_clusters=places.table_clusters,
            nb_snapshots=len(change.snapshots),
            snapshots_offset=places.snapshots * self._size if change.snapshots else 0,
        )
        if change.in_place:
            return header
        return replace(
            header,
            size=change.size,
            l1_size=len(change.active.tables),
            l1_table_offset=places.l1 * self._size,
        )

    # Counts

    def _write_counts(self, change: Change, places: _Places) -> None:
        """New blocks and table: the old counts and what changes, a window of clusters at a time.

        For each window all trees are read; of the rest only a part is in memory at once."""
        per_block = self._wanted.refcounts_per_block
        part = max(_COUNTED_TOGETHER, per_block, self._geometry.refcounts_per_block)
        step = max(WINDOW, part)
        self._single = np.zeros(places.end, dtype=np.bool_)
        blocks = ceil_div(places.end, per_block)
        for base in range(0, places.end, step):
            stop = min(places.end, base + step)
            delta = self._count_changes(change, places, base, stop)
            for first in range(base, stop, part):
                last = min(stop, first + part)
                counts = self._new_counts(delta[first - base : last - base], first, last)
                self._single[first:last] = counts == 1
                place = (places.blocks + first // per_block) * self._size
                self._storage.pwrite(self._encode(counts), offset=place)
        entries = np.zeros(places.table_clusters * self._size // 8, dtype=">u8")
        entries[:blocks] = (np.arange(blocks) + places.blocks) * self._size
        self._storage.pwrite([entries.tobytes()], offset=places.table * self._size)

    def _count_changes(
        self, change: Change, places: _Places, base: int, stop: int
    ) -> npt.NDArray[np.int32]:
        """By how much the counts of host clusters [base, stop) change."""
        delta = np.zeros(stop - base, dtype=np.int32)
        for sign, trees in ((1, change.added), (-1, change.dropped)):
            for tree in trees:
                self._count_tree(delta, tree, sign, base, stop)
        for offset, length in (*change.given_up, *self._replaced(change)):
            first, last = offset >> self._bits, (offset + length - 1) >> self._bits
            if length:
                _add_run(delta, first - base, last + 1 - base, -1)
        blocks = np.flatnonzero(self._table)
        self._add(delta, hosts_of(self._table[blocks]), -1, base, stop)
        _add_run(delta, self._first - base, places.end - base, 1)
        return delta

    def _new_counts(self, delta: npt.NDArray[np.int32], base: int, stop: int) -> Int64Array:
        """Counts of host clusters [base, stop) as they will be."""
        old = self._old_counts(base, stop)
        counts = old + delta
        self._check(counts, old, base)
        gone = (old > 0) & (counts == 0)
        if gone.any():
            edges = np.flatnonzero(np.diff(gone.astype(np.int8), prepend=0, append=0))
            self.freed += [
                (base + int(low), int(high - low))
                for low, high in zip(edges[::2], edges[1::2], strict=True)
            ]
        return counts

    def _replaced(self, change: Change) -> Iterator[tuple[int, int]]:
        """Structures that are replaced."""
        header, metadata = self._metadata.header, self._metadata
        yield header.refcount_table_offset, header.refcount_table_clusters * self._size
        yield header.snapshots_offset, metadata.snapshot_table_bytes
        if not change.in_place:
            yield header.l1_table_offset, header.l1_bytes

    def _old_counts(self, base: int, stop: int) -> Int64Array:
        counts = np.zeros(stop - base, dtype=np.int64)
        per_block, order = self._geometry.refcounts_per_block, self._geometry.refcount_order
        first = base // per_block
        part = self._table[first : ceil_div(stop, per_block)]
        for index, raw in iter_blocks(self._storage, part, cluster_size=self._size):
            at = index * per_block
            values = decode_refcounts(raw, order)[: len(counts) - at]
            counts[at : at + len(values)] = values.astype(np.int64)
        return counts

    def _check(self, counts: Int64Array, old: Int64Array, base: int) -> None:
        if int(counts.min(initial=0)) < 0:
            index = int(counts.argmin())
            raise CorruptMetadata(
                "refcount block",
                host_offset=(base + index) << self._bits,
                reason=f"the cluster counts {int(old[index])}, fewer than it is referred to: check "
                "the image first",
            )
        highest = int(counts.max(initial=0))
        if highest > self._wanted.refcount_max:
            raise RequestError(
                f"a cluster would be referred to {highest} times, and refcounts of "
                f"{self._wanted.refcount_bits} bits end at {self._wanted.refcount_max}: wider "
                "ones can be had by amend -o refcount_bits"
            )

    def _encode(self, counts: Int64Array) -> list[bytes]:
        """Whole refcount blocks, one behind the other."""
        full = np.pad(counts, (0, -len(counts) % self._wanted.refcounts_per_block))
        return [encode_refcounts(full.astype(np.uint64), self._wanted.refcount_order)]

    def _count_tree(
        self, delta: npt.NDArray[np.int32], tree: Tree, sign: int, base: int, stop: int
    ) -> None:
        """References of a tree: its clusters, and its tables too where they are dropped."""
        if sign < 0:
            self._add(delta, tree.tables[tree.tables > 0], sign, base, stop)
        for _, links in self._iter_links(tree):
            self._add(delta, links.host, sign, base, stop)
            first = links.packed_host >> self._bits
            last = (links.packed_host + links.packed_length - 1) >> self._bits
            for step in range(int((last - first).max(initial=-1)) + 1):
                touched = (first + step)[last >= first + step]
                self._add(delta, touched << self._bits, sign, base, stop)

    def _add(
        self,
        delta: npt.NDArray[np.int32],
        offsets: Int64Array,
        sign: int,
        base: int,
        stop: int,
    ) -> None:
        clusters = offsets >> self._bits
        inside = clusters[(clusters >= base) & (clusters < stop)]
        np.add.at(delta, inside - base, np.int32(sign))

    # Trees

    def _iter_links(self, tree: Tree) -> Iterator[tuple[Uint64Array, Links]]:
        """(words, links) of the tables of a tree, some at a time. Raises CorruptMetadata."""
        for offsets in self._batches(tree):
            words = self._load(offsets)
            entries, bitmaps = split_words(words, geometry=self._geometry)
            report = raise_fault(offsets, per_table=self._geometry.l2_entries)
            yield (
                words,
                find_links(entries, bitmaps, rules=self._rules, starts=None, report=report),
            )

    def _batches(self, tree: Tree) -> Iterator[Int64Array]:
        tables = tree.tables[tree.tables > 0]
        step = max(1, _BATCH_BYTES // self._size)
        for at in range(0, len(tables), step):
            yield tables[at : at + step]

    def _load(self, offsets: Int64Array) -> Uint64Array:
        self._effort.spend(len(offsets) * self._size)
        raw = bytearray(len(offsets) * self._size)
        view = memoryview(raw)
        for index, offset in enumerate(offsets.tolist()):
            part = view[index * self._size : (index + 1) * self._size]
            self._storage.pread_into(part, offset=offset)
        return np.frombuffer(raw, dtype=">u8").astype(np.uint64)

    def _write_tree(self, tree: Tree, places: _Places) -> None:
        """Copies of the L2 tables with COPIED as the new counts have it, and their L1 table."""
        at = places.l2 * self._size
        for words, links in self._iter_links(tree):
            entries, _ = split_views(words, self._geometry.has_subclusters)
            mark_copied(entries, links.where, self._single[links.host >> self._bits])
            self._storage.pwrite([words.astype(">u8").tobytes()], offset=at)
            at += len(words) * 8
        used = tree.tables > 0
        l1 = np.zeros(len(tree.tables), dtype=np.uint64)
        order = np.arange(int(np.count_nonzero(used)), dtype=np.uint64)
        l1[used] = order * np.uint64(self._size) + np.uint64(places.l2 * self._size | COPIED)
        self._storage.pwrite([l1.astype(">u8").tobytes()], offset=places.l1 * self._size)


def split_views(words: Uint64Array, extended: bool) -> tuple[Uint64Array, Uint64Array | None]:
    """Entries and bitmaps of words, as views that change them."""
    return (words[::2], words[1::2]) if extended else (words, None)


def _add_run(delta: npt.NDArray[np.int32], first: int, last: int, value: int) -> None:
    """Clusters [first, last) of a window, as far as they lie in it."""
    first, last = max(first, 0), min(last, len(delta))
    if first < last:
        delta[first:last] += value
