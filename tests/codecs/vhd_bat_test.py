"""The block allocation table and sector bitmaps as arrays: vhd.md 1.3."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.vhd.bat import (
    decode_bat,
    decode_bitmap,
    encode_bat,
    encode_bitmap,
    has_bit,
    set_bits,
)


def test_entries_are_unsigned_and_all_ones_is_unused() -> None:
    raw = bytes.fromhex("00000004 ffffffff fffffffe 80000000".replace(" ", ""))
    assert decode_bat(raw).tolist() == [4, -1, 0xFFFFFFFE, 0x80000000]


@given(st.lists(st.integers(-1, 0xFFFFFFFE), max_size=64))
def test_every_table_survives_encoding(entries: list[int]) -> None:
    sectors = np.array(entries, dtype=np.int64)
    assert decode_bat(encode_bat(sectors)).tolist() == entries


def test_bitmaps_begin_with_the_most_significant_bit() -> None:
    assert decode_bitmap(b"\x80\x01", count=16).nonzero()[0].tolist() == [0, 15]


@given(st.lists(st.booleans(), min_size=1, max_size=9000))
def test_every_bitmap_survives_encoding_and_fills_sectors(bits: list[bool]) -> None:
    raw = encode_bitmap(np.array(bits))
    assert len(raw) % 512 == 0
    assert decode_bitmap(raw, count=len(bits)).tolist() == bits


@given(st.integers(1, 40), st.data())
def test_bits_are_set_in_runs(size: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, size * 8))
    end = data.draw(st.integers(first, size * 8))
    bitmap = bytearray(size)
    set_bits(bitmap, first=first, end=end)
    assert decode_bitmap(bytes(bitmap), count=size * 8).nonzero()[0].tolist() == [
        *range(first, end)
    ]
    assert [n for n in range(size * 8) if has_bit(bitmap, n)] == [*range(first, end)]


def test_bits_that_were_set_stay_so() -> None:
    bitmap = bytearray(b"\x81\x00\x01")
    set_bits(bitmap, first=4, end=18)
    assert bitmap == b"\x8f\xff\xc1"
