"""The zero test against the plain one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.extents.zeros import zero_units

UNITS = (512, 4096, 65536)


@given(
    length=st.integers(0, 1 << 17),
    marks=st.lists(st.integers(0, (1 << 17) - 1), max_size=40),
    unit=st.sampled_from(UNITS),
)
def test_zero_units_agree_with_the_plain_test(length: int, marks: list[int], unit: int) -> None:
    buffer = np.zeros(length, dtype=np.uint8)
    buffer[[mark for mark in marks if mark < length]] = 0x80
    expected = [not buffer[at : at + unit].any() for at in range(0, length, unit)]
    assert zero_units(buffer, unit).tolist() == expected


@pytest.mark.parametrize("unit", UNITS)
def test_one_byte_anywhere_in_a_unit_is_found(unit: int) -> None:
    for place in (0, 7, 8, unit // 2 + 1, unit - 9, unit - 1):
        buffer = np.zeros(3 * unit, dtype=np.uint8)
        buffer[unit + place] = 1
        assert zero_units(buffer, unit).tolist() == [True, False, True]


def test_scattered_zero_units_among_data_are_found() -> None:
    buffer = np.full((4096, 512), 0xFF, dtype=np.uint8)
    buffer[::37] = 0
    buffer[::111, 300] = 1
    expected = [row % 37 == 0 and row % 111 != 0 for row in range(4096)]
    assert zero_units(buffer.reshape(-1), 512).tolist() == expected


def test_a_short_last_unit_is_tested_to_its_end() -> None:
    buffer = np.zeros(1000, dtype=np.uint8)
    assert zero_units(buffer, 512).tolist() == [True, True]
    buffer[999] = 1
    assert zero_units(buffer, 512).tolist() == [True, False]


def test_an_unaligned_view_is_read_as_it_is() -> None:
    buffer = np.zeros(2049, dtype=np.uint8)
    buffer[0] = buffer[-1] = 1
    assert zero_units(buffer[1:], 1024).tolist() == [True, False]
