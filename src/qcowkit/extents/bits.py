"""Which parts of a disk are dirty: a bit for each granule, packed. Pure.

A table of runs would be smaller for most bitmaps and without bound for the worst; bits have one
size, whatever is written. Bit n is that of granule n; the least significant bit comes first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qcowkit.extents.algebra import clip, merge_rows
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import ExtentTable, Flag, concatenate, make_table
from qcowkit.units import ceil_div

Bytes = npt.NDArray[np.uint8]

# Packed bytes that are looked at together; unpacked they take eight times that.
_WINDOW = 1 << 16


class GranuleBits:
    """The dirty granules of a disk of `size` bytes. Not safe from several threads.

    raw: the packed bits, uint8, shape (ceil(granules / 8),); bits behind the last granule are 0."""

    def __init__(self, *, size: int, granularity_bits: int) -> None:
        """All clean. granularity_bits: a granule has 2 to the power of that many bytes."""
        self.size = size
        self.shift = granularity_bits
        # The host gives memory for what is touched only.
        self.raw: Bytes = np.zeros(self.byte_count, dtype=np.uint8)
        self._view = self.raw.data

    @property
    def granularity(self) -> int:
        """Bytes of a granule."""
        return 1 << self.shift

    @property
    def granules(self) -> int:
        """How many there are; the last one may reach beyond the disk."""
        return ceil_div(self.size, 1 << self.shift)

    @property
    def byte_count(self) -> int:
        """Bytes of the packed bits."""
        return ceil_div(self.granules, 8)

    def mark(self, *, start: int, length: int) -> None:
        """Every granule that [start, start + length) touches is dirty; the range is cut to the
        disk."""
        stop = min(start + length, self.size)
        if stop <= start:
            return
        first, last = start >> self.shift, (stop - 1) >> self.shift
        view = self._view
        low, high = first >> 3, last >> 3
        head, tail = 0xFF << (first & 7) & 0xFF, (2 << (last & 7)) - 1
        if low == high:
            view[low] |= head & tail
            return
        view[low] |= head
        view[high] |= tail
        if high - low > 1:
            self.raw[low + 1 : high] = 0xFF

    def clear(self) -> None:
        """All clean."""
        self.raw = np.zeros(self.byte_count, dtype=np.uint8)
        self._view = self.raw.data

    def put(self, data: bytes | Bytes, *, offset: int) -> None:
        """Packed bits from byte `offset` on; what lies behind the last granule is dropped."""
        part = np.frombuffer(data, dtype=np.uint8)[: max(0, len(self.raw) - offset)]
        self.raw[offset : offset + len(part)] = part
        self._cut_tail()

    def resize(self, size: int) -> None:
        """Another size of the disk, in bytes: what is added is clean."""
        self.size = size
        kept = self.raw[: self.byte_count]
        raw = np.zeros(self.byte_count, dtype=np.uint8)
        raw[: len(kept)] = kept
        self.raw, self._view = raw, raw.data
        self._cut_tail()

    def copy(self) -> GranuleBits:
        """The same bits in memory of their own."""
        other = GranuleBits(size=self.size, granularity_bits=self.shift)
        other.raw[:] = self.raw
        return other

    def merge(self, other: GranuleBits) -> None:
        """What is dirty in `other` is dirty here too: whole granules of this one, whose size may
        be another. What lies beyond this disk is left out."""
        if other.shift == self.shift:
            count = min(len(self.raw), len(other.raw))
            self.raw[:count] |= other.raw[:count]
        elif other.shift < self.shift:
            self._merge_finer(other)
        else:
            self._merge_coarser(other)
        self._cut_tail()

    def _merge_finer(self, other: GranuleBits) -> None:
        factor = 1 << (self.shift - other.shift)
        step = max(1, _WINDOW // factor)
        for begin in range(0, len(self.raw), step):
            end = min(begin + step, len(self.raw))
            part = other.raw[begin * factor : end * factor]
            if not part.any():
                continue
            bits = np.unpackbits(part, bitorder="little")
            rows = np.pad(bits, (0, -len(bits) % factor)).reshape(-1, factor)
            packed = np.packbits(rows.any(axis=1), bitorder="little")
            self.raw[begin : begin + len(packed)] |= packed

    def _merge_coarser(self, other: GranuleBits) -> None:
        factor = 1 << (other.shift - self.shift)
        step = max(1, _WINDOW // factor)
        for begin in range(0, len(other.raw), step):
            part = other.raw[begin : begin + step]
            if not part.any():
                continue
            bits = np.repeat(np.unpackbits(part, bitorder="little"), factor)
            place = begin * factor
            packed = np.packbits(bits, bitorder="little")[: max(0, len(self.raw) - place)]
            self.raw[place : place + len(packed)] |= packed

    @property
    def count(self) -> int:
        """How many granules are dirty."""
        return sum(int(np.unpackbits(part).sum()) for _, part in self._windows())

    def ranges(self) -> RangeSet:
        """The dirty bytes of the disk."""
        starts, stops = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for begin, part in self._windows():
            bits = np.unpackbits(part, bitorder="little").view(np.int8)
            edges = np.diff(bits, prepend=np.int8(0), append=np.int8(0))
            starts.append(np.flatnonzero(edges > 0) + begin * 8)
            stops.append(np.flatnonzero(edges < 0) + begin * 8)
        # Runs that go on from one window to the next are joined.
        found = RangeSet.of(np.concatenate(starts), np.concatenate(stops))
        return found.scale_up(self.granularity).clip(0, self.size)

    @property
    def dirty_bytes(self) -> int:
        """Bytes of the disk in dirty granules."""
        if not self.granules:
            return 0
        last = self.granules - 1
        is_last_dirty = bool(self.raw[last >> 3] >> (last & 7) & 1)
        beyond = (self.granules << self.shift) - self.size
        return (self.count << self.shift) - (beyond if is_last_dirty else 0)

    def iter_extents(self, *, start: int, stop: int) -> Iterator[ExtentTable]:
        """[start, stop) of the disk in tables of bounded length, whose rows are DIRTY or have no
        flag; neighbours differ, across tables too."""
        first, last = start >> self.shift >> 3, ceil_div(ceil_div(stop, self.granularity), 8)
        waiting: ExtentTable | None = None
        for begin in range(first, last, _WINDOW):
            found = self._rows(begin, min(begin + _WINDOW, last), start=start, stop=stop)
            if waiting is not None:
                found = concatenate((waiting, found))
                found = merge_rows(found, found.flags[1:] == found.flags[:-1])
            waiting = found.take(slice(-1, None))
            if len(found) > 1:
                yield found.take(slice(0, -1))
        if waiting is not None and start < stop:
            yield waiting

    def _rows(self, begin: int, end: int, *, start: int, stop: int) -> ExtentTable:
        """The rows of packed bytes [begin, end), as far as they lie in [start, stop)."""
        bits = np.unpackbits(self.raw[begin:end], bitorder="little")
        edges = np.append(0, np.flatnonzero(np.diff(bits)) + 1).astype(np.int64)
        flags = np.where(bits[edges], int(Flag.DIRTY), 0)
        starts = (edges + begin * 8) << self.shift
        length = np.diff(starts, append=end * 8 << self.shift)
        return clip(make_table(starts, length, flags), start, stop)

    def _windows(self) -> Iterator[tuple[int, Bytes]]:
        """(first byte, packed bits) of the windows in which anything is dirty."""
        for begin in range(0, len(self.raw), _WINDOW):
            part = self.raw[begin : begin + _WINDOW]
            if part.any():
                yield begin, part

    def _cut_tail(self) -> None:
        if self.granules % 8:
            self.raw[-1] &= (1 << self.granules % 8) - 1
