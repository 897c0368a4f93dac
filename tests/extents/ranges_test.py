"""Interval sets against sets of integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import ExtentTable, Flag
from qcowkit.testing.strategies import extent_tables, per_byte, range_sets


def members(ranges: RangeSet) -> set[int]:
    return {value for start, stop in ranges for value in range(start, stop)}


def assert_maximal(ranges: RangeSet) -> None:
    assert bool((ranges.stop > ranges.start).all())
    assert bool((ranges.start[1:] > ranges.stop[:-1]).all())


@given(left=range_sets(), right=range_sets())
def test_set_operations_agree_with_sets_of_integers(left: RangeSet, right: RangeSet) -> None:
    one, two = members(left), members(right)
    for found, expected in (
        (left.union(right), one | two),
        (left.intersection(right), one & two),
        (left.difference(right), one - two),
        (left.complement(5, 50), set(range(5, 50)) - one),
        (left.clip(5, 50), one & set(range(5, 50))),
    ):
        assert members(found) == expected
        assert_maximal(found)


@given(ranges=range_sets())
def test_total_and_membership_agree_with_the_integers(ranges: RangeSet) -> None:
    inside = members(ranges)
    assert ranges.total == len(inside)
    points = np.arange(-1, 66)
    assert ranges.contains(points).tolist() == [value in inside for value in range(-1, 66)]
    assert [value in ranges for value in range(-1, 66)] == ranges.contains(points).tolist()


@given(ranges=range_sets(), unit=st.sampled_from((1, 2, 3, 8)))
def test_scaling_outward_keeps_every_unit_that_is_touched(ranges: RangeSet, unit: int) -> None:
    scaled = ranges.scale_outward(unit)
    assert members(scaled) == {value // unit for value in members(ranges)}
    assert_maximal(scaled)


@given(table=extent_tables())
def test_a_table_gives_the_bytes_with_the_flag(table: ExtentTable) -> None:
    ranges = RangeSet.from_table(table, Flag.ZERO)
    assert members(ranges) == {
        key for key, facts in per_byte(table).items() if facts[0] & Flag.ZERO
    }
    assert_maximal(ranges)


@given(ranges=range_sets())
def test_inclusive_pairs_round_trip(ranges: RangeSet) -> None:
    assert RangeSet.from_pairs(ranges.pairs()) == ranges


def test_removing_one_from_the_middle_of_a_run_splits_it() -> None:
    rest = RangeSet.from_pairs([[0, 10]]).difference(RangeSet.from_pairs([[5, 5]]))
    assert rest.pairs().tolist() == [[0, 4], [6, 10]]


def test_runs_only_in_the_base_do_not_appear_in_a_difference() -> None:
    rest = RangeSet.of([0, 20], [2, 30]).difference(RangeSet.of([5, 25], [10, 40]))
    assert list(rest) == [(0, 2), (20, 25)]


def test_indices_scale_up_to_the_bytes_they_cover() -> None:
    assert list(RangeSet.of([1], [3]).scale_up(512)) == [(512, 1536)]


def test_a_petabyte_in_one_run_costs_one_run() -> None:
    ranges = RangeSet.of([0], [1 << 50])
    assert len(ranges.complement(0, 1 << 51)) == 1
    assert ranges.scale_outward(1 << 16).total == 1 << 34


def test_a_set_of_ranges_says_what_it_holds() -> None:
    assert repr(RangeSet.of([0, 4, 8, 12, 16], [1, 5, 9, 13, 17])) == (
        "RangeSet([0, 1), [4, 5), [8, 9), [12, 13), ...)"
    )


def test_sets_are_equal_by_content_and_not_hashable() -> None:
    assert RangeSet.of([0, 2], [2, 4]) == RangeSet.of([0], [4])
    assert RangeSet.empty() != RangeSet.of([0], [4])
    with pytest.raises(TypeError):
        hash(RangeSet.empty())
