"""L1 and L2 tables of one qcow2 image in memory: loaded in bulk, cached by slice, bounded."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator

import numpy as np

from qcowkit.codecs.qcow2.entries import OFFSET_MASK, Uint64Array, check_l1
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.engine.qcow2.cache import MetadataCache
from qcowkit.errors import CorruptMetadata
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage
from qcowkit.units import MiB

MAX_READ = 4 * MiB
assert array("Q").itemsize == 8


def native_words(raw: bytes | bytearray) -> array[int]:
    """Big-endian 64-bit words as a native array; numpy can view it without a copy."""
    words = array("Q")
    words.frombytes(raw)
    if sys.byteorder == "little":
        words.byteswap()
    return words


def read_words(storage: Storage, *, offset: int, count: int, structure: str) -> Uint64Array:
    """`count` big-endian words as native uint64, shape (count,). Raises CorruptMetadata when the
    file ends before them."""
    raw = storage.pread(count * 8, offset=offset)
    if len(raw) != count * 8:
        raise CorruptMetadata(
            structure,
            host_offset=offset,
            reason=f"the file ends after {len(raw)} of {count * 8} bytes",
        )
    return np.frombuffer(native_words(raw), dtype=np.uint64)


def load_l1(
    storage: Storage, *, offset: int, count: int, geometry: Geometry, file_size: int
) -> Uint64Array:
    """The L1 table, checked. A file that ends inside the table's last cluster holds zeros there."""
    if count == 0:
        return np.zeros(0, dtype=np.uint64)
    words = read_words(storage, offset=offset, count=count, structure="L1 table")
    check_l1(words, geometry=geometry, host_offset=offset, file_size=file_size)
    return words


def encode_words(words: array[int], first: int, last: int) -> bytes:
    """Bytes [first, last) of a table of native words, as they are on disk."""
    part = words[first // 8 : last // 8]
    if sys.byteorder == "little":
        part.byteswap()
    return part.tobytes()


class L2Tables:
    """The mapping of one address space: its L1 entries, and its L2 tables by slices.

    l1: native uint64, shape (entries,), changed in place by the writer. A slice is the part of an
    L2 table that is cached as one; its number counts slices from guest offset 0."""

    def __init__(
        self,
        storage: Storage,
        *,
        l1: Uint64Array,
        geometry: Geometry,
        slice_size: int,
        cache_bytes: int,
        whole: bool = False,
    ) -> None:
        """whole: all slices of the disk fit into the cache."""
        self._storage = storage
        self._geometry = geometry
        self.l1 = l1
        self.slice_size = slice_size
        self.slice_entries = slice_size // geometry.l2_entry_size
        self.slices_per_table = geometry.l2_entries // self.slice_entries
        self.cache: MetadataCache[array[int]] = MetadataCache(
            storage,
            entry_size=slice_size,
            limit=cache_bytes,
            decode=native_words,
            encode=encode_words,
            whole=whole,
        )

    def place(self, number: int) -> int:
        """The host offset of a slice, whose table must exist."""
        table, part = divmod(number, self.slices_per_table)
        return (int(self.l1[table]) & OFFSET_MASK) + part * self.slice_size

    def slice(self, number: int) -> array[int]:
        """The words of a slice. Raises StorageError, and CorruptMetadata where there is no table:
        a reader may come too late for one that was given up."""
        index = number // self.slices_per_table
        while True:
            # In this order: a table that goes away does so before its slices are dropped.
            stores = self.cache.stores
            if not int(self.l1[index]) & OFFSET_MASK:
                raise CorruptMetadata("L1 table", index=index, reason="there is no L2 table")
            words = self.cache.get_if(number, offset=self.place(number), stores=stores)
            if words is not None:
                return words

    def load_part(self, l1_index: int, *, first: int, count: int) -> Uint64Array:
        """Words of entries [first, first + count) of a table, through the cache when they are few.

        Shape (count * words an entry,)."""
        words_an_entry = self._geometry.l2_entry_size // 8
        begin = first // self.slice_entries
        end = (first + count - 1) // self.slice_entries + 1
        if end - begin > 2:
            return self._load_range(l1_index, first=first, count=count)
        base = l1_index * self.slices_per_table
        # A copy in any case, which an array makes in one step: a writer may change the slice next.
        parts = [
            np.frombuffer(self.slice(base + index)[:], dtype=np.uint64)
            for index in range(begin, end)
        ]
        words = parts[0] if len(parts) == 1 else np.concatenate(parts)
        skip = (first - begin * self.slice_entries) * words_an_entry
        return words[skip : skip + count * words_an_entry]

    def _load_range(self, l1_index: int, *, first: int, count: int) -> Uint64Array:
        """The same beside the cache; what is changed there counts."""
        size = self._geometry.l2_entry_size
        base = l1_index * self.slices_per_table * self.slice_size // 8
        begin = first * size // 8
        while True:
            stores = self.cache.stores
            table = int(self.l1[l1_index]) & OFFSET_MASK
            raw = self._storage.pread(count * size, offset=table + first * size)
            words = np.frombuffer(native_words(raw.ljust(count * size, b"\0")), dtype=np.uint64)
            self._overlay(words, base + begin)
            if self.cache.stores == stores:
                return words

    def load_whole(self, l1_indices: Int64Array) -> Uint64Array:
        """All words of several tables, in order; neighbours in the file share a read.

        They do not go through the cache, but what is changed there counts."""
        size = self._geometry.cluster_size
        raw = bytearray(len(l1_indices) * size)
        view = memoryview(raw)
        while True:
            stores = self.cache.stores
            offsets = (self.l1[l1_indices] & np.uint64(OFFSET_MASK)).astype(np.int64)
            for index, count in _neighbours(offsets, size):
                part = view[index * size : (index + count) * size]
                self._storage.pread_into(part, offset=int(offsets[index]))
            # One swap of the whole buffer; bytes past the end of the file stay zero.
            words = np.frombuffer(raw, dtype=">u8").astype(np.uint64)
            if self.cache.dirty:
                length = size // 8
                for index, table in enumerate(l1_indices.tolist()):
                    whole = words[index * length : (index + 1) * length]
                    self._overlay(whole, table * length)
            if self.cache.stores == stores:
                return words

    def _overlay(self, words: Uint64Array, base: int) -> None:
        """Put changed slices over words from the file; `base` counts words from guest offset 0."""
        if not self.cache.dirty:
            return
        length = self.slice_size // 8
        first, last = base // length, (base + len(words) - 1) // length
        for number in self.cache.dirty_keys():
            if first <= number <= last:
                changed = np.frombuffer(self.slice(number)[:], dtype=np.uint64)
                at = number * length - base
                begin, end = max(at, 0), min(at + length, len(words))
                words[begin:end] = changed[begin - at : end - at]


def _neighbours(offsets: Int64Array, size: int) -> Iterator[tuple[int, int]]:
    """(index, count) of runs whose tables follow one another in the file, MAX_READ at most."""
    most = max(1, MAX_READ // size)
    breaks = np.flatnonzero(offsets[1:] != offsets[:-1] + size) + 1
    edges = [0, *breaks.tolist(), len(offsets)]
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        for index in range(begin, end, most):
            yield index, min(most, end - index)
