"""The header: fields at their places, round trips, and new headers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.codecs.qcow2.header import (
    FIELD_OFFSETS,
    MAGIC,
    CompressionType,
    FeatureKind,
    Header,
    Incompatible,
    feature_label,
    new_header,
)
from qcowkit.errors import CorruptMetadata, UnsupportedFeature

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
V2_FIELDS = {
    "backing_file_offset": U64,
    "backing_file_size": U32,
    "cluster_bits": st.integers(9, 21),
    "size": U64,
    "crypt_method": U32,
    "l1_size": U32,
    "l1_table_offset": U64,
    "refcount_table_offset": U64,
    "refcount_table_clusters": U32,
    "nb_snapshots": U32,
    "snapshots_offset": U64,
}
V3_FIELDS = {
    "incompatible_features": U64,
    "compatible_features": U64,
    "autoclear_features": U64,
    "refcount_order": U32,
    "compression_type": st.integers(0, 255),
}


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Any header that can be decoded; its values need not make sense together."""
    fields = {name: draw(values) for name, values in V2_FIELDS.items()}
    if draw(st.booleans()):
        return Header(version=2, header_length=72, unknown=b"", **fields)
    fields |= {name: draw(values) for name, values in V3_FIELDS.items()}
    length = draw(st.sampled_from([104, 112, 120, 512]))
    if length == 104:
        fields["compression_type"] = 0
    rest = max(0, length - 105)
    unknown = draw(st.binary(min_size=rest, max_size=rest))
    return Header(version=3, header_length=length, unknown=unknown, **fields)


@given(headers())
def test_a_header_comes_back_as_it_was(header: Header) -> None:
    raw = header.encode()
    assert len(raw) == header.header_length
    assert Header.decode(raw) == header


@given(headers())
def test_what_follows_the_header_does_not_change_it(header: Header) -> None:
    assert Header.decode(header.encode() + b"\xff" * 100) == header


@pytest.mark.parametrize(
    "name", [name for name in FIELD_OFFSETS if name not in ("magic", "version")]
)
def test_a_field_lies_where_the_specification_says(name: str) -> None:
    changed = {"cluster_bits": 17, "header_length": 120, "compression_type": 1}
    header = Header(unknown=bytes(7))
    value = changed.get(name, 0x5A)
    more = {"unknown": bytes(15)} if name == "header_length" else {}
    raw = replace(header, **{name: value}, **more).encode()  # type: ignore[arg-type]
    before = header.encode().ljust(len(raw), b"\0")
    differing = [index for index in range(len(raw)) if raw[index] != before[index]]
    width = max(index for index in differing) + 1 - FIELD_OFFSETS[name]
    assert min(differing) >= FIELD_OFFSETS[name]
    assert width in (1, 4, 8)


def test_an_empty_file_is_too_short() -> None:
    with pytest.raises(CorruptMetadata) as caught:
        Header.decode(b"")
    assert str(caught.value) == "header: 0 bytes, expected at least 72"


@pytest.mark.parametrize("length", [4, 8, 71])
def test_a_cut_header_is_too_short(length: int) -> None:
    with pytest.raises(CorruptMetadata, match=f"{length} bytes, expected at least 72"):
        Header.decode(Header().encode()[:length])


def test_version_2_implies_the_fields_it_lacks() -> None:
    raw = Header(version=2, header_length=72, unknown=b"").encode() + b"\xff" * 64
    header = Header.decode(raw)
    assert (header.incompatible_features, header.refcount_order, header.compression_type) == (
        0,
        4,
        0,
    )


def test_an_unknown_bit_is_named_from_the_table_of_the_image() -> None:
    header = Header(incompatible_features=1 << 9 | 1 << 12)
    with pytest.raises(UnsupportedFeature) as caught:
        header.check({(FeatureKind.INCOMPATIBLE, 9): "erasure coding"})
    assert caught.value.bit == 9
    assert caught.value.name == (
        "incompatible feature bit 9 ('erasure coding'), incompatible feature bit 12"
    )


def test_an_unknown_bit_is_judged_before_the_fields_it_may_change() -> None:
    with pytest.raises(UnsupportedFeature, match="bit 40"):
        Header(incompatible_features=1 << 40, refcount_order=9, size=1 << 63).check()


def test_a_feature_name_cannot_reach_the_terminal() -> None:
    label = feature_label({(FeatureKind.AUTOCLEAR, 3): "\x1b[2J"}, FeatureKind.AUTOCLEAR, 3)
    assert label == "autoclear feature bit 3 ('\\x1b[2J')"


@pytest.mark.parametrize("bit", list(Incompatible))
def test_a_known_bit_is_not_refused_as_unknown(bit: Incompatible) -> None:
    kind = int(bit is Incompatible.COMPRESSION)
    Header(incompatible_features=int(bit), compression_type=kind).check()


def test_a_new_header_has_the_bits_of_its_options() -> None:
    header = new_header(
        Geometry(cluster_bits=17, refcount_order=3, extended_l2=True),
        size=1 << 30,
        compression_type=CompressionType.ZSTD,
        lazy_refcounts=True,
        data_file=True,
        data_file_raw=True,
    )
    assert header.incompatible_features == 0b11100
    assert (header.compatible_features, header.autoclear_features) == (1, 2)
    assert header.geometry == Geometry(cluster_bits=17, refcount_order=3, extended_l2=True)
    assert header.encode()[:4] == MAGIC


def test_a_new_header_of_version_2_has_72_bytes() -> None:
    header = new_header(Geometry(cluster_bits=16), size=512, version=2)
    assert len(header.encode()) == 72
