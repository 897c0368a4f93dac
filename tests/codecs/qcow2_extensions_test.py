"""Header extensions and the first cluster."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.extensions import (
    FEATURE_NAMES,
    BitmapsExtension,
    CryptoExtension,
    Extension,
    Extensions,
    ExtensionType,
    decode_extensions,
    decode_feature_names,
    encode_feature_names,
    encode_first_cluster,
)
from qcowkit.codecs.qcow2.header import FeatureKind, Header
from qcowkit.errors import QcowkitError, RequestError

UNKNOWN = st.builds(
    Extension,
    type=st.integers(1, 2**32 - 1).filter(lambda kind: kind not in set(ExtensionType)),
    data=st.binary(max_size=40),
)
NAMES = st.text(
    st.characters(min_codepoint=32, exclude_characters="\x7f", exclude_categories=["Cs"]),
    min_size=1,
)


def header(*, cluster_bits: int = 16, version: int = 3, unknown: bytes = bytes(7)) -> Header:
    if version == 2:
        return Header(version=2, cluster_bits=cluster_bits, header_length=72, unknown=b"")
    return Header(cluster_bits=cluster_bits, header_length=105 + len(unknown), unknown=unknown)


def decode_cluster(raw: bytes) -> tuple[Header, Extensions, str]:
    """The three parts of a first cluster, as a reader finds them."""
    found = Header.decode(raw)
    stop = found.backing_file_offset or len(raw)
    extensions = decode_extensions(raw, start=found.header_length, stop=stop)
    name = raw[stop : stop + found.backing_file_size] if found.backing_file_offset else b""
    return found, extensions, name.decode("utf-8", "surrogateescape")


def types(raw: bytes) -> list[int]:
    """The extension types in file order, by another reader than ours."""
    found, offset = [], Header.decode(raw).header_length
    while True:
        kind, length = struct.unpack_from(">II", raw, offset)
        if kind == 0:
            return found
        found.append(kind)
        offset += 8 + -(-length // 8) * 8


@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "backing_format": st.sampled_from(["raw", "qcow2", "vpc"]),
            "data_file": NAMES.filter(lambda name: len(name.encode()) < 300),
            "bitmaps": st.builds(
                BitmapsExtension,
                bitmap_count=st.integers(1, 65535),
                directory_size=st.integers(1, 1024 * 65535),
                directory_offset=st.integers(0, 2**64 - 1),
            ),
            "crypto": st.builds(
                CryptoExtension,
                offset=st.integers(0, 2**64 - 1),
                length=st.integers(0, 64 << 20),
            ),
            "unknown": st.lists(UNKNOWN, max_size=4).map(tuple),
        },
    ),
    name=NAMES.filter(lambda name: len(name.encode()) < 300),
    tail=st.binary(max_size=3).map(lambda data: bytes(7) + data * 8),
)
def test_a_first_cluster_comes_back_as_it_was(
    fields: dict[str, Any], name: str, tail: bytes
) -> None:
    extensions = Extensions(feature_names=dict(FEATURE_NAMES), **fields)
    raw = encode_first_cluster(header(unknown=tail), extensions, name)
    assert len(raw) == 1 << 16
    found, again, backing = decode_cluster(raw)
    assert (again, backing, found.unknown) == (extensions, name, tail)


def test_extensions_are_written_in_the_order_of_qemu() -> None:
    extensions = Extensions(
        backing_format="raw",
        data_file="d",
        bitmaps=BitmapsExtension(bitmap_count=1, directory_size=32, directory_offset=0),
        crypto=CryptoExtension(offset=0, length=0),
        unknown=(Extension(type=9, data=b""), Extension(type=8, data=b"")),
    )
    raw = encode_first_cluster(header(), extensions, "b")
    assert types(raw) == [
        ExtensionType.BACKING_FORMAT,
        ExtensionType.DATA_FILE,
        ExtensionType.CRYPTO,
        ExtensionType.FEATURE_NAMES,
        ExtensionType.BITMAPS,
        9,
        8,
    ]


@pytest.mark.parametrize(
    ("cluster_bits", "version", "written"), [(13, 3, True), (12, 3, False), (16, 2, False)]
)
def test_the_feature_table_is_written_where_there_is_room(
    cluster_bits: int, version: int, written: bool
) -> None:
    raw = encode_first_cluster(
        header(cluster_bits=cluster_bits, version=version), Extensions(), None
    )
    assert (ExtensionType.FEATURE_NAMES in types(raw)) is written


def test_the_feature_table_has_eight_records() -> None:
    raw = encode_feature_names()
    assert len(raw) == 384
    assert decode_feature_names(raw) == FEATURE_NAMES


def test_feature_names_of_unknown_kinds_and_bits_are_left_out() -> None:
    records = [(3, 0, b"kind"), (0, 64, b"bit"), (1, 7, b"kept\0rest"), (1, 7, b"second")]
    raw = b"".join(struct.pack(">BB46s", *record) for record in records)
    assert decode_feature_names(raw) == {(FeatureKind.COMPATIBLE, 7): "kept"}


def test_a_header_of_104_bytes_grows_to_112() -> None:
    short = Header(cluster_bits=12, header_length=104, unknown=b"")
    raw = encode_first_cluster(short, Extensions(backing_format="raw"), "b")
    found, extensions, name = decode_cluster(raw)
    assert (found.header_length, extensions.backing_format, name) == (112, "raw", "b")


def test_a_cluster_without_room_is_refused() -> None:
    extensions = Extensions(unknown=(Extension(type=9, data=bytes(300)),))
    with pytest.raises(RequestError) as caught:
        encode_first_cluster(header(cluster_bits=9), extensions, "b" * 100)
    assert str(caught.value) == (
        "the header needs 532 bytes with its extensions and names, but a cluster has 512"
    )


def test_a_cluster_may_be_filled_to_its_last_byte() -> None:
    raw = encode_first_cluster(header(cluster_bits=9), Extensions(), "b" * 392)
    assert decode_cluster(raw)[2] == "b" * 392
    with pytest.raises(RequestError):
        encode_first_cluster(header(cluster_bits=9), Extensions(), "b" * 393)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("b" * 1024, "backing file name of 1024 bytes is longer than 1023"),
        ("a\nb", "backing file name 'a\\nb' has control characters"),
        ("\ud800", "backing file name '\\ud800' cannot be written as UTF-8"),
    ],
)
def test_a_name_that_no_reader_would_take_is_not_written(name: str, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        encode_first_cluster(header(), Extensions(), name)
    assert str(caught.value) == says


def test_a_data_file_name_of_1024_bytes_is_not_written() -> None:
    with pytest.raises(RequestError, match="data file name of 1024 bytes is longer than 1023"):
        encode_first_cluster(header(), Extensions(data_file="d" * 1024), None)


def test_extensions_end_where_the_backing_name_begins() -> None:
    raw = struct.pack(">II", 7, 0) + b"\0\0\0\x09\0\0\0\0"
    assert decode_extensions(raw, start=0, stop=8).unknown == (Extension(type=7, data=b""),)


def test_extensions_may_fill_the_cluster_without_an_end_marker() -> None:
    raw = struct.pack(">II", 7, 8) + b"12345678"
    found = decode_extensions(raw, start=0, stop=len(raw))
    assert found.unknown == (Extension(type=7, data=b"12345678"),)


def test_the_last_extension_may_lack_its_padding() -> None:
    raw = struct.pack(">II", 7, 3) + b"abc"
    found = decode_extensions(raw, start=0, stop=len(raw))
    assert found.unknown == (Extension(type=7, data=b"abc"),)


def test_nothing_is_read_behind_the_end_marker() -> None:
    raw = bytes(8) + b"\xff" * 8
    assert decode_extensions(raw, start=0, stop=16) == Extensions()


def test_256_extensions_are_allowed() -> None:
    raw = struct.pack(">II", 7, 0) * 256
    assert len(decode_extensions(raw, start=0, stop=len(raw)).unknown) == 256


def test_unknown_extensions_may_repeat_a_type() -> None:
    raw = struct.pack(">II", 7, 0) * 2
    assert len(decode_extensions(raw, start=0, stop=len(raw)).unknown) == 2


@given(st.binary(max_size=200))
def test_arbitrary_bytes_decode_or_are_refused_by_us(raw: bytes) -> None:
    try:
        found = decode_extensions(raw, start=0, stop=len(raw))
    except QcowkitError:
        return
    assert len(found.unknown) <= len(raw) // 8
