"""Other sizes for VHDs with blocks."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qcowkit.codecs.vhd.chs import chs_from_sectors
from qcowkit.engine.vhd.layout import MAX_SIZE
from qcowkit.engine.vhd.resize import plan_table, resize_blocks
from qcowkit.engine.vhd.writer import BlockWriter
from qcowkit.errors import (
    BudgetExceeded,
    CorruptMetadata,
    RequestError,
    StorageError,
    UnsupportedFeature,
)
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.device import MemoryDevice
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.recording import RecordingStorage
from qcowkit.testing.vhd_builder import DIFFERENCING, DYNAMIC, VhdBuilder
from qcowkit.units import MiB
from tests.vhd_disks import (
    BLOCK,
    FIRST_BLOCK,
    SPAN,
    audit,
    build,
    build_child,
    build_with_a_name_behind_the_table,
    changes,
    content,
    load,
    open_writer,
    per_byte,
    put,
)


def resize(writer: BlockWriter, size: int) -> None:
    resize_blocks(writer, size, shrink=size < writer.blocks.size)


def filled(blocks: int = 4, **options: Any) -> tuple[MemoryStorage, bytes]:
    """A dynamic disk that has all of its blocks, in the order of the disk."""
    disk = per_byte(b"abcdefghijk", blocks * BLOCK)
    builder = VhdBuilder(size=len(disk), **options)
    for index in range(blocks):
        builder.block(index, disk[index * BLOCK : (index + 1) * BLOCK])
    return MemoryStorage(builder.build()), disk


# Growing


@pytest.mark.parametrize("blocks", [5, 128, 129, 1000])
def test_a_disk_grows_by_zeros_and_keeps_its_content(blocks: int) -> None:
    """Up to 128 entries fit into the table's sector; more need the place of the first blocks."""
    storage, disk = filled()
    resize(open_writer(storage), blocks * BLOCK)
    assert content(storage) == disk.ljust(blocks * BLOCK, b"\0")
    assert load(storage).footer.original_size == 4 * BLOCK
    assert load(storage).dynamic_header.max_table_entries == blocks  # type: ignore[union-attr]
    assert audit(storage) == []


def test_a_grown_disk_can_be_written_up_to_its_end() -> None:
    storage, disk = filled()
    writer = open_writer(storage)
    resize(writer, 300 * BLOCK)
    put(writer, b"end", offset=300 * BLOCK - 3)
    writer.flush()
    assert content(storage) == disk.ljust(300 * BLOCK - 3, b"\0") + b"end"
    assert audit(storage) == []


def test_an_empty_disk_whose_footer_is_in_the_way_grows() -> None:
    storage = MemoryStorage(build())
    resize(open_writer(storage), 1000 * BLOCK)
    assert content(storage) == bytes(1000 * BLOCK)
    assert audit(storage) == []


def test_the_geometry_is_that_of_the_new_size_where_one_fits() -> None:
    exact = chs_from_sectors(68000).sectors * 512
    storage = MemoryStorage(build())
    resize(open_writer(storage), exact)
    assert load(storage).footer.geometry == chs_from_sectors(68000)
    resize(open_writer(storage), exact + 512)
    assert str(load(storage).footer.geometry) == "65535/16/255"
    assert load(storage).virtual_size == exact + 512


def test_entries_that_a_larger_table_left_behind_do_not_come_into_view() -> None:
    raw = VhdBuilder(size=BLOCK, entries=8).block(0, b"a" * BLOCK).build()
    raw[1536 + 4 : 1536 + 8] = (77).to_bytes(4, "big")
    storage = MemoryStorage(raw)
    resize(open_writer(storage), 5 * BLOCK)
    assert content(storage) == b"a" * BLOCK + bytes(4 * BLOCK)
    assert audit(storage) == []


def test_what_lay_in_the_last_block_beyond_the_end_does_not_come_into_view() -> None:
    builder = VhdBuilder(size=BLOCK + 512).block(1, b"x" * BLOCK)
    storage = MemoryStorage(builder.build())
    resize(open_writer(storage), 2 * BLOCK)
    assert content(storage) == bytes(BLOCK) + b"x" * 512 + bytes(BLOCK - 512)


def test_what_is_made_zero_is_so_before_the_size_shows_it() -> None:
    builder = VhdBuilder(size=BLOCK + 512).block(1, b"x" * BLOCK)
    storage = RecordingStorage(MemoryStorage(builder.build()))
    writer = open_writer(storage)
    storage.calls.clear()
    resize(writer, 2 * BLOCK)
    assert changes(storage.calls)[:3] == [
        ("zero", FIRST_BLOCK + 512 + 512, BLOCK - 512),
        ("flush", 0, 0),
        ("pwrite", 0, 512),
    ]


def test_a_table_that_nobody_would_open_again_is_refused() -> None:
    storage = MemoryStorage(build())
    message = "block allocation table: 536870912 is above the limit of 268435456"
    with pytest.raises(BudgetExceeded, match=message):
        resize(open_writer(storage), (1 << 26) * BLOCK)
    assert storage.to_bytes() == build()


def test_a_larger_parent_does_not_show_in_what_is_added() -> None:
    parent = per_byte(b"parent..", 6 * BLOCK)
    storage = MemoryStorage(build(1, disk_type=DIFFERENCING))
    resize(open_writer(storage, parent), 8 * BLOCK)
    assert content(storage, parent) == parent[:BLOCK] + bytes(7 * BLOCK)
    assert audit(storage) == []


def test_a_parent_that_is_not_open_may_be_larger() -> None:
    parent = per_byte(b"parent..", 3 * BLOCK)
    storage = MemoryStorage(build(1, disk_type=DIFFERENCING))
    resize(open_writer(storage), 2 * BLOCK)
    assert content(storage, parent) == parent[:BLOCK] + bytes(BLOCK)


def test_the_size_changes_last() -> None:
    storage = RecordingStorage(filled()[0])
    writer = open_writer(storage)
    storage.calls.clear()
    resize(writer, 200 * BLOCK)
    end = FIRST_BLOCK + 4 * SPAN
    assert changes(storage.calls) == [
        # The first block goes behind the last one,
        ("pwrite", end + SPAN, 512),
        ("flush", 0, 0),
        ("pwrite", end, SPAN),
        ("flush", 0, 0),
        ("pwrite", 1536, 4),
        ("flush", 0, 0),
        # its place becomes a part of the table,
        ("pwrite", 1536 + 16, 1024 - 16),
        ("flush", 0, 0),
        ("pwrite", 512, 512),
        ("flush", 0, 0),
        # and only then one footer and the other.
        ("pwrite", 0, 512),
        ("flush", 0, 0),
        ("pwrite", end + SPAN, 512),
        ("flush", 0, 0),
    ]


def test_readers_are_told_before_the_place_of_a_block_is_reused() -> None:
    storage = filled()[0]
    writer = open_writer(storage)
    resize(writer, 100 * BLOCK)
    assert writer.releases == 0
    resize(writer, 200 * BLOCK)
    assert writer.releases == 1
    resize(writer, BLOCK)
    assert writer.releases == 2


def test_a_table_with_a_name_behind_it_moves_behind_the_name() -> None:
    storage = MemoryStorage(build_with_a_name_behind_the_table(4))
    writer = open_writer(storage, b"")
    put(writer, b"x" * BLOCK, offset=BLOCK)
    resize(writer, 300 * BLOCK)
    header = load(storage).dynamic_header
    assert header is not None
    assert (header.table_offset, header.max_table_entries) == (2560, 300)
    assert load(storage).references[0].names[0] == "parent.vhd"
    put(writer, b"y" * 3, offset=299 * BLOCK)
    writer.flush()
    expected = (bytes(BLOCK) + b"x" * BLOCK).ljust(299 * BLOCK, b"\0") + b"yyy"
    assert content(storage, b"") == expected.ljust(300 * BLOCK, b"\0")
    assert audit(storage) == []


def test_the_plan_of_a_table_that_fits_is_the_table() -> None:
    metadata = load(MemoryStorage(build(4, entries=100)))
    assert plan_table(metadata, entries=100).end == 2048
    assert plan_table(metadata, entries=3).entries == 100


def test_a_block_that_cannot_be_read_whole_is_not_moved() -> None:
    storage, disk = filled()
    # A look for a batmap, both footers and the header come first.
    faulty, writer = open_faulty(storage, Fault(operation="pread", call=5, short=1))
    message = "block at host offset 0x800: the file ends after 4607 of 4608 bytes"
    with pytest.raises(CorruptMetadata, match=message):
        resize(writer, 300 * BLOCK)
    assert faulty.fired
    writer.flush()
    assert content(storage) == disk


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (1000, "size 1000 is not a multiple of 512, which a VHD must be"),
        (-512, "size -512 is not a multiple of 512, which a VHD must be"),
        (MAX_SIZE + 512, "is above the largest VHD, 2190433320960 bytes (2040 GiB)"),
        (MAX_SIZE, "block size 4096 is too small for a VHD of 2190433320960 bytes"),
        (512, "size 512 is below the disk's 16384, and shrinking was not asked for"),
    ],
)
def test_impossible_sizes_are_refused_and_change_nothing(size: int, message: str) -> None:
    storage, _ = filled()
    before = storage.to_bytes()
    with pytest.raises(RequestError, match=re.escape(message)):
        resize_blocks(open_writer(storage), size, shrink=False)
    assert storage.to_bytes() == before


def test_a_disk_with_large_blocks_grows_to_2040_gib() -> None:
    storage = MemoryStorage(VhdBuilder(size=2 * MiB, block_size=2 * MiB).build())
    writer = open_writer(storage)
    put(writer, b"first", offset=0)
    resize(writer, MAX_SIZE)
    put(writer, b"last", offset=MAX_SIZE - 4)
    writer.flush()
    writer = open_writer(storage)
    assert np.flatnonzero(writer.blocks.sectors != -1).tolist() == [0, 1044479]
    assert storage.pread(5, offset=writer.blocks.data_offset(0)) == b"first"
    assert audit(storage) == []


# Shrinking


def test_a_disk_shrinks_and_the_end_of_its_file_goes() -> None:
    storage, disk = filled()
    resize(open_writer(storage), 2 * BLOCK)
    assert content(storage) == disk[: 2 * BLOCK]
    assert storage.size() == FIRST_BLOCK + 2 * SPAN + 512
    assert load(storage).dynamic_header.max_table_entries == 2  # type: ignore[union-attr]
    assert audit(storage) == []


def test_a_block_of_the_rest_that_lies_last_keeps_the_file_long() -> None:
    storage = MemoryStorage(build())
    writer = open_writer(storage)
    put(writer, b"lost", offset=3 * BLOCK)
    put(writer, b"kept", offset=0)
    resize(writer, BLOCK)
    assert storage.size() == FIRST_BLOCK + 2 * SPAN + 512
    assert b"lost" not in storage.to_bytes()
    assert content(storage) == b"kept".ljust(BLOCK, b"\0")


def test_a_disk_that_shrank_and_grows_again_shows_zeros() -> None:
    storage, disk = filled()
    writer = open_writer(storage)
    resize(writer, BLOCK + 1024)
    resize(writer, 4 * BLOCK)
    assert content(storage) == disk[: BLOCK + 1024].ljust(4 * BLOCK, b"\0")
    assert audit(storage) == []


def test_a_child_that_shrank_and_grows_again_hides_its_parent() -> None:
    parent = per_byte(b"parent..", 4 * BLOCK)
    storage = MemoryStorage(build_child())
    writer = open_writer(storage, parent)
    put(writer, b"x" * 700, offset=BLOCK + 600)
    resize(writer, BLOCK + 1024)
    resize(writer, 4 * BLOCK)
    expected = parent[: BLOCK + 600] + b"x" * 424
    assert content(storage, parent) == expected.ljust(4 * BLOCK, b"\0")


def test_the_size_shrinks_first_and_the_file_last() -> None:
    storage = RecordingStorage(filled()[0])
    writer = open_writer(storage)
    storage.calls.clear()
    resize(writer, 3 * BLOCK)
    end = FIRST_BLOCK + 3 * SPAN
    assert changes(storage.calls) == [
        ("pwrite", 0, 512),
        ("flush", 0, 0),
        ("pwrite", end + SPAN, 512),
        ("flush", 0, 0),
        ("pwrite", 1536 + 12, 4),
        ("pwrite", 512, 512),
        ("pwrite", end, 512),
        ("flush", 0, 0),
        ("truncate", 0, end + 512),
        ("flush", 0, 0),
    ]


def test_a_disk_may_shrink_to_nothing() -> None:
    storage, _ = filled()
    writer = open_writer(storage)
    resize(writer, 0)
    assert content(storage) == b""
    assert storage.size() == 1536 + 512
    resize(writer, BLOCK)
    assert content(storage) == bytes(BLOCK)
    assert audit(storage) == []


def test_the_present_size_changes_nothing() -> None:
    storage, _ = filled()
    before = storage.to_bytes()
    resize(open_writer(storage), 4 * BLOCK)
    assert storage.to_bytes() == before


def test_a_device_gives_blocks_that_went_to_others() -> None:
    device = MemoryDevice(build(), size=FIRST_BLOCK + 2 * SPAN + 512)
    writer = open_writer(device)
    put(writer, b"a" * BLOCK, offset=0)
    put(writer, b"b" * BLOCK, offset=BLOCK)
    resize(writer, BLOCK)
    resize(writer, 2 * BLOCK)
    put(writer, b"c", offset=BLOCK)
    writer.flush()
    assert content(device) == b"a" * BLOCK + b"c" + bytes(BLOCK - 1)
    assert audit(device) == []


# What is in the way


def test_a_batmap_behind_the_table_is_not_written_over() -> None:
    raw = bytearray(build())
    raw[-512:-512] = b"tdbatmap".ljust(512, b"\0")
    for size in (BLOCK, 300 * BLOCK):
        storage = MemoryStorage(raw)
        message = "batmap of XenServer: lies at 0x800, right behind the table"
        with pytest.raises(UnsupportedFeature, match=message):
            resize(open_writer(storage), size)
        assert storage.to_bytes() == raw


def test_a_header_that_is_not_on_a_sector_is_not_rewritten() -> None:
    builder = VhdBuilder(size=4 * BLOCK)
    builder.footer["data_offset"] = 520
    builder.header["table_offset"] = 2048
    raw = bytearray(builder.encode_footer() + bytes(8) + builder.encode_header())
    raw = raw.ljust(2048, b"\0") + b"\xff" * 512 + builder.encode_footer()
    message = "dynamic header: lies at 0x208, not on a sector: it cannot be changed at one stroke"
    with pytest.raises(UnsupportedFeature, match=message):
        resize(open_writer(MemoryStorage(raw)), 5 * BLOCK)


# Errors


def open_faulty(
    storage: MemoryStorage, fault: Fault, below: bytes | None = None
) -> tuple[FaultyStorage, BlockWriter]:
    """A writer whose calls to the storage are counted once it is open."""
    counter = FaultyStorage(MemoryStorage(storage.to_bytes()))
    open_writer(counter)
    before = counter.calls[fault.operation]
    faulty = FaultyStorage(storage, replace(fault, call=before + fault.call))
    return faulty, open_writer(faulty, below)


@pytest.mark.parametrize("operation", ["pwrite", "truncate", "zero", "discard", "pread"])
@pytest.mark.parametrize("size", [2 * BLOCK + 512, 300 * BLOCK])
@pytest.mark.parametrize("child", [False, True])
def test_a_resize_that_failed_can_be_tried_again(operation: str, size: int, child: bool) -> None:
    """Whichever call it was, and to whichever size the next one goes."""
    parent = per_byte(b"parent..", 6 * BLOCK) if child else None
    for call in itertools.count(1):
        storage, disk = filled(disk_type=DIFFERENCING if child else DYNAMIC)
        faulty, writer = open_faulty(storage, Fault(operation=operation, call=call), parent)
        try:
            resize(writer, size)
        except StorageError:
            now = writer.metadata.virtual_size
            assert now in (4 * BLOCK, size)
            disk = disk[:now].ljust(now, b"\0")
        else:
            assert not faulty.fired
            break
        put(writer, b"!", offset=0)
        other = 3 * BLOCK if call % 2 else size
        resize(writer, other)
        writer.flush()
        assert content(storage, parent) == (b"!" + disk[1:other]).ljust(other, b"\0")
        assert audit(storage) == []
