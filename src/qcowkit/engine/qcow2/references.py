"""Everything that a qcow2 file refers to, down to its L2 tables: the first half of a recount.

Faults are written into a log and never end the walk. What an L2 table says is in `l2_audit`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.bitmaps_data import bitmap_entry_faults, bitmap_offsets
from qcowkit.codecs.qcow2.entries import L1_RESERVED, OFFSET_MASK, Uint64Array
from qcowkit.codecs.qcow2.refcount_block import RESERVED_TABLE_BITS
from qcowkit.engine.findings import Effort, Finding, FindingLog, Severity
from qcowkit.engine.qcow2.claims import Claims, ClaimsBuilder
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.refcounts import BLOCK_OFFSET_MASK, load_refcount_table
from qcowkit.engine.qcow2.tables import native_words
from qcowkit.errors import StorageError
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage
from qcowkit.units import INT64_MAX

# L2 tables of many snapshots are sorted in pieces of this many.
_PENDING = 1 << 22
_NONE = np.zeros(0, dtype=np.int64)
_ALL_BITS = (1 << 64) - 1

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class L1Links:
    """Sound entries of the active L1 table, shape (n,): index, host offset of the L2 table, and
    the COPIED flag."""

    index: Int64Array
    offset: Int64Array
    copied: BoolArray


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSet:
    """All L2 tables, each once, by ascending host offset; shape (n,).

    weight: how many L1 entries of all trees refer to it. guest: the index of its entry in the
    active L1 table, -1 where only snapshots have it."""

    offset: Int64Array
    weight: Int64Array
    guest: Int64Array

    def take(self, where: npt.NDArray[np.intp] | BoolArray) -> TableSet:
        """Some of the tables."""
        return TableSet(
            offset=self.offset[where], weight=self.weight[where], guest=self.guest[where]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What is to be counted. blocks: int64 host offset of each refcount block, by index into the
    refcount table; 0 where there is none, or none that can be read.

    dangling: entries that lead nowhere. beyond: the lowest place behind the end of the file that
    is referred to, or from where on a table is missing. bad_blocks: faulty refcount table entries,
    of which some may have a block that can be read."""

    claims: Claims
    tables: TableSet
    links: L1Links
    blocks: Int64Array
    dangling: int = 0
    beyond: int = INT64_MAX
    bad_blocks: int = 0


def survey(storage: Storage, metadata: Qcow2Metadata, *, log: FindingLog, effort: Effort) -> Survey:
    """Walk all structures but the L2 tables. Raises StorageError only for the refcount table,
    OperationError and Cancelled from `effort`."""
    return _Surveyor(storage, metadata, log, effort).run()


class _Surveyor:
    def __init__(
        self, storage: Storage, metadata: Qcow2Metadata, log: FindingLog, effort: Effort
    ) -> None:
        self.storage = storage
        self.metadata = metadata
        self.log = log
        self.effort = effort
        self.cluster_size = metadata.cluster_size
        self.file_size = storage.size()
        self.claims = ClaimsBuilder(metadata.geometry.cluster_bits)
        self.dangling = self.bad_blocks = 0
        self.beyond = INT64_MAX

    def run(self) -> Survey:
        """The structures in the order of the header."""
        self._claim_fixed()
        links, tables = self._walk_trees()
        self._walk_bitmaps()
        blocks = self._walk_refcount_table()
        return Survey(
            claims=self.claims.build(),
            tables=tables,
            links=links,
            blocks=blocks,
            dangling=self.dangling,
            beyond=self.beyond,
            bad_blocks=self.bad_blocks,
        )

    def _note_dangling(self, offsets: Int64Array) -> None:
        """Entries that lead nowhere, by the host offsets in them."""
        self.dangling += len(offsets)
        outside = offsets[offsets >= self.file_size]
        if len(outside):
            self.beyond = min(self.beyond, int(outside.min()))

    def _claim(self, name: str, *, offset: int, length: int) -> None:
        self.effort.spend(length)
        self.claims.add(name, offset=offset, length=length)

    def _claim_fixed(self) -> None:
        metadata, header = self.metadata, self.metadata.header
        table_bytes = header.refcount_table_clusters << header.cluster_bits
        self._claim("header", offset=0, length=self.cluster_size)
        self._claim("L1 table", offset=header.l1_table_offset, length=header.l1_bytes)
        self._claim("refcount table", offset=header.refcount_table_offset, length=table_bytes)
        self._claim(
            "snapshot table", offset=header.snapshots_offset, length=metadata.snapshot_table_bytes
        )
        crypto, bitmaps = metadata.extensions.crypto, metadata.extensions.bitmaps
        if crypto is not None:
            self._claim("crypto header", offset=crypto.offset, length=crypto.length)
        if bitmaps is not None and metadata.bitmaps:
            self._claim(
                "bitmap directory", offset=bitmaps.directory_offset, length=bitmaps.directory_size
            )

    def _read(self, offset: int, count: int, structure: str) -> Uint64Array:
        """A table of 64-bit words; what cannot be read is reported, and zeros."""
        self.effort.spend(count * 8)
        try:
            raw = self.storage.pread(count * 8, offset=offset)
        except StorageError as error:
            self.log.failure(structure, error, host_offset=offset)
            return np.zeros(count, dtype=np.uint64)
        if len(raw) < count * 8:
            reason = f"the file ends after {len(raw)} of its {count * 8} bytes"
            self.log.corruption(structure, reason=reason, host_offset=offset)
            self.beyond = min(self.beyond, self.file_size)
            self.dangling += 1
            raw = raw.ljust(count * 8, b"\0")
        return np.frombuffer(native_words(raw), dtype=np.uint64)

    # L1 trees

    def _walk_trees(self) -> tuple[L1Links, TableSet]:
        header = self.metadata.header
        words = self._read(header.l1_table_offset, header.l1_size, "L1 table")
        index = self._sound_l1(words, "L1 table", header.l1_table_offset)
        found = words[index]
        links = L1Links(
            index=index,
            offset=(found & np.uint64(OFFSET_MASK)).view(np.int64),
            copied=found.view(np.int64) < 0,
        )
        offset, weight = self._count_tables(links)
        guest = np.full(len(offset), -1, dtype=np.int64)
        # Backwards: of several entries for one table the first has the last word.
        guest[np.searchsorted(offset, links.offset[::-1])] = links.index[::-1]
        return links, TableSet(offset=offset, weight=weight, guest=guest)

    def _count_tables(self, links: L1Links) -> tuple[Int64Array, Int64Array]:
        """(host offset, weight) of all L2 tables, each once; 65,536 snapshots in bounded memory."""
        unique, weight = self._merge(_NONE, _NONE, [self._once(links.offset, "L1 table")])
        pending: list[Int64Array] = []
        waiting = 0
        for offsets in self._snapshot_trees():
            pending.append(offsets)
            waiting += len(offsets)
            if waiting >= _PENDING:
                unique, weight = self._merge(unique, weight, pending)
                pending, waiting = [], 0
        return self._merge(unique, weight, pending)

    @staticmethod
    def _merge(
        unique: Int64Array, weight: Int64Array, more: list[Int64Array]
    ) -> tuple[Int64Array, Int64Array]:
        if not any(map(len, more)):
            return unique, weight
        values = np.concatenate([unique, *more])
        weights = np.ones(len(values), dtype=np.int64)
        weights[: len(weight)] = weight
        # Not numpy.unique: its first call loads modules for longer than most checks take.
        order = np.argsort(values, kind="stable")
        values, weights = values[order], weights[order]
        first = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
        return values[first], np.add.reduceat(weights, first)

    def _snapshot_trees(self) -> Iterator[Int64Array]:
        for entry in self.metadata.snapshots:
            name = f"L1 table of snapshot {entry.id!r}"
            self._claim(name, offset=entry.l1_offset, length=entry.l1_bytes)
            if not entry.l1_entries:
                continue
            words = self._read(entry.l1_offset, entry.l1_entries, name)
            index = self._sound_l1(words, name, entry.l1_offset)
            offsets = (words[index] & np.uint64(OFFSET_MASK)).view(np.int64)
            yield self._once(offsets, name)

    def _sound_l1(self, words: Uint64Array, name: str, host_offset: int) -> Int64Array:
        """Indices of the entries that lead to a table; the others are reported (rows 20, 37)."""
        index = np.flatnonzero(words)
        used = words[index].view(np.int64)
        if not len(used):
            return index
        offsets = used & np.int64(OFFSET_MASK)
        bits = int(np.bitwise_or.reduce(used))
        if bits & L1_RESERVED:
            mask = (used & np.int64(L1_RESERVED)) != 0
            self._fault(
                name,
                host_offset,
                index[mask],
                used[mask] & np.int64(L1_RESERVED),
                "reserved bits {:#x} are set, expected 0",
            )
        good: BoolArray = offsets != 0
        unaligned = (offsets & np.int64(self.cluster_size - 1)) != 0
        if unaligned.any():
            self._fault(
                name,
                host_offset,
                index[unaligned],
                offsets[unaligned],
                "L2 table offset {:#x} is not a multiple of the cluster size "
                f"{self.cluster_size:#x}",
            )
            good &= ~unaligned
        outside = good & (offsets >= self.file_size)
        if outside.any():
            self._fault(
                name,
                host_offset,
                index[outside],
                offsets[outside],
                f"L2 table offset {{:#x}} is beyond the end of the file at {self.file_size:#x}",
            )
            good &= ~outside
        self._note_dangling(offsets[unaligned | outside])
        return index[good]

    def _once(self, offsets: Int64Array, name: str) -> Int64Array:
        """Report L2 tables that one L1 table refers to more than once; the offsets as they are."""
        ordered = np.sort(offsets)
        again = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(again):
            places, times = np.unique(again, return_counts=True)

            def make(number: int) -> Finding:
                count = int(times[number]) + 1
                return Finding(
                    severity=Severity.CORRUPTION,
                    structure="L2 table",
                    host_offset=int(places[number]),
                    reason=f"{count} entries of the {name} refer to it, expected 1",
                )

            self.log.add_many(Severity.CORRUPTION, len(places), make)
        return offsets

    def _fault(
        self, name: str, host_offset: int, index: Int64Array, values: Int64Array, text: str
    ) -> None:
        def make(number: int) -> Finding:
            return Finding(
                severity=Severity.CORRUPTION,
                structure=name,
                host_offset=host_offset,
                index=int(index[number]),
                reason=text.format(int(values[number]) & _ALL_BITS),
            )

        self.log.add_many(Severity.CORRUPTION, len(index), make)

    # Bitmaps and refcounts

    def _walk_bitmaps(self) -> None:
        """Tables and clusters of bits, also of bitmaps in use (row 36)."""
        for bitmap in self.metadata.bitmaps:
            table = f"table of bitmap {bitmap.name!r}"
            self._claim(table, offset=bitmap.table_offset, length=bitmap.table_bytes)
            words = self._read(bitmap.table_offset, bitmap.table_entries, table)
            offsets = bitmap_offsets(words)
            good = offsets != 0
            for reason, mask in bitmap_entry_faults(words, cluster_size=self.cluster_size).items():
                index = np.flatnonzero(mask)
                text = "{:#x}: " + reason
                values = words[index].view(np.int64)
                self._fault(table, bitmap.table_offset, index, values, text)
            good &= offsets % self.cluster_size == 0
            outside = good & (offsets >= self.file_size)
            if outside.any():
                text = f"offset {{:#x}} is beyond the end of the file at {self.file_size:#x}"
                index = np.flatnonzero(outside)
                self._fault(table, bitmap.table_offset, index, offsets[index], text)
                good &= ~outside
            self._note_dangling(offsets[(offsets != 0) & ~good])
            self.claims.add_clusters(f"data of bitmap {bitmap.name!r}", offsets[good])

    def _walk_refcount_table(self) -> Int64Array:
        """Host offsets of the blocks; entries that break row 41 are reported and become 0."""
        header, name = self.metadata.header, "refcount table"
        if not header.refcount_table_clusters:
            self.log.corruption("header", reason="there is no refcount table, expected one")
            return _NONE
        place = header.refcount_table_offset
        words = load_refcount_table(self.storage, self.metadata)
        self.effort.spend(len(words) * 8)
        index = np.flatnonzero(words)
        used = words[index]
        blocks = np.zeros(len(words), dtype=np.int64)
        reserved = (used & np.uint64(RESERVED_TABLE_BITS)).view(np.int64)
        mask = reserved != 0
        self._fault(
            name, place, index[mask], reserved[mask], "reserved bits {:#x} are set, expected 0"
        )
        # A negative offset is one of 2**63 or more.
        offsets = (used & np.uint64(BLOCK_OFFSET_MASK)).view(np.int64)
        unaligned = (offsets & np.int64(self.cluster_size - 1)) != 0
        self._fault(
            name,
            place,
            index[unaligned],
            offsets[unaligned],
            "refcount block offset {:#x} is not a multiple of the cluster size "
            f"{self.cluster_size:#x}",
        )
        outside = ~unaligned & ((offsets < 0) | (offsets >= self.file_size))
        self._fault(
            name,
            place,
            index[outside],
            offsets[outside],
            f"refcount block offset {{:#x}} is beyond the end of the file at {self.file_size:#x}",
        )
        self.bad_blocks = int(np.count_nonzero(mask | unaligned | outside))
        good = ~unaligned & ~outside & (offsets != 0)
        blocks[index[good]] = offsets[good]
        self.claims.add_clusters("refcount block", offsets[good])
        return blocks
