"""Disks made of other disks: several behind one another, a part of one, one with bad spots."""

from __future__ import annotations

from bisect import bisect, insort
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from qcowkit.engine.ranges import check_range
from qcowkit.errors import CorruptMetadata, StorageError
from qcowkit.extents.algebra import clip, shift
from qcowkit.extents.table import ExtentTable, Flag, concatenate, make_table, single
from qcowkit.image.chain import data_rows
from qcowkit.image.protocol import Image
from qcowkit.units import MiB, align_down

# What `Salvaged` gives up at once when tables cannot be read, bytes.
_STEP = 2 * MiB


class Disk(Protocol):
    """What copying, mapping and comparing need of a guest disk. `images`: by `layer` of a row."""

    @property
    def size(self) -> int: ...

    @property
    def images(self) -> tuple[Image, ...]: ...

    def iter_extents(
        self, *, start: int = 0, length: int | None = None, align: int = 1
    ) -> Iterator[ExtentTable]:
        """Windows of bounded memory over the range, in ascending order."""

    def read_table(self, table: ExtentTable, buffer: memoryview) -> None:
        """Fill the buffer with what the table covers."""


class Window:
    """[start, start + length) of a disk as a disk of its own."""

    def __init__(self, disk: Disk, *, start: int, length: int) -> None:
        check_range(start=start, length=length, size=disk.size)
        self._disk = disk
        self._start = start
        self.size = length
        self.images = disk.images

    def iter_extents(
        self, *, start: int = 0, length: int | None = None, align: int = 1
    ) -> Iterator[ExtentTable]:
        """See `Disk.iter_extents`."""
        length = self.size - start if length is None else length
        tables = self._disk.iter_extents(start=self._start + start, length=length)
        return _realign((shift(table, -self._start) for table in tables), align)

    def read_table(self, table: ExtentTable, buffer: memoryview) -> None:
        """See `Disk.read_table`."""
        self._disk.read_table(shift(table, self._start), buffer)


class Concatenation:
    """Disks one behind the other."""

    def __init__(self, disks: Sequence[Disk]) -> None:
        self._disks = tuple(disks)
        sizes = [disk.size for disk in disks]
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self.size = sum(sizes)
        self.images = tuple(image for disk in disks for image in disk.images)
        counts = [len(disk.images) for disk in disks]
        self._layers = [sum(counts[:index]) for index in range(len(counts))]

    def iter_extents(
        self, *, start: int = 0, length: int | None = None, align: int = 1
    ) -> Iterator[ExtentTable]:
        """See `Disk.iter_extents`."""
        stop = self.size if length is None else start + length
        return _realign(self._tables(start, stop), align)

    def _tables(self, start: int, stop: int) -> Iterator[ExtentTable]:
        for disk, base, layer in zip(self._disks, self._starts, self._layers, strict=True):
            begin, end = max(start, base), min(stop, base + disk.size)
            if begin >= end:
                continue
            for table in disk.iter_extents(start=begin - base, length=end - begin):
                yield _relayer(shift(table, base), layer)

    def read_table(self, table: ExtentTable, buffer: memoryview) -> None:
        """See `Disk.read_table`."""
        for disk, base, layer in zip(self._disks, self._starts, self._layers, strict=True):
            part = clip(table, base, base + disk.size)
            if len(part):
                at = part.begin - table.begin
                own = shift(_relayer(part, -layer), -base)
                disk.read_table(own, buffer[at : at + part.end - part.begin])


class Padded:
    """A disk with zeros behind its end, up to `size` bytes; they count as the top layer's own."""

    def __init__(self, disk: Disk, *, size: int) -> None:
        self._disk = disk
        self.size = max(size, disk.size)
        self.images = disk.images

    def iter_extents(
        self, *, start: int = 0, length: int | None = None, align: int = 1
    ) -> Iterator[ExtentTable]:
        """See `Disk.iter_extents`."""
        stop = self.size if length is None else start + length
        return _realign(self._tables(start, stop), align)

    def _tables(self, start: int, stop: int) -> Iterator[ExtentTable]:
        end = min(stop, self._disk.size)
        if start < end:
            yield from self._disk.iter_extents(start=start, length=end - start)
        start = max(start, end)
        if start < stop:
            yield single(start, stop - start, Flag.ZERO | Flag.PRESENT)

    def read_table(self, table: ExtentTable, buffer: memoryview) -> None:
        """See `Disk.read_table`."""
        part = clip(table, table.begin, min(table.end, self._disk.size))
        count = part.end - part.begin
        if count:
            self._disk.read_table(part, buffer[:count])
        buffer[count:] = bytes(len(buffer) - count)


class Salvaged:
    """A disk whose unreadable spots read as zeros, each reported once as (start, length, why).

    A spot that was given up stays so: whoever walks the extents twice sees the same disk."""

    def __init__(self, disk: Disk, *, report: Callable[[int, int, str], None]) -> None:
        self._disk = disk
        self._report = report
        self._lost: list[tuple[int, int]] = []
        self.size = disk.size
        self.images = disk.images

    def iter_extents(
        self, *, start: int = 0, length: int | None = None, align: int = 1
    ) -> Iterator[ExtentTable]:
        """See `Disk.iter_extents`; a range whose tables are malformed is a hole."""
        stop = self.size if length is None else start + length
        return _realign(self._tables(start, stop), align)

    def _tables(self, start: int, stop: int) -> Iterator[ExtentTable]:
        """Spans shrink around what fails, down to one step, and grow again behind it."""
        span = stop - start
        while start < stop:
            end = min(stop, align_down(start + span, _STEP) + _STEP)
            end, lost = self._next_spot(start, end)
            if lost:
                yield single(start, end - start, Flag.NONE)
                start = end
                continue
            try:
                for table in self._disk.iter_extents(start=start, length=end - start):
                    start = table.end
                    yield table
                span = max(2 * span, _STEP)
            except (CorruptMetadata, StorageError) as error:
                span = min(span, end - start) // 2
                if end - start <= _STEP:
                    self._give_up(start, end, str(error))

    def _next_spot(self, start: int, end: int) -> tuple[int, bool]:
        """How far [start, end) is of one kind, and whether it is lost."""
        index = bisect(self._lost, start, key=lambda spot: spot[0])
        if index and start < self._lost[index - 1][1]:
            return min(end, self._lost[index - 1][1]), True
        if index < len(self._lost):
            end = min(end, self._lost[index][0])
        return end, False

    def _give_up(self, start: int, end: int, why: str) -> None:
        insort(self._lost, (start, end))
        self._report(start, end - start, why)

    def read_table(self, table: ExtentTable, buffer: memoryview) -> None:
        """See `Disk.read_table`."""
        try:
            self._disk.read_table(table, buffer)
        except (CorruptMetadata, StorageError):
            self._read_rows(table, buffer)

    def _read_rows(self, table: ExtentTable, buffer: memoryview) -> None:
        np.frombuffer(buffer, dtype=np.uint8).fill(0)
        rows = data_rows(table)
        for index in range(len(rows)):
            row = rows.take(slice(index, index + 1))
            at = row.begin - table.begin
            part = buffer[at : at + row.end - row.begin]
            try:
                self._disk.read_table(row, part)
            except (CorruptMetadata, StorageError) as error:
                part[:] = bytes(len(part))
                self._report(row.begin, len(part), str(error))


def _relayer(table: ExtentTable, delta: int) -> ExtentTable:
    if delta == 0:
        return table
    return make_table(
        table.start,
        table.length,
        table.flags,
        layer=table.layer + delta,
        host=table.host,
        stored=table.stored,
    )


def _realign(tables: Iterator[ExtentTable], align: int) -> Iterator[ExtentTable]:
    """The same range cut at multiples of `align` only: a cut-off tail joins the next window."""
    rest: ExtentTable | None = None
    for table in tables:
        joined = table if rest is None else concatenate((rest, table))
        cut = align_down(joined.end, align)
        if cut <= joined.begin:
            rest = joined
            continue
        yield clip(joined, joined.begin, cut)
        rest = clip(joined, cut, joined.end) if cut < joined.end else None
    if rest is not None:
        yield rest
