"""What surrounds the blocks of a VHD that is written: footers that were lost, and devices."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from qcowkit.errors import StorageError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.device import MemoryDevice
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.recording import RecordingStorage
from qcowkit.testing.vhd_builder import DIFFERENCING, VhdBuilder, seal_footer
from tests.vhd_disks import (
    BLOCK,
    FIRST_BLOCK,
    SPAN,
    audit,
    build,
    changes,
    content,
    load,
    open_writer,
    per_byte,
    put,
)


def sample() -> bytearray:
    return VhdBuilder(size=3 * BLOCK).block(0, b"a" * BLOCK).block(1, b"b" * BLOCK).build()


def without_tail(raw: bytearray) -> bytearray:
    return raw[:-512]


def cut_within_the_tail(raw: bytearray) -> bytearray:
    return raw[:-100]


def with_a_damaged_tail(raw: bytearray) -> bytearray:
    raw[-100] ^= 1
    return raw


def with_another_tail(raw: bytearray) -> bytearray:
    raw[-512 + 24 : -512 + 28] = b"time"
    tail = raw[-512:]
    seal_footer(tail)
    return raw[:-512] + tail


def with_a_short_tail(raw: bytearray) -> bytearray:
    return raw[:-1]


def without_head(raw: bytearray) -> bytearray:
    raw[:512] = bytes(512)
    return raw


@pytest.mark.parametrize(
    "spoil",
    [
        without_tail,
        cut_within_the_tail,
        with_a_damaged_tail,
        with_another_tail,
        with_a_short_tail,
        without_head,
    ],
)
@pytest.mark.parametrize("new", [False, True])
def test_the_first_write_brings_both_footers_back(
    spoil: Callable[[bytearray], bytearray], new: bool
) -> None:
    """new: the write needs a block, whose place is where the footer lies."""
    storage = MemoryStorage(spoil(sample()))
    writer = open_writer(storage)
    put(writer, b"x", offset=2 * BLOCK if new else 0)
    writer.flush()
    expected = bytearray(b"a" * BLOCK + b"b" * BLOCK + bytes(BLOCK))
    expected[2 * BLOCK if new else 0] = ord("x")
    assert content(storage) == expected
    assert audit(storage) == []
    assert storage.pread(512, offset=0) == storage.pread(512, offset=storage.size() - 512)


def test_a_flush_alone_brings_a_lost_footer_back() -> None:
    storage = MemoryStorage(without_tail(sample()))
    open_writer(storage).flush()
    assert audit(storage) == []


def test_one_footer_is_durable_before_the_other_is_touched() -> None:
    storage = RecordingStorage(MemoryStorage(without_head(sample())))
    writer = open_writer(storage)
    put(writer, b"x", offset=0)
    assert changes(storage.calls)[:2] == [("pwrite", 0, 512), ("flush", 0, 0)]


def test_sound_footers_are_left_alone() -> None:
    storage = RecordingStorage(MemoryStorage(sample()))
    writer = open_writer(storage)
    put(writer, b"x", offset=0)
    assert [call[0] for call in changes(storage.calls)] == ["pwrite"]


def test_what_a_footer_says_of_its_maker_survives() -> None:
    builder = VhdBuilder(size=2 * BLOCK)
    builder.footer = {"creator": b"tap\0", "timestamp": 77, "reserved": b"h" * 427}
    storage = MemoryStorage(without_tail(builder.build()))
    put(open_writer(storage), b"x", offset=0)
    footer = load(storage).footer
    assert (footer.creator, footer.timestamp, footer.reserved) == (b"tap\0", 77, b"h" * 427)
    assert storage.to_bytes()[-512:] == footer.encode()


# Devices

DEVICE = 64 * 1024
LAST_SECTOR = DEVICE - 512


def test_on_a_device_the_footer_keeps_to_the_last_sector() -> None:
    device = MemoryDevice(build(), size=DEVICE)
    writer = open_writer(device)
    put(writer, b"x" * 10, offset=BLOCK)
    writer.flush()
    assert device.pread(512, offset=LAST_SECTOR) == device.pread(512, offset=0)
    assert audit(device) == []


def test_what_a_device_held_before_does_not_show() -> None:
    device = MemoryDevice(build(), size=DEVICE)
    writer = open_writer(device)
    put(writer, b"x" * 10, offset=BLOCK + 100)
    writer.flush()
    assert content(device) == (bytes(BLOCK + 100) + b"x" * 10).ljust(4 * BLOCK, b"\0")


def test_blocks_fill_a_device_from_the_front() -> None:
    device = MemoryDevice(build(), size=DEVICE)
    writer = open_writer(device)
    for index in (3, 0):
        put(writer, b"x", offset=index * BLOCK)
    first = FIRST_BLOCK // 512
    assert writer.blocks.sectors.tolist() == [first + SPAN // 512, -1, -1, first]
    writer.flush()
    put(open_writer(device), b"y", offset=BLOCK)
    assert audit(device) == []


def test_a_child_on_a_device_has_bits_for_what_was_written_alone() -> None:
    device = MemoryDevice(build(disk_type=DIFFERENCING), size=DEVICE)
    parent = per_byte(b"parent..", 4 * BLOCK)
    writer = open_writer(device, parent)
    put(writer, b"x" * 10, offset=100)
    writer.write_zeroes(offset=BLOCK, length=1024)
    writer.flush()
    expected = bytearray(parent)
    expected[100:110] = b"x" * 10
    expected[BLOCK : BLOCK + 1024] = bytes(1024)
    assert content(device, parent) == expected


def test_a_full_device_says_so_and_keeps_what_it_has() -> None:
    device = MemoryDevice(build(), size=FIRST_BLOCK + 2 * SPAN + 512)
    writer = open_writer(device)
    put(writer, b"1" * BLOCK, offset=0)
    put(writer, b"2" * BLOCK, offset=BLOCK)
    with pytest.raises(StorageError, match=re.escape("no room for another block before the foo")):
        put(writer, b"3", offset=2 * BLOCK)
    put(writer, b"4", offset=0)
    writer.flush()
    assert content(device) == b"4" + b"1" * (BLOCK - 1) + b"2" * BLOCK + bytes(2 * BLOCK)


def test_a_device_without_room_for_a_footer_is_not_written() -> None:
    raw = VhdBuilder(size=BLOCK).block(0, b"a").build()
    device = MemoryDevice(without_tail(raw), size=len(raw) - 512)
    with pytest.raises(StorageError, match="no room for a footer behind the last block"):
        put(open_writer(device), b"x", offset=0)


def test_a_failed_write_to_a_device_leaves_no_trace_in_its_retry() -> None:
    device = MemoryDevice(build(), size=DEVICE)
    writer = open_writer(FaultyStorage(device, Fault(operation="pwrite", call=2, written=2000)))
    with pytest.raises(StorageError):
        put(writer, b"1" * BLOCK, offset=0)
    put(writer, b"2", offset=BLOCK)
    writer.flush()
    assert content(device) == bytes(BLOCK) + b"2" + bytes(3 * BLOCK - 1)


def test_zeros_over_a_parent_that_failed_can_be_tried_again() -> None:
    device = MemoryDevice(build(disk_type=DIFFERENCING), size=DEVICE)
    parent = per_byte(b"parent..", 4 * BLOCK)
    writer = open_writer(FaultyStorage(device, Fault(operation="zero", call=2)), parent)
    with pytest.raises(StorageError):
        writer.write_zeroes(offset=0, length=2 * BLOCK)
    assert writer.blocks.sectors.tolist() == [-1] * 4
    writer.write_zeroes(offset=0, length=2 * BLOCK)
    writer.flush()
    assert content(device, parent) == bytes(2 * BLOCK) + parent[2 * BLOCK :]
