"""The block allocation table and the sector bitmaps of a VHD, as arrays. Pure.

Source: the VHD specification, section "Block Allocation Table and Data Blocks"."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcowkit.extents.table import Int64Array
from qcowkit.units import SECTOR, align_up

ENTRY_SIZE = 4
UNUSED = -1
# Unsigned on disk: files above 1 TiB set the highest bit.
_DISK = np.dtype(">u4")
_UNUSED_ON_DISK = 0xFFFF_FFFF
MAX_SECTOR = _UNUSED_ON_DISK - 1


def decode_bat(raw: bytes) -> Int64Array:
    """int64 sector numbers, shape (len(raw) / 4,); -1 where the block is unused."""
    sectors = np.frombuffer(raw, dtype=_DISK).astype(np.int64)
    sectors[sectors == _UNUSED_ON_DISK] = UNUSED
    return sectors


def encode_bat(sectors: Int64Array) -> bytes:
    """The entries on disk, without padding; -1 becomes unused."""
    return sectors.astype(_DISK).tobytes()


def decode_bitmap(raw: bytes, *, count: int) -> npt.NDArray[np.bool_]:
    """The first `count` bits, the most significant of each byte first: True is present."""
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=count)
    return bits.view(np.bool_)


def encode_bitmap(present: npt.NDArray[np.bool_]) -> bytes:
    """The bitmap of a block on disk, padded with zeros to whole sectors."""
    raw = np.packbits(present).tobytes()
    return raw.ljust(align_up(len(raw), SECTOR), b"\0")


def has_bit(bitmap: bytes | bytearray, sector: int) -> bool:
    """Whether the bit of a sector of the block is set."""
    return bool(bitmap[sector >> 3] & 0x80 >> (sector & 7))


def set_bits(bitmap: bytearray, *, first: int, end: int) -> None:
    """Set the bits of the sectors [first, end) in place."""
    if first >= end:
        return
    low, high = first >> 3, end - 1 >> 3
    head, tail = 0xFF >> (first & 7), 0xFF & 0xFF00 >> ((end - 1 & 7) + 1)
    if low == high:
        bitmap[low] |= head & tail
        return
    bitmap[low] |= head
    bitmap[low + 1 : high] = b"\xff" * (high - low - 1)
    bitmap[high] |= tail
