"""The identity of an image as bytes."""

from __future__ import annotations

import hashlib
import struct
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.extensions import (
    Extension,
    Extensions,
    decode_extensions,
    encode_first_cluster,
)
from qcowkit.codecs.qcow2.header import Header
from qcowkit.codecs.qcow2.identity import IDENTITY_TYPE, BackingIdentity, Identity, parse_guid
from qcowkit.errors import RequestError
from qcowkit.units import INT64_MAX

OWN = UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")
BELOW = UUID("f47ac10b-58cc-4372-a567-0e02b2c3d479")
BACKING = BackingIdentity(guid=BELOW, length=3 << 30)
FULL = Identity.of(OWN, backing=BACKING, backing_name="base.qcow2")

guids = st.uuids(allow_nil=False)
backings = st.builds(BackingIdentity, guid=guids, length=st.integers(0, INT64_MAX))
# A name in a header is any bytes: those that are no UTF-8 are lone surrogates.
names = st.binary(min_size=1, max_size=40).map(lambda raw: raw.decode("utf-8", "surrogateescape"))


def pack(
    *,
    version: int = 1,
    reserved: bytes = bytes(7),
    guid: bytes = OWN.bytes,
    below: bytes = BELOW.bytes,
    length: int = 1,
    digest: bytes = b"d" * 16,
) -> bytes:
    return struct.pack(">B7s16s16sQ16s", version, reserved, guid, below, length, digest)


def decode_cluster(raw: bytes) -> Extensions:
    header = Header.decode(raw)
    return decode_extensions(raw, start=header.header_length, stop=len(raw))


def test_the_layout_is_as_documented() -> None:
    digest = hashlib.sha256(b"base.qcow2").digest()[:16]
    assert FULL.encode() == (
        b"\1" + bytes(7) + OWN.bytes + BELOW.bytes + (3 << 30).to_bytes(8, "big") + digest
    )
    assert Identity.of(OWN).encode() == b"\1" + bytes(7) + OWN.bytes + bytes(40)


@given(guid=guids, backing=st.none() | backings, name=names)
def test_an_identity_comes_back_as_it_was(
    guid: UUID, backing: BackingIdentity | None, name: str
) -> None:
    one = Identity.of(guid, backing=backing, backing_name=name)
    assert Identity.decode(one.encode()) == one


@given(name=names, other=names)
def test_the_backing_is_known_under_the_name_it_was_recorded_for(name: str, other: str) -> None:
    one = Identity.of(OWN, backing=BACKING, backing_name=name)
    assert one.backing_of(name) == BACKING
    assert (one.backing_of(other) == BACKING) is (name == other)
    assert one.backing_of(None) is None


def test_a_backing_without_a_name_is_not_recorded() -> None:
    assert Identity.of(OWN, backing=BACKING) == Identity.of(OWN)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        pack()[:-1],
        pack() + b"\0",
        pack(version=2),
        pack(reserved=b"\0\0\0\0\0\0\1"),
        pack(guid=bytes(16)),
        pack(length=1 << 63),
        pack(below=bytes(16)),
        pack(below=bytes(16), length=0),
    ],
    ids=["empty", "short", "long", "version", "reserved", "no guid", "length"]
    + ["length without a backing", "name without a backing"],
)
def test_what_is_no_identity_is_kept_as_an_unknown_extension(raw: bytes) -> None:
    assert Identity.decode(raw) is None
    extensions = Extensions(unknown=(Extension(type=IDENTITY_TYPE, data=raw),))
    cluster = encode_first_cluster(Header(cluster_bits=12), extensions, None)
    assert decode_cluster(cluster) == extensions


def test_a_second_identity_is_kept_as_an_unknown_extension() -> None:
    second = Extension(type=IDENTITY_TYPE, data=Identity.of(BELOW).encode())
    extensions = Extensions(identity=FULL, unknown=(second,))
    cluster = encode_first_cluster(Header(cluster_bits=12), extensions, None)
    assert decode_cluster(cluster) == extensions


@given(at=st.integers(0, 63), bit=st.integers(0, 7))
def test_no_flipped_bit_makes_bytes_that_would_be_written_in_another_way(at: int, bit: int) -> None:
    raw = bytearray(FULL.encode())
    raw[at] ^= 1 << bit
    found = Identity.decode(bytes(raw))
    assert found is None or found.encode() == bytes(raw)


@pytest.mark.parametrize("text", [str(OWN), OWN.hex, f"{{{OWN}}}", str(OWN).upper()])
def test_a_guid_is_read_in_every_usual_notation(text: str) -> None:
    assert parse_guid(text) == OWN


@pytest.mark.parametrize("text", ["", "auto", "12", str(OWN) + "0", str(UUID(int=0))])
def test_what_is_no_guid_is_refused(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_guid(text)
    assert str(caught.value) == (
        f"guid is {text!r}, expected 32 hexadecimal digits that are not all 0"
    )
