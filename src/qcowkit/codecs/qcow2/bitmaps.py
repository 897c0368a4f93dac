"""The bitmap directory, and the tables of the bitmaps in it. Pure; the bits are elsewhere.

Source: the qcow2 specification, "Bitmaps". Rows 32 to 36 of docs/formats/qcow2.md."""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag

from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.units import INT64_MAX, MiB, align_up

MAX_BITMAP_TABLE_ENTRIES = 0x8000000
MAX_BITMAP_BYTES = 512 * MiB
MAX_BITMAP_NAME = 1023
MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31
DIRTY_TRACKING = 1
# What one directory entry can take at most.
MAX_BITMAP_ENTRY = 24 + MAX_BITMAP_NAME + 7

_ENTRY = struct.Struct(">QIIBBHI")
_DIRECTORY = "bitmap directory"
_TABLE = "bitmap table"
_RESERVED = 0xFF000000000001FE
_ALL_ONES = 1
_OFFSET = 0x00FFFFFFFFFFFE00


class BitmapFlag(IntFlag):
    """Flags of a directory entry."""

    IN_USE = 1
    AUTO = 2


_KNOWN_FLAGS = sum(BitmapFlag)


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapEntry:
    """One persistent dirty bitmap. Offset and granularity in bytes.

    A bit covers `granularity` guest bytes. in_use: it was not closed properly and its content
    means nothing. auto: it records writes."""

    name: str
    table_offset: int
    table_entries: int
    granularity_bits: int
    flags: int = 0

    @property
    def granularity(self) -> int:
        """Guest bytes of one bit."""
        return 1 << self.granularity_bits

    @property
    def in_use(self) -> bool:
        """True where the content cannot be trusted."""
        return bool(self.flags & BitmapFlag.IN_USE)

    @property
    def auto(self) -> bool:
        """True where writes are to be recorded."""
        return bool(self.flags & BitmapFlag.AUTO)

    @property
    def table_bytes(self) -> int:
        """Bytes of the bitmap's table."""
        return self.table_entries * 8


def decode_bitmap(
    raw: bytes, *, offset: int, left: int, index: int, host_offset: int
) -> tuple[BitmapEntry, int]:
    """The directory entry at byte `offset` of `raw`, and where the next one begins. Row 33.

    left: bytes of the directory from there on. index, host_offset: of this entry, for messages.
    Raises CorruptMetadata."""

    def bad(reason: str) -> CorruptMetadata:
        return CorruptMetadata(_DIRECTORY, host_offset=host_offset, index=index, reason=reason)

    left = min(left, len(raw) - offset)
    if left < _ENTRY.size:
        raise bad(f"{left} bytes left, expected at least {_ENTRY.size}")
    table, entries, flags, kind, bits, name_length, extra = _ENTRY.unpack_from(raw, offset)
    if kind != DIRTY_TRACKING:
        raise bad(f"type {kind}, expected {DIRTY_TRACKING} (dirty tracking)")
    if not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
        limits = f"{MIN_GRANULARITY_BITS} to {MAX_GRANULARITY_BITS}"
        raise bad(f"granularity of {bits} bits, expected {limits}")
    if flags & ~_KNOWN_FLAGS:
        raise bad(f"flags {flags:#x}, expected at most {_KNOWN_FLAGS:#x}")
    if not 1 <= name_length <= MAX_BITMAP_NAME:
        raise bad(f"name of {name_length} bytes, expected 1 to {MAX_BITMAP_NAME}")
    if extra:
        raise bad(f"{extra} bytes of extra data, expected 0")
    length = align_up(_ENTRY.size + name_length, 8)
    if length > left:
        raise bad(f"{length} bytes, expected at most the {left} that are left")
    start = offset + _ENTRY.size
    try:
        name = bytes(raw[start : start + name_length]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad(f"name is not UTF-8 at byte {error.start}") from None
    entry = BitmapEntry(
        name=name, table_offset=table, table_entries=entries, granularity_bits=bits, flags=flags
    )
    return entry, offset + length


def check_bitmap(
    entry: BitmapEntry, *, index: int, geometry: Geometry, disk_size: int, host_offset: int
) -> None:
    """Place and size of the bitmap's table. Rows 32, 34 and 35.

    disk_size: guest bytes. index, host_offset: of the entry and the directory, for messages.
    Raises CorruptMetadata."""
    count, offset, size = entry.table_entries, entry.table_offset, geometry.cluster_size
    covered = count * size * 8 * entry.granularity
    reason = ""
    if not 1 <= count <= MAX_BITMAP_TABLE_ENTRIES:
        reason = f"table of {count} entries, expected 1 to {MAX_BITMAP_TABLE_ENTRIES}"
    elif not offset or offset % size:
        reason = f"table offset {offset:#x} is not a positive multiple of {size:#x}"
    elif offset + entry.table_bytes > INT64_MAX:
        reason = f"table offset {offset:#x} ends above 2**63 - 1"
    elif count * size > MAX_BITMAP_BYTES:
        reason = f"{count * size} bytes of bits, expected at most {MAX_BITMAP_BYTES}"
    elif covered < disk_size and not entry.in_use:
        reason = f"covers {covered} bytes, expected the disk of {disk_size}"
    if reason:
        raise CorruptMetadata(_DIRECTORY, host_offset=host_offset, index=index, reason=reason)


def encode_bitmap_directory(entries: Iterable[BitmapEntry]) -> bytes:
    """The whole directory. Raises RequestError for a name that no entry can hold."""
    return b"".join(map(_encode_entry, entries))


def _encode_entry(entry: BitmapEntry) -> bytes:
    name = entry.name.encode()
    if not 1 <= len(name) <= MAX_BITMAP_NAME:
        limit = MAX_BITMAP_NAME
        raise RequestError(f"the bitmap name has {len(name)} bytes, expected 1 to {limit}")
    raw = _ENTRY.pack(
        entry.table_offset,
        entry.table_entries,
        entry.flags,
        DIRTY_TRACKING,
        entry.granularity_bits,
        len(name),
        0,
    )
    raw += name
    return raw.ljust(align_up(len(raw), 8), b"\0")


def decode_bitmap_table(raw: bytes, *, geometry: Geometry, host_offset: int) -> array[int]:
    """The 64-bit entries of one bitmap's table, judged by row 36.

    Each is 0 (all bits clear), 1 (all bits set) or the host offset of a cluster of bits.
    host_offset: of the table, for messages. Raises CorruptMetadata."""
    words = array("Q", bytes(raw))
    if sys.byteorder == "little":
        words.byteswap()
    for index, word in enumerate(words):
        reason = ""
        if word & _RESERVED:
            reason = f"reserved bits {word & _RESERVED:#x} are set, expected 0"
        elif word & _OFFSET and word & _ALL_ONES:
            reason = f"{word:#x} has an offset and the all-ones bit, expected one of them"
        elif word & _OFFSET & (geometry.cluster_size - 1):
            size = geometry.cluster_size
            reason = f"offset {word & _OFFSET:#x} is not a multiple of the cluster size {size:#x}"
        if reason:
            raise CorruptMetadata(_TABLE, host_offset=host_offset, index=index, reason=reason)
    return words
