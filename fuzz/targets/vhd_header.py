"""The dynamic header of a VHD."""

from __future__ import annotations

from fuzz.images import vhd_bases
from qcowkit.codecs.vhd.dynamic_header import DynamicHeader
from qcowkit.testing.vhd_builder import seal_header


def target(data: bytes) -> None:
    """data: odd for a mended checksum (1 byte), then the header."""
    raw = bytearray(data[1:])
    if data[:1] and data[0] & 1 and len(raw) >= 1024:
        seal_header(raw)
    header = DynamicHeader.decode(bytes(raw))
    assert DynamicHeader.decode(header.encode()) == header, "encoding changes the header"


def seeds() -> list[bytes]:
    """The headers of a dynamic and of a differencing disk."""
    return [b"1" + base[512:1536] for base in vhd_bases()[:2]]
