"""All tables of an image said anew in another geometry, beside the old ones, and taken into use by
one write of the header (docs/adr/0014, 0019).

Guest data stay where they are as far as the new entries can name them; the others are written
anew. Until the header is written, nothing that it leads to has changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from qcowkit.codecs.qcow2.entries import (
    ALL_ALLOCATED,
    COPIED,
    OFFSET_MASK,
    READS_ZERO,
    EntryRules,
    Uint64Array,
    find_fault,
    split_words,
)
from qcowkit.codecs.qcow2.extensions import decode_extensions, encode_first_cluster
from qcowkit.codecs.qcow2.geometry import MAX_L1_BYTES
from qcowkit.codecs.qcow2.header import Autoclear, Header
from qcowkit.codecs.qcow2.recoding import RecodeRules, recode
from qcowkit.codecs.qcow2.snapshots import SnapshotEntry, encode_snapshots
from qcowkit.codecs.qcow2.transitions import compressed, hosts_of
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.findings import Effort
from qcowkit.engine.qcow2.cutover import Cutover
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.refcounts import end_of_counts, load_refcount_table
from qcowkit.engine.qcow2.renewal import renew_refcounts
from qcowkit.engine.qcow2.renewed_data import DataRenewal, GuestReader
from qcowkit.engine.qcow2.room import Room
from qcowkit.engine.qcow2.tables import load_l1
from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, ceil_div

# New entries that are made at once, unless a table has more.
_ENTRIES = 1 << 15
# Clusters that were written anew and may be shared by snapshots: they are remembered.
_MOST_SHARED = 1 << 21
_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """One disk, or the machine state behind it, which begins where its tables do.

    tables: int64 host offsets of its L2 tables, 0 for none. disk_size: bytes that can be read as
    the guest's, 0 for a state. size: guest bytes whose entries count, None for a state, of which
    all do. entries: of the new L1 table."""

    snapshot: SnapshotEntry | None
    tables: Int64Array
    disk_size: int
    size: int | None
    entries: int


class Transform:
    """One change of geometry. The image is sound, recovered and closed to everybody else.

    `run` returns the header that is in use then. Raises CorruptMetadata for tables that break the
    format, RequestError for what the new geometry cannot hold, OperationError, StorageError; in all
    of these the image is as it was."""

    def __init__(
        self,
        storage: Storage,
        metadata: Qcow2Metadata,
        target: Header,
        *,
        data: Storage,
        read: GuestReader,
        barriers: Barriers,
        effort: Effort,
        zero_clusters: bool = True,
        room: Room | None = None,
    ) -> None:
        """target: the header afterwards, but for sizes and places. data: where guest clusters lie,
        `storage` itself mostly. barriers: of both. zero_clusters: whether there may be any. room:
        for what is new; behind the end of the file if None."""
        self._storage = storage
        self._metadata = metadata
        # Our hints say where things were.
        kept = target.autoclear_features & (Autoclear.BITMAPS | Autoclear.DATA_FILE_RAW)
        self._target = replace(target, autoclear_features=int(kept))
        self._barriers = barriers
        self._effort = effort
        self._old, self._new = metadata.geometry, target.geometry
        self._room = room or self._behind()
        self._check_rules = EntryRules(
            geometry=self._old,
            version=metadata.header.version,
            external_data=metadata.data_file,
            file_size=storage.size(),
        )
        self._rules = RecodeRules(
            old=self._old,
            new=self._new,
            has_zeros=zero_clusters,
            has_base=metadata.backing_name is not None,
            external=metadata.data_file,
            same_packed=target.compression_type == metadata.header.compression_type,
        )
        planned = replace(metadata, header=self._target, geometry=self._new)
        self._renewal = DataRenewal(
            storage, data, planned, room=self._room, read=read, zero_clusters=zero_clusters
        )
        # What snapshots share is made once: tables by those they come from, data by old entries.
        self._made: dict[tuple[int, int, bytes], Uint64Array] = {}
        self._moved: dict[tuple[int, int, bytes], tuple[int, int]] = {}

    def run(self) -> Header:
        """Write, switch, make that durable, and give back what is free then."""
        size = self._new.cluster_size
        with Cutover(self._storage, self._metadata.header, barriers=self._barriers) as cutover:
            planned, l1 = self._write_trees()
            renewed = renew_refcounts(
                self._storage, planned, l1, room=self._room, effort=self._effort
            )
            header = replace(
                planned.header,
                refcount_table_offset=renewed.table_offset,
                refcount_table_clusters=renewed.table_clusters,
            )
            cutover.switch(header, sector=self._first_sector(header))
        self._clear_first_cluster()
        for first, count in renewed.free:
            self._storage.discard(offset=first * size, length=count * size)
        return header

    def _clear_first_cluster(self) -> None:
        """What lay behind a shorter first cluster, data of the guest perhaps, is nobody's now."""
        begin, end = self._old.cluster_size, self._new.cluster_size
        if begin < end:
            self._storage.zero(offset=begin, length=end - begin, unmap=True)

    def _first_sector(self, header: Header) -> bytes | None:
        """All of it, where extensions and names have to come closer for a smaller first cluster."""
        if fits_as_it_is(self._storage, self._metadata, size=header.cluster_size):
            return None
        metadata = self._metadata
        return encode_first_cluster(header, metadata.extensions, metadata.backing_name)[:SECTOR]

    def _behind(self) -> Room:
        table = load_refcount_table(self._storage, self._metadata)
        end = end_of_counts(self._storage, table, geometry=self._old) * self._old.cluster_size
        if not self._storage.caps.block_device:
            end = max(end, self._storage.size())
        return Room(first=ceil_div(end, self._new.cluster_size))

    def find_kinds(self) -> tuple[bool, bool]:
        """Whether the image, with its snapshots, has zero clusters, and compressed ones."""
        zeros = packed = False
        for tree in self._trees():
            for words in self._iter_words(tree):
                entries, bitmaps = split_words(words, geometry=self._old)
                is_packed = compressed(entries)
                packed |= bool(is_packed.any())
                plain = entries[~is_packed] if bitmaps is None else bitmaps >> np.uint64(32)
                mask = READS_ZERO if bitmaps is None else ALL_ALLOCATED
                zeros |= bool((plain & np.uint64(mask)).any())
                if zeros and packed:
                    return True, True
        return zeros, packed

    def _iter_words(self, tree: Tree) -> Iterator[Uint64Array]:
        for number in self._iter_chunks(tree):
            start = number * self._chunk
            for at in range(start, self._end(tree, start), self._piece):
                if self._old_tables(tree, at, self._piece).any():
                    yield self._load(tree, at, self._piece)

    # Trees

    def _trees(self) -> Iterator[Tree]:
        yield self._active_tree()
        for entry in self._metadata.snapshots:
            yield from self._snapshot_trees(entry)

    def _write_trees(self) -> tuple[Qcow2Metadata, Uint64Array]:
        """The metadata as they will be, but for refcounts, and the active L1 table's words."""
        for _ in self._trees():
            # All of them are looked at before anything is written; few are in memory at once.
            pass
        active = self._write_tree(self._active_tree())
        place = self._write_words(active, at_least=1)
        snapshots = tuple(map(self._write_snapshot, self._metadata.snapshots))
        raw = encode_snapshots(snapshots)
        header = replace(
            self._target,
            l1_size=len(active),
            l1_table_offset=place,
            snapshots_offset=self._write_raw(raw, at_least=1) if raw else 0,
        )
        planned = replace(
            self._metadata,
            header=header,
            geometry=self._new,
            snapshots=snapshots,
            snapshot_table_bytes=len(raw),
        )
        return planned, active

    def _write_snapshot(self, entry: SnapshotEntry) -> SnapshotEntry:
        """The same snapshot with tables of the new geometry."""
        words = np.concatenate([self._write_tree(tree) for tree in self._snapshot_trees(entry)])
        place = self._write_words(words, at_least=1) if len(words) else 0
        return replace(entry, l1_offset=place, l1_entries=len(words))

    def _write_words(self, words: Uint64Array, *, at_least: int) -> int:
        return self._write_raw(words.astype(">u8").tobytes(), at_least=at_least)

    def _write_raw(self, raw: bytes, *, at_least: int) -> int:
        """The host offset of a structure in clusters of its own."""
        size = self._new.cluster_size
        count = max(at_least, ceil_div(len(raw), size))
        place = self._room.take(count) * size
        self._storage.pwrite([raw.ljust(count * size, b"\0")], offset=place)
        return place

    def _active_tree(self) -> Tree:
        header, size = self._metadata.header, self._metadata.virtual_size
        words = self._load_l1(header.l1_table_offset, header.l1_size)
        # Behind the disk a state may be left that no snapshot refers to from here.
        return Tree(
            snapshot=None,
            tables=hosts_of(words[: self._old.l1_entries(header.size)]),
            disk_size=size,
            size=header.size,
            entries=self._l1_entries(header.size),
        )

    def _snapshot_trees(self, entry: SnapshotEntry) -> list[Tree]:
        """The disk, and behind its tables those of a machine state."""
        tables = hosts_of(self._load_l1(entry.l1_offset, entry.l1_entries))
        needed = self._old.l1_entries(entry.disk_size)
        disk = Tree(
            snapshot=entry,
            tables=tables[:needed],
            disk_size=entry.disk_size,
            size=entry.disk_size,
            entries=self._l1_entries(entry.disk_size),
        )
        state = tables[needed:]
        if not entry.vm_state_size or not len(state):
            return [disk]
        entries = self._l1_entries(len(state) * self._old.l2_coverage)
        return [
            disk,
            Tree(snapshot=entry, tables=state, disk_size=0, size=None, entries=entries),
        ]

    def _l1_entries(self, size: int) -> int:
        entries = self._new.l1_entries(size)
        if entries * 8 > MAX_L1_BYTES:
            limit = MAX_L1_BYTES // 8 * self._new.l2_coverage
            raise RequestError(
                f"a disk of {size} bytes is above {limit}, the most that clusters of "
                f"{self._new.cluster_size} bytes can do"
            )
        return entries

    def _load_l1(self, offset: int, count: int) -> Uint64Array:
        # Snapshots without number may name one large table.
        self._effort.spend(count * 8)
        return load_l1(
            self._storage,
            offset=offset,
            count=count,
            geometry=self._old,
            file_size=self._storage.size(),
        )

    def _write_tree(self, tree: Tree) -> Uint64Array:
        """The words of the new L1 table, without COPIED; its L2 tables are written."""
        self._effort.spend(tree.entries * 8)
        l1 = np.zeros(tree.entries, dtype=np.uint64)
        per_chunk = self._chunk // self._new.l2_coverage
        for number in self._iter_chunks(tree):
            start, index = number * self._chunk, number * per_chunk
            # A table that is cut at the end of one disk is not that of a longer one.
            tables = self._old_tables(tree, start, self._chunk)
            key = start, self._end(tree, start), tables.tobytes()
            # The guest's disk has its tables for itself (docs/adr/0014).
            made = None if tree.snapshot is None else self._made.get(key)
            if made is None:
                made = self._write_chunk(tree, start)
                if tree.snapshot is not None:
                    self._made[key] = made
            l1[index : index + per_chunk] = made[: len(l1) - index]
        return l1

    @property
    def _chunk(self) -> int:
        """Guest bytes that are done at once: whole tables of the new geometry and whole clusters
        of the old one."""
        tables = max(1, _ENTRIES // self._new.l2_entries)
        return max(tables * self._new.l2_coverage, self._old.cluster_size)

    def _iter_chunks(self, tree: Tree) -> Iterator[int]:
        used, coverage, last = np.flatnonzero(tree.tables).tolist(), self._old.l2_coverage, -1
        for index in used:
            begin = index * coverage // self._chunk
            end = ceil_div((index + 1) * coverage, self._chunk)
            if tree.size is not None:
                end = min(end, ceil_div(tree.size, self._chunk))
            for number in range(max(begin, last + 1), end):
                yield number
                last = number

    def _old_tables(self, tree: Tree, start: int, length: int) -> Int64Array:
        coverage = self._old.l2_coverage
        return tree.tables[start // coverage : ceil_div(start + length, coverage)]

    def _end(self, tree: Tree, start: int) -> int:
        """Where a chunk ends, or the disk in it."""
        stop = start + self._chunk
        return stop if tree.size is None else min(stop, tree.size)

    # One chunk

    def _write_chunk(self, tree: Tree, start: int) -> Uint64Array:
        """Host offsets of the new L2 tables, 0 where nothing is to be said."""
        count = self._chunk // self._new.l2_coverage
        width = self._new.l2_entry_size // 8
        rows = np.zeros((self._chunk // self._new.cluster_size, width), dtype=np.uint64)
        for at in range(start, self._end(tree, start), self._piece):
            if not self._old_tables(tree, at, self._piece).any():
                continue
            words = self._load(tree, at, self._piece)
            if words.any():
                first = (at - start) // self._new.cluster_size
                made = self.recode(tree, words, at)
                rows[first : first + len(made)] = made
        return self._write_tables(rows.reshape(count, -1))

    @property
    def _piece(self) -> int:
        """Guest bytes of a chunk whose entries, old and new, are held at once."""
        sizes = self._old.cluster_size, self._new.cluster_size
        return min(self._chunk, max(*sizes, _ENTRIES * min(sizes)))

    def recode(self, tree: Tree, words: Uint64Array, start: int) -> Uint64Array:
        """New entries, each a row with its bitmap, of the old words from guest offset `start`."""
        entries, bitmaps = split_words(words, geometry=self._old)
        self.judge(entries, bitmaps, tree, start)
        rules = self._rules
        if tree.size is None:
            # Nothing lies below a machine state.
            rules = replace(rules, has_base=False)
        found = recode(entries, bitmaps, rules=rules)
        if len(found.rewrite):
            places = found.rewrite * self._new.cluster_size + start
            fresh = self._rewrite(tree, words, start, places, found.packed)
            found.entries[found.rewrite] = fresh[0]
            if found.bitmaps is not None:
                found.bitmaps[found.rewrite] = fresh[1]
        columns = [found.entries] if found.bitmaps is None else [found.entries, found.bitmaps]
        return np.stack(columns, axis=1)

    def _write_tables(self, rows: Uint64Array) -> Uint64Array:
        used = np.flatnonzero(rows.any(axis=1))
        hosts = np.zeros(len(rows), dtype=np.uint64)
        if len(used):
            first = self._room.take(len(used))
            size = self._new.cluster_size
            self._storage.pwrite([rows[used].astype(">u8").tobytes()], offset=first * size)
            hosts[used] = ((np.arange(len(used)) + first) * size).astype(np.uint64)
        return hosts

    def _load(self, tree: Tree, start: int, length: int) -> Uint64Array:
        """Old words of a guest range; zeros where there is no table, and behind the disk."""
        geometry = self._old
        size, width = geometry.cluster_size, geometry.l2_entry_size
        raw = bytearray(length // size * width)
        view, at = memoryview(raw), start
        while at < start + length:
            index, inside = divmod(at, geometry.l2_coverage)
            end = min(start + length, at - inside + geometry.l2_coverage)
            host = int(tree.tables[index]) if index < len(tree.tables) else 0
            if host:
                part = view[(at - start) // size * width : (end - start) // size * width]
                self._effort.spend(len(part))
                self._storage.pread_into(part, offset=host + inside // size * width)
            at = end
        if tree.size is not None:
            behind = ceil_div(max(0, tree.size - start), size) * width
            raw[behind:] = bytes(max(0, len(raw) - behind))
        return np.frombuffer(raw, dtype=">u8").astype(np.uint64)

    def judge(
        self, entries: Uint64Array, bitmaps: Uint64Array | None, tree: Tree, start: int
    ) -> None:
        """Raise CorruptMetadata for the first entry that breaks the format."""
        fault = find_fault(entries, bitmaps, self._check_rules)
        size = self._old.cluster_size
        index, reason = (fault.index, fault.reason) if fault is not None else (-1, "")
        if fault is None and self._metadata.data_file:
            hosts = (entries & np.uint64(OFFSET_MASK)).view(np.int64)
            guest = np.arange(len(hosts)) * size + start
            wrong = np.flatnonzero((hosts != 0) & (hosts != guest))
            if not len(wrong):
                return
            index = int(wrong[0])
            reason = f"data file offset {int(hosts[index]):#x}, expected {int(guest[index]):#x}"
        if index < 0:
            return
        table, inside = divmod(start + index * size, self._old.l2_coverage)
        raise CorruptMetadata(
            "L2 table", host_offset=int(tree.tables[table]), index=inside // size, reason=reason
        )

    def _rewrite(
        self,
        tree: Tree,
        words: Uint64Array,
        start: int,
        places: Int64Array,
        packed: np.ndarray[tuple[int], np.dtype[np.bool_]],
    ) -> tuple[Uint64Array, Uint64Array]:
        """New entries and bitmaps of what has to be written anew, once for all that share it."""
        if not self._metadata.snapshots:
            return self._renewal.rewrite(tree.snapshot, places, packed, disk_size=tree.disk_size)
        size, end = self._new.cluster_size, tree.disk_size
        keys = [
            (place, min(place + size, end), self._old_words(words, place - start))
            for place in places.tolist()
        ]
        entries, bitmaps = np.zeros((2, len(keys)), dtype=np.uint64)
        missing = np.array([key not in self._moved for key in keys], dtype=np.bool_)
        entries[missing], bitmaps[missing] = self._renewal.rewrite(
            tree.snapshot, places[missing], packed[missing], disk_size=tree.disk_size
        )
        for index in np.flatnonzero(~missing).tolist():
            entries[index], bitmaps[index] = self._moved[keys[index]]
        for index in np.flatnonzero(missing).tolist():
            # Beyond that many, snapshots get copies of their own.
            if len(self._moved) < _MOST_SHARED:
                self._moved[keys[index]] = int(entries[index]), int(bitmaps[index])
        return entries, bitmaps

    def _old_words(self, words: Uint64Array, inside: int) -> bytes:
        """The old words of a new cluster, COPIED left out: it differs between trees."""
        width = self._old.l2_entry_size // 8
        count = max(1, self._new.cluster_size // self._old.cluster_size) * width
        first = inside // self._old.cluster_size * width
        part = words[first : first + count].copy()
        part[::width] &= ~np.uint64(COPIED)
        return part.tobytes()


def fits_as_it_is(storage: Storage, metadata: Qcow2Metadata, *, size: int) -> bool:
    """Whether the first cluster reads the same when it has `size` bytes. Raises StorageError."""
    header = metadata.header
    stop = min(header.backing_file_offset or size, size)
    if header.backing_file_offset + header.backing_file_size > size:
        return False
    raw = storage.pread(size, offset=0)
    try:
        return decode_extensions(raw, start=header.header_length, stop=stop) == metadata.extensions
    except CorruptMetadata:
        return False
