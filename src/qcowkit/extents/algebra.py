"""Pure operations on extent tables: cut, merge, stack. Every result covers exactly one range.

A row may be cut anywhere. The host offset of a plain row moves with its start; a COMPRESSED row
keeps `host` and `stored`, which locate the whole cluster whatever part of it is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcowkit.extents.table import (
    ExtentTable,
    Flag,
    Int64Array,
    concatenate,
    empty,
)
from qcowkit.units import align_up

BoolArray = npt.NDArray[np.bool_]

_COMPRESSED = int(Flag.COMPRESSED)
_PRESENT = int(Flag.PRESENT)


def clip(table: ExtentTable, start: int, stop: int) -> ExtentTable:
    """The part of the table within [start, stop): guest bytes, any alignment.

    The range may reach beyond the table on either side. Columns of rows that stay whole are
    views; a table that lies within the range is returned as it is."""
    begin, end = table.begin, table.end
    if start <= begin and stop >= end:
        return table
    start, stop = max(start, begin), min(stop, end)
    if start >= stop:
        return empty()
    first = int(np.searchsorted(table.start, start, side="right")) - 1
    last = int(np.searchsorted(table.start, stop, side="left"))
    part = table.take(slice(first, last))
    lead = start - int(part.start[0])
    starts, host, length = part.start, part.host, part.length.copy()
    if lead:
        starts, host = starts.copy(), host.copy()
        starts[0] = start
        length[0] -= lead
        if host[0] >= 0 and not part.flags[0] & _COMPRESSED:
            host[0] += lead
    length[-1] = stop - int(starts[-1])
    return _with_columns(part, start=starts, length=length, host=host)


def coalesce(table: ExtentTable) -> ExtentTable:
    """Merge neighbours that share flags and layer and whose host ranges follow one another.

    Rows without a host merge with each other. COMPRESSED rows stay apart: each is a cluster."""
    if len(table) < 2:
        return table
    host, flags = table.host, table.flags
    joins = (flags[1:] == flags[:-1]) & (table.layer[1:] == table.layer[:-1])
    joins &= (flags[1:] & _COMPRESSED) == 0
    joins &= host[1:] == np.where(host[:-1] < 0, host[:-1], host[:-1] + table.length[:-1])
    return merge_rows(table, joins)


def merge_rows(table: ExtentTable, joins: BoolArray) -> ExtentTable:
    """Row i + 1 becomes part of row i where `joins[i]`, shape (n - 1,).

    A merged row keeps the other columns of its first part; `stored` is the sum of all parts."""
    if not joins.any():
        return table
    rows = np.append(0, np.flatnonzero(~joins) + 1)
    merged = table.take(rows)
    stored = np.add.reduceat(table.stored, rows) if table.stored.any() else merged.stored
    return _with_columns(merged, length=np.diff(merged.start, append=table.end), stored=stored)


def overlay(top: ExtentTable, base: ExtentTable) -> ExtentTable:
    """What a reader of `top` over `base` sees; covers the range of `top`.

    PRESENT rows of the top win; elsewhere the base shows, PRESENT or not, with the layer that it
    brings. Beyond the end of a shorter base the rows of the top stay: so a byte that no layer
    decides carries the layer of the deepest one that reaches it, as qemu's map does. Both begin at
    the same guest offset (an empty base is shorter than any top). COMPRESSED rows of the top are
    never cut; nothing of the base is cut but at the edges of what hides it.

    A base beyond a short middle layer must not show through: stack from the bottom upwards, or
    clip each base to the smallest size above it."""
    present = (top.flags & _PRESENT) != 0
    base_end = min(base.end, top.end) if len(base) else top.begin
    if base_end <= top.begin or present.all():
        return top
    assert top.begin == base.begin, f"the top begins at {top.begin}, the base at {base.begin}"
    if len(top) == 1:
        hidden = clip(top, base_end, top.end) if base_end < top.end else empty()
        shown = clip(base, top.begin, base_end)
        return concatenate((shown, hidden)) if len(hidden) else shown
    return _interleave(top, base, present=present, base_end=base_end)


def _interleave(
    top: ExtentTable, base: ExtentTable, *, present: BoolArray, base_end: int
) -> ExtentTable:
    """Overlay in general. An edge of either table counts only where that table may be seen."""
    top_seen = present.copy()
    top_seen[0] = True
    top_seen[1:] |= present[:-1]
    top_seen |= top.start >= base_end
    below = base.start if base.end <= base_end else base.start[base.start < base_end]
    below = np.append(below, base_end) if base_end < top.end else below
    below = below[~present[_rows_at(top, below)]]
    edges = _merge_sorted(top.start[top_seen], below)
    from_top = _rows_at(top, edges)
    show_top = present[from_top] | (edges >= base_end)
    from_base = np.minimum(_rows_at(base, edges), len(base) - 1)
    upper, lower = top.take(from_top), base.take(from_base)
    merged = ExtentTable(
        start=np.where(show_top, upper.start, lower.start),
        length=np.diff(edges, append=top.end),
        flags=np.where(show_top, upper.flags, lower.flags),
        layer=np.where(show_top, upper.layer, lower.layer),
        host=np.where(show_top, upper.host, lower.host),
        stored=np.where(show_top, upper.stored, lower.stored),
    )
    return _advance(merged, edges)


def shift(table: ExtentTable, delta: int) -> ExtentTable:
    """The same rows `delta` guest bytes further; host offsets stay."""
    return _with_columns(table, start=table.start + delta) if delta else table


def split_at(table: ExtentTable, offsets: npt.ArrayLike) -> ExtentTable:
    """Cut rows at the given guest offsets (any order, repeats allowed; those outside are idle)."""
    cuts = np.sort(np.asarray(offsets, dtype=np.int64).ravel())
    if len(cuts):
        cuts = cuts[np.append(True, cuts[1:] != cuts[:-1])]
    cuts = cuts[(cuts > table.begin) & (cuts < table.end)]
    if not len(cuts):
        return table
    edges = _merge_sorted(table.start, cuts)
    if len(edges) == len(table):
        return table
    rows = table.take(_rows_at(table, edges))
    return _advance(_with_columns(rows, length=np.diff(edges, append=table.end)), edges)


def split_every(table: ExtentTable, unit: int) -> ExtentTable:
    """Cut rows at every multiple of the power of two `unit`. The result has at least one row a
    unit: the caller bounds the range."""
    if not len(table):
        return table
    first = align_up(table.begin + 1, unit)
    return split_at(table, np.arange(first, table.end, unit, dtype=np.int64))


def units_with(table: ExtentTable, flag: int, unit: int) -> BoolArray:
    """The units of `unit` guest bytes, a power of two, that rows with any bit of `flag` touch.

    Shape (n,): element i stands for unit `table.begin // unit + i`, up to the one that holds the
    table's last byte. The caller bounds the range; RangeSet has no such need."""
    if not len(table):
        return np.zeros(0, dtype=np.bool_)
    base = table.begin // unit
    count = -(-table.end // unit) - base
    chosen = (table.flags & flag) != 0
    if len(table) == 1 or chosen.all() or not chosen.any():
        return np.full(count, chosen[0], dtype=np.bool_)
    start, stop = table.start[chosen], (table.start + table.length)[chosen]
    depth = np.bincount(start // unit - base, minlength=count + 1)
    depth -= np.bincount((stop - 1) // unit - base + 1, minlength=count + 1)
    return np.cumsum(depth[:count]) > 0


def _rows_at(table: ExtentTable, offsets: Int64Array) -> npt.NDArray[np.intp]:
    """The row that holds each offset; an offset beyond the end gives the last row."""
    return np.searchsorted(table.start, offsets, side="right") - 1


def _merge_sorted(left: Int64Array, right: Int64Array) -> Int64Array:
    """The sorted union of two ascending arrays, each without repeats of its own."""
    if not len(right):
        return left
    both = np.concatenate((left, right))
    both.sort(kind="stable")  # two ascending runs: a stable sort only merges them
    union: Int64Array = both[np.append(True, both[1:] != both[:-1])]
    return union


def _advance(table: ExtentTable, starts: Int64Array) -> ExtentTable:
    """The rows moved to begin at `starts`, within each; plain host offsets follow."""
    moves = (table.host >= 0) & ((table.flags & _COMPRESSED) == 0)
    host = np.where(moves, table.host + (starts - table.start), table.host)
    return _with_columns(table, start=starts, host=host)


def _with_columns(table: ExtentTable, **columns: Any) -> ExtentTable:
    """The table with some columns replaced. Plain construction: dataclasses.replace is slow."""
    return ExtentTable(
        start=columns.get("start", table.start),
        length=columns.get("length", table.length),
        flags=columns.get("flags", table.flags),
        layer=columns.get("layer", table.layer),
        host=columns.get("host", table.host),
        stored=columns.get("stored", table.stored),
    )
