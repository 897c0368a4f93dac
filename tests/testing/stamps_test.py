"""Stamped sectors: whatever is not exactly what was written there is told apart."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from qcowkit.testing.stamps import FOREIGN, describe_sector, make_stamps, read_stamps


@pytest.mark.parametrize("value", [1, 2, 77, 1000])
def test_a_stamp_is_read_back(value: int) -> None:
    content = make_stamps(first=5, count=3, value=value)
    assert len(content) == 3 * 512
    assert read_stamps(content, first=5).tolist() == [value] * 3


def test_zeros_are_value_0() -> None:
    assert read_stamps(bytes(1024)).tolist() == [0, 0]


@pytest.mark.parametrize("value", [2, 3])
def test_data_of_another_address_are_foreign(value: int) -> None:
    content = make_stamps(first=5, count=1, value=value)
    assert read_stamps(content, first=6).tolist() == [FOREIGN]
    assert describe_sector(content) == f"value {value} of sector 5"


@pytest.mark.parametrize("value", [2, 3])
@pytest.mark.parametrize("place", [0, 8, 16, 511])
def test_one_wrong_byte_makes_a_sector_foreign(value: int, place: int) -> None:
    content = bytearray(make_stamps(first=0, count=1, value=value))
    content[place] ^= 1
    assert read_stamps(content).tolist() != [value]


def test_a_mixture_of_two_values_is_foreign() -> None:
    old, new = (make_stamps(first=0, count=1, value=value) for value in (3, 4))
    assert read_stamps(new[:256] + old[256:]).tolist() == [FOREIGN]
    assert describe_sector(new[:256] + old[256:]) == "a part of value 4 of sector 0"


def test_a_stamp_among_zeros_is_not_zeros() -> None:
    content = bytes(500) + b"x" + bytes(11)
    assert read_stamps(content).tolist() == [FOREIGN]
    assert "no guest sector" in describe_sector(content)


def test_odd_values_do_not_compress_and_even_ones_do() -> None:
    noise = make_stamps(first=0, count=128, value=7)
    assert len(zlib.compress(noise)) > 0.9 * len(noise)
    assert len(zlib.compress(make_stamps(first=0, count=128, value=8))) < 4096


def test_no_two_sectors_of_a_run_are_alike() -> None:
    words = np.frombuffer(make_stamps(first=0, count=64, value=9), dtype=np.uint64)
    assert len(set(words.reshape(64, -1)[:, 10].tolist())) == 64
