"""Guest writes into VHDs with blocks: places, bits, and the order of what is written."""

from __future__ import annotations

import errno
import re
from typing import Any

import numpy as np
import pytest

from qcowkit.engine.vhd import writer as writer_module
from qcowkit.errors import CorruptMetadata, RequestError, StorageError, UnsupportedFeature
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.recording import RecordingStorage
from qcowkit.testing.vhd_builder import DIFFERENCING, VhdBuilder
from tests.vhd_disks import (
    BLOCK,
    FIRST_BLOCK,
    SPAN,
    TABLE_AT,
    audit,
    build,
    build_child,
    changes,
    content,
    open_writer,
    per_byte,
    put,
)

PARENT = per_byte(b"parent..", 4 * BLOCK)


def recorded(raw: bytes, below: bytes | None = None) -> tuple[RecordingStorage, Any]:
    """A writer whose first look at the file is over."""
    storage = RecordingStorage(MemoryStorage(raw))
    writer = open_writer(storage, below)
    storage.calls.clear()
    return storage, writer


def test_a_new_block_goes_behind_a_footer_that_is_durable() -> None:
    storage, writer = recorded(build())
    put(writer, b"x" * 512, offset=BLOCK)
    assert changes(storage.calls) == [
        ("pwrite", FIRST_BLOCK + SPAN, 512),
        ("flush", 0, 0),
        ("pwrite", FIRST_BLOCK, 1024),
    ]


def test_the_table_is_written_between_two_flushes() -> None:
    storage, writer = recorded(build())
    put(writer, b"x" * 512, offset=BLOCK)
    storage.calls.clear()
    writer.flush()
    assert changes(storage.calls) == [("flush", 0, 0), ("pwrite", TABLE_AT + 4, 4), ("flush", 0, 0)]


def test_before_a_flush_the_table_of_the_file_knows_nothing() -> None:
    storage = MemoryStorage(build())
    put(open_writer(storage), b"x" * BLOCK, offset=0)
    assert content(storage) == bytes(4 * BLOCK)
    assert audit(storage) == []


def test_the_blocks_of_one_request_share_a_footer_a_flush_and_a_write() -> None:
    storage, writer = recorded(build())
    put(writer, b"x" * (2 * BLOCK + 512), offset=BLOCK)
    assert changes(storage.calls) == [
        ("pwrite", FIRST_BLOCK + 3 * SPAN, 512),
        ("flush", 0, 0),
        ("pwrite", FIRST_BLOCK, 2 * SPAN + 512 + 512),
    ]


def test_entries_of_several_blocks_are_one_write() -> None:
    storage, writer = recorded(build())
    put(writer, b"x" * 2 * BLOCK, offset=BLOCK)
    writer.flush()
    assert [call.length for call in storage.of("pwrite")][-1] == 8


def test_a_block_that_is_there_is_written_in_place() -> None:
    storage, writer = recorded(bytes(VhdBuilder(size=2 * BLOCK).block(1, b"old").build()))
    put(writer, b"new", offset=BLOCK + 700)
    put(writer, b"new", offset=BLOCK + 800)
    at = FIRST_BLOCK + 512
    assert changes(storage.calls) == [("pwrite", at + 700, 3), ("pwrite", at + 800, 3)]


def test_a_flush_without_changes_does_not_trouble_the_host() -> None:
    storage, writer = recorded(build())
    writer.flush()
    assert changes(storage.calls) == []


def test_a_write_of_nothing_changes_nothing() -> None:
    storage, writer = recorded(build())
    put(writer, b"", offset=4 * BLOCK)
    writer.write_zeroes(offset=4 * BLOCK, length=0)
    writer.discard(offset=4 * BLOCK, length=0)
    assert changes(storage.calls) == []


def test_where_the_footer_lay_the_new_block_reads_as_zeros() -> None:
    storage = MemoryStorage(build())
    writer = open_writer(storage)
    put(writer, b"x", offset=BLOCK - 1)
    writer.flush()
    assert content(storage) == bytes(BLOCK - 1) + b"x" + bytes(3 * BLOCK)
    # Of eight sectors the bitmap has one byte; the rest of its sector is padding.
    assert storage.pread(512, offset=FIRST_BLOCK) == b"\xff" + bytes(511)
    assert audit(storage) == []


def test_what_was_flushed_is_read_by_another_process() -> None:
    storage = MemoryStorage(build())
    writer = open_writer(storage)
    put(writer, b"abc" * 3000, offset=3000)
    writer.flush()
    assert content(storage) == (bytes(3000) + b"abc" * 3000).ljust(4 * BLOCK, b"\0")
    assert audit(storage) == []


def test_too_many_staged_changes_are_committed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_STAGED_BYTES", 100)
    storage = MemoryStorage(build())
    writer = open_writer(storage)
    put(writer, b"1" * BLOCK, offset=0)
    assert content(storage) == bytes(4 * BLOCK)
    put(writer, b"2" * BLOCK, offset=BLOCK)
    assert content(storage) == b"1" * BLOCK + b"2" * BLOCK + bytes(2 * BLOCK)


def test_a_long_request_is_done_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_WINDOW_BLOCKS", 2)
    storage, writer = recorded(build(8))
    put(writer, b"x" * 5 * BLOCK, offset=BLOCK)
    lengths = [call.length for call in storage.of("pwrite")]
    # Block 1, then 2 and 3, then 4 and 5; a footer before each.
    assert lengths == [512, SPAN, 512, 2 * SPAN, 512, 2 * SPAN]


# Differencing disks


def test_over_a_parent_only_the_bits_of_written_sectors_are_set() -> None:
    storage = MemoryStorage(build_child())
    writer = open_writer(storage, PARENT)
    put(writer, b"x" * 1024, offset=512)
    writer.flush()
    assert storage.pread(512, offset=FIRST_BLOCK) == b"\x60" + bytes(511)
    assert content(storage, PARENT) == PARENT[:512] + b"x" * 1024 + PARENT[1536:]


def test_sectors_written_in_part_are_filled_up_from_below() -> None:
    storage = MemoryStorage(build_child())
    writer = open_writer(storage, PARENT)
    put(writer, b"x" * 600, offset=BLOCK + 100)
    put(writer, b"y", offset=BLOCK + 2000)
    writer.flush()
    expected = bytearray(PARENT)
    expected[BLOCK + 100 : BLOCK + 700] = b"x" * 600
    expected[BLOCK + 2000] = ord("y")
    assert content(storage, PARENT) == expected


def test_a_sector_that_is_there_already_is_not_filled_up_again() -> None:
    storage = MemoryStorage(build_child())
    writer = open_writer(storage, PARENT)
    put(writer, b"x" * 512, offset=0)
    put(writer, b"y", offset=100)
    put(writer, b"z" * 412, offset=200)
    writer.flush()
    assert content(storage, PARENT)[:512] == b"x" * 100 + b"y" + b"x" * 99 + b"z" * 312


def test_beyond_the_end_of_a_shorter_parent_lie_zeros() -> None:
    storage = MemoryStorage(build_child())
    writer = open_writer(storage, b"p" * 700)
    put(writer, b"x", offset=600)
    put(writer, b"x", offset=1500)
    writer.flush()
    expected = (b"p" * 600 + b"x" + b"p" * 99).ljust(1500, b"\0") + b"x"
    assert content(storage, b"p" * 700) == expected.ljust(4 * BLOCK, b"\0")


def test_bits_in_an_old_block_are_written_between_two_flushes() -> None:
    child = VhdBuilder(size=BLOCK, disk_type=DIFFERENCING).block(0, b"c", bitmap=b"\x80")
    storage, writer = recorded(bytes(child.build()), PARENT)
    put(writer, b"x" * 512, offset=1024)
    writer.flush()
    assert changes(storage.calls) == [
        ("pwrite", FIRST_BLOCK + 512 + 1024, 512),
        ("flush", 0, 0),
        ("pwrite", FIRST_BLOCK, 1),
        ("flush", 0, 0),
    ]
    assert storage.of("pwrite")[-1].data == b"\xa0"


def test_the_bitmap_of_a_new_block_is_durable_before_its_entry() -> None:
    storage, writer = recorded(build_child(), PARENT)
    put(writer, b"x" * 512, offset=0)
    storage.calls.clear()
    writer.flush()
    assert changes(storage.calls) == [
        ("pwrite", FIRST_BLOCK, 512),
        ("flush", 0, 0),
        ("pwrite", TABLE_AT, 4),
        ("flush", 0, 0),
    ]


def test_readers_see_staged_bits_before_the_file_has_them() -> None:
    storage = MemoryStorage(build_child())
    writer = open_writer(storage, PARENT)
    put(writer, b"x" * 512, offset=512)
    rows = writer.blocks.extents(start=0, length=BLOCK)
    assert [(row.start, row.flags) for row in rows] == [(0, 0), (512, 5), (1024, 0)]


def test_a_block_that_has_become_whole_is_known_as_such() -> None:
    storage = MemoryStorage(build_child())
    writer = open_writer(storage, PARENT)
    put(writer, b"x" * 512, offset=0)
    put(writer, b"y" * (BLOCK - 512), offset=512)
    assert bool(writer.blocks.full[0])
    writer.flush()
    assert content(storage, PARENT)[:BLOCK] == b"x" * 512 + b"y" * (BLOCK - 512)


def test_a_part_of_a_sector_needs_the_parent_to_be_open() -> None:
    writer = open_writer(MemoryStorage(build_child()))
    with pytest.raises(RequestError, match="the parent of this differencing VHD is not open"):
        put(writer, b"x", offset=100)
    put(writer, b"x" * 512, offset=512)


def test_clear_sectors_of_a_dynamic_disk_are_filled_up_with_zeros() -> None:
    odd = VhdBuilder(size=BLOCK).block(0, b"\xee" * BLOCK, bitmap=b"\x0f")
    storage = MemoryStorage(odd.build())
    writer = open_writer(storage)
    put(writer, b"x", offset=700)
    writer.flush()
    assert content(storage) == bytes(700) + b"x" + bytes(2048 - 701) + b"\xee" * 2048


# Zeros and discards


def test_zeros_in_unused_blocks_of_a_dynamic_disk_cost_nothing() -> None:
    storage, writer = recorded(build())
    writer.write_zeroes(offset=100, length=3 * BLOCK, fallback=False)
    assert changes(storage.calls) == []


@pytest.mark.parametrize("unmap", [False, True])
def test_zeros_in_blocks_of_a_dynamic_disk_are_left_to_the_host(unmap: bool) -> None:
    raw = VhdBuilder(size=3 * BLOCK).block(0, b"a" * BLOCK).block(2, b"b" * BLOCK).build()
    storage, writer = recorded(bytes(raw))
    writer.write_zeroes(offset=100, length=2 * BLOCK, unmap=unmap, fallback=False)
    first = FIRST_BLOCK + 512
    assert changes(storage.calls) == [
        ("zero", first + 100, BLOCK - 100),
        ("zero", first + SPAN, 100),
    ]


def test_zeros_over_a_parent_need_data_and_say_so() -> None:
    writer = open_writer(MemoryStorage(build_child()), PARENT)
    message = "zeros without data: a differencing VHD says zeros with data alone"
    with pytest.raises(UnsupportedFeature, match=message):
        writer.write_zeroes(offset=0, length=BLOCK, fallback=False)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 4 * BLOCK), (100, 300), (100, 5000), (512, 512), (3 * BLOCK, BLOCK)]
)
def test_zeros_over_a_parent_hide_it(offset: int, length: int) -> None:
    storage = MemoryStorage(build_child())
    writer = open_writer(storage, PARENT)
    put(writer, b"x" * 1024, offset=BLOCK)
    before = bytearray(PARENT)
    before[BLOCK : BLOCK + 1024] = b"x" * 1024
    writer.write_zeroes(offset=offset, length=length)
    writer.flush()
    before[offset : offset + length] = bytes(length)
    assert content(storage, PARENT) == before
    assert audit(storage) == []


def test_zeros_over_zeros_of_a_parent_need_no_block() -> None:
    storage, writer = recorded(build_child(), b"p" * BLOCK + bytes(2 * BLOCK))
    writer.write_zeroes(offset=BLOCK, length=3 * BLOCK)
    assert changes(storage.calls) == []


def test_a_discard_zeroes_whole_blocks_of_a_dynamic_disk() -> None:
    raw = VhdBuilder(size=3 * BLOCK - 512)
    for index in range(3):
        raw.block(index, b"x" * BLOCK)
    storage = MemoryStorage(raw.build())
    writer = open_writer(storage)
    writer.discard(offset=100, length=3 * BLOCK - 512 - 100)
    assert content(storage) == b"x" * BLOCK + bytes(2 * BLOCK - 512)
    writer.discard(offset=0, length=BLOCK - 1)
    assert content(storage)[:BLOCK] == b"x" * BLOCK
    assert audit(storage) == []


def test_a_discard_over_a_parent_is_ignored() -> None:
    storage, writer = recorded(build_child(), PARENT)
    writer.discard(offset=0, length=4 * BLOCK)
    assert changes(storage.calls) == []


# Errors


def test_a_write_that_failed_can_be_tried_again_and_loses_nothing() -> None:
    """qemu keeps the entry of the first try: the next block is then put on top of the retry."""
    raw = MemoryStorage(build())
    storage = FaultyStorage(raw, Fault(operation="pwrite", call=2))
    writer = open_writer(storage)
    with pytest.raises(StorageError):
        put(writer, b"1" * BLOCK, offset=0)
    assert writer.blocks.sectors.tolist() == [-1] * 4
    put(writer, b"1" * BLOCK, offset=0)
    put(writer, b"2" * BLOCK, offset=BLOCK)
    writer.flush()
    assert content(raw) == b"1" * BLOCK + b"2" * BLOCK + bytes(2 * BLOCK)
    assert audit(raw) == []


def test_what_a_failed_write_left_in_a_block_is_gone_when_its_place_is_used() -> None:
    raw = MemoryStorage(build())
    storage = FaultyStorage(
        raw, Fault(operation="pwrite", call=2, errno=errno.ENOSPC, written=3000)
    )
    writer = open_writer(storage)
    with pytest.raises(StorageError, match="ENOSPC"):
        put(writer, b"1" * BLOCK, offset=0)
    put(writer, b"2", offset=3 * BLOCK)
    writer.flush()
    assert content(raw) == bytes(3 * BLOCK) + b"2" + bytes(BLOCK - 1)


def test_a_footer_that_cannot_be_moved_stays_where_it_is() -> None:
    raw = MemoryStorage(build())
    before = raw.to_bytes()
    storage = FaultyStorage(raw, Fault(operation="pwrite", errno=errno.ENOSPC, written=100))
    writer = open_writer(storage)
    with pytest.raises(StorageError):
        put(writer, b"1", offset=0)
    assert raw.to_bytes() == before


def test_a_growth_that_could_not_be_taken_back_is_taken_back_later() -> None:
    raw = MemoryStorage(build())
    before = raw.to_bytes()
    faults = (
        Fault(operation="pwrite", errno=errno.EIO, written=100),
        Fault(operation="truncate", errno=errno.EIO),
    )
    writer = open_writer(FaultyStorage(raw, *faults))
    with pytest.raises(StorageError):
        put(writer, b"1", offset=0)
    assert raw.size() > len(before)
    writer.flush()
    assert raw.to_bytes() == before


def test_a_flush_that_failed_is_never_made_good() -> None:
    storage = FaultyStorage(MemoryStorage(build()), Fault(operation="flush", call=2))
    writer = open_writer(storage)
    put(writer, b"1", offset=0)
    for change in (
        writer.flush,
        writer.flush,
        lambda: put(writer, b"1", offset=0),
        lambda: writer.write_zeroes(offset=0, length=1),
        lambda: writer.discard(offset=0, length=BLOCK),
    ):
        with pytest.raises(StorageError, match="flush"):
            change()


def test_a_table_that_could_not_be_written_is_written_by_the_next_flush() -> None:
    raw = MemoryStorage(build())
    # Footer, data, table.
    writer = open_writer(FaultyStorage(raw, Fault(operation="pwrite", call=3)))
    put(writer, b"1" * BLOCK, offset=0)
    with pytest.raises(StorageError):
        writer.flush()
    writer.flush()
    assert content(raw)[:BLOCK] == b"1" * BLOCK


@pytest.mark.parametrize("written", [1, 2, 3])
def test_half_an_entry_of_the_table_is_not_left_behind(written: int) -> None:
    """Whoever gets the error may give up, and the next one must be able to open the file."""
    raw = MemoryStorage(build())
    writer = open_writer(FaultyStorage(raw, Fault(operation="pwrite", call=3, written=written)))
    put(writer, b"1" * BLOCK, offset=0)
    with pytest.raises(StorageError):
        writer.flush()
    assert content(raw) == b"1" * BLOCK + bytes(3 * BLOCK)
    assert audit(raw) == []


def test_a_bitmap_that_is_cut_off_is_an_error_not_zeros() -> None:
    child = VhdBuilder(size=BLOCK, disk_type=DIFFERENCING).block(0, b"c", bitmap=b"\x80")
    storage = MemoryStorage(child.build())
    writer = open_writer(storage, PARENT)
    writer.begin()
    storage.truncate(FIRST_BLOCK)
    message = "sector bitmap at host offset 0x800: the file ends after 0 of 1 bytes"
    with pytest.raises(CorruptMetadata, match=re.escape(message)):
        put(writer, b"x" * 512, offset=512)


def test_a_block_beyond_the_last_sector_number_is_refused() -> None:
    writer = open_writer(MemoryStorage(build()))
    writer.begin()
    writer.space.take(0xFFFF_FFFF * 512)
    message = "block at 0x1fffffffe00 is beyond the last sector of a table entry"
    with pytest.raises(StorageError, match=message) as failure:
        put(writer, b"x", offset=0)
    assert failure.value.errno == errno.EFBIG


def test_every_barrier_has_a_name() -> None:
    seen: list[str] = []
    writer = open_writer(MemoryStorage(build()), observe=seen.append)
    put(writer, b"1", offset=0)
    writer.flush()
    assert seen == [
        "footer before blocks",
        "blocks before what leads to them",
        "bitmaps and table before more changes",
    ]


class Interrupted(np.ndarray):
    """A block table in memory: right after an entry was set, the program is interrupted, once."""

    armed = True

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt


def test_a_place_is_not_given_out_twice_after_an_interrupt() -> None:
    storage = MemoryStorage(build())
    writer = open_writer(storage)
    writer.blocks.sectors = writer.blocks.sectors.view(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(writer, b"x" * BLOCK, offset=0)
    put(writer, b"y" * BLOCK, offset=BLOCK)
    writer.flush()
    assert audit(storage) == []
    assert content(storage)[: 2 * BLOCK] == b"x" * BLOCK + b"y" * BLOCK
