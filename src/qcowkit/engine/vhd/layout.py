"""Where everything lies in a VHD that is written from front to back. Pure, never imports numpy.

A dynamic file: footer copy, header, parent names, block allocation table, blocks in the order in
which they are placed, footer. Its size follows from the number of blocks alone."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from typing import Literal

from qcowkit.codecs.vhd.chs import MAX_GEOMETRY, Chs, chs_from_sectors, round_up_to_chs
from qcowkit.codecs.vhd.dynamic_header import (
    DEFAULT_BLOCK_SIZE,
    HEADER_SIZE,
    NAME_BYTES,
    DynamicHeader,
    is_block_size,
    sector_bitmap_size,
)
from qcowkit.codecs.vhd.footer import FOOTER_SIZE, MAX_SECTORS, NO_OFFSET, DiskType, Footer
from qcowkit.codecs.vhd.locators import (
    ABSOLUTE,
    FILE_URL,
    LOCATOR_COUNT,
    MAX_LOCATOR_BYTES,
    RELATIVE,
    ParentLocator,
    encode_locator,
)
from qcowkit.errors import RequestError
from qcowkit.units import SECTOR, align_up, ceil_div

# Nobody's table of creators has this one, so every reader takes current_size.
CREATOR = b"qkit"
CREATOR_VERSION = 0x0001_0000
MAX_SIZE = MAX_SECTORS * SECTOR
# Sector numbers in the table are 32 bits wide and the last value means unused.
MAX_FILE_BYTES = 0xFFFF_FFFF * SECTOR
_ENTRY_BYTES = 4
_HEADER_AT = FOOTER_SIZE
_NAMES_AT = FOOTER_SIZE + HEADER_SIZE

NewSubformat = Literal["dynamic", "fixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentLink:
    """The parent of a new differencing disk, under both of its names.

    relative, absolute: POSIX paths to the same file, the first from the child's directory.
    timestamp: when the parent's file was last modified, seconds since 2000-01-01 UTC; 0 is not
    known."""

    relative: str
    absolute: str
    unique_id: uuid.UUID
    timestamp: int = 0


def plan_disk_size(size: int, *, force_size: bool = True) -> int:
    """The guest bytes of a VHD for a disk of `size` bytes, never fewer.

    A VHD has whole sectors; without `force_size` it also has whole cylinders, as qemu-img makes
    them. Raises RequestError above 2040 GiB."""
    planned = align_up(size, SECTOR) if force_size else round_up_to_chs(size)
    if planned > MAX_SIZE:
        raise RequestError(f"size {planned} is above the largest VHD, {MAX_SIZE} bytes (2040 GiB)")
    return planned


def plan_geometry(size: int) -> Chs:
    """The geometry that means `size` bytes exactly; where there is none the largest one, which
    tells every reader to take current_size."""
    geometry = chs_from_sectors(size // SECTOR)
    return geometry if geometry.sectors * SECTOR == size else MAX_GEOMETRY


@dataclass(frozen=True, slots=True, kw_only=True)
class VhdLayout:
    """Offsets of a new VHD. Sizes and offsets in bytes; `table_entries` counts.

    names: (platform code, data) of each parent locator; empty without a parent."""

    size: int
    subformat: NewSubformat = "dynamic"
    block_size: int = DEFAULT_BLOCK_SIZE
    parent: ParentLink | None = None
    names: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def table_entries(self) -> int:
        """Blocks of the disk; 0 when fixed."""
        return 0 if self.subformat == "fixed" else ceil_div(self.size, self.block_size)

    @property
    def table_offset(self) -> int:
        """Where the block allocation table begins: behind the parent's names."""
        return _NAMES_AT + sum(align_up(len(raw), SECTOR) for _, raw in self.names)

    @property
    def table_bytes(self) -> int:
        """The table with its padding; one sector at least, also for an empty disk."""
        return max(align_up(self.table_entries * _ENTRY_BYTES, SECTOR), SECTOR)

    @property
    def first_block(self) -> int:
        """Where the bitmap of the first placed block begins."""
        return self.table_offset + self.table_bytes

    @property
    def block_stride(self) -> int:
        """Bytes of a block with its bitmap."""
        return sector_bitmap_size(self.block_size) + self.block_size

    def block_offset(self, order: int) -> int:
        """The host offset of the bitmap of the block that was placed as number `order`, from 0."""
        return self.first_block + order * self.block_stride

    def file_size(self, blocks: int) -> int:
        """Bytes of the whole file once `blocks` blocks are placed."""
        body = self.size if self.subformat == "fixed" else self.block_offset(blocks)
        return body + FOOTER_SIZE

    def footer(self, *, unique_id: uuid.UUID, timestamp: int, creator: bytes = CREATOR) -> Footer:
        """The footer of a new disk; the size as `plan_geometry` has it."""
        kind = DiskType.DIFFERENCING if self.parent else DiskType.DYNAMIC
        fixed = self.subformat == "fixed"
        return Footer(
            disk_type=DiskType.FIXED if fixed else kind,
            current_size=self.size,
            original_size=self.size,
            geometry=plan_geometry(self.size),
            unique_id=unique_id,
            data_offset=NO_OFFSET if fixed else _HEADER_AT,
            timestamp=timestamp,
            creator=creator,
            creator_version=CREATOR_VERSION,
        )

    def header(self) -> DynamicHeader:
        """The dynamic header, with the parent's identity and locators where there is one."""
        header = DynamicHeader(
            table_offset=self.table_offset,
            max_table_entries=self.table_entries,
            block_size=self.block_size,
        )
        if self.parent is None:
            return header
        return replace(
            header,
            parent_unique_id=self.parent.unique_id,
            parent_timestamp=self.parent.timestamp,
            parent_name=_unicode_name(self.parent.relative),
            locators=self._locators(),
        )

    def names_data(self) -> bytes:
        """What lies between header and table: the names, each in sectors of its own."""
        return b"".join(raw.ljust(align_up(len(raw), SECTOR), b"\0") for _, raw in self.names)

    def _locators(self) -> tuple[ParentLocator, ...]:
        entries, offset = [], _NAMES_AT
        for code, raw in self.names:
            space = align_up(len(raw), SECTOR)
            entries.append(
                ParentLocator(
                    code=code,
                    data_space=space // SECTOR,
                    data_length=len(raw),
                    data_offset=offset,
                )
            )
            offset += space
        return (*entries, *(ParentLocator(),) * (LOCATOR_COUNT - len(entries)))


def plan_layout(
    size: int,
    *,
    subformat: NewSubformat = "dynamic",
    block_size: int = DEFAULT_BLOCK_SIZE,
    parent: ParentLink | None = None,
) -> VhdLayout:
    """The layout for a disk of exactly `size` bytes; see `plan_disk_size`.

    Raises RequestError for what no VHD can be: a size that is no number of sectors or above
    2040 GiB, another block size, a fixed disk with a parent, a parent's name that cannot be
    written, or blocks so small that 32-bit sector numbers would not reach the last one."""
    if size < 0 or size % SECTOR:
        raise RequestError(f"size {size} is not a multiple of {SECTOR}")
    plan_disk_size(size)
    if not is_block_size(block_size):
        raise RequestError(f"block size {block_size} is not a power of two from 4 KiB to 256 MiB")
    if parent is not None and subformat == "fixed":
        raise RequestError("a fixed VHD cannot have a parent")
    layout = VhdLayout(
        size=size,
        subformat=subformat,
        block_size=block_size,
        parent=parent,
        names=_encode_names(parent) if parent else (),
    )
    if layout.file_size(layout.table_entries) > MAX_FILE_BYTES:
        raise RequestError(f"block size {block_size} is too small for a VHD of {size} bytes")
    return layout


def _encode_names(parent: ParentLink) -> tuple[tuple[bytes, bytes], ...]:
    """Three locators for one file: Windows reads the first two, XAPI the third alone."""
    for path in (parent.relative, parent.absolute):
        if "\\" in path or any(ord(char) < 0x20 or ord(char) == 0x7F for char in path):
            reason = "a VHD cannot hold backslashes and control characters"
            raise RequestError(f"parent name {path!r}: {reason}")
    try:
        names = (
            (RELATIVE, encode_locator(RELATIVE, parent.relative)),
            (ABSOLUTE, encode_locator(ABSOLUTE, parent.absolute)),
            (FILE_URL, encode_locator(FILE_URL, parent.relative)),
        )
        # Too long a name must fail here, not when the file is nearly done.
        _unicode_name(parent.relative)
    except UnicodeEncodeError:
        raise RequestError(f"parent name {parent.absolute!r} is not UTF-8") from None
    longest = max(len(raw) for _, raw in names)
    if longest > MAX_LOCATOR_BYTES:
        raise RequestError(f"parent name: {longest} bytes, expected at most {MAX_LOCATOR_BYTES}")
    return names


def _unicode_name(path: str) -> bytes:
    """The name for display, cut to its last component where the path is too long for the field."""
    for name in (path, path.rpartition("/")[2]):
        raw = name.encode("utf-16-be")
        if len(raw) < NAME_BYTES:
            return raw.ljust(NAME_BYTES, b"\0")
    raise RequestError(
        f"parent name {path!r} is too long: its last component fills {len(raw)} bytes"
    )
