"""Hypothesis strategies for extent tables and interval sets, and their per-byte oracle.

Needs hypothesis, which is not installed with the package."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import NO_HOST, ExtentTable, Flag, empty, make_table

_STATES = (
    Flag.NONE,
    Flag.DATA | Flag.PRESENT,
    Flag.DATA | Flag.PRESENT | Flag.COPIED,
    Flag.DATA | Flag.PRESENT | Flag.COMPRESSED,
    Flag.ZERO | Flag.PRESENT,
)

# What the oracle knows of a byte: flags, layer, host offset, stored.
ByteFacts = tuple[int, int, int, int]


@st.composite
def extent_tables(
    draw: Any,
    *,
    layer: int = 0,
    begin: int = 0,
    max_rows: int = 12,
    max_length: int = 8,
    unit: int = 1,
) -> ExtentTable:
    """Tables from `begin` on, with every state that an image knows; lengths are multiples of
    `unit`. Host offsets often continue from row to row, so that neighbours can merge."""
    rows = draw(
        st.lists(
            st.tuples(
                st.integers(1, max_length),
                st.sampled_from(_STATES),
                st.sampled_from((0, 0, 1 << 20, NO_HOST)),
                st.integers(1, 4),
            ),
            max_size=max_rows,
        )
    )
    columns: list[tuple[int, int, int, int, int]] = []
    start = begin
    for units, flags, base, stored in rows:
        length = units * unit
        # Data always lies somewhere; the others may keep a host range.
        host = start + base if base >= 0 else NO_HOST
        if flags & Flag.DATA and host < 0:
            host = start + (1 << 30)
        packed = bool(flags & Flag.COMPRESSED)
        columns.append((start, length, int(flags), host, stored if packed else 0))
        start += length
    if not columns:
        return empty()
    starts, lengths, states, hosts, sizes = zip(*columns, strict=True)
    return make_table(starts, lengths, states, layer=layer, host=hosts, stored=sizes)


@st.composite
def range_sets(draw: Any, *, stop: int = 64, max_runs: int = 8) -> RangeSet:
    """Sets of integers from 0 to `stop`."""
    edges = st.integers(0, stop)
    pairs = draw(st.lists(st.tuples(edges, edges), max_size=max_runs))
    return RangeSet.of([min(pair) for pair in pairs], [max(pair) for pair in pairs])


def per_byte(table: ExtentTable) -> dict[int, ByteFacts]:
    """Guest offset to what the table says of that byte; the oracle of the extent algebra."""
    facts: dict[int, ByteFacts] = {}
    for row in table:
        moves = row.host >= 0 and not row.flags & Flag.COMPRESSED
        for index in range(row.length):
            host = row.host + index if moves else row.host
            facts[row.start + index] = (row.flags, row.layer, host, row.stored)
    return facts
