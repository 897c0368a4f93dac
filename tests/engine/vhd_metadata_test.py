"""Opening a VHD: every rule of rows 46-50, 53 and 54 with a file that breaks it."""

from __future__ import annotations

import contextlib
import struct
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.budget import TRUSTED, Budget
from qcowkit.engine.vhd.metadata import VhdMetadata, load_vhd_metadata
from qcowkit.errors import BudgetExceeded, QcowkitError
from qcowkit.references import Reference, ReferenceKind
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.vhd_builder import (
    DIFFERENCING,
    FIXED,
    PARENT_ID,
    UNIQUE_ID,
    VhdBuilder,
    seal_footer,
)
from qcowkit.units import GiB

LIMIT = 0xFF000000 * 512


def load(image: bytes, **options: Any) -> VhdMetadata:
    return load_vhd_metadata(MemoryStorage(image), **{"budget": TRUSTED, **options})


def refusal(image: bytes, **options: Any) -> str:
    with pytest.raises(QcowkitError) as caught:
        load(image, **options)
    return f"{type(caught.value).__name__}: {caught.value}"


def dynamic(*, size: int = 16384, **footer: int | bytes) -> VhdBuilder:
    builder = VhdBuilder(size=size).block(1, b"data")
    builder.footer.update(footer)
    return builder


def fixed(*, size: int = 4096, **footer: int | bytes) -> VhdBuilder:
    builder = VhdBuilder(size=size, disk_type=FIXED)
    builder.footer.update(footer)
    return builder


def child(*locators: tuple[bytes, bytes], **header: int | bytes) -> VhdBuilder:
    builder = VhdBuilder(size=16384, disk_type=DIFFERENCING)
    for code, raw in locators:
        builder.locator(code, raw)
    builder.header.update(header)
    return builder


def test_a_dynamic_disk_tells_its_size_block_size_and_identity() -> None:
    metadata = load(dynamic().build())
    assert (metadata.format, metadata.subformat) == ("vpc", "dynamic")
    assert (metadata.virtual_size, metadata.cluster_size, metadata.block_count) == (16384, 4096, 4)
    assert metadata.unique_id == UNIQUE_ID
    assert (metadata.parent_id, metadata.references, metadata.warnings) == (None, (), ())


def test_a_fixed_disk_has_sectors_for_clusters_and_no_header() -> None:
    metadata = load(fixed().build(b"guest"))
    assert (metadata.subformat, metadata.virtual_size, metadata.cluster_size) == (
        "fixed",
        4096,
        512,
    )
    assert metadata.dynamic_header is None
    assert (metadata.block_count, metadata.data_end) == (0, 4096)


def test_an_empty_fixed_disk_is_one_footer() -> None:
    assert load(fixed(size=0).build()).virtual_size == 0


# Row 46


@pytest.mark.parametrize("image", [b"", b"conectix", bytes(510)])
def test_a_file_below_one_footer_is_no_vhd(image: bytes) -> None:
    assert refusal(image).startswith(f"UnknownFormat: not a VHD: {len(image)} bytes are too few")


def test_a_file_without_any_cookie_is_no_vhd() -> None:
    message = "UnknownFormat: not a VHD: no footer at the start or the end"
    assert refusal(bytes(4096)) == message


def test_a_footer_with_a_wrong_checksum_is_refused() -> None:
    assert refusal(dynamic(checksum=1).build()).startswith(
        "CorruptMetadata: VHD footer at host offset 0x0: checksum is 0x00000001, expected 0xffff"
    )


def test_a_damaged_copy_at_the_start_is_not_covered_by_the_one_at_the_end() -> None:
    image = dynamic().build()
    image[64] ^= 1
    assert "VHD footer at host offset 0x0: checksum is" in refusal(image)


def test_a_fixed_disk_with_a_damaged_footer_is_refused() -> None:
    image = fixed().build()
    image[-1] = 1
    assert "VHD footer at host offset 0x1000: checksum is" in refusal(image)


def test_a_deprecated_disk_type_is_refused() -> None:
    assert refusal(dynamic(disk_type=5).build()) == (
        "UnsupportedFeature: VHD footer: disk type is 5, "
        "expected 2 (fixed), 3 (dynamic) or 4 (differencing)"
    )


def test_another_file_version_is_refused() -> None:
    assert refusal(dynamic(version=0x20000).build()) == (
        "UnsupportedFeature: VHD footer: version is 0x00020000, expected 0x00010000"
    )


def test_reserved_bytes_in_the_footer_are_a_warning() -> None:
    metadata = load(dynamic(reserved=b"\1").build())
    assert metadata.warnings == ("the reserved bytes of the footer are not zero",)


def test_a_footer_of_511_bytes_is_read() -> None:
    assert load(fixed().build()[:-1]).virtual_size == 4096


def test_a_footer_for_fixed_disks_at_the_start_is_refused() -> None:
    image = fixed(data_offset=512).encode_footer() + bytes(4096)
    assert refusal(image) == (
        "CorruptMetadata: VHD footer at host offset 0x0: "
        "a fixed disk has its footer at the end only"
    )


# Row 47


def test_a_missing_copy_at_the_start_is_recovered_from_the_end() -> None:
    image = dynamic().build()
    image[:512] = bytes(512)
    metadata = load(image)
    assert metadata.virtual_size == 16384
    assert metadata.warnings == (
        "the footer copy at the start is missing: the one at the end counts",
    )


def test_a_missing_footer_at_the_end_is_recovered_from_the_start() -> None:
    image = dynamic().build()[:-512]
    metadata = load(image)
    assert metadata.data_end == len(image)
    assert metadata.warnings == ("the footer at the end is missing: the copy at the start counts",)


def test_a_damaged_footer_at_the_end_is_a_warning() -> None:
    image = dynamic().build()
    image[-1] = 1
    (warning,) = load(image).warnings
    assert warning.startswith("the footer at the end is damaged (VHD footer at host offset 0x")
    assert warning.endswith("): the copy at the start counts")


def test_copies_that_differ_are_a_warning_naming_the_fields() -> None:
    image = dynamic().build()
    struct.pack_into(">I", image, len(image) - 512 + 24, 99)
    struct.pack_into(">Q", image, len(image) - 512 + 48, 8192)
    seal_footer(image, len(image) - 512)
    metadata = load(image)
    assert metadata.virtual_size == 16384
    assert metadata.warnings == (
        "the footer at the end differs from its copy at the start, which counts: "
        "current_size, timestamp",
    )


def test_a_guest_cannot_turn_its_fixed_disk_into_a_dynamic_one() -> None:
    forged = dynamic(unique_id=uuid.uuid4().bytes).build()
    metadata = load(fixed(size=len(forged)).build(bytes(forged)))
    assert (metadata.subformat, metadata.virtual_size) == ("fixed", len(forged))
    assert metadata.warnings == (
        "the first sector of this fixed disk holds the footer of another VHD",
    )


def test_two_types_for_one_disk_are_refused() -> None:
    inner = dynamic().build()
    assert refusal(fixed(size=len(inner)).build(bytes(inner))) == (
        "CorruptMetadata: VHD footer at host offset 0x0: disk type is 3, but 2 at the end"
    )


# Row 48


@pytest.mark.parametrize("offset", [0, 256, 2048 + 4608 - 1023, 2**64 - 1])
def test_a_header_outside_the_file_is_refused(offset: int) -> None:
    assert refusal(dynamic(data_offset=offset).build()) == (
        f"CorruptMetadata: VHD footer: data offset is {offset:#x}, expected 0x200 to 0x1600"
    )


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"cookie": b"cxsparsf"}, "CorruptMetadata: dynamic header at host offset 0x200: cookie"),
        ({"checksum": 1}, "CorruptMetadata: dynamic header at host offset 0x200: checksum is"),
        ({"version": 0x20000}, "UnsupportedFeature: dynamic header: version is 0x00020000"),
        (
            {"table_offset": 1537},
            "CorruptMetadata: dynamic header: table offset is 0x601, expected a multiple of 512",
        ),
        (
            {"table_offset": 1 << 20},
            "CorruptMetadata: block allocation table at host offset 0x100000: "
            "table of 4 entries ends at 0x100010, expected at most 0x1a00",
        ),
        (
            {"table_offset": 1024},
            "CorruptMetadata: block allocation table at host offset 0x400: "
            "overlaps the dynamic header, which ends at 0x600",
        ),
        (
            {"table_offset": 0},
            "CorruptMetadata: leading footer at host offset 0x0: "
            "overlaps the block allocation table, which ends at 0x10",
        ),
    ],
)
def test_a_broken_header_or_table_place_is_refused(
    header: dict[str, int | bytes], message: str
) -> None:
    builder = dynamic()
    builder.header.update(header)
    assert refusal(builder.build()).startswith(message)


# Row 49


def test_a_table_larger_than_the_file_is_refused() -> None:
    builder = dynamic()
    builder.header["max_table_entries"] = 0xFFFF_FFFF
    assert refusal(builder.build()) == (
        "CorruptMetadata: block allocation table at host offset 0x600: "
        "table of 4294967295 entries ends at 0x4000005fc, expected at most 0x1a00"
    )


def test_a_table_that_does_not_cover_the_disk_is_refused() -> None:
    builder = dynamic(size=16384 + 512)
    builder.header["max_table_entries"] = 4
    assert refusal(builder.build()) == (
        "CorruptMetadata: dynamic header: table has 4 entries, "
        "expected at least 5 for 16896 bytes in blocks of 4096"
    )


def test_a_table_larger_than_the_disk_needs_is_tolerated() -> None:
    metadata = load(VhdBuilder(size=16384, entries=300).build())
    assert (metadata.block_count, metadata.warnings) == (4, ())


@pytest.mark.parametrize("block_size", [0, 1, 2048, 5000, 1 << 29])
def test_a_block_size_outside_the_rules_is_refused(block_size: int) -> None:
    builder = dynamic()
    builder.header["block_size"] = block_size
    assert refusal(builder.build()) == (
        "CorruptMetadata: dynamic header at host offset 0x200: "
        f"block size is {block_size}, expected a power of two from 4 KiB to 256 MiB"
    )


# Row 50


def test_a_disk_above_2040_gib_is_refused() -> None:
    assert refusal(dynamic(current_size=LIMIT + 512).build()) == (
        f"CorruptMetadata: VHD footer: size is {LIMIT + 512} bytes, "
        f"expected at most {LIMIT} (2040 GiB)"
    )


def test_a_disk_of_2040_gib_is_opened() -> None:
    builder = VhdBuilder(size=LIMIT, block_size=256 << 20)
    assert load(builder.build()).virtual_size == LIMIT == 2040 * GiB


def test_a_size_that_is_no_number_of_sectors_is_refused() -> None:
    assert refusal(dynamic(current_size=1000).build()) == (
        "CorruptMetadata: VHD footer: size is 1000 bytes, expected a multiple of 512"
    )


def test_a_fixed_disk_larger_than_its_file_is_refused() -> None:
    assert refusal(fixed(current_size=8192).build()) == (
        "CorruptMetadata: VHD footer at host offset 0x1000: "
        "size is 8192 bytes, expected at most the 4096 before the footer"
    )


def test_space_between_a_fixed_disk_and_its_footer_is_a_warning() -> None:
    metadata = load(fixed(current_size=1024).build())
    assert metadata.warnings == ("3072 bytes between the end of the disk and the footer",)


def test_the_virtual_size_is_held_against_the_budget() -> None:
    budget = Budget(virtual_size=8192)
    assert refusal(dynamic().build(), budget=budget) == (
        "BudgetExceeded: virtual size: 16384 is above the limit of 8192"
    )


def test_the_table_is_held_against_the_budget_before_it_is_read() -> None:
    budget = Budget(metadata_bytes=31)
    with pytest.raises(BudgetExceeded, match="block allocation table: 32 is above the limit of 31"):
        load(dynamic().build(), budget=budget)


# Row 53

WINDOWS = "utf-16-le"


def test_the_parent_is_named_by_the_relative_then_the_absolute_then_the_unicode_name() -> None:
    metadata = load(
        child(
            (b"W2ku", "\\images\\parent.vhd".encode(WINDOWS)),
            (b"MacX", b"file://./mac.vhd"),
            (b"W2ru", ".\\windows.vhd".encode(WINDOWS)),
            parent_name="unicode.vhd".encode("utf-16-be"),
            parent_timestamp=77,
        ).build()
    )
    names = ("mac.vhd", "windows.vhd", "/images/parent.vhd", "unicode.vhd")
    expected = Reference(kind=ReferenceKind.PARENT, names=names, format="vpc")
    assert metadata.references == (expected,)
    assert (metadata.parent_id, metadata.parent_timestamp) == (PARENT_ID, 77)
    assert metadata.subformat == "differencing"


def test_a_name_is_tried_once() -> None:
    metadata = load(child((b"W2ru", ".\\parent.vhd".encode(WINDOWS))).build())
    assert metadata.references[0].names == ("parent.vhd",)


def test_a_nil_parent_id_is_refused() -> None:
    assert refusal(child(parent_unique_id=bytes(16)).build()) == (
        "CorruptMetadata: dynamic header: parent unique id is nil, expected that of the parent"
    )


def test_a_disk_that_is_its_own_parent_is_refused() -> None:
    assert refusal(child(parent_unique_id=UNIQUE_ID.bytes).build()) == (
        f"CorruptMetadata: dynamic header: parent unique id {UNIQUE_ID} is the disk's own"
    )


def test_a_child_without_any_name_is_refused() -> None:
    assert refusal(child((b"????", b"alias"), parent_name=b"").build()) == (
        "CorruptMetadata: parent locators: "
        "no locator and no unicode name spells a path to the parent"
    )


def test_a_locator_without_a_path_is_a_warning() -> None:
    metadata = load(child((b"????", b"alias"), (b"MacX", b"http://host/p.vhd")).build())
    assert metadata.references[0].names == ("parent.vhd",)
    assert metadata.warnings == (
        "parent locator b'????' holds no path and is not followed",
        "parent locator b'MacX' is not followed: "
        "URL b'http://host/p.vhd' does not begin with file://",
    )


def test_a_unicode_name_that_is_no_text_is_a_warning() -> None:
    builder = child((b"MacX", b"file://./p.vhd"), parent_name=b"\xd8\x00\x00a")
    metadata = load(builder.build())
    assert metadata.references[0].names == ("p.vhd",)
    assert metadata.warnings == (
        "the unicode name of the parent is not followed: the name is not UTF-16",
    )


def locator(*, length: int = 16, offset: int = 1536, space: int = 1) -> bytes:
    return struct.pack(">4sIIIQ", b"W2ru", space, length, 0, offset)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            locator(length=65537),
            "parent locator, entry 0: name has 65537 bytes, expected at most 65536",
        ),
        (
            locator(offset=2**64 - 1),
            "parent locator, entry 0: name ends at 0x1000000000000000f, expected at most 0x800",
        ),
        (
            locator(offset=1536),
            "parent locator data at host offset 0x600: "
            "overlaps the block allocation table, which ends at 0x610",
        ),
        (
            locator(offset=100),
            "parent locator data at host offset 0x64: "
            "overlaps the leading footer, which ends at 0x200",
        ),
    ],
)
def test_a_locator_outside_its_bounds_is_refused(entry: bytes, message: str) -> None:
    assert refusal(child(locators=entry).build()) == f"CorruptMetadata: {message}"


def test_an_overlap_behind_nested_locators_is_found() -> None:
    entries = locator(length=900, offset=400) + locator(length=8, offset=420)
    assert "overlaps" in refusal(child(locators=entries).build())


def test_locators_may_share_one_name() -> None:
    name = ".\\parent.vhd".encode(WINDOWS)
    entries = locator(length=len(name)) + locator(length=len(name), space=512)
    metadata = load(child((b"W2ru", name), locators=entries).build())
    assert metadata.references[0].names == ("parent.vhd",)
    assert len(metadata.locators) == 2


def test_the_locators_of_a_dynamic_disk_are_ignored() -> None:
    builder = dynamic()
    builder.header["locators"] = locator(offset=2**63)
    assert load(builder.build()).locators == ()


# Row 54


def test_a_saved_state_is_a_warning() -> None:
    assert load(dynamic(saved_state=1).build()).warnings == (
        "the disk is in a saved state: a suspended machine depends on it",
    )


def geometry() -> dict[str, int | bytes]:
    return {"cylinders": 1, "heads": 4, "sectors_per_track": 7}


def test_a_geometry_that_counts_and_disagrees_is_a_warning() -> None:
    metadata = load(dynamic(creator=b"vpc ", **geometry()).build())
    assert metadata.virtual_size == 28 * 512
    assert metadata.warnings == (
        "geometry 1/4/7 of creator b'vpc ' means 14336 bytes, "
        "current_size is 16384: the geometry counts",
    )


def test_a_geometry_that_does_not_count_may_disagree() -> None:
    metadata = load(dynamic(creator=b"win ", **geometry()).build())
    assert (metadata.virtual_size, metadata.warnings) == (16384, ())


def test_the_size_rule_can_be_forced() -> None:
    image = dynamic(creator=b"vpc ", **geometry()).build()
    assert load(image, force_size_calc="current_size").virtual_size == 16384


def test_a_geometry_larger_than_the_table_covers_is_refused() -> None:
    image = dynamic(creator=b"qemu", cylinders=100, heads=4, sectors_per_track=17).build()
    assert "expected at least 850" in refusal(image)


@given(st.data())
def test_no_change_of_one_field_escapes_the_error_hierarchy(data: st.DataObject) -> None:
    image = child((b"W2ru", ".\\parent.vhd".encode(WINDOWS))).block(2, b"x").build()
    offset = data.draw(st.integers(0, 2047))
    value = data.draw(st.binary(min_size=1, max_size=8))
    image[offset : offset + len(value)] = value
    seal_footer(image)
    with contextlib.suppress(QcowkitError):
        load(image)


class ClaimedTable(MemoryStorage):
    """A dynamic VHD whose table is one hole: the size is claimed, no memory is taken."""

    def __init__(self, builder: VhdBuilder) -> None:
        super().__init__(builder.encode_footer() + builder.encode_header())
        self._claimed = builder.table_offset + 4 * builder.entries

    def size(self) -> int:
        return self._claimed


def test_a_table_of_gigabytes_is_refused_by_the_budget() -> None:
    storage = ClaimedTable(VhdBuilder(size=LIMIT))
    message = f"block allocation table: {LIMIT // 4096 * 8} is above the limit of {256 << 20}"
    with pytest.raises(BudgetExceeded, match=message):
        load_vhd_metadata(storage, budget=TRUSTED)
