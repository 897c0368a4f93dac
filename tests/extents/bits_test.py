"""Packed dirty bits against a set of granules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.extents.bits import GranuleBits
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import Flag, concatenate

sizes = st.integers(0, 1 << 15)
shifts = st.integers(9, 13)
ranges = st.lists(st.tuples(st.integers(0, 1 << 15), st.integers(0, 1 << 13)), max_size=8)


def make(size: int, shift: int, marks: list[tuple[int, int]]) -> GranuleBits:
    bits = GranuleBits(size=size, granularity_bits=shift)
    for start, length in marks:
        bits.mark(start=start, length=length)
    return bits


def granules_of(bits: GranuleBits) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(bits.raw, bitorder="little")).tolist())


def touched(size: int, shift: int, marks: list[tuple[int, int]]) -> set[int]:
    return {
        byte >> shift
        for start, length in marks
        for byte in {*range(start, min(start + length, size), 512), min(start + length, size) - 1}
        if start <= byte < size
    }


@given(size=sizes, shift=shifts, marks=ranges)
def test_marking_dirties_every_granule_that_is_touched_and_no_other(size, shift, marks) -> None:
    assert granules_of(make(size, shift, marks)) == touched(size, shift, marks)


@given(
    size=sizes, shift=shifts, marks=ranges, window=st.integers(1, 4), where=st.tuples(sizes, sizes)
)
def test_ranges_and_extents_say_what_the_bits_say(size, shift, marks, window, where) -> None:
    bits = make(size, shift, marks)
    wanted = [
        (granule << shift, min((granule + 1) << shift, size))
        for granule in sorted(granules_of(bits))
    ]
    inside = [byte for start, stop in bits.ranges() for byte in range(start, stop, 512)]
    assert inside == [byte for start, stop in wanted for byte in range(start, stop, 512)]
    assert bits.count == len(wanted)
    assert bits.dirty_bytes == sum(stop - start for start, stop in wanted)
    begin, end = sorted(min(one, size) for one in where)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcowkit.extents.bits._WINDOW", window)
        table = concatenate(list(bits.iter_extents(start=begin, stop=end)))
    table.check()
    assert bool((table.flags[1:] != table.flags[:-1]).all())
    assert int(table.length.sum()) == end - begin
    assert not len(table) or table.begin == begin
    dirty = table.take((table.flags & int(Flag.DIRTY)) != 0)
    assert RangeSet.from_table(table, int(Flag.DIRTY)) == bits.ranges().clip(begin, end)
    assert len(dirty) == len(bits.ranges().clip(begin, end))


@given(size=sizes, first=shifts, second=shifts, one=ranges, other=ranges)
def test_a_merge_dirties_whole_granules_of_the_target(size, first, second, one, other) -> None:
    target, source = make(size, first, one), make(size, second, other)
    wanted = granules_of(target)
    for start, stop in source.ranges():
        wanted |= set(range(start >> first, ((stop - 1) >> first) + 1))
    target.merge(source)
    assert granules_of(target) == wanted


@given(before=sizes, after=sizes, shift=shifts, marks=ranges)
def test_another_size_keeps_what_is_below_both_and_adds_clean_granules(
    before, after, shift, marks
) -> None:
    bits = make(before, shift, marks)
    kept = {one for one in granules_of(bits) if one < -(-after // (1 << shift))}
    bits.resize(after)
    assert granules_of(bits) == kept
    assert bits.size == after


@pytest.mark.parametrize(("fine", "coarse"), [(9, 31), (9, 20)])
def test_granularities_far_apart_merge_both_ways(fine: int, coarse: int) -> None:
    size = 3 << 30
    one = make(size, fine, [(5 << 20, 1), (size - 1, 1)])
    other = GranuleBits(size=size, granularity_bits=coarse)
    other.merge(one)
    assert granules_of(other) == {(5 << 20) >> coarse, (size - 1) >> coarse}
    back = GranuleBits(size=size, granularity_bits=fine)
    other.mark(start=0, length=1)
    back.merge(other)
    assert back.ranges() == other.ranges()


def test_bits_behind_the_last_granule_are_dropped_on_loading() -> None:
    bits = GranuleBits(size=3 * 512, granularity_bits=9)
    bits.put(b"\xff\xff", offset=0)
    assert granules_of(bits) == {0, 1, 2}


def test_a_copy_does_not_change_with_its_original() -> None:
    bits = make(4096, 9, [(0, 1)])
    other = bits.copy()
    bits.clear()
    assert (granules_of(bits), granules_of(other)) == (set(), {0})


def test_runs_are_joined_across_windows() -> None:
    size = (1 << 20) * 512
    bits = make(size, 9, [(0, size - 512)])
    assert list(bits.ranges()) == [(0, size - 512)]
