"""Holes of the host file under extents that claim data: a preallocated image has many."""

from __future__ import annotations

from itertools import islice

import numpy as np
import numpy.typing as npt

from qcowkit.extents.algebra import split_at
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import ExtentTable, Flag, Int64Array
from qcowkit.storage.protocol import Storage

# Two host calls a piece: beyond this many, asking costs more than it could save.
MAX_PIECES = 1 << 20


def load_host_data(storage: Storage) -> RangeSet | None:
    """Host ranges that may hold data; None for a file in too many pieces to be worth asking."""
    pieces = list(islice(storage.iter_data(offset=0, length=storage.size()), MAX_PIECES + 1))
    if len(pieces) > MAX_PIECES:
        return None
    starts = np.array([offset for offset, _ in pieces], dtype=np.int64)
    return RangeSet.of(starts, starts + np.array([size for _, size in pieces], dtype=np.int64))


def mark_holes(table: ExtentTable, data: RangeSet) -> ExtentTable:
    """Plain DATA rows, cut where the host has holes; what lies in a hole gets ZERO as well."""
    plain = (table.flags & (Flag.DATA | Flag.COMPRESSED)) == Flag.DATA
    plain &= table.host >= 0
    if not plain.any():
        return table
    cuts = _edges_inside(table, plain, data)
    if cuts is None:
        return table
    if len(cuts):
        table = split_at(table, cuts)
        plain = ((table.flags & (Flag.DATA | Flag.COMPRESSED)) == Flag.DATA) & (table.host >= 0)
    hole = plain & ~data.contains(table.host)
    if not hole.any():
        return table
    flags = table.flags.copy()
    flags[hole] |= np.uint16(Flag.ZERO)
    return ExtentTable(
        start=table.start,
        length=table.length,
        flags=flags,
        layer=table.layer,
        host=table.host,
        stored=table.stored,
    )


def _edges_inside(
    table: ExtentTable, plain: npt.NDArray[np.bool_], data: RangeSet
) -> Int64Array | None:
    """Guest offsets at which a plain row crosses an edge of a host range.

    None where that is more often than there are edges: host clusters mapped over and over."""
    edges = np.sort(np.concatenate((data.start, data.stop)))
    rows = np.flatnonzero(plain)
    host, length = table.host[rows], table.length[rows]
    first = np.searchsorted(edges, host, side="right")
    counts = np.searchsorted(edges, host + length, side="left") - first
    if int(counts.sum()) > 2 * MAX_PIECES:
        return None
    owner = np.repeat(np.arange(len(rows)), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    cuts: Int64Array = edges[first[owner] + rank] - host[owner] + table.start[rows][owner]
    return cuts
