"""Alignment and sizes, up to the largest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.errors import RequestError
from qcowkit.units import (
    INT64_MAX,
    EiB,
    GiB,
    KiB,
    align_down,
    align_up,
    ceil_div,
    is_power_of_two,
    parse_size,
)


@given(value=st.integers(0, 1 << 64), bits=st.integers(0, 63))
def test_alignment_is_exact_at_any_size(value: int, bits: int) -> None:
    unit = 1 << bits
    down, up = align_down(value, unit), align_up(value, unit)
    assert down % unit == up % unit == 0
    assert down <= value <= up < value + unit
    assert up == ceil_div(value, unit) * unit


def test_the_largest_offset_is_aligned_exactly() -> None:
    assert align_down(INT64_MAX, 512) == INT64_MAX - 511
    assert align_up(INT64_MAX, 512) == 1 << 63


def test_powers_of_two_are_known() -> None:
    assert [value for value in range(-2, 10) if is_power_of_two(value)] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512b", 512), ("64k", 64 * KiB), ("1.5G", 3 * GiB // 2), ("0x200", 512)],
)
def test_a_size_is_read_as_people_write_it(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_size_above_the_largest_is_refused() -> None:
    with pytest.raises(RequestError, match="size '8E' is above the largest size"):
        parse_size("8E")
    assert parse_size("7E") == 7 * EiB
