"""The LUKS1 header, as far as it can be judged without a key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.luks_header import LuksHeader
from qcowkit.errors import CorruptMetadata, QcowkitError, UnsupportedFeature
from qcowkit.testing.qcow2_builder import make_luks_area

AREA = make_luks_area(key_bytes=16)
SLOT_0 = 208
SLOT_1 = 256


def decode(area: bytes = AREA) -> LuksHeader:
    return LuksHeader.decode(area[:592], host_offset=0x30000, length=len(area))


def patched(offset: int, value: int, width: int = 4) -> bytes:
    return AREA[:offset] + value.to_bytes(width, "big") + AREA[offset + width :]


def test_the_fields_of_a_header_are_read() -> None:
    header = decode(make_luks_area(key_bytes=64))
    assert (header.cipher_name, header.cipher_mode, header.ivgen) == ("aes-256", "xts", "plain64")
    assert (header.hash, header.ivgen_hash, header.digest_iterations) == ("sha256", None, 1000)
    assert header.payload_offset == 2068480
    assert [slot.key_offset for slot in header.slots[:3]] == [4096, 262144, 520192]


@pytest.mark.parametrize(
    ("area", "error", "says"),
    [
        (
            AREA[:591],
            CorruptMetadata,
            "LUKS header at host offset 0x30000: 591 bytes, expected at least 592",
        ),
        (
            patched(0, 0),
            CorruptMetadata,
            "LUKS header at host offset 0x30000: magic 00000000babe, expected 4c554b53babe",
        ),
        (patched(6, 2, 2), UnsupportedFeature, "LUKS version 2: expected version 1"),
        (
            patched(108, 17),
            CorruptMetadata,
            "LUKS header at host offset 0x30000: master key of 17 bytes, "
            "expected one of (16, 24, 32, 48, 64)",
        ),
        (
            patched(164, 999),
            CorruptMetadata,
            "LUKS header at host offset 0x30000: 999 digest iterations, expected at least 1000",
        ),
        (
            patched(SLOT_0, 1),
            CorruptMetadata,
            "LUKS key slot at host offset 0x30000, entry 0: state 0x00000001, "
            "expected 0x00ac71f3 or 0x0000dead",
        ),
        (
            patched(SLOT_0 + 4, 999),
            CorruptMetadata,
            "LUKS key slot at host offset 0x30000, entry 0: 999 iterations, expected at least 1000",
        ),
        (
            patched(SLOT_1 + 44, 3999),
            CorruptMetadata,
            "LUKS key slot at host offset 0x30000, entry 1: 3999 stripes, expected 4000",
        ),
        (
            patched(SLOT_0 + 40, 1),
            CorruptMetadata,
            "LUKS key slot at host offset 0x30000, entry 0: key material at 0x200 to 0xfc00, "
            "expected 0x400 to 0x81000",
        ),
        (
            patched(SLOT_1 + 40, 9),
            CorruptMetadata,
            "LUKS key slot at host offset 0x30000, entry 1: key material at 0x1200 to 0x10c00, "
            "expected 0x10a00 to 0x81000",
        ),
        (
            patched(SLOT_1 + 40, 0xFFFFFFFF),
            CorruptMetadata,
            "LUKS key slot at host offset 0x30000, entry 1: key material at 0x1fffffffe00 to "
            "0x2000000f800, expected 0x80a00 to 0x81000",
        ),
    ],
)
def test_a_malformed_header_is_refused(area: bytes, error: type[QcowkitError], says: str) -> None:
    with pytest.raises(error) as caught:
        decode(area)
    assert str(caught.value) == says


@given(offset=st.integers(0, 591), value=st.binary(min_size=1, max_size=8))
def test_only_our_errors_leave_a_damaged_header(offset: int, value: bytes) -> None:
    area = bytearray(AREA)
    area[offset : offset + len(value)] = value
    try:
        header = decode(bytes(area))
    except QcowkitError:
        return
    assert header.cipher_name
