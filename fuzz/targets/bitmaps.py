"""The bitmap directory and the table of a bitmap."""

from __future__ import annotations

from qcowkit.codecs.qcow2.bitmaps import (
    BitmapEntry,
    check_bitmap,
    decode_bitmap,
    decode_bitmap_table,
    encode_bitmap_directory,
)
from qcowkit.codecs.qcow2.geometry import Geometry

_GEOMETRY = Geometry(cluster_bits=12)


def target(data: bytes) -> None:
    """data: odd for a directory, even for a table (1 byte), then its bytes."""
    raw = data[1:]
    if not data[:1] or not data[0] & 1:
        decode_bitmap_table(raw[: len(raw) // 8 * 8], geometry=_GEOMETRY, host_offset=0)
        return
    offset = 0
    for index in range(16):
        if offset >= len(raw):
            break
        before = offset
        entry, offset = decode_bitmap(
            raw, offset=offset, left=len(raw) - offset, index=index, host_offset=0
        )
        assert offset > before, "an entry without a length"
        check_bitmap(entry, index=index, geometry=_GEOMETRY, disk_size=1 << 20, host_offset=0)


def seeds() -> list[bytes]:
    """A directory and a table."""
    entry = BitmapEntry(
        name="bitmap", table_offset=0x10000, table_entries=1, granularity_bits=16, flags=2
    )
    table = b"".join(word.to_bytes(8, "big") for word in (0, 1, 0x20000))
    return [b"1" + encode_bitmap_directory([entry, entry]), b"0" + table]
