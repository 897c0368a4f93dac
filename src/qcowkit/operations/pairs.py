"""Two disks side by side: their tables over the same ranges, and where they have to be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qcowkit.extents.algebra import clip, split_at
from qcowkit.extents.differences import may_differ, pad_to
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import ExtentTable, Int64Array, empty
from qcowkit.extents.zeros import zero_units
from qcowkit.image.chain import WINDOW_ENTRIES, Chain, data_rows
from qcowkit.storage.file import FileStorage
from qcowkit.storage.protocol import Storage
from qcowkit.units import align_down

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Tables of both disks over the guest range [start, stop); beyond its end a disk reads as
    zeros. suspects: where only reading can tell whether the two are equal."""

    start: int
    stop: int
    first: ExtentTable
    second: ExtentTable
    suspects: RangeSet


def iter_pairs(
    first: Chain | None, second: Chain | None, *, size: int, align: int
) -> Iterator[Pair]:
    """Pairs over [0, size) in bounded memory, each ending at a multiple of `align` or at `size`.

    None stands for a disk that has nothing: all zeros."""
    numbers: dict[object, int] = {}
    files = [_files_of(disk, numbers) for disk in (first, second)]
    start = 0
    while start < size:
        stop, tables = size, []
        for disk in (first, second):
            table = _map_from(disk, start, stop)
            if disk is not None and len(table) and table.end < min(disk.size, stop):
                # It has more than fits into one window.
                stop = max(align_down(table.end, align), min(start + align, stop))
            tables.append((disk, table))
        one, other = (_fitted(disk, table, start, stop) for disk, table in tables)
        suspects = may_differ(one, other, first_files=files[0], second_files=files[1])
        yield Pair(start=start, stop=stop, first=one, second=other, suspects=suspects)
        start = stop


def _map_from(disk: Chain | None, start: int, stop: int) -> ExtentTable:
    if disk is None or start >= disk.size:
        return empty()
    length = min(stop, disk.size) - start
    return disk.extents(start=start, length=length, limit=WINDOW_ENTRIES)


def _fitted(disk: Chain | None, table: ExtentTable, start: int, stop: int) -> ExtentTable:
    """The table of exactly [start, stop)."""
    if disk is not None and len(table) and table.end < min(disk.size, stop):
        # Shorter than the least step: the whole of that is asked for.
        table = disk.extents(start=start, length=min(stop, disk.size) - start)
    return pad_to(clip(table, start, stop), start, stop)


def _files_of(disk: Chain | None, numbers: dict[object, int]) -> Int64Array:
    """By layer, a number for the file that holds its data."""
    images = () if disk is None else disk.images
    found = [numbers.setdefault(_identity(image.data_storage), len(numbers)) for image in images]
    return np.array(found or [-1], dtype=np.int64)


def _identity(storage: Storage) -> object:
    return storage.identity if isinstance(storage, FileStorage) else id(storage)


def only_within(pair: Pair, ranges: RangeSet) -> Pair:
    """The same pair with nothing allocated outside of `ranges`: what is not asked for is not read,
    and the two are equal there."""
    return replace(
        pair,
        first=_within(pair.first, ranges),
        second=_within(pair.second, ranges),
    )


def _within(table: ExtentTable, ranges: RangeSet) -> ExtentTable:
    cut = split_at(table, np.concatenate((ranges.start, ranges.stop)))
    inside = ranges.contains(cut.start)
    return ExtentTable(
        start=cut.start,
        length=cut.length,
        flags=np.where(inside, cut.flags, np.uint16(0)),
        layer=cut.layer,
        host=cut.host,
        stored=cut.stored,
    )


def read_part(
    disk: Chain | None, table: ExtentTable, buffer: Bytes, *, start: int, stop: int
) -> None:
    """Fill the buffer with guest bytes [start, stop) of one of the two disks. table: its own of the
    pair, which holds the range. Raises what reading raises."""
    view = buffer[: stop - start]
    if disk is None:
        view.fill(0)
    else:
        disk.read_table(clip(table, start, stop), view.data)


def compare_part(
    disks: tuple[Chain | None, Chain | None],
    tables: tuple[ExtentTable, ExtentTable],
    buffers: tuple[Bytes, Bytes],
    *,
    start: int,
    stop: int,
    unit: int,
) -> Mask:
    """For each unit of [start, stop) whether two disks differ. The first buffer then holds what the
    first of them shows; where one of them has no data the other is only looked at for zeros."""
    length = stop - start
    left, right = (buffer[:length] for buffer in buffers)
    read_part(disks[0], tables[0], left, start=start, stop=stop)
    if not _has_data(tables[1], start, stop):
        return ~zero_units(left, unit)
    read_part(disks[1], tables[1], right, start=start, stop=stop)
    if not _has_data(tables[0], start, stop):
        return ~zero_units(right, unit)
    return unequal_units(left, right, unit)


def _has_data(table: ExtentTable, start: int, stop: int) -> bool:
    return len(data_rows(clip(table, start, stop))) > 0


def unequal_units(left: Bytes, right: Bytes, unit: int) -> Mask:
    """For each unit of bytes whether the two differ; equal shapes (n,), the last may be short."""
    whole = len(left) // unit
    cut = whole * unit
    words = left[:cut].view(np.uint64) != right[:cut].view(np.uint64)
    found: Mask = words.reshape(whole, unit // 8).any(axis=1)
    if cut == len(left):
        return found
    return np.append(found, not np.array_equal(left[cut:], right[cut:]))
