"""The header of dynamic and differencing VHDs: 1024 bytes at the footer's data offset. Pure.

Source: the VHD specification, section "Dynamic Disk Header Format". Everything is big-endian."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import Self

from qcowkit.codecs.vhd.footer import FILE_VERSION, NO_OFFSET, check_checksum, checksum
from qcowkit.codecs.vhd.locators import LOCATOR_COUNT, LOCATOR_SIZE, ParentLocator
from qcowkit.errors import CorruptMetadata, UnsupportedFeature
from qcowkit.units import SECTOR, KiB, MiB, align_up, ceil_div, is_power_of_two

HEADER_SIZE = 1024
HEADER_COOKIE = b"cxsparse"
DEFAULT_BLOCK_SIZE = 2 * MiB
MIN_BLOCK_SIZE = 4 * KiB
MAX_BLOCK_SIZE = 256 * MiB
NAME_BYTES = 512

_STRUCT = struct.Struct(f">8sQQIIII16sII{NAME_BYTES}s{LOCATOR_COUNT * LOCATOR_SIZE}s256s")
_CHECKSUM_AT = 36
_NIL = uuid.UUID(int=0)


def sector_bitmap_size(block_size: int) -> int:
    """Bytes of the bitmap in front of each block: one bit a sector, padded to whole sectors."""
    return align_up(ceil_div(block_size // SECTOR, 8), SECTOR)


def is_block_size(value: int) -> bool:
    """Whether blocks may have this many bytes: a power of two from 4 KiB to 256 MiB."""
    return is_power_of_two(value) and MIN_BLOCK_SIZE <= value <= MAX_BLOCK_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicHeader:
    """Every field but cookie, version and checksum. Sizes and offsets in bytes.

    parent_timestamp: seconds since 2000-01-01 UTC. parent_name: 512 bytes of UTF-16BE as stored.
    reserved, padding: the reserved fields, kept verbatim."""

    table_offset: int
    max_table_entries: int
    block_size: int = DEFAULT_BLOCK_SIZE
    parent_unique_id: uuid.UUID = _NIL
    parent_timestamp: int = 0
    parent_name: bytes = bytes(NAME_BYTES)
    locators: tuple[ParentLocator, ...] = (ParentLocator(),) * LOCATOR_COUNT
    data_offset: int = NO_OFFSET
    reserved: int = 0
    padding: bytes = bytes(256)

    @property
    def bitmap_size(self) -> int:
        """Bytes of the sector bitmap in front of each block."""
        return sector_bitmap_size(self.block_size)

    @classmethod
    def decode(cls, raw: bytes, *, host_offset: int | None = None) -> Self:
        """A header from its 1024 bytes; `host_offset` is where they came from, for messages.

        Raises CorruptMetadata for a wrong length, cookie, checksum or block size,
        UnsupportedFeature for another header version."""
        if len(raw) != HEADER_SIZE:
            reason = f"{len(raw)} bytes, expected {HEADER_SIZE}"
            raise CorruptMetadata("dynamic header", host_offset=host_offset, reason=reason)
        fields = _STRUCT.unpack(raw)
        if fields[0] != HEADER_COOKIE:
            reason = f"cookie is {fields[0]!r}, expected {HEADER_COOKIE!r}"
            raise CorruptMetadata("dynamic header", host_offset=host_offset, reason=reason)
        check_checksum("dynamic header", raw, field=_CHECKSUM_AT, host_offset=host_offset)
        if fields[3] != FILE_VERSION:
            reason = f"version is {fields[3]:#010x}, expected {FILE_VERSION:#010x}"
            raise UnsupportedFeature("dynamic header", reason=reason)
        if not is_block_size(fields[5]):
            reason = f"block size is {fields[5]}, expected a power of two from 4 KiB to 256 MiB"
            raise CorruptMetadata("dynamic header", host_offset=host_offset, reason=reason)
        return cls(
            data_offset=fields[1],
            table_offset=fields[2],
            max_table_entries=fields[4],
            block_size=fields[5],
            parent_unique_id=uuid.UUID(bytes=fields[7]),
            parent_timestamp=fields[8],
            reserved=fields[9],
            parent_name=fields[10],
            locators=_decode_locators(fields[11]),
            padding=fields[12],
        )

    def encode(self) -> bytes:
        """The 1024 bytes, with their checksum."""
        raw = _STRUCT.pack(
            HEADER_COOKIE,
            self.data_offset,
            self.table_offset,
            FILE_VERSION,
            self.max_table_entries,
            self.block_size,
            0,
            self.parent_unique_id.bytes,
            self.parent_timestamp,
            self.reserved,
            self.parent_name,
            b"".join(locator.encode() for locator in self.locators),
            self.padding,
        )
        total = checksum(raw, field=_CHECKSUM_AT).to_bytes(4, "big")
        return raw[:_CHECKSUM_AT] + total + raw[_CHECKSUM_AT + 4 :]


def _decode_locators(raw: bytes) -> tuple[ParentLocator, ...]:
    return tuple(
        ParentLocator.decode(raw[start : start + LOCATOR_SIZE])
        for start in range(0, len(raw), LOCATOR_SIZE)
    )
