"""The geometry of VHD footers: vhd.md 2.1."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.vhd.chs import MAX_GEOMETRY, Chs, chs_from_sectors, round_up_to_chs

LARGEST = 65535 * 16 * 255


@pytest.mark.parametrize(
    ("sectors", "expected"),
    [
        (0, "0/4/17"),
        (1, "0/4/17"),
        (65536, "963/4/17"),
        (4 * 17 * 1023, "1023/4/17"),
        (4 * 17 * 1024, "140/16/31"),
        (4 * 17 * 1024 + 17, "819/5/17"),
        (16 * 17 * 1024 - 1, "1023/16/17"),
        (16 * 17 * 1024, "561/16/31"),
        (16 * 31 * 1024 - 1, "1023/16/31"),
        (16 * 31 * 1024, "503/16/63"),
        (66059279, "65534/16/63"),
        (66059280, "16191/16/255"),
        (LARGEST - 1, "65534/16/255"),
        (LARGEST, "65535/16/255"),
        (0xFF000000, "65535/16/255"),
    ],
)
def test_the_geometry_follows_the_specification(sectors: int, expected: str) -> None:
    assert str(chs_from_sectors(sectors)) == expected


@given(st.integers(0, LARGEST))
def test_a_geometry_never_addresses_more_sectors_than_the_disk_has(sectors: int) -> None:
    assert chs_from_sectors(sectors).sectors <= sectors


@given(st.integers(0, LARGEST * 2))
def test_a_geometry_fits_its_fields(sectors: int) -> None:
    chs = chs_from_sectors(sectors)
    assert chs.cylinders <= 0xFFFF
    assert chs.heads <= 16
    assert chs.sectors_per_track <= 255


def test_qemu_rounds_32_mib_up_to_33562624() -> None:
    assert round_up_to_chs(33554432) == 33562624


@given(st.integers(0, 1 << 37))
def test_rounding_up_reaches_a_size_that_a_geometry_expresses(size: int) -> None:
    rounded = round_up_to_chs(size)
    assert rounded >= size
    assert rounded - size < 16 * 255 * 512 * 2
    if rounded < LARGEST * 512:
        assert chs_from_sectors(rounded // 512).sectors * 512 <= rounded
    assert round_up_to_chs(rounded) == rounded


def test_rounding_above_the_largest_geometry_only_completes_the_sector() -> None:
    assert round_up_to_chs(LARGEST * 512 + 1) == LARGEST * 512 + 512


def test_the_largest_geometry_is_65535_16_255() -> None:
    assert Chs(cylinders=65535, heads=16, sectors_per_track=255) == MAX_GEOMETRY
