"""The record of dirty L2 tables as bytes."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.dirty_tables import (
    DIRTY_TABLES_TYPE,
    MAX_SHIFT,
    DirtyTables,
    plan_dirty_tables,
)
from qcowkit.codecs.qcow2.extensions import (
    Extension,
    Extensions,
    decode_extensions,
    encode_first_cluster,
)
from qcowkit.codecs.qcow2.header import Autoclear, FeatureKind, Header
from qcowkit.units import KiB, MiB


def record(*, shift: int = 0, bits: bytes = b"\x05\x80") -> DirtyTables:
    return DirtyTables(shift=shift, bit_count=len(bits) * 8, bits=bits)


def decode_cluster(raw: bytes) -> Extensions:
    header = Header.decode(raw)
    return decode_extensions(raw, start=header.header_length, stop=len(raw))


def entries(found: DirtyTables) -> list[int]:
    return [entry for part in found.iter_entries() for entry in part]


def test_the_layout_is_as_documented() -> None:
    raw = record(shift=3).encode()
    assert raw == struct.pack(">BBHI", 1, 3, 0, 16) + b"\x05\x80"


@given(bits=st.binary(min_size=1, max_size=40), shift=st.integers(0, MAX_SHIFT))
def test_a_record_comes_back_as_it_was(bits: bytes, shift: int) -> None:
    one = record(shift=shift, bits=bits)
    again = DirtyTables.decode(one.encode(), host_offset=7)
    assert again == one
    assert again is not None
    assert again.host_offset == 7


@given(bits=st.binary(min_size=1, max_size=12), shift=st.integers(0, 3))
def test_set_bits_name_their_entries(bits: bytes, shift: int) -> None:
    wanted = [
        entry
        for entry in range(len(bits) * 8 << shift)
        if bits[(entry >> shift) // 8] >> (entry >> shift) % 8 & 1
    ]
    assert entries(record(shift=shift, bits=bits)) == wanted


def test_neighbouring_bits_give_one_range() -> None:
    assert list(record(shift=2, bits=b"\xfe\x01").iter_entries()) == [range(4, 36)]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        struct.pack(">BBHI", 1, 0, 0, 8),
        struct.pack(">BBHI", 2, 0, 0, 8) + b"\0",
        struct.pack(">BBHI", 1, MAX_SHIFT + 1, 0, 8) + b"\0",
        struct.pack(">BBHI", 1, 0, 1, 8) + b"\0",
        struct.pack(">BBHI", 1, 0, 0, 0),
        struct.pack(">BBHI", 1, 0, 0, 8) + b"\0\0",
        struct.pack(">BBHI", 1, 0, 0, 9) + b"\0",
        struct.pack(">BBHI", 1, 0, 0, 7) + b"\x80",
        struct.pack(">BBHI", 1, 0, 0, 2033 * 8) + bytes(2033),
    ],
    ids=["empty", "no bits", "version", "shift", "reserved", "count 0", "long", "short", "spare"]
    + ["too long"],
)
def test_what_is_no_record_is_kept_as_an_unknown_extension(raw: bytes) -> None:
    assert DirtyTables.decode(raw, host_offset=0) is None
    extensions = Extensions(unknown=(Extension(type=DIRTY_TABLES_TYPE, data=raw),))
    cluster = encode_first_cluster(Header(cluster_bits=12), extensions, None)
    assert decode_cluster(cluster) == extensions


def test_a_second_record_is_kept_as_an_unknown_extension() -> None:
    second = Extension(type=DIRTY_TABLES_TYPE, data=record(bits=b"\1").encode())
    extensions = Extensions(dirty_tables=record(), unknown=(second,))
    cluster = encode_first_cluster(Header(cluster_bits=12), extensions, None)
    assert decode_cluster(cluster) == extensions


def test_a_decoded_record_knows_where_its_bytes_lie() -> None:
    extensions = Extensions(backing_format="raw", dirty_tables=record())
    cluster = encode_first_cluster(Header(cluster_bits=16), extensions, "base")
    found = decode_cluster(cluster).dirty_tables
    assert found == record()
    assert found is not None
    assert cluster[found.host_offset :].startswith(record().encode())


def test_an_image_with_a_record_names_the_bit() -> None:
    name = (FeatureKind.AUTOCLEAR, Autoclear.DIRTY_TABLES.bit_length() - 1)
    plain = Extensions(backing_format="raw")
    for extensions, names in ((plain, False), (replace(plain, dirty_tables=record()), True)):
        cluster = encode_first_cluster(Header(cluster_bits=16), extensions, None)
        assert (name in decode_cluster(cluster).feature_names) is names


@pytest.mark.parametrize(
    ("cluster_size", "room"), [(KiB, 64), (4 * KiB, 256), (32 * KiB, 2048), (2 * MiB, 2048)]
)
def test_a_record_takes_a_sixteenth_of_a_cluster_and_two_kibibytes_at_most(
    cluster_size: int, room: int
) -> None:
    planned = plan_dirty_tables(cluster_size=cluster_size, l1_entries=1)
    assert planned is not None
    assert len(planned.encode()) + 8 == room


def test_the_smallest_clusters_have_no_record() -> None:
    assert plan_dirty_tables(cluster_size=512, l1_entries=1) is None


@given(
    bits=st.integers(10, 21), entries=st.integers(0, 1 << 22) | st.sampled_from([8128, 8129, 16256])
)
def test_a_record_has_bits_for_a_disk_twice_as_large(bits: int, entries: int) -> None:
    planned = plan_dirty_tables(cluster_size=1 << bits, l1_entries=entries)
    assert planned is not None
    assert planned.covered >= 2 * entries
    assert not any(planned.bits)
    assert DirtyTables.decode(planned.encode(), host_offset=0) == planned
    # The finest bits that there is room for.
    assert planned.shift == 0 or planned.covered // 2 < 2 * entries + (2 << planned.shift)
