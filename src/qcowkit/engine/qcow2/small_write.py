"""The short way for small writes: one cluster, warm tables, an entry without surprises.

What it does is what `Writer` would do, without a plan and without arrays; a property test holds the
two equal. Whatever is not plain to see is left to the long way."""

from __future__ import annotations

from array import array

from qcowkit.codecs.qcow2.entries import COPIED, OFFSET_MASK
from qcowkit.engine.qcow2.old_content import Below, OldContent
from qcowkit.engine.qcow2.state import WriteState
from qcowkit.errors import CorruptMetadata
from qcowkit.units import SECTOR

_FLAGS = (1 << 64) - 1 - OFFSET_MASK


class SmallWriter:
    """Writes into one image that need no more than a look. The caller holds the lock."""

    def __init__(self, state: WriteState, old: OldContent) -> None:
        self._state = state
        self._old = old
        self._barriers = state.barriers
        self._bits = state.geometry.cluster_bits
        self._size = state.geometry.cluster_size
        self._mask = self._size - 1
        self._unit = state.geometry.subcluster_size
        self._unit_bits = self._unit.bit_length() - 1
        self._extended = state.geometry.has_subclusters
        self._words = 2 if self._extended else 1
        self._entries = state.tables.slice_entries
        self._bytes = 8 * self._words
        self._touch = state.tables.cache.touch
        self._find = state.tables.cache.find
        self._slice = state.tables.slice
        self._judged = state.judged
        self._owned = state.owned
        self._recent = state.guard.recent
        self._external = state.external
        self._cipher = state.cipher
        self._take = state.allocator.take_fresh
        self._put = state.data.pwrite

    def write(self, data: memoryview, offset: int) -> bool:
        """Write the bytes; False, and nothing done, where that is not so simple."""
        length = len(data)
        cluster = offset >> self._bits
        number = cluster // self._entries
        inside = offset & self._mask
        if not 0 < length <= self._size - inside or number not in self._judged:
            return False
        words = self._find(number)
        if words is None:
            words = self._slice(number)
        index = (cluster - number * self._entries) * self._words
        entry = words[index]
        span = 0
        if self._extended:
            first, last = inside >> self._unit_bits, (inside + length - 1) >> self._unit_bits
            span = (2 << last) - (1 << first)
            bitmap = words[index + 1]
            if not entry and not bitmap:
                return self._allocate(number, index, span, data, offset)
            if bitmap & span != span:
                return False
        elif not entry:
            return self._allocate(number, index, span, data, offset)
        host = entry & OFFSET_MASK
        if entry & _FLAGS != COPIED or (not host and not self._external):
            return False
        if host >> self._bits in self._recent:
            return False
        content: memoryview | bytearray = data
        if self._cipher is not None:
            if (offset | length) % SECTOR:
                return False
            content = self._cipher.encrypt(data, host=host + inside, guest=offset)
        self._barriers.pending = True
        self._put((content,), offset=host + inside)
        return True

    def _allocate(self, number: int, index: int, span: int, data: memoryview, offset: int) -> bool:
        """A cluster that is nowhere yet goes into one that reads as zeros."""
        if self._external or self._cipher is not None or number not in self._owned:
            return False
        inside = offset & self._mask
        buffers: tuple[memoryview | bytes | bytearray, ...] = (data,)
        if self._old.below is not None:
            merged = self._merge(self._old.below, data, inside, offset - inside)
            if merged is None:
                return False
            inside, buffers = merged
        cluster = self._take()
        if cluster < 0:
            return False
        self._barriers.pending = True
        try:
            self._put(buffers, offset=(cluster << self._bits) + inside)
            words = self._edit(number, index)
        except BaseException:
            self._state.allocator.free(cluster, 1, punch=False)
            raise
        words[index] = cluster << self._bits | COPIED
        if self._extended:
            words[index + 1] = span
        return True

    def _merge(
        self, below: Below, data: memoryview, inside: int, start: int
    ) -> tuple[int, tuple[memoryview | bytes | bytearray, ...]] | None:
        """(place in the cluster, buffers) with what lies around the data in the layers below; None
        where that is not so simple. start: guest offset of the cluster."""
        begin, end = 0, self._size
        if self._extended:
            # Only the subclusters that are touched have to be there afterwards.
            begin = inside & -self._unit
            end = (inside + len(data) + self._unit - 1) & -self._unit
        if len(data) == end - begin or start + begin >= below.size:
            return inside, (data,)
        if start + end > below.size or end - begin > len(data) * 32 + 65536:
            return None
        try:
            raw = below.read_or_none(start=start + begin, length=end - begin)
        except CorruptMetadata as error:
            self._state.foreign = error
            raise
        if raw is None:
            return inside, (data,)
        view = memoryview(raw)
        return begin, (view[: inside - begin], data, view[inside + len(data) - begin :])

    def _edit(self, number: int, index: int) -> array[int]:
        """The words of the slice, the entry at word `index` marked as changed."""
        words = self._find(number)
        first = index * 8
        if words is not None and self._touch(number, words, first=first, last=first + self._bytes):
            return words
        # A reader has pushed the slice out: it is found again.
        entry = index // self._words
        return self._state.edit(number, first=entry, last=entry + 1)
