"""A whole VHD with a few changed fields, its checksums mended or not."""

from __future__ import annotations

from fuzz.images import change, exercise, vhd_bases
from qcowkit.testing.vhd_builder import seal_footer, seal_header

_FOOTER, _HEADER = 512, 1024


def target(data: bytes) -> None:
    """data: which base, and whether checksums are mended (1 byte); then changes."""
    bases = vhd_bases()
    base = bases[data[0] % len(bases)] if data else bases[0]
    image = change(base, data[1:])
    if data and data[0] & 0x80 and len(image) >= _FOOTER:
        mend(image)
    exercise(image, "vpc")


def mend(image: bytearray) -> None:
    """Right checksums for the structures at their usual places."""
    for offset in {0, len(image) // _FOOTER * _FOOTER - _FOOTER}:
        if image[offset : offset + 8] == b"conectix":
            seal_footer(image, offset)
    if len(image) >= _FOOTER + _HEADER and image[_FOOTER : _FOOTER + 8] == b"cxsparse":
        seal_header(image, _FOOTER)


def seeds() -> list[bytes]:
    """Each base as it is, and with a change whose checksum is right again."""
    wild = bytes([0x5C, 0, 0, 0, 48]) + bytes(8)
    count = len(vhd_bases())
    # 126 and 129 are multiples of the number of bases.
    return [bytes([0x80 // count * count + count + index]) + wild for index in range(count)] + [
        bytes([index]) for index in range(count)
    ]
