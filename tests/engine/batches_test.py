"""Plans of bulk copying cover what they are given, and no barrier."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.engine.batches import plan_batches, rows_of, runs_of
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import ExtentTable, Flag
from qcowkit.testing.strategies import extent_tables, per_byte, range_sets


def members(ranges: RangeSet) -> set[int]:
    return {value for start, stop in ranges for value in range(start, stop)}


@given(ranges=range_sets(stop=200), blocked=range_sets(stop=200), bits=st.integers(0, 7))
def test_batches_cover_the_ranges_and_no_barrier(
    ranges: RangeSet, blocked: RangeSet, bits: int
) -> None:
    window = 1 << bits
    barriers = blocked.difference(ranges)
    start, stop = plan_batches(ranges, window=window, barriers=barriers)
    covered: set[int] = set()
    for begin, end in zip(start.tolist(), stop.tolist(), strict=True):
        assert begin // window == (end - 1) // window
        assert begin in ranges
        assert end - 1 in ranges
        assert not covered & set(range(begin, end))
        covered |= set(range(begin, end))
    assert members(ranges) <= covered
    assert not covered & members(barriers)
    assert (np.diff(start) > 0).all()


@given(ranges=range_sets(stop=200))
def test_without_barriers_a_window_is_one_batch(ranges: RangeSet) -> None:
    start, _ = plan_batches(ranges, window=32)
    assert len(start) == len({value // 32 for value in members(ranges)})


@given(table=extent_tables())
def test_rows_are_chosen_by_their_flags(table: ExtentTable) -> None:
    facts = per_byte(table)
    wanted = {at for at, (flags, *_) in facts.items() if flags & Flag.DATA}
    assert members(rows_of(table, Flag.DATA)) == wanted
    apart = {at for at in wanted if not facts[at][0] & Flag.COPIED}
    assert members(rows_of(table, Flag.DATA, without=Flag.COPIED)) == apart


@given(mask=st.lists(st.booleans(), max_size=20))
def test_runs_are_the_maximal_ones(mask: list[bool]) -> None:
    first, end = runs_of(np.array(mask, dtype=bool))
    assert {at for pair in zip(first, end, strict=True) for at in range(*pair)} == {
        index for index, chosen in enumerate(mask) if chosen
    }
    assert all(left < right for left, right in zip(end, first[1:], strict=False))
