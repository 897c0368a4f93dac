"""Where two tables may differ: against the bytes that they stand for, one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given

from qcowkit.extents.differences import may_differ, pad_to
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import Extent, ExtentTable, Flag, empty, make_table, single
from qcowkit.testing.strategies import extent_tables

FILES = np.arange(4, dtype=np.int64)
DATA = int(Flag.DATA | Flag.PRESENT)
ZERO = int(Flag.ZERO | Flag.PRESENT)


def suspects(first: ExtentTable, second: ExtentTable) -> RangeSet:
    return may_differ(first, second, first_files=FILES, second_files=FILES)


def test_the_same_place_in_the_same_file_needs_no_reading() -> None:
    table = make_table([0, 4096], [4096, 4096], DATA, host=[65536, 0])
    assert suspects(table, table) == RangeSet.empty()


def test_another_place_or_another_file_must_be_read() -> None:
    table = make_table([0], 4096, DATA, host=[65536])
    assert suspects(table, make_table([0], 4096, DATA, host=[0])) == RangeSet.of([0], [4096])
    other = make_table([0], 4096, DATA, host=[65536], layer=1)
    assert suspects(table, other) == RangeSet.of([0], [4096])


def test_rows_that_are_cut_differently_are_compared_by_their_bytes() -> None:
    whole = make_table([0], 8192, DATA, host=[65536])
    parts = make_table([0, 512], [512, 7680], DATA, host=[65536, 66048])
    assert suspects(whole, parts) == RangeSet.empty()
    moved = make_table([0, 512], [512, 7680], DATA, host=[65536, 65536])
    assert suspects(whole, moved) == RangeSet.of([512], [8192])


def test_zeros_are_equal_whoever_says_so() -> None:
    known, unallocated = single(0, 4096, ZERO), single(0, 4096, 0)
    assert suspects(known, unallocated) == RangeSet.empty()
    data = make_table([0], 4096, DATA, host=[0])
    assert suspects(known, data) == RangeSet.of([0], [4096])


def test_compressed_and_encrypted_bytes_are_no_plain_ones() -> None:
    plain = make_table([0], 4096, DATA, host=[0])
    for flag in (Flag.COMPRESSED, Flag.ENCRYPTED):
        other = make_table([0], 4096, DATA | int(flag), host=[0])
        assert suspects(plain, other) == RangeSet.of([0], [4096])
        assert suspects(other, other) == RangeSet.empty()


def test_a_compressed_cluster_that_is_cut_stays_the_same() -> None:
    flags = DATA | int(Flag.COMPRESSED)
    whole = make_table([0], 4096, flags, host=[777], stored=100)
    parts = make_table([0, 512], [512, 3584], flags, host=[777, 777], stored=100)
    assert suspects(whole, parts) == RangeSet.empty()


def test_beyond_its_end_a_disk_has_nothing() -> None:
    table = make_table([0], 4096, DATA, host=[0])
    padded = pad_to(table, 0, 8192)
    assert (padded.begin, padded.end) == (0, 8192)
    assert suspects(padded, pad_to(empty(), 0, 8192)) == RangeSet.of([0], [4096])
    assert pad_to(table, 0, 4096) is table


def source(row: Extent, offset: int) -> tuple[object, ...]:
    """What one byte is, as far as a table says."""
    if row.flags & (Flag.DATA | Flag.ZERO) != Flag.DATA:
        return ("zero",)
    kind = row.flags & (Flag.COMPRESSED | Flag.ENCRYPTED)
    if row.host < 0:
        return ("unknown", object())
    moved = 0 if row.flags & Flag.COMPRESSED else offset - row.start
    return (row.layer, row.host + moved, kind, row.stored)


@given(first=extent_tables(), second=extent_tables())
def test_a_byte_is_suspected_unless_both_tables_name_the_same_source(
    first: ExtentTable, second: ExtentTable
) -> None:
    stop = max(first.end, second.end)
    pair = [pad_to(table, 0, stop) for table in (first, second)]
    found = suspects(*pair)
    expected = []
    for offset in range(stop):
        one, other = (
            source(
                next(row for row in table if row.start <= offset < row.start + row.length), offset
            )
            for table in pair
        )
        if one != other:
            expected.append(offset)
    assert found.total == len(expected)
    assert bool(found.contains(expected).all())
