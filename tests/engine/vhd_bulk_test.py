"""Writing whole VHDs: vhd.md 4 to 6."""

from __future__ import annotations

import re
import uuid
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.budget import TRUSTED
from qcowkit.codecs.vhd.bat import encode_bitmap
from qcowkit.engine.vhd.bulk import VhdBulkWriter
from qcowkit.engine.vhd.layout import MAX_SIZE, ParentLink, plan_disk_size, plan_layout
from qcowkit.engine.vhd.mapping import BlockMap
from qcowkit.engine.vhd.metadata import VhdMetadata, load_vhd_metadata
from qcowkit.errors import RequestError
from qcowkit.extents.table import Flag
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.vhd_builder import PARENT_ID, UNIQUE_ID
from qcowkit.units import GiB, KiB, MiB, TiB

BLOCK = 4 * KiB
PARENT = ParentLink(
    relative="base/parent.vhd",
    absolute="/images/base/parent.vhd",
    unique_id=PARENT_ID,
    timestamp=5,
)


def write(*blocks: int, **options: Any) -> tuple[MemoryStorage, VhdBulkWriter]:
    """A VHD whose given blocks are filled with their own number."""
    storage = MemoryStorage()
    options = {"size": 16 * BLOCK, "block_size": BLOCK, "unique_id": UNIQUE_ID, **options}
    writer = VhdBulkWriter(storage, timestamp=7, **options)
    for block in blocks:
        storage.pwrite([bytes([block]) * writer.unit], offset=writer.place(block))
    writer.finish()
    return storage, writer


def load(storage: MemoryStorage) -> VhdMetadata:
    return load_vhd_metadata(storage, budget=TRUSTED)


def content(storage: MemoryStorage) -> bytes:
    metadata = load(storage)
    disk = bytearray(metadata.virtual_size)
    for row in BlockMap.load(metadata, storage).extents(start=0, length=metadata.virtual_size):
        if row.flags & Flag.DATA:
            part = storage.pread(row.length, offset=row.host)
            disk[row.start : row.start + row.length] = part
    return bytes(disk)


@given(st.sets(st.integers(0, 15)), st.integers(1, 16 * BLOCK // 512))
def test_what_was_written_is_read(blocks: set[int], sectors: int) -> None:
    size = sectors * 512
    placed = sorted(block for block in blocks if block * BLOCK < size)
    storage, writer = write(*placed, size=size)
    expected = b"".join(bytes([n if n in placed else 0]) * BLOCK for n in range(16))
    assert content(storage) == expected[:size]
    assert storage.size() == writer.layout.file_size(len(placed))
    assert load(storage).warnings == ()


def test_blocks_lie_in_the_order_in_which_they_were_placed_without_gaps() -> None:
    writer = VhdBulkWriter(MemoryStorage(), size=16 * BLOCK, block_size=BLOCK)
    assert [writer.place(index) for index in (0, 3, 9)] == [2560, 2560 + 4608, 2560 + 2 * 4608]
    assert writer.blocks == 3


def test_the_same_blocks_identity_and_time_give_the_same_bytes() -> None:
    assert write(1, 5)[0].to_bytes() == write(1, 5)[0].to_bytes()


def test_every_new_disk_has_an_identity_of_its_own() -> None:
    first, second = (write(unique_id=None)[0] for _ in range(2))
    assert load(first).unique_id != load(second).unique_id


def test_the_two_footers_are_equal_and_carry_what_was_given() -> None:
    raw = write(2)[0].to_bytes()
    assert raw[:512] == raw[-512:]
    footer = load(MemoryStorage(raw)).footer
    assert (footer.unique_id, footer.timestamp, footer.creator) == (UNIQUE_ID, 7, b"qkit")
    assert footer.original_size == footer.current_size == 16 * BLOCK


def test_bitmaps_are_all_ones_so_that_readers_who_ignore_them_agree() -> None:
    raw = write(2, size=16 * MiB, block_size=2 * MiB)[0].to_bytes()
    assert raw[2048 : 2048 + 512] == b"\xff" * 512


def test_an_empty_disk_is_table_and_headers_alone() -> None:
    storage, _ = write(size=1 * GiB, block_size=2 * MiB)
    assert storage.size() == 1536 + 2048 + 512
    assert content_is_unused(storage)


def content_is_unused(storage: MemoryStorage) -> bool:
    metadata = load(storage)
    return bool((BlockMap.load(metadata, storage).sectors == -1).all())


def test_a_disk_of_size_zero_can_be_written_and_opened() -> None:
    storage, _ = write(size=0)
    assert load(storage).virtual_size == 0


def test_a_fixed_disk_is_its_content_and_a_footer() -> None:
    storage = MemoryStorage()
    writer = VhdBulkWriter(storage, size=3 * BLOCK + 512, subformat="fixed", block_size=BLOCK)
    assert [writer.place(index) for index in range(4)] == [0, BLOCK, 2 * BLOCK, 3 * BLOCK]
    storage.pwrite([b"boot"], offset=writer.place(0))
    writer.finish()
    assert storage.size() == 3 * BLOCK + 1024
    metadata = load(storage)
    assert (metadata.subformat, metadata.virtual_size) == ("fixed", 3 * BLOCK + 512)
    assert storage.pread(4, offset=0) == b"boot"


def test_a_child_names_its_parent_in_every_way() -> None:
    storage, _ = write(1, parent=PARENT)
    metadata = load(storage)
    assert metadata.subformat == "differencing"
    assert (metadata.parent_id, metadata.parent_timestamp) == (PARENT_ID, 5)
    assert [entry.code for entry in metadata.locators] == [b"W2ru", b"W2ku", b"MacX"]
    assert metadata.references[0].names == ("base/parent.vhd", "/images/base/parent.vhd")
    assert metadata.warnings == ()


def test_the_names_in_a_child_are_spelled_as_their_readers_expect() -> None:
    raw = write(parent=PARENT)[0].to_bytes()
    assert raw[1536:].startswith(".\\base\\parent.vhd".encode("utf-16-le"))
    assert raw[2048:].startswith("\\images\\base\\parent.vhd".encode("utf-16-le"))
    assert raw[2560:].startswith(b"file://./base/parent.vhd\0")
    assert raw[512 + 64 :].startswith("base/parent.vhd".encode("utf-16-be"))


def test_a_name_too_long_for_the_unicode_field_is_cut_to_its_last_component() -> None:
    link = ParentLink(relative="d" * 250 + "/parent.vhd", absolute="/p.vhd", unique_id=PARENT_ID)
    storage, _ = write(parent=link)
    assert load(storage).references[0].names == (link.relative, "/p.vhd", "parent.vhd")


def test_a_block_of_a_child_may_have_a_precise_bitmap() -> None:
    storage = MemoryStorage()
    writer = VhdBulkWriter(storage, size=BLOCK, block_size=BLOCK, parent=PARENT)
    present = np.array([False, True, True, False, False, False, False, False])
    writer.place(0, bitmap=encode_bitmap(present))
    writer.finish()
    table = BlockMap.load(load(storage), storage).extents(start=0, length=BLOCK)
    assert [(row.length, bool(row.flags & Flag.PRESENT)) for row in table] == [
        (512, False),
        (1024, True),
        (2560, False),
    ]


def test_a_table_longer_than_one_window_is_written_whole() -> None:
    size, last = 2 * GiB, 2 * GiB // BLOCK - 1
    storage, writer = write(0, size=size)
    assert writer.layout.table_entries == last + 1 > 1 << 18
    storage = MemoryStorage()
    writer = VhdBulkWriter(storage, size=size, block_size=BLOCK)
    offsets = {index: writer.place(index) for index in (1, (1 << 18) - 1, 1 << 18, last)}
    writer.finish()
    sectors = BlockMap.load(load(storage), storage).sectors
    used = np.flatnonzero(sectors != -1).tolist()
    assert {index: int(sectors[index]) * 512 + 512 for index in used} == offsets


def test_an_exact_geometry_is_written_and_otherwise_the_largest() -> None:
    exact, _ = write(size=65536 * 512, block_size=2 * MiB, force_size=False)
    assert (load(exact).virtual_size, str(load(exact).footer.geometry)) == (33562624, "964/4/17")
    odd, _ = write(size=65536 * 512, block_size=2 * MiB)
    assert (load(odd).virtual_size, str(load(odd).footer.geometry)) == (33554432, "65535/16/255")


@pytest.mark.parametrize(
    ("size", "force_size", "planned"),
    [(1, True, 512), (512, True, 512), (33554432, True, 33554432), (33554432, False, 33562624)],
)
def test_the_size_grows_to_sectors_and_only_on_request_to_cylinders(
    size: int, force_size: bool, planned: int
) -> None:
    assert plan_disk_size(size, force_size=force_size) == planned


def test_a_disk_of_2040_gib_fits_and_a_sector_more_does_not() -> None:
    assert 2040 * GiB == MAX_SIZE
    layout = plan_layout(MAX_SIZE)
    assert layout.file_size(layout.table_entries) < 2 * TiB
    message = f"size {MAX_SIZE + 512} is above the largest VHD, {MAX_SIZE} bytes (2040 GiB)"
    with pytest.raises(RequestError, match=re.escape(message)):
        VhdBulkWriter(MemoryStorage(), size=MAX_SIZE + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 1000}, "size 1000 is not a multiple of 512"),
        ({"size": -512}, "size -512 is not a multiple of 512"),
        ({"size": 512, "block_size": 3072}, "block size 3072 is not a power of two from 4 KiB"),
        ({"size": 512, "block_size": 1 << 29}, "block size 536870912 is not a power of two"),
        ({"size": MAX_SIZE, "block_size": BLOCK}, "block size 4096 is too small for a VHD of"),
        (
            {"size": 512, "subformat": "fixed", "parent": PARENT},
            "a fixed VHD cannot have a parent",
        ),
    ],
)
def test_what_no_vhd_can_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        plan_layout(**options)


@pytest.mark.parametrize(
    ("relative", "message"),
    [
        ("a\\b.vhd", "parent name 'a\\\\b.vhd': a VHD cannot hold backslashes and control"),
        ("a\nb.vhd", "parent name 'a\\nb.vhd': a VHD cannot hold backslashes and control"),
        ("\udcff.vhd", "parent name '/p.vhd' is not UTF-8"),
        ("d/" * 20000, "parent name: 80004 bytes, expected at most 65536"),
        ("x" * 256, f"parent name '{'x' * 256}' is too long: its last component fills 512 bytes"),
    ],
)
def test_a_parent_name_that_cannot_be_written_is_refused_first(relative: str, message: str) -> None:
    link = ParentLink(relative=relative, absolute="/p.vhd", unique_id=uuid.uuid4())
    with pytest.raises(RequestError, match=re.escape(message)):
        plan_layout(512, parent=link)
