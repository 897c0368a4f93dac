"""Refcounts of an image that is written: blocks in memory, new entries of the table staged.

A block may be written at any time: what is added to it only ever says more than the file refers
to, and what is taken away has been unreferenced durably before (docs/adr/0011)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.geometry import MAX_REFCOUNT_TABLE_BYTES, Geometry
from qcowkit.codecs.qcow2.refcount_block import (
    RESERVED_TABLE_BITS,
    BadCount,
    add_to_refcounts,
    add_to_scattered,
    count_used,
    find_free,
    last_used,
    raise_refcounts,
    read_count,
    view_refcounts,
)
from qcowkit.engine.qcow2.cache import MetadataCache
from qcowkit.engine.qcow2.tables import encode_words
from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, align_down, align_up

_ENTRY = 8

# (first, count) of host clusters.
Run = tuple[int, int]


class RefcountStore:
    """Counts of host clusters, which are numbered from 0. Not safe from several threads.

    table: native words of the refcount table. place, clusters: where it lies, once the header says
    so; a new one is staged by `move_table`."""

    def __init__(
        self,
        storage: Storage,
        *,
        geometry: Geometry,
        table: array[int],
        place: int,
        cache_bytes: int,
    ) -> None:
        self._storage = storage
        self.geometry = geometry
        self.table = table
        self.place = place
        self.per_block = geometry.refcounts_per_block
        # Beyond the last one in use no question need be asked (seed 003-41).
        self.last_used = _last_nonzero(table)
        self.moved = False
        self._new_entries: set[int] = set()
        # Blocks known to have no free cluster: looked at again only once something is freed there.
        self._full: set[int] = set()
        self.blocks: MetadataCache[bytearray] = MetadataCache(
            storage,
            entry_size=geometry.cluster_size,
            limit=cache_bytes,
            decode=bytearray,
            encode=lambda raw, first, last: bytes(raw[first:last]),
        )

    @property
    def clusters(self) -> int:
        """Clusters of the refcount table."""
        return len(self.table) * _ENTRY // self.geometry.cluster_size

    @property
    def staged(self) -> bool:
        """Whether the table has new entries, or a new place, that are not written yet."""
        return self.moved or bool(self._new_entries)

    def has_block(self, index: int) -> bool:
        """Whether refcount block `index` exists."""
        return index < len(self.table) and self.table[index] != 0

    def count(self, cluster: int) -> int:
        """The refcount of one cluster; 0 where no block says otherwise."""
        block, entry = divmod(cluster, self.per_block)
        if not self.has_block(block):
            return 0
        return read_count(self._block(block), self.geometry.refcount_order, entry)

    def add(self, first: int, count: int, delta: int) -> list[Run]:
        """Change the counts of a run of clusters by 1 or -1; returns the runs that became 0.

        Raises CorruptMetadata where a count would leave its range or has no block."""
        order = self.geometry.refcount_order
        freed: list[Run] = []
        while count:
            block, entry = divmod(first, self.per_block)
            part = min(count, self.per_block - entry)
            raw = self._edit(block, entry, part)
            try:
                zero = add_to_refcounts(raw, order, first=entry, count=part, delta=delta)
            except BadCount as error:
                raise self._bad_count(block, error) from None
            if delta < 0:
                self._full.discard(block)
                freed += _runs(zero, block * self.per_block)
            first, count = first + part, count - part
        return freed

    def add_scattered(self, clusters: Int64Array, delta: int) -> list[Run]:
        """The same for single clusters, ascending; one that is there twice changes twice."""
        order = self.geometry.refcount_order
        freed: list[Run] = []
        for block, part in self._by_block(clusters):
            entries = (clusters[part] - block * self.per_block).astype(np.intp)
            raw = self._edit_entries(block, entries)
            try:
                zero = add_to_scattered(raw, order, entries=entries, delta=delta)
            except BadCount as error:
                raise self._bad_count(block, error) from None
            if delta < 0:
                self._full.discard(block)
                freed += _runs(zero, block * self.per_block)
        return freed

    def counts_of(self, clusters: Int64Array) -> npt.NDArray[np.uint64]:
        """The refcounts of clusters, ascending; 0 where no block says otherwise."""
        counts = np.zeros(len(clusters), dtype=np.uint64)
        for block, part in self._by_block(clusters):
            if self.has_block(block):
                stored = view_refcounts(self._block(block), self.geometry.refcount_order)
                counts[part] = stored[clusters[part] - block * self.per_block]
        return counts

    def raise_to(self, clusters: Int64Array, counts: npt.NDArray[np.uint64]) -> None:
        """Bring the refcounts of clusters, ascending and distinct, up to `counts`, which fit into
        their width. Raises CorruptMetadata where one has no block."""
        for block, part in self._by_block(clusters):
            entries = (clusters[part] - block * self.per_block).astype(np.intp)
            raw = self._edit_entries(block, entries)
            order = self.geometry.refcount_order
            raise_refcounts(raw, order, entries=entries, counts=counts[part])

    def _by_block(self, clusters: Int64Array) -> Iterator[tuple[int, slice]]:
        """(block, where in `clusters` those are that it describes) of ascending clusters."""
        owners = clusters // self.per_block
        edges = [*np.flatnonzero(np.diff(owners, prepend=-1)).tolist(), len(clusters)]
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            yield int(owners[begin]), slice(begin, end)

    def find_free(self, cluster: int) -> tuple[int, int]:
        """(first, count) of the first run of free clusters at or behind `cluster`, within one
        block; count is 0 where the search came to a block that does not exist, which begins there.
        """
        while True:
            block, entry = divmod(cluster, self.per_block)
            if not self.has_block(block):
                return cluster, 0
            if block not in self._full:
                raw = self._block(block)
                found, count = find_free(raw, self.geometry.refcount_order, first=entry)
                if count:
                    return block * self.per_block + found, count
                if not entry:
                    self._full.add(block)
            cluster = (block + 1) * self.per_block

    def last_in_use(self) -> int:
        """The last cluster whose count is not 0, -1 for none."""
        for block in range(self.last_used, -1, -1):
            if self.table[block]:
                last = last_used(self._block(block), self.geometry.refcount_order)
                if last >= 0:
                    return block * self.per_block + last
        return -1

    def take_back_drop(self, dropped: list[tuple[int, int]]) -> None:
        """What `drop_empty_tail` has returned is in the table again."""
        for index, word in dropped:
            self.table[index] = word
            self._new_entries.add(index)
        self.last_used = _last_nonzero(self.table)

    def drop_empty_tail(self) -> list[tuple[int, int]]:
        """Take blocks that count nothing but themselves off the end of the table; returns (index,
        entry) of each. They are gone once `store_table` has written that."""
        dropped: list[tuple[int, int]] = []
        while self.last_used > 0:
            block, bits = self.last_used, self.geometry.cluster_bits
            cluster = self._block_offset(block) >> bits
            raw, order = self._block(block), self.geometry.refcount_order
            inside = cluster - block * self.per_block
            if not 0 <= inside < self.per_block or count_used(raw, order) != 1:
                break
            if read_count(raw, order, inside) != 1:
                break
            dropped.append((block, self.table[block]))
            self.table[block] = 0
            self._new_entries.add(block)
            self.blocks.drop(range(block, block + 1))
            self.last_used = _last_nonzero(self.table)
        return dropped

    def add_block(self, index: int, *, cluster: int, used: Run) -> None:
        """A new block in host cluster `cluster`, in which the part of the run `used` that it
        describes counts once, the block itself mostly among it. Raises StorageError; there is no
        block then."""
        self._make_room()
        raw = bytearray(self.geometry.cluster_size)
        begin, base = used[0], index * self.per_block
        first, last = max(begin, base), min(begin + used[1], base + self.per_block)
        if first < last:
            order = self.geometry.refcount_order
            add_to_refcounts(raw, order, first=first - base, count=last - first, delta=1)
        self.blocks.put(index, raw)
        self.table[index] = cluster << self.geometry.cluster_bits
        self._new_entries.add(index)
        self.last_used = max(self.last_used, index)

    def take_back_blocks(self, indices: list[int], *, entries: int) -> None:
        """Blocks that were just added are not, and the table has `entries` entries again."""
        for index in indices:
            self.table[index] = 0
            self._new_entries.discard(index)
        self.blocks.drop(iter(indices))
        del self.table[entries:]
        self.last_used = _last_nonzero(self.table)

    def lengthen(self, entries: int) -> None:
        """Room in memory for `entries` entries; `move_table` says where they lie."""
        self.table.extend([0] * (entries - len(self.table)))

    def move_table(self, *, place: int) -> None:
        """The whole table lies at host `place` from now on; `store_table` writes it."""
        self.place, self.moved = place, True

    def plan_entries(self, blocks: int) -> int:
        """Entries of a table that is to refer to `blocks` blocks: half as many again, in whole
        clusters. Raises RequestError above what a header can say."""
        size = self.geometry.cluster_size
        limit = MAX_REFCOUNT_TABLE_BYTES // _ENTRY
        if blocks > limit:
            raise RequestError(
                f"the image would need {blocks} refcount blocks, more than {limit}: with this "
                "cluster size and refcount width its file cannot grow any further"
            )
        wanted = min(limit, max(blocks * 3 // 2, blocks + 1))
        return align_up(wanted * _ENTRY, size) // _ENTRY

    def store_blocks(self) -> bool:
        """Write changed blocks; says whether there were any."""
        if not self.blocks.dirty:
            return False
        self.blocks.store(lambda index: self.table[index] & ~RESERVED_TABLE_BITS)
        return True

    def store_table(self) -> None:
        """Write new entries in place, or all of a table that has moved, which the header must be
        told of then: `table_switched` says that it was."""
        if self.moved:
            raw = encode_words(self.table, 0, len(self.table) * _ENTRY)
            self._storage.pwrite([raw], offset=self.place)
            return
        for begin in sorted({align_down(index * _ENTRY, SECTOR) for index in self._new_entries}):
            raw = encode_words(self.table, begin, min(begin + SECTOR, len(self.table) * _ENTRY))
            self._storage.pwrite([raw], offset=self.place + begin)
        self._new_entries.clear()

    def table_switched(self) -> None:
        """The header says where the moved table lies."""
        self.moved = False
        self._new_entries.clear()

    def _block(self, index: int) -> bytearray:
        return self.blocks.get(index, offset=self._block_offset(index))

    def _edit(self, index: int, first: int, count: int) -> bytearray:
        if not self.has_block(index):
            raise CorruptMetadata(
                "refcount table",
                host_offset=self.place,
                index=index,
                reason="no refcount block, expected one for a cluster that is in use",
            )
        self._make_room()
        bits = self.geometry.refcount_bits
        begin, end = first * bits // 8, -(-(first + count) * bits // 8)
        return self.blocks.edit(index, offset=self._block_offset(index), first=begin, last=end)

    def _edit_entries(self, index: int, entries: npt.NDArray[np.intp]) -> bytearray:
        first, last = int(entries[0]), int(entries[-1])
        return self._edit(index, first, last + 1 - first)

    def _make_room(self) -> None:
        if self.blocks.crowded:
            self.store_blocks()

    def _block_offset(self, index: int) -> int:
        word = self.table[index]
        offset = word & ~RESERVED_TABLE_BITS
        if word & RESERVED_TABLE_BITS or offset % self.geometry.cluster_size or not offset:
            raise CorruptMetadata(
                "refcount table",
                host_offset=self.place,
                index=index,
                reason=f"refcount block offset {word:#x} is not a multiple of the cluster size "
                f"{self.geometry.cluster_size:#x}",
            )
        return offset

    def _bad_count(self, block: int, error: BadCount) -> CorruptMetadata:
        cluster = block * self.per_block + error.index
        return CorruptMetadata(
            "refcount block",
            host_offset=self.table[block] & ~RESERVED_TABLE_BITS,
            index=error.index,
            reason=f"refcount {error.found} of the cluster at "
            f"{cluster << self.geometry.cluster_bits:#x} cannot change by {error.delta}",
        )


def _last_nonzero(table: array[int]) -> int:
    """The index of the last word that is not 0, -1 for none."""
    if not len(table):
        return -1
    used = np.flatnonzero(np.frombuffer(table, dtype=np.uint64))
    return int(used[-1]) if len(used) else -1


def _runs(indices: npt.NDArray[np.intp], base: int) -> list[Run]:
    """(first, count) of ascending indices, moved by `base`."""
    if not len(indices):
        return []
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    edges = [0, *breaks.tolist(), len(indices)]
    return [
        (base + int(indices[begin]), end - begin)
        for begin, end in zip(edges[:-1], edges[1:], strict=True)
    ]
