"""The footer codec: vhd.md 1.1 and 2.2, row 46 of the validation list."""

from __future__ import annotations

import re
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.vhd.chs import MAX_GEOMETRY, Chs
from qcowkit.codecs.vhd.footer import DiskType, Footer, checksum
from qcowkit.errors import CorruptMetadata, UnsupportedFeature
from qcowkit.testing.vhd_builder import FIXED, UNIQUE_ID, VhdBuilder

footers = st.builds(
    Footer,
    disk_type=st.sampled_from(DiskType),
    current_size=st.integers(0, 2**64 - 1),
    original_size=st.integers(0, 2**64 - 1),
    geometry=st.builds(
        Chs,
        cylinders=st.integers(0, 0xFFFF),
        heads=st.integers(0, 0xFF),
        sectors_per_track=st.integers(0, 0xFF),
    ),
    unique_id=st.uuids(),
    data_offset=st.integers(0, 2**64 - 1),
    timestamp=st.integers(0, 2**32 - 1),
    creator=st.binary(min_size=4, max_size=4),
    creator_version=st.integers(0, 2**32 - 1),
    creator_os=st.binary(min_size=4, max_size=4),
    features=st.integers(0, 2**32 - 1),
    saved_state=st.integers(0, 255),
    reserved=st.binary(min_size=427, max_size=427),
)


def footer(**changes: Any) -> Footer:
    values: dict[str, Any] = {
        "disk_type": DiskType.DYNAMIC,
        "current_size": 1 << 20,
        "original_size": 1 << 20,
        "geometry": Chs(cylinders=30, heads=4, sectors_per_track=17),
        "unique_id": UNIQUE_ID,
        "creator": b"vpc ",
    }
    return Footer(**{**values, **changes})


def raw_footer(**fields: int | bytes) -> bytes:
    builder = VhdBuilder(size=1 << 20, disk_type=FIXED)
    builder.footer.update(fields)
    return builder.encode_footer()


@given(footers)
def test_every_footer_survives_encoding(value: Footer) -> None:
    raw = value.encode()
    assert len(raw) == 512
    assert Footer.decode(raw) == value
    assert Footer.decode(raw).encode() == raw


def test_the_fields_are_where_the_specification_puts_them() -> None:
    raw = raw_footer(
        timestamp=7, creator=b"qem2", cylinders=3, heads=2, sectors_per_track=1, saved_state=1
    )
    value = Footer.decode(raw)
    assert value.timestamp == 7
    assert value.creator == b"qem2"
    assert str(value.geometry) == "3/2/1"
    assert value.saved_state == 1
    assert value.unique_id == UNIQUE_ID
    assert value.disk_type is DiskType.FIXED
    assert value.current_size == value.original_size == 1 << 20


def test_the_unique_id_is_stored_big_endian() -> None:
    assert raw_footer()[68:84] == uuid.UUID("11111111222233334444555555555555").bytes


def test_the_checksum_is_the_complement_of_the_sum_of_the_other_bytes() -> None:
    assert checksum(b"\x01\x02\xff\xff\xff\xff\x03", field=2) == 0xFFFF_FFF9


def test_a_footer_with_a_wrong_checksum_is_refused() -> None:
    message = "VHD footer at host offset 0x600: checksum is 0x00000001, expected 0xffff"
    with pytest.raises(CorruptMetadata, match=re.escape(message)):
        Footer.decode(raw_footer(checksum=1), host_offset=0x600)


def test_a_footer_with_another_cookie_is_refused() -> None:
    message = "VHD footer: cookie is b'conectiy', expected b'conectix'"
    with pytest.raises(CorruptMetadata, match=re.escape(message)):
        Footer.decode(raw_footer(cookie=b"conectiy"))


def test_a_footer_of_another_version_is_refused() -> None:
    message = "VHD footer: version is 0x00020000, expected 0x00010000"
    with pytest.raises(UnsupportedFeature, match=re.escape(message)):
        Footer.decode(raw_footer(version=0x20000))


@pytest.mark.parametrize("kind", [0, 1, 5, 6, 7])
def test_a_reserved_or_deprecated_disk_type_is_refused(kind: int) -> None:
    message = (
        f"VHD footer: disk type is {kind}, expected 2 (fixed), 3 (dynamic) or 4 (differencing)"
    )
    with pytest.raises(UnsupportedFeature, match=re.escape(message)):
        Footer.decode(raw_footer(disk_type=kind))


def test_a_footer_that_is_too_short_is_refused() -> None:
    with pytest.raises(CorruptMetadata, match="VHD footer: 511 bytes, expected 512"):
        Footer.decode(raw_footer()[:511])


@given(st.binary(max_size=600))
def test_no_bytes_make_the_footer_decoder_fail_in_another_way(raw: bytes) -> None:
    with pytest.raises((CorruptMetadata, UnsupportedFeature)):
        Footer.decode(raw)


@pytest.mark.parametrize("creator", [b"vpc ", b"qemu"])
def test_virtual_pc_and_qemu_mean_the_geometry(creator: bytes) -> None:
    assert footer(creator=creator).virtual_size() == 30 * 4 * 17 * 512


@pytest.mark.parametrize(
    "creator", [b"qem2", b"win ", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0", b"caml", b"????"]
)
def test_every_other_creator_means_current_size(creator: bytes) -> None:
    assert footer(creator=creator).virtual_size() == 1 << 20


def test_the_largest_geometry_always_means_current_size() -> None:
    value = footer(geometry=MAX_GEOMETRY)
    assert value.virtual_size() == value.virtual_size(force="chs") == 1 << 20


def test_a_geometry_without_sectors_means_current_size() -> None:
    value = footer(geometry=Chs(cylinders=0, heads=4, sectors_per_track=17))
    assert value.virtual_size() == 1 << 20


def test_the_size_rule_can_be_forced_either_way() -> None:
    assert footer(creator=b"win ").virtual_size(force="chs") == 30 * 4 * 17 * 512
    assert footer(creator=b"vpc ").virtual_size(force="current_size") == 1 << 20
