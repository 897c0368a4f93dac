"""The record of dirty L2 tables: a header extension of our own. Pure.

Seed 002-08; docs/formats/qcow2.md, "The record of dirty tables". While an image with lazy refcounts
is dirty, the record says whose L2 tables have changed: the repair after a crash looks at no others.
It means something only while autoclear bit 62 is set, which any writer that does not know it
clears; whoever does not know the extension keeps or drops it, and either is right."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from qcowkit.units import KiB, ceil_div

# "qkdt"
DIRTY_TABLES_TYPE = 0x716B6474
DIRTY_TABLES_NAME = "dirty tables record"
VERSION = 1
# One bit for 2**22 entries: the longest L1 table has no more.
MAX_SHIFT = 22
# Of the first cluster the record takes one part in so many, and no more than so many bytes; what
# names need is left alone, and smaller clusters have no record at all.
_SHARE = 16
_MAX_ROOM = 2 * KiB
_MIN_CLUSTER = KiB
_EXTENSION_HEAD = 8
_HEAD = struct.Struct(">BBHI")
# Bytes in front of the bits.
HEAD_SIZE = _HEAD.size


@dataclass(frozen=True, slots=True, kw_only=True)
class DirtyTables:
    """Bit i, the least significant of a byte first, stands for the entries of the active L1 table
    from i << shift up to the next bit's. bits: as many bytes as `bit_count` bits need.

    host_offset: where the data of the extension begin in the file, 0 before it was written."""

    shift: int
    bit_count: int
    bits: bytes
    host_offset: int = field(default=0, compare=False)

    @classmethod
    def decode(cls, raw: bytes, *, host_offset: int) -> Self | None:
        """None for what is not exactly a record of this version: it is an unknown extension then,
        since an image is never refused for a hint that it may do without."""
        if not HEAD_SIZE <= len(raw) <= _MAX_ROOM - _EXTENSION_HEAD:
            return None
        version, shift, reserved, bit_count = _HEAD.unpack_from(raw)
        bits = bytes(raw[HEAD_SIZE:])
        if version != VERSION or reserved or shift > MAX_SHIFT or not bit_count:
            return None
        if len(bits) != ceil_div(bit_count, 8) or int.from_bytes(bits, "little") >> bit_count:
            return None
        return cls(shift=shift, bit_count=bit_count, bits=bits, host_offset=host_offset)

    def encode(self) -> bytes:
        """The data of the extension."""
        return _HEAD.pack(VERSION, self.shift, 0, self.bit_count) + self.bits

    @property
    def covered(self) -> int:
        """How many L1 entries the bits stand for."""
        return self.bit_count << self.shift

    def iter_entries(self) -> Iterator[range]:
        """The L1 entries that are recorded, one range for neighbouring bits."""
        word, position = int.from_bytes(self.bits, "little"), 0
        while word:
            skip = (word & -word).bit_length() - 1
            word >>= skip
            # Counts the ones from the lowest bit on.
            count = (~word & (word + 1)).bit_length() - 1
            word >>= count
            begin = position + skip
            position = begin + count
            yield range(begin << self.shift, position << self.shift)


def plan_dirty_tables(*, cluster_size: int, l1_entries: int) -> DirtyTables | None:
    """An empty record for a new image, with bits for twice its L1 table as long as there is room
    for that; None where a cluster has no room for any.

    cluster_size: bytes."""
    if cluster_size < _MIN_CLUSTER:
        return None
    room = min(_MAX_ROOM, cluster_size // _SHARE) - _EXTENSION_HEAD - HEAD_SIZE
    bit_count = room * 8
    shift = 0
    while ceil_div(l1_entries, 1 << shift) * 2 > bit_count:
        shift += 1
    return DirtyTables(shift=shift, bit_count=bit_count, bits=bytes(room))
