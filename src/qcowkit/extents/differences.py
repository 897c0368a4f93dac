"""Where two disks may differ, as far as their tables alone can tell. Pure.

The same bytes of the same file are equal, and so are zeros and zeros, without reading any."""

from __future__ import annotations

import numpy as np

from qcowkit.extents.algebra import split_at
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import (
    ExtentTable,
    Flag,
    Int64Array,
    concatenate,
    single,
)

_KIND = np.uint16(Flag.COMPRESSED | Flag.ENCRYPTED)
_DATA_OR_ZERO = np.uint16(Flag.DATA | Flag.ZERO)


def may_differ(
    first: ExtentTable,
    second: ExtentTable,
    *,
    first_files: Int64Array,
    second_files: Int64Array,
) -> RangeSet:
    """Ranges of which only reading can tell whether they are equal.

    Both tables cover the same range. first_files, second_files: by layer, a number that stands for
    the file in which its host offsets lie; int64, shape (layers,)."""
    assert (first.begin, first.end) == (second.begin, second.end), "tables of different ranges"
    if not len(first):
        return RangeSet.empty()
    one, other = split_at(first, second.start), split_at(second, first.start)
    data, others_data = _is_data(one), _is_data(other)
    same = (one.host >= 0) & (one.host == other.host) & (one.stored == other.stored)
    same &= (one.flags & _KIND) == (other.flags & _KIND)
    same &= first_files[one.layer] == second_files[other.layer]
    equal = np.where(data & others_data, same, data == others_data)
    return RangeSet.of(one.start[~equal], (one.start + one.length)[~equal])


def pad_to(table: ExtentTable, start: int, stop: int) -> ExtentTable:
    """The table as one of [start, stop): beyond its end nothing is allocated."""
    end = table.end if len(table) else start
    return concatenate([part for part in (table, single(end, stop - end, 0)) if len(part)])


def _is_data(table: ExtentTable) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Rows whose bytes must be read; all others are zeros."""
    return np.asarray((table.flags & _DATA_OR_ZERO) == np.uint16(Flag.DATA))
