"""Small VHDs as bytes, sound or broken on purpose. Shares no code with the codecs it tests."""

from __future__ import annotations

import struct
import uuid
from typing import Self

_SECTOR = 512
_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427s")
_FOOTER_FIELDS = (
    "cookie",
    "features",
    "version",
    "data_offset",
    "timestamp",
    "creator",
    "creator_version",
    "creator_os",
    "original_size",
    "current_size",
    "cylinders",
    "heads",
    "sectors_per_track",
    "disk_type",
    "checksum",
    "unique_id",
    "saved_state",
    "reserved",
)
_HEADER = struct.Struct(">8sQQIIII16sII512s192s256s")
_HEADER_FIELDS = (
    "cookie",
    "data_offset",
    "table_offset",
    "version",
    "max_table_entries",
    "block_size",
    "checksum",
    "parent_unique_id",
    "parent_timestamp",
    "reserved",
    "parent_name",
    "locators",
    "padding",
)
_ALL_ONES = (1 << 64) - 1
_NAMES_AT = 1536

FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
UNIQUE_ID = uuid.UUID("11111111-2222-3333-4444-555555555555")
PARENT_ID = uuid.UUID("aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee")


class VhdBuilder:
    """Collects the parts of one VHD; `build` lays them out and seals the checksums.

    footer, header: values by field name that replace the sound ones, in the types of their
    struct formats (numbers, or bytes). A `checksum` among them is kept as it is. Sizes in bytes.

    >>> image = VhdBuilder(size=8192, block_size=4096).block(1, b"x" * 4096).build()
    >>> bytes(image[:8]), len(image)
    (b'conectix', 7168)
    """

    def __init__(
        self, *, size: int, disk_type: int = DYNAMIC, block_size: int = 4096, entries: int = 0
    ) -> None:
        """`entries`: of the table, where more than the disk needs are wanted."""
        self.size = size
        self.disk_type = disk_type
        self.block_size = block_size
        self.entries = entries or -(-size // block_size)
        self.footer: dict[str, int | bytes] = {}
        self.header: dict[str, int | bytes] = {}
        self._blocks: dict[int, tuple[bytes, bytes]] = {}
        self._locators: list[tuple[bytes, bytes]] = []

    @property
    def table_offset(self) -> int:
        """Host offset of the block allocation table."""
        return _NAMES_AT + sum(_padded(len(raw)) for _, raw in self._locators)

    @property
    def bitmap_size(self) -> int:
        """Bytes of the bitmap before each block."""
        return _padded(-(-self.block_size // _SECTOR // 8))

    def block(self, index: int, data: bytes, *, bitmap: bytes | None = None) -> Self:
        """The data of a block, padded with zeros; `bitmap` None stands for all ones."""
        if bitmap is None:
            bitmap = b"\xff" * (self.block_size // _SECTOR // 8)
        raw = data.ljust(self.block_size, b"\0")
        self._blocks[index] = (bitmap.ljust(self.bitmap_size, b"\0"), raw)
        return self

    def locator(self, code: bytes, raw: bytes) -> Self:
        """One parent locator with its data."""
        self._locators.append((code, raw))
        return self

    def block_offset(self, index: int) -> int:
        """Host offset of the bitmap of a block that was given."""
        order = list(self._blocks).index(index)
        table = _padded(self.entries * 4)
        return self.table_offset + table + order * (self.bitmap_size + self.block_size)

    def build(self, content: bytes = b"") -> bytearray:
        """The file. `content`: the guest bytes of a fixed disk."""
        footer = self.encode_footer()
        if self.disk_type == FIXED:
            return bytearray(content.ljust(self.size, b"\0") + footer)
        names = b"".join(raw.ljust(_padded(len(raw)), b"\0") for _, raw in self._locators)
        table = bytearray(b"\xff" * _padded(self.entries * 4))
        for index in self._blocks:
            struct.pack_into(">I", table, index * 4, self.block_offset(index) // _SECTOR)
        blocks = b"".join(bitmap + raw for bitmap, raw in self._blocks.values())
        return bytearray(footer + self.encode_header() + names + table + blocks + footer)

    def encode_footer(self) -> bytes:
        """The 512 bytes of either copy."""
        values: dict[str, int | bytes] = {
            "cookie": b"conectix",
            "features": 2,
            "version": 0x0001_0000,
            "data_offset": _ALL_ONES if self.disk_type == FIXED else 512,
            "timestamp": 0,
            "creator": b"win ",
            "creator_version": 0x0006_0000,
            "creator_os": b"Wi2k",
            "original_size": self.size,
            "current_size": self.size,
            "cylinders": 65535,
            "heads": 16,
            "sectors_per_track": 255,
            "disk_type": self.disk_type,
            "checksum": 0,
            "unique_id": UNIQUE_ID.bytes,
            "saved_state": 0,
            "reserved": bytes(427),
        }
        values.update(self.footer)
        raw = bytearray(_FOOTER.pack(*(values[name] for name in _FOOTER_FIELDS)))
        if "checksum" not in self.footer:
            seal_footer(raw)
        return bytes(raw)

    def encode_header(self) -> bytes:
        """The 1024 bytes of the dynamic header."""
        child = self.disk_type == DIFFERENCING
        values: dict[str, int | bytes] = {
            "cookie": b"cxsparse",
            "data_offset": _ALL_ONES,
            "table_offset": self.table_offset,
            "version": 0x0001_0000,
            "max_table_entries": self.entries,
            "block_size": self.block_size,
            "checksum": 0,
            "parent_unique_id": PARENT_ID.bytes if child else bytes(16),
            "parent_timestamp": 0,
            "reserved": 0,
            "parent_name": "parent.vhd".encode("utf-16-be") if child else b"",
            "locators": self._locator_entries(),
            "padding": bytes(256),
        }
        values.update(self.header)
        raw = bytearray(_HEADER.pack(*(values[name] for name in _HEADER_FIELDS)))
        if "checksum" not in self.header:
            seal_header(raw)
        return bytes(raw)

    def _locator_entries(self) -> bytes:
        entries, offset = b"", _NAMES_AT
        for code, raw in self._locators:
            space = _padded(len(raw))
            entries += struct.pack(">4sIIIQ", code, space // _SECTOR, len(raw), 0, offset)
            offset += space
        return entries


def seal_footer(image: bytearray, offset: int = 0) -> None:
    """Set the checksum of the footer at `offset` to what its bytes demand."""
    _seal(image, offset, size=_FOOTER.size, field=64)


def seal_header(image: bytearray, offset: int = 0) -> None:
    """Set the checksum of the dynamic header at `offset` to what its bytes demand."""
    _seal(image, offset, size=_HEADER.size, field=36)


def _seal(image: bytearray, offset: int, *, size: int, field: int) -> None:
    struct.pack_into(">I", image, offset + field, 0)
    total = ~sum(image[offset : offset + size]) & 0xFFFF_FFFF
    struct.pack_into(">I", image, offset + field, total)


def _padded(length: int) -> int:
    return -(-length // _SECTOR) * _SECTOR
