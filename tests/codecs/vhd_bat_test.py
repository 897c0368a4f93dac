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
