"""Everything that is known of a VHD before its block allocation table is read. Never imports numpy.

Row numbers in comments are those of the validation list, docs/formats/vhd.md."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

from qcowkit.codecs.vhd.dynamic_header import HEADER_SIZE, DynamicHeader
from qcowkit.codecs.vhd.footer import (
    FOOTER_COOKIE,
    FOOTER_SIZE,
    MAX_SECTORS,
    DiskType,
    Footer,
    SizeRule,
)
from qcowkit.codecs.vhd.locators import (
    MAX_LOCATOR_BYTES,
    PATH_CODES,
    ParentLocator,
    decode_locator,
    decode_utf16,
    decode_windows_path,
)
from qcowkit.errors import CorruptMetadata, QcowkitError, UnknownFormat
from qcowkit.references import Reference, ReferenceKind
from qcowkit.units import SECTOR, ceil_div

if TYPE_CHECKING:
    from qcowkit.budget import Budget
    from qcowkit.storage.protocol import Storage

Subformat = Literal["fixed", "dynamic", "differencing"]

_SUBFORMATS: dict[DiskType, Subformat] = {
    DiskType.FIXED: "fixed",
    DiskType.DYNAMIC: "dynamic",
    DiskType.DIFFERENCING: "differencing",
}
_ENTRY_BYTES = 4
# A decoded entry is an int64.
MAP_ENTRY_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class VhdMetadata:
    """A VHD without its block allocation table. Sizes and offsets in bytes.

    cluster_size: the block size; 512, the sector, for fixed disks, which have no blocks.
    data_end: host offset where the trailing footer begins, or the file ends where it is missing.
    locators: those in use. references: of a differencing disk its parent, the names in lookup
    order. parent_timestamp: seconds since 2000-01-01 UTC, 0 without a parent."""

    footer: Footer
    dynamic_header: DynamicHeader | None
    locators: tuple[ParentLocator, ...]
    virtual_size: int
    cluster_size: int
    data_end: int
    references: tuple[Reference, ...] = ()
    warnings: tuple[str, ...] = ()

    format: ClassVar[str] = "vpc"

    @property
    def subformat(self) -> Subformat:
        """The disk type in a word."""
        return _SUBFORMATS[self.footer.disk_type]

    @property
    def unique_id(self) -> uuid.UUID:
        """What a child calls its parent's identity."""
        return self.footer.unique_id

    @property
    def parent_id(self) -> uuid.UUID | None:
        """The unique id that the parent must have; None unless differencing."""
        if self.dynamic_header is None or self.footer.disk_type is not DiskType.DIFFERENCING:
            return None
        return self.dynamic_header.parent_unique_id

    @property
    def parent_timestamp(self) -> int:
        """When the parent was last modified, as the child knows it."""
        if self.dynamic_header is None or self.parent_id is None:
            return 0
        return self.dynamic_header.parent_timestamp

    @property
    def block_count(self) -> int:
        """Blocks of the disk, which is also how many table entries count; 0 for fixed disks."""
        return ceil_div(self.virtual_size, self.cluster_size) if self.dynamic_header else 0


def load_vhd_metadata(
    storage: Storage, *, budget: Budget, force_size_calc: SizeRule | None = None
) -> VhdMetadata:
    """Footer, header and locators of a VHD, validated (rows 46-50, 53 and 54).

    force_size_calc: take the size from the geometry or from current_size whatever the creator.
    Raises UnknownFormat where there is no footer, CorruptMetadata, UnsupportedFeature, and
    BudgetExceeded before anything of the size that the file claims is allocated."""
    file_size = storage.size()
    copies = _FooterCopies.load(storage, file_size)
    footer, warnings = copies.choose()
    virtual_size = _check_size(footer, force_size_calc, warnings)
    budget.spend("virtual size", value=virtual_size, limit=budget.virtual_size)
    if footer.saved_state:
        warnings.append("the disk is in a saved state: a suspended machine depends on it")
    if any(footer.reserved):
        # XenServer keeps its flag for hidden disks in the first of these bytes.
        warnings.append("the reserved bytes of the footer are not zero")
    if footer.disk_type is DiskType.FIXED:
        return _fixed(footer, virtual_size, copies.data_end, warnings)
    header = _load_header(storage, footer.data_offset, copies.data_end)
    _check_table(header, virtual_size, copies.data_end)
    entries = ceil_div(virtual_size, header.block_size)
    budget.spend(
        "block allocation table",
        value=entries * MAP_ENTRY_BYTES,
        limit=budget.metadata_bytes,
    )
    differencing = footer.disk_type is DiskType.DIFFERENCING
    locators = tuple(entry for entry in header.locators if entry.used) if differencing else ()
    _check_disjoint(footer, header, locators, copies)
    references: tuple[Reference, ...] = ()
    if differencing:
        _check_parent_identity(footer, header)
        references = (_parent(storage, header, locators, copies.data_end, warnings),)
    return VhdMetadata(
        footer=footer,
        dynamic_header=header,
        locators=locators,
        virtual_size=virtual_size,
        cluster_size=header.block_size,
        data_end=copies.data_end,
        references=references,
        warnings=tuple(warnings),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _FooterCopies:
    """What stands at both ends of the file: a footer, the error of one, or None for neither."""

    head: Footer | QcowkitError | None
    tail: Footer | QcowkitError | None
    file_size: int
    data_end: int

    @classmethod
    def load(cls, storage: Storage, file_size: int) -> _FooterCopies:
        """Both copies; host errors pass, errors of the format are kept."""
        # Early Virtual PC versions wrote 511 bytes, without the last reserved one.
        length = FOOTER_SIZE - 1 if file_size % SECTOR == SECTOR - 1 else FOOTER_SIZE
        tail_at = file_size - length
        if tail_at < 0:
            reason = f"{file_size} bytes are too few for a footer of {FOOTER_SIZE} bytes"
            raise UnknownFormat(f"not a VHD: {reason}")
        tail = _decode_copy(storage.pread(length, offset=tail_at), host_offset=tail_at)
        # A file of one footer alone is an empty fixed disk.
        head = (
            _decode_copy(storage.pread(FOOTER_SIZE, offset=0), host_offset=0) if tail_at else None
        )
        return cls(
            head=head,
            tail=tail,
            file_size=file_size,
            data_end=tail_at if isinstance(tail, Footer) else file_size,
        )

    def choose(self) -> tuple[Footer, list[str]]:
        """The footer that counts, and what is to be said about the other (rows 46 and 47).

        A guest can write the first sector of a fixed disk, and a dynamic disk that lost its
        trailing footer ends in a sector of the guest. So a fixed footer counts only at the end,
        and there before everything else; otherwise the copy at the start comes first. Where that
        is gone the footer at the end takes its place, but a damaged one refuses the file."""
        head, tail = self.head, self.tail
        if isinstance(tail, Footer) and tail.disk_type is DiskType.FIXED:
            return tail, self._beside_fixed(tail)
        if isinstance(head, Footer) and head.disk_type is DiskType.FIXED:
            head = CorruptMetadata(
                "VHD footer", host_offset=0, reason="a fixed disk has its footer at the end only"
            )
        if isinstance(head, Footer):
            return head, _compare_copies(head, tail)
        if head is not None:
            raise head
        if isinstance(tail, Footer):
            return tail, ["the footer copy at the start is missing: the one at the end counts"]
        raise tail or UnknownFormat("not a VHD: no footer at the start or the end")

    def _beside_fixed(self, tail: Footer) -> list[str]:
        if not isinstance(self.head, Footer):
            return []
        same = self.head.unique_id == tail.unique_id
        if same and self.head.disk_type is not DiskType.FIXED:
            reason = f"disk type is {self.head.disk_type}, but {tail.disk_type} at the end"
            raise CorruptMetadata("VHD footer", host_offset=0, reason=reason)
        return ["the first sector of this fixed disk holds the footer of another VHD"]


def _decode_copy(raw: bytes, *, host_offset: int) -> Footer | QcowkitError | None:
    if not raw.startswith(FOOTER_COOKIE):
        return None
    try:
        return Footer.decode(raw.ljust(FOOTER_SIZE, b"\0"), host_offset=host_offset)
    except QcowkitError as error:
        return error


def _compare_copies(head: Footer, tail: Footer | QcowkitError | None) -> list[str]:
    """Row 47: which fields differ between the copy at the start, which counts, and the end."""
    if tail is None:
        return ["the footer at the end is missing: the copy at the start counts"]
    if isinstance(tail, QcowkitError):
        return [f"the footer at the end is damaged ({tail}): the copy at the start counts"]
    names = [
        field.name
        for field in fields(Footer)
        if getattr(head, field.name) != getattr(tail, field.name)
    ]
    if not names:
        return []
    listed = ", ".join(names)
    return [f"the footer at the end differs from its copy at the start, which counts: {listed}"]


def _check_size(footer: Footer, force: SizeRule | None, warnings: list[str]) -> int:
    """Rows 50 and 54: the guest bytes, in whole sectors and below 2040 GiB."""
    size = footer.virtual_size(force=force)
    if size > MAX_SECTORS * SECTOR:
        reason = f"size is {size} bytes, expected at most {MAX_SECTORS * SECTOR} (2040 GiB)"
        raise CorruptMetadata("VHD footer", reason=reason)
    if size % SECTOR:
        reason = f"size is {size} bytes, expected a multiple of {SECTOR}"
        raise CorruptMetadata("VHD footer", reason=reason)
    if footer.size_rule(force=force) == "chs" and size != footer.current_size:
        warnings.append(
            f"geometry {footer.geometry} of creator {footer.creator!r} means {size} bytes, "
            f"current_size is {footer.current_size}: the geometry counts"
        )
    return size


def _fixed(footer: Footer, size: int, data_end: int, warnings: list[str]) -> VhdMetadata:
    if size > data_end:
        reason = f"size is {size} bytes, expected at most the {data_end} before the footer"
        raise CorruptMetadata("VHD footer", host_offset=data_end, reason=reason)
    if size < data_end:
        warnings.append(f"{data_end - size} bytes between the end of the disk and the footer")
    return VhdMetadata(
        footer=footer,
        dynamic_header=None,
        locators=(),
        virtual_size=size,
        cluster_size=SECTOR,
        data_end=data_end,
        warnings=tuple(warnings),
    )


def _load_header(storage: Storage, offset: int, data_end: int) -> DynamicHeader:
    """Row 48: the header lies behind the leading footer and inside the file."""
    if not FOOTER_SIZE <= offset <= data_end - HEADER_SIZE:
        reason = (
            f"data offset is {offset:#x}, expected {FOOTER_SIZE:#x} "
            f"to {max(data_end - HEADER_SIZE, 0):#x}"
        )
        raise CorruptMetadata("VHD footer", reason=reason)
    return DynamicHeader.decode(storage.pread(HEADER_SIZE, offset=offset), host_offset=offset)


def _check_table(header: DynamicHeader, size: int, data_end: int) -> None:
    """Rows 48 and 49: the table is aligned, covers the disk, and lies inside the file."""
    offset, entries = header.table_offset, header.max_table_entries
    if offset % SECTOR:
        reason = f"table offset is {offset:#x}, expected a multiple of {SECTOR}"
        raise CorruptMetadata("dynamic header", reason=reason)
    stop = offset + entries * _ENTRY_BYTES
    if stop > data_end:
        reason = f"table of {entries} entries ends at {stop:#x}, expected at most {data_end:#x}"
        raise CorruptMetadata("block allocation table", host_offset=offset, reason=reason)
    needed = ceil_div(size, header.block_size)
    if entries < needed:
        reason = (
            f"table has {entries} entries, expected at least {needed} "
            f"for {size} bytes in blocks of {header.block_size}"
        )
        raise CorruptMetadata("dynamic header", reason=reason)


def metadata_regions(
    metadata: VhdMetadata,
) -> tuple[tuple[str, int, int], ...]:
    """(name, start, stop) in host bytes of everything in the file that is no block."""
    assert metadata.dynamic_header is not None
    return tuple(_regions(metadata.footer.data_offset, metadata.dynamic_header, metadata.locators))


def _regions(
    header_offset: int, header: DynamicHeader, locators: Iterable[ParentLocator]
) -> list[tuple[str, int, int]]:
    table_stop = header.table_offset + header.max_table_entries * _ENTRY_BYTES
    regions = [
        ("leading footer", 0, FOOTER_SIZE),
        ("dynamic header", header_offset, header_offset + HEADER_SIZE),
        ("block allocation table", header.table_offset, table_stop),
    ]
    regions += [
        ("parent locator data", entry.data_offset, entry.data_offset + entry.data_length)
        for entry in locators
    ]
    return [region for region in regions if region[1] < region[2]]


def _check_disjoint(
    footer: Footer,
    header: DynamicHeader,
    locators: tuple[ParentLocator, ...],
    copies: _FooterCopies,
) -> None:
    """Rows 48 and 53: locators bounded and in the file, and no two structures share a byte."""
    for index, entry in enumerate(locators):
        stop = entry.data_offset + entry.data_length
        if entry.data_length > MAX_LOCATOR_BYTES:
            reason = f"name has {entry.data_length} bytes, expected at most {MAX_LOCATOR_BYTES}"
            raise CorruptMetadata("parent locator", index=index, reason=reason)
        if stop > copies.data_end:
            reason = f"name ends at {stop:#x}, expected at most {copies.data_end:#x}"
            raise CorruptMetadata("parent locator", index=index, reason=reason)
    reached, owner = 0, ""
    regions = _regions(footer.data_offset, header, locators)
    for name, start, stop in sorted(regions, key=lambda region: region[1:]):
        # Several locators may share one name; nothing else is shared.
        if start < reached and name != owner:
            reason = f"overlaps the {owner}, which ends at {reached:#x}"
            raise CorruptMetadata(name, host_offset=start, reason=reason)
        if stop > reached:
            reached, owner = stop, name


def _check_parent_identity(footer: Footer, header: DynamicHeader) -> None:
    """Row 53: without an identity any file would do as the parent."""
    if not header.parent_unique_id.int:
        reason = "parent unique id is nil, expected that of the parent"
        raise CorruptMetadata("dynamic header", reason=reason)
    if header.parent_unique_id == footer.unique_id:
        reason = f"parent unique id {header.parent_unique_id} is the disk's own"
        raise CorruptMetadata("dynamic header", reason=reason)


def _parent(
    storage: Storage,
    header: DynamicHeader,
    locators: tuple[ParentLocator, ...],
    data_end: int,
    warnings: list[str],
) -> Reference:
    """The candidate names: relative locators, absolute ones, then the unicode name."""
    found: list[str] = []
    for entry in locators:
        if entry.code not in PATH_CODES:
            warnings.append(f"parent locator {entry.code!r} holds no path and is not followed")
            continue
        raw = storage.pread(entry.data_length, offset=entry.data_offset)
        try:
            found += decode_locator(entry.code, raw)
        except CorruptMetadata as error:
            warnings.append(f"parent locator {entry.code!r} is not followed: {error.reason}")
    # Stable: within relative and absolute the order of the table remains.
    found.sort(key=lambda name: name.startswith("/"))
    try:
        found.append(decode_windows_path(decode_utf16(header.parent_name, big_endian=True)))
    except CorruptMetadata as error:
        warnings.append(f"the unicode name of the parent is not followed: {error.reason}")
    names = tuple(dict.fromkeys(name for name in found if name))
    if not names:
        reason = "no locator and no unicode name spells a path to the parent"
        raise CorruptMetadata("parent locators", reason=reason)
    return Reference(kind=ReferenceKind.PARENT, names=names, format="vpc")
