"""The dynamic header codec: vhd.md 1.2, rows 48 and 49 of the validation list."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.vhd.dynamic_header import DynamicHeader, is_block_size, sector_bitmap_size
from qcowkit.codecs.vhd.locators import ParentLocator
from qcowkit.errors import CorruptMetadata, UnsupportedFeature
from qcowkit.testing.vhd_builder import PARENT_ID, VhdBuilder
from qcowkit.units import KiB, MiB

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
locators = st.builds(
    ParentLocator,
    code=st.binary(min_size=4, max_size=4),
    data_space=u32,
    data_length=u32,
    reserved=u32,
    data_offset=u64,
)
headers = st.builds(
    DynamicHeader,
    table_offset=u64,
    max_table_entries=u32,
    block_size=st.integers(12, 28).map(lambda bits: 1 << bits),
    parent_unique_id=st.uuids(),
    parent_timestamp=u32,
    parent_name=st.binary(min_size=512, max_size=512),
    locators=st.lists(locators, min_size=8, max_size=8).map(tuple),
    data_offset=u64,
    reserved=u32,
    padding=st.binary(min_size=256, max_size=256),
)


def raw_header(**fields: int | bytes) -> bytes:
    builder = VhdBuilder(size=1 << 20, block_size=4096)
    builder.header.update(fields)
    return builder.encode_header()


@given(headers)
def test_every_header_survives_encoding(value: DynamicHeader) -> None:
    raw = value.encode()
    assert len(raw) == 1024
    assert DynamicHeader.decode(raw) == value
    assert DynamicHeader.decode(raw).encode() == raw


def test_the_fields_are_where_the_specification_puts_them() -> None:
    value = DynamicHeader.decode(raw_header(parent_unique_id=PARENT_ID.bytes, parent_timestamp=9))
    assert value.table_offset == 1536
    assert value.max_table_entries == 256
    assert value.block_size == 4096
    assert value.parent_unique_id == PARENT_ID
    assert value.parent_timestamp == 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cookie": b"cxsparsf"}, "cookie is b'cxsparsf', expected b'cxsparse'"),
        ({"checksum": 1}, "checksum is 0x00000001, expected 0xffff"),
        ({"block_size": 0}, "block size is 0, expected a power of two from 4 KiB to 256 MiB"),
        ({"block_size": 2048}, "block size is 2048, expected a power of two"),
        ({"block_size": 3 << 20}, "block size is 3145728, expected a power of two"),
        ({"block_size": 1 << 29}, "block size is 536870912, expected a power of two"),
    ],
)
def test_a_broken_header_is_refused(fields: dict[str, int | bytes], message: str) -> None:
    with pytest.raises(CorruptMetadata) as caught:
        DynamicHeader.decode(raw_header(**fields), host_offset=0x200)
    assert str(caught.value).startswith(f"dynamic header at host offset 0x200: {message}")


def test_a_header_of_another_version_is_refused() -> None:
    message = "dynamic header: version is 0x00010001, expected 0x00010000"
    with pytest.raises(UnsupportedFeature, match=re.escape(message)):
        DynamicHeader.decode(raw_header(version=0x10001))


def test_a_header_that_is_too_short_is_refused() -> None:
    with pytest.raises(CorruptMetadata, match="dynamic header: 1000 bytes, expected 1024"):
        DynamicHeader.decode(raw_header()[:1000])


@pytest.mark.parametrize(
    ("block_size", "expected"),
    [(4 * KiB, 512), (2 * MiB, 512), (4 * MiB, 1024), (256 * MiB, 65536)],
)
def test_the_bitmap_has_a_bit_a_sector_and_fills_whole_sectors(
    block_size: int, expected: int
) -> None:
    assert sector_bitmap_size(block_size) == expected


def test_block_sizes_are_powers_of_two_from_4_kib_to_256_mib() -> None:
    good = [size for size in range(0, 1 << 20, 1024) if is_block_size(size)]
    assert good == [1 << bits for bits in range(12, 20)]
    assert is_block_size(256 * MiB)
    assert not is_block_size(512 * MiB)
