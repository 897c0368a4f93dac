"""The footer of a VHD: 512 bytes at the end of the file, copied to its start unless fixed. Pure.

Source: the VHD specification, section "Hard Disk Footer Format". Everything is big-endian."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, Self

from qcowkit.codecs.vhd.chs import MAX_GEOMETRY, Chs
from qcowkit.errors import CorruptMetadata, UnsupportedFeature
from qcowkit.units import SECTOR

FOOTER_SIZE = 512
FOOTER_COOKIE = b"conectix"
FILE_VERSION = 0x0001_0000
# The data offset of a fixed disk, and of a dynamic header.
NO_OFFSET = 0xFFFF_FFFF_FFFF_FFFF
# Seconds from the Unix epoch to 2000-01-01 UTC, the epoch of every VHD timestamp.
EPOCH = 946_684_800
MAX_SECTORS = 0xFF00_0000
# These two address a disk by its geometry; every other writer means current_size.
CHS_CREATORS = frozenset({b"vpc ", b"qemu"})

_STRUCT = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427s")
_CHECKSUM_AT = 64

SizeRule = Literal["chs", "current_size"]


class DiskType(IntEnum):
    """The disk types in use; 0, 1, 5 and 6 are reserved or deprecated."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


def checksum(raw: bytes, *, field: int) -> int:
    """The complement of the 32-bit sum of all bytes but the four of the checksum, at `field`."""
    return ~(sum(raw) - sum(raw[field : field + 4])) & 0xFFFF_FFFF


def check_checksum(structure: str, raw: bytes, *, field: int, host_offset: int | None) -> None:
    """Raise CorruptMetadata unless the big-endian word at `field` is the checksum of `raw`."""
    found, expected = int.from_bytes(raw[field : field + 4], "big"), checksum(raw, field=field)
    if found != expected:
        raise CorruptMetadata(
            structure,
            host_offset=host_offset,
            reason=f"checksum is {found:#010x}, expected {expected:#010x}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """Every field of a footer but cookie, version and checksum. Sizes and offsets in bytes.

    timestamp: seconds since 2000-01-01 UTC. creator: four bytes. saved_state: 1 when the machine
    was suspended. reserved: 427 bytes, kept verbatim."""

    disk_type: DiskType
    current_size: int
    original_size: int
    geometry: Chs
    unique_id: uuid.UUID
    data_offset: int = NO_OFFSET
    timestamp: int = 0
    creator: bytes = b"\0\0\0\0"
    creator_version: int = 0
    creator_os: bytes = b"Wi2k"
    features: int = 2
    saved_state: int = 0
    reserved: bytes = bytes(427)

    @classmethod
    def decode(cls, raw: bytes, *, host_offset: int | None = None) -> Self:
        """A footer from its 512 bytes; `host_offset` is where they came from, for messages.

        Raises CorruptMetadata for a wrong length, cookie or checksum, UnsupportedFeature for
        another file version or disk type."""
        if len(raw) != FOOTER_SIZE:
            reason = f"{len(raw)} bytes, expected {FOOTER_SIZE}"
            raise CorruptMetadata("VHD footer", host_offset=host_offset, reason=reason)
        fields = _STRUCT.unpack(raw)
        if fields[0] != FOOTER_COOKIE:
            reason = f"cookie is {fields[0]!r}, expected {FOOTER_COOKIE!r}"
            raise CorruptMetadata("VHD footer", host_offset=host_offset, reason=reason)
        check_checksum("VHD footer", raw, field=_CHECKSUM_AT, host_offset=host_offset)
        if fields[2] != FILE_VERSION:
            reason = f"version is {fields[2]:#010x}, expected {FILE_VERSION:#010x}"
            raise UnsupportedFeature("VHD footer", reason=reason)
        return cls(
            disk_type=_disk_type(fields[13]),
            features=fields[1],
            data_offset=fields[3],
            timestamp=fields[4],
            creator=fields[5],
            creator_version=fields[6],
            creator_os=fields[7],
            original_size=fields[8],
            current_size=fields[9],
            geometry=Chs(cylinders=fields[10], heads=fields[11], sectors_per_track=fields[12]),
            unique_id=uuid.UUID(bytes=fields[15]),
            saved_state=fields[16],
            reserved=fields[17],
        )

    def encode(self) -> bytes:
        """The 512 bytes, with their checksum."""
        raw = _STRUCT.pack(
            FOOTER_COOKIE,
            self.features,
            FILE_VERSION,
            self.data_offset,
            self.timestamp,
            self.creator,
            self.creator_version,
            self.creator_os,
            self.original_size,
            self.current_size,
            self.geometry.cylinders,
            self.geometry.heads,
            self.geometry.sectors_per_track,
            self.disk_type,
            0,
            self.unique_id.bytes,
            self.saved_state,
            self.reserved,
        )
        total = checksum(raw, field=_CHECKSUM_AT).to_bytes(4, "big")
        return raw[:_CHECKSUM_AT] + total + raw[_CHECKSUM_AT + 4 :]

    def size_rule(self, *, force: SizeRule | None = None) -> SizeRule:
        """Whether the geometry or current_size is the size of the disk.

        The largest geometry always means current_size, and so does one without sectors. `force`
        overrides what the creator application implies."""
        if self.geometry == MAX_GEOMETRY or not self.geometry.sectors:
            return "current_size"
        return force or ("chs" if self.creator in CHS_CREATORS else "current_size")

    def virtual_size(self, *, force: SizeRule | None = None) -> int:
        """Guest bytes, by `size_rule`."""
        by_geometry = self.size_rule(force=force) == "chs"
        return self.geometry.sectors * SECTOR if by_geometry else self.current_size


def _disk_type(value: int) -> DiskType:
    try:
        return DiskType(value)
    except ValueError:
        reason = f"disk type is {value}, expected 2 (fixed), 3 (dynamic) or 4 (differencing)"
        raise UnsupportedFeature("VHD footer", reason=reason) from None
