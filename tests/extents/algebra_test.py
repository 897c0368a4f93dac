"""The extent algebra against a per-byte oracle."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.extents.algebra import (
    clip,
    coalesce,
    merge_rows,
    overlay,
    shift,
    split_at,
    split_every,
    units_with,
)
from qcowkit.extents.table import Extent, ExtentTable, Flag, empty, make_table, single
from qcowkit.testing.strategies import extent_tables, per_byte

DATA = int(Flag.DATA | Flag.PRESENT)
ZERO = int(Flag.ZERO | Flag.PRESENT)
PACKED = int(Flag.DATA | Flag.PRESENT | Flag.COMPRESSED)

OFFSETS = st.integers(0, 120)


@given(table=extent_tables(begin=5), start=OFFSETS, stop=OFFSETS)
def test_clip_keeps_each_byte_of_the_range(table: ExtentTable, start: int, stop: int) -> None:
    part = clip(table, start, stop)
    part.check()
    expected = {key: facts for key, facts in per_byte(table).items() if start <= key < stop}
    assert per_byte(part) == expected


def test_clip_of_a_range_that_covers_the_table_is_the_table_itself() -> None:
    table = single(10, 5, DATA, host=0)
    assert clip(table, 0, 15) is table


def test_clip_leaves_the_columns_of_its_argument_alone() -> None:
    table = make_table([0, 8], [8, 8], [DATA, DATA], host=[0, 100])
    clip(table, 3, 12)
    assert list(table) == [Extent(0, 8, DATA, 0, 0, 0), Extent(8, 8, DATA, 0, 100, 0)]


@given(table=extent_tables())
def test_coalesce_changes_no_byte(table: ExtentTable) -> None:
    merged = coalesce(table)
    merged.check()
    assert per_byte(merged) == per_byte(table)


@given(table=extent_tables())
def test_coalesce_leaves_no_neighbours_that_could_merge(table: ExtentTable) -> None:
    for left, right in pairwise(coalesce(table)):
        host = left.host if left.host < 0 else left.host + left.length
        same = (left.flags, left.layer, host) == (right.flags, right.layer, right.host)
        assert not same or left.flags & Flag.COMPRESSED


def test_coalesce_keeps_compressed_clusters_apart() -> None:
    table = make_table([0, 4], [4, 4], [PACKED, PACKED], host=[0, 4], stored=3)
    assert len(coalesce(table)) == 2


def test_merge_rows_adds_up_the_stored_bytes() -> None:
    table = make_table([0, 4, 8], [4, 4, 4], [PACKED] * 3, host=-1, stored=[3, 5, 7])
    merged = merge_rows(table, np.array([True, False]))
    assert [(row.start, row.length, row.stored) for row in merged] == [(0, 8, 8), (8, 4, 7)]


@given(top=extent_tables(layer=0, begin=3), base=extent_tables(layer=1, begin=3))
def test_overlay_shows_the_base_only_where_the_top_is_not_present(
    top: ExtentTable, base: ExtentTable
) -> None:
    merged = overlay(top, base)
    merged.check()
    below = per_byte(base)
    assert per_byte(merged) == {
        key: facts if facts[0] & Flag.PRESENT else below.get(key, facts)
        for key, facts in per_byte(top).items()
    }


@given(top=extent_tables(layer=0), base=extent_tables(layer=1))
def test_overlay_never_cuts_a_compressed_row_of_the_top(
    top: ExtentTable, base: ExtentTable
) -> None:
    rows = set(overlay(top, base))
    assert all(row in rows for row in top if row.flags & Flag.COMPRESSED)


def test_overlay_does_not_cut_the_base_between_two_rows_it_shows_through() -> None:
    top = make_table([0, 4], [4, 4], [0, 0], host=[-1, 96])
    base = make_table([0], [8], [PACKED], layer=1, host=512, stored=7)
    assert list(overlay(top, base)) == list(base)


def test_overlay_keeps_rows_of_the_top_beyond_a_shorter_base() -> None:
    base = make_table([0], [4], [DATA], layer=1, host=0)
    merged = overlay(single(0, 10, 0), base)
    assert list(merged) == [Extent(0, 4, DATA, 1, 0, 0), Extent(4, 6, 0, 0, -1, 0)]


def test_overlay_of_a_present_top_is_the_top_itself() -> None:
    top = single(0, 8, ZERO)
    assert overlay(top, single(0, 8, DATA, host=0)) is top


def test_overlay_on_an_empty_base_is_the_top_itself() -> None:
    top = single(0, 8, 0)
    assert overlay(top, empty()) is top


@given(table=extent_tables(), delta=st.integers(0, 1 << 40))
def test_shift_moves_guest_offsets_only(table: ExtentTable, delta: int) -> None:
    moved = shift(table, delta)
    assert [row.start - delta for row in moved] == table.start.tolist()
    assert [row[1:] for row in moved] == [row[1:] for row in table]


@given(table=extent_tables(begin=5), offsets=st.lists(OFFSETS, max_size=6))
def test_split_at_cuts_there_and_changes_no_byte(table: ExtentTable, offsets: list[int]) -> None:
    cut = split_at(table, offsets)
    cut.check()
    assert per_byte(cut) == per_byte(table)
    inside = {offset for offset in offsets if table.begin <= offset < table.end}
    assert set(cut.start.tolist()) == set(table.start.tolist()) | inside


@given(table=extent_tables(begin=5), unit=st.sampled_from((1, 2, 4, 8, 16)))
def test_split_every_leaves_each_row_within_one_unit(table: ExtentTable, unit: int) -> None:
    cut = split_every(table, unit)
    cut.check()
    assert per_byte(cut) == per_byte(table)
    assert all(row.start // unit == (row.start + row.length - 1) // unit for row in cut)


@given(table=extent_tables(begin=5), unit=st.sampled_from((1, 2, 4, 8, 16)))
def test_units_with_finds_each_unit_that_a_row_touches(table: ExtentTable, unit: int) -> None:
    found = np.flatnonzero(units_with(table, Flag.DATA, unit)) + table.begin // unit
    expected = {key // unit for key, facts in per_byte(table).items() if facts[0] & Flag.DATA}
    assert found.tolist() == sorted(expected)
    assert len(units_with(table, Flag.DATA, unit)) == -(-table.end // unit) - table.begin // unit
