"""Entries of the bitmap directory and words of a bitmap table."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.bitmaps import (
    BitmapEntry,
    check_bitmap,
    decode_bitmap,
    decode_bitmap_table,
    encode_bitmap_directory,
)
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.errors import CorruptMetadata, RequestError

GEOMETRY = Geometry(cluster_bits=16)
ONE = BitmapEntry(name="b", table_offset=0x10000, table_entries=1, granularity_bits=16)
ENTRIES = st.builds(
    BitmapEntry,
    name=st.text(min_size=1, max_size=40),
    table_offset=st.integers(0, 2**64 - 1),
    table_entries=st.integers(0, 2**32 - 1),
    granularity_bits=st.integers(9, 31),
    flags=st.integers(0, 3),
)


def decode_all(raw: bytes, count: int) -> list[BitmapEntry]:
    entries, offset = [], 0
    for index in range(count):
        entry, offset = decode_bitmap(
            raw, offset=offset, left=len(raw) - offset, index=index, host_offset=offset
        )
        entries.append(entry)
    assert offset == len(raw)
    return entries


@given(st.lists(ENTRIES, max_size=5))
def test_a_directory_comes_back_as_it_was(entries: list[BitmapEntry]) -> None:
    assert decode_all(encode_bitmap_directory(entries), len(entries)) == entries


@pytest.mark.parametrize(
    ("flags", "in_use", "auto"), [(0, False, False), (1, True, False), (2, False, True)]
)
def test_flags_have_names(flags: int, in_use: bool, auto: bool) -> None:
    entry = replace(ONE, flags=flags)
    assert (entry.in_use, entry.auto) == (in_use, auto)


@pytest.mark.parametrize("name", ["", "n" * 1024])
def test_a_name_that_no_entry_can_hold_is_not_written(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        encode_bitmap_directory([replace(ONE, name=name)])
    assert str(caught.value) == f"the bitmap name has {len(name)} bytes, expected 1 to 1023"


def test_a_bitmap_may_cover_the_disk_exactly() -> None:
    covered = (1 << 16) * 8 * (1 << 16)
    check_bitmap(ONE, index=0, geometry=GEOMETRY, disk_size=covered, host_offset=0)
    with pytest.raises(CorruptMetadata, match=f"covers {covered} bytes"):
        check_bitmap(ONE, index=0, geometry=GEOMETRY, disk_size=covered + 512, host_offset=0)


def test_512_mib_of_bits_are_allowed() -> None:
    entry = replace(ONE, table_entries=8192)
    check_bitmap(entry, index=0, geometry=GEOMETRY, disk_size=0, host_offset=0)


@given(st.lists(st.sampled_from([0, 1, 0x10000, 0x00FFFFFFFFFF0000])))
def test_sound_table_words_pass_unchanged(words: list[int]) -> None:
    raw = struct.pack(f">{len(words)}Q", *words)
    assert decode_bitmap_table(raw, geometry=GEOMETRY, host_offset=0).tolist() == words


@given(st.binary(max_size=80))
def test_arbitrary_bytes_decode_or_are_refused_by_us(raw: bytes) -> None:
    try:
        _, end = decode_bitmap(raw, offset=0, left=len(raw), index=0, host_offset=0)
    except CorruptMetadata:
        return
    assert 32 <= end <= len(raw)
