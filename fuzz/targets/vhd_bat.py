"""The block allocation table and the sector bitmaps."""

from __future__ import annotations

from qcowkit.codecs.vhd.bat import decode_bat, decode_bitmap, encode_bat, encode_bitmap


def target(data: bytes) -> None:
    """data: a table; then the same bytes as a bitmap."""
    raw = data[: len(data) // 4 * 4]
    sectors = decode_bat(raw)
    assert len(sectors) * 4 == len(raw), "an entry is lost"
    assert encode_bat(sectors)[: len(raw)] == raw, "encoding is not the inverse"
    present = decode_bitmap(data, count=len(data) * 8)
    assert encode_bitmap(present)[: len(data)] == data, "encoding is not the inverse"


def seeds() -> list[bytes]:
    """Used and unused blocks."""
    return [b"\xff" * 16 + bytes([0, 0, 0, 4, 0, 1, 0, 4]), bytes(range(64))]
