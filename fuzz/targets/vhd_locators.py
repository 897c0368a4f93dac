"""Parent locators: names in three spellings, all of them hostile."""

from __future__ import annotations

from qcowkit.codecs.vhd.locators import (
    ParentLocator,
    decode_locator,
    decode_utf16,
    decode_windows_path,
    encode_locator,
)

_CODES = (b"W2ru", b"W2ku", b"MacX", b"Mac ", b"Wi2r", b"None", b"\xff\xff\xff\xff")


def target(data: bytes) -> None:
    """data: which code (1 byte), then the entry and the locator's data."""
    if not data:
        return
    code, raw = _CODES[data[0] % len(_CODES)], data[1:]
    if len(raw) >= 24:
        assert ParentLocator.decode(raw[:24]).encode()[:4] == raw[:4], "the code is lost"
    for order in (False, True):
        decode_windows_path(decode_utf16(raw, big_endian=order))
    for name in decode_locator(code, raw):
        assert "\0" not in name, "a name with a NUL"


def seeds() -> list[bytes]:
    """One path in each spelling."""
    path = "../disks/größer & more.vhd"
    return [bytes([index]) + encode_locator(_CODES[index], path) for index in (0, 2)]
