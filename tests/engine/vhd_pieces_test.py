"""Plans of VHD writes: parts of blocks, vectored writes, runs of entries."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qcowkit.engine.vhd.pieces import Part, gather, plan_entry_runs, split_range, split_sectors

BLOCK = 4096


def test_a_range_within_a_block_is_one_part() -> None:
    assert list(split_range(offset=BLOCK + 7, length=9, block_size=BLOCK)) == [
        Part(block=1, begin=7, end=16, at=0)
    ]


@given(st.integers(0, 5 * BLOCK), st.integers(0, 5 * BLOCK))
def test_parts_follow_one_another_and_cover_the_range(offset: int, length: int) -> None:
    position = offset
    for part in split_range(offset=offset, length=length, block_size=BLOCK):
        assert 0 <= part.begin < part.end <= BLOCK
        assert (part.block * BLOCK + part.begin, part.at) == (position, position - offset)
        position += part.end - part.begin
    assert position == offset + length


def test_neighbours_become_one_vectored_write() -> None:
    writes = [(0, b"ab"), (2, b"c"), (10, b"d"), (11, b"e"), (5, b"f")]
    assert list(gather(writes)) == [(0, [b"ab", b"c"]), (10, [b"d", b"e"]), (5, [b"f"])]


def test_nothing_to_write_is_no_write() -> None:
    assert list(gather([])) == []


def test_entries_of_one_sector_go_out_together() -> None:
    assert list(plan_entry_runs([3, 4, 100])) == [(3, 101)]


def test_entries_far_apart_go_out_alone() -> None:
    assert list(plan_entry_runs([0, 500, 501])) == [(0, 1), (500, 502)]


@given(st.sets(st.integers(0, 2000)))
def test_every_entry_is_in_one_run(blocks: set[int]) -> None:
    runs = list(plan_entry_runs(sorted(blocks)))
    assert all(sum(first <= block < end for first, end in runs) == 1 for block in blocks)
    assert all(first in blocks and end - 1 in blocks for first, end in runs)


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_a_range_is_head_whole_sectors_and_tail(offset: int, length: int) -> None:
    head, whole, tail = split_sectors(offset=offset, length=length)
    assert head + whole + tail == length
    assert whole % 512 == 0
    assert max(head, tail) < 512
    assert whole == 0 or (offset + head) % 512 == 0
