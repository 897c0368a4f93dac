"""L1 and L2 tables of one qcow2 image in memory: loaded in bulk, cached by slice, bounded.

A slice is a part of an L2 table; the cache knows no image, only a storage and its sizes."""

from __future__ import annotations

import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

from qcowkit.codecs.qcow2.entries import OFFSET_MASK, Uint64Array, check_l1
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.errors import CorruptMetadata
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage
from qcowkit.units import KiB, MiB

MAX_SLICE = 64 * KiB
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


class SliceCache:
    """The most recently used L2 slices, `limit` bytes at most. Safe from several threads."""

    def __init__(self, storage: Storage, *, slice_size: int, limit: int) -> None:
        self._storage = storage
        self._slice_size = slice_size
        self._capacity = max(2, limit // slice_size)
        self._slices: OrderedDict[int, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, host_offset: int) -> array[int]:
        """The slice at `host_offset` (a multiple of the slice size), native words."""
        with self._lock:
            words = self._slices.get(host_offset)
            if words is not None:
                self._slices.move_to_end(host_offset)
                return words
        words = native_words(_pad(self._storage, host_offset, self._slice_size))
        with self._lock:
            self._slices[host_offset] = words
            while len(self._slices) > self._capacity:
                self._slices.popitem(last=False)
        return words


def _pad(storage: Storage, offset: int, length: int) -> bytes:
    """Bytes of a table; a file that ends inside its last cluster reads as zeros there."""
    raw = storage.pread(length, offset=offset)
    return raw if len(raw) == length else raw.ljust(length, b"\0")


class L2Tables:
    """Reads L2 words by L1 entry. Offsets are host bytes."""

    def __init__(self, storage: Storage, *, geometry: Geometry, cache_bytes: int) -> None:
        self._storage = storage
        self._geometry = geometry
        self.slice_size = min(geometry.cluster_size, MAX_SLICE)
        self.slice_entries = self.slice_size // geometry.l2_entry_size
        self._cache = SliceCache(storage, slice_size=self.slice_size, limit=cache_bytes)

    def load_part(self, l1_entry: int, *, first: int, count: int) -> Uint64Array:
        """Words of entries [first, first + count) of a table, through the cache when they are few.

        Shape (count * words an entry,)."""
        size = self._geometry.l2_entry_size
        table = l1_entry & OFFSET_MASK
        begin = first // self.slice_entries
        end = (first + count - 1) // self.slice_entries + 1
        if end - begin <= 2:
            parts = [
                np.frombuffer(self._cache.get(table + index * self.slice_size), dtype=np.uint64)
                for index in range(begin, end)
            ]
            words = parts[0] if len(parts) == 1 else np.concatenate(parts)
            skip = (first - begin * self.slice_entries) * size // 8
            return words[skip : skip + count * size // 8]
        raw = _pad(self._storage, table + first * size, count * size)
        return np.frombuffer(native_words(raw), dtype=np.uint64)

    def load_whole(self, l1_entries: Uint64Array) -> Uint64Array:
        """All words of several tables, in order; neighbours in the file share a read."""
        size = self._geometry.cluster_size
        offsets = (l1_entries & np.uint64(OFFSET_MASK)).astype(np.int64)
        raw = bytearray(len(offsets) * size)
        view = memoryview(raw)
        for index, count in _neighbours(offsets, size):
            part = view[index * size : (index + count) * size]
            self._storage.pread_into(part, offset=int(offsets[index]))
        # One swap of the whole buffer; bytes past the end of the file stay zero.
        return np.frombuffer(raw, dtype=">u8").astype(np.uint64)


def _neighbours(offsets: Int64Array, size: int) -> Iterator[tuple[int, int]]:
    """(index, count) of runs whose tables follow one another in the file, MAX_READ at most."""
    most = max(1, MAX_READ // size)
    breaks = np.flatnonzero(offsets[1:] != offsets[:-1] + size) + 1
    edges = [0, *breaks.tolist(), len(offsets)]
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        for index in range(begin, end, most):
            yield index, min(most, end - index)
