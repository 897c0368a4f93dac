"""Guest writes into fixed VHDs, and their other sizes."""

from __future__ import annotations

import itertools
import re

import pytest

from qcowkit.codecs.vhd.chs import chs_from_sectors
from qcowkit.engine.vhd.fixed import FixedWriter
from qcowkit.errors import RequestError, StorageError, UnsupportedFeature
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.device import MemoryDevice
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.recording import RecordingStorage
from qcowkit.testing.vhd_builder import FIXED, VhdBuilder
from tests.vhd_disks import changes, load, per_byte

SIZE = 8192
DISK = per_byte(b"content!", SIZE)


def build(size: int = SIZE) -> bytes:
    return bytes(VhdBuilder(size=size, disk_type=FIXED).build(DISK[:size]))


def with_a_gap(length: int) -> bytes:
    """A disk whose footer lies further behind, with bytes of nobody in between."""
    raw = build()
    return raw[:SIZE] + b"\xee" * length + raw[SIZE:]


def open_writer(storage: Storage) -> FixedWriter:
    return FixedWriter(storage, load(storage))


def resize(writer: FixedWriter, size: int, preallocation: str = "off") -> None:
    shrink = size < writer.metadata.virtual_size
    writer.resize(size, shrink=shrink, preallocation=preallocation)


def disk_of(storage: MemoryStorage) -> bytes:
    """The guest disk as another process reads it; the file ends with its footer."""
    metadata = load(MemoryStorage(storage.to_bytes()))
    assert metadata.warnings == ()
    assert storage.size() == metadata.virtual_size + 512
    return storage.pread(metadata.virtual_size, offset=0)


def test_a_write_goes_where_it_belongs_and_leaves_the_footer_alone() -> None:
    storage = RecordingStorage(MemoryStorage(build()))
    writer = open_writer(storage)
    storage.calls.clear()
    writer.write(memoryview(b"new"), offset=100)
    writer.flush()
    assert changes(storage.calls) == [("pwrite", 100, 3), ("flush", 0, 0)]


def test_zeros_and_discards_are_left_to_the_host() -> None:
    storage = RecordingStorage(MemoryStorage(build()))
    writer = open_writer(storage)
    storage.calls.clear()
    writer.write_zeroes(offset=10, length=1000, fallback=False)
    writer.discard(offset=4096, length=4096)
    assert changes(storage.calls) == [("zero", 10, 1000), ("discard", 4096, 4096)]


@pytest.mark.parametrize("size", [SIZE + 512, 3 * SIZE, 512, 0])
def test_a_disk_gets_another_size(size: int) -> None:
    storage = MemoryStorage(build())
    writer = open_writer(storage)
    resize(writer, size)
    assert disk_of(storage) == DISK[:size].ljust(size, b"\0")
    assert writer.metadata.virtual_size == size
    assert load(storage).footer.original_size == SIZE


def test_the_geometry_follows_the_size() -> None:
    storage = MemoryStorage(build())
    exact = chs_from_sectors(4000).sectors * 512
    resize(open_writer(storage), exact)
    assert load(storage).footer.geometry == chs_from_sectors(4000)


@pytest.mark.parametrize("size", [SIZE - 512, SIZE + 512, SIZE + 1024, SIZE + 2048, SIZE + 4096])
def test_a_gap_before_the_footer_is_closed_and_never_shows(size: int) -> None:
    storage = MemoryStorage(with_a_gap(1024))
    resize(open_writer(storage), size)
    assert disk_of(storage) == DISK[:size].ljust(size, b"\0")


def test_a_growing_disk_has_a_footer_of_its_old_size_until_its_space_is_zero() -> None:
    storage = RecordingStorage(MemoryStorage(build()))
    writer = open_writer(storage)
    storage.calls.clear()
    resize(writer, 3 * SIZE)
    assert changes(storage.calls) == [
        ("pwrite", 3 * SIZE, 512),
        ("flush", 0, 0),
        ("zero", SIZE, 512),
        ("flush", 0, 0),
        ("pwrite", 3 * SIZE, 512),
        ("flush", 0, 0),
    ]
    old, new = storage.of("pwrite")
    assert old.data == build()[-512:] != new.data


def test_a_shrinking_disk_has_its_new_size_before_its_file_is_cut() -> None:
    storage = RecordingStorage(MemoryStorage(build()))
    writer = open_writer(storage)
    storage.calls.clear()
    resize(writer, 512)
    assert changes(storage.calls) == [
        ("pwrite", SIZE, 512),
        ("flush", 0, 0),
        ("pwrite", 512, 512),
        ("flush", 0, 0),
        ("truncate", 0, 1024),
        ("flush", 0, 0),
    ]


def test_added_space_can_be_reserved() -> None:
    storage = RecordingStorage(MemoryStorage(build()))
    resize(open_writer(storage), 3 * SIZE, "falloc")
    assert [(call.offset, call.length) for call in storage.of("allocate")] == [(SIZE, 2 * SIZE)]


def test_added_space_can_be_written() -> None:
    storage = RecordingStorage(MemoryStorage(build()))
    resize(open_writer(storage), 3 * SIZE, "full")
    written = [(call.offset, call.length) for call in storage.of("pwrite")]
    assert (SIZE, 2 * SIZE) in written


def test_on_a_device_a_disk_grows_up_to_its_footer() -> None:
    device = MemoryDevice(with_a_gap(SIZE), size=2 * SIZE + 512)
    writer = open_writer(device)
    resize(writer, 2 * SIZE)
    assert disk_of(device) == DISK.ljust(2 * SIZE, b"\0")
    resize(writer, SIZE)
    assert load(device).virtual_size == SIZE
    message = "size 16896 does not fit before the footer at 0x4000 of a device"
    with pytest.raises(RequestError, match=message):
        resize(writer, 2 * SIZE + 512)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (100, "size 100 is not a multiple of 512, which a VHD must be"),
        (2041 << 30, "is above the largest VHD, 2190433320960 bytes (2040 GiB)"),
        (512, "size 512 is below the disk's 8192, and shrinking was not asked for"),
    ],
)
def test_impossible_sizes_are_refused(size: int, message: str) -> None:
    writer = open_writer(MemoryStorage(build()))
    with pytest.raises(RequestError, match=re.escape(message)):
        writer.resize(size, shrink=False, preallocation="off")


def test_the_present_size_changes_nothing() -> None:
    storage = MemoryStorage(with_a_gap(512))
    resize(open_writer(storage), SIZE)
    assert storage.to_bytes() == with_a_gap(512)


def test_a_footer_that_is_not_on_a_sector_is_not_moved() -> None:
    writer = open_writer(MemoryStorage(with_a_gap(100)))
    message = "footer of a fixed VHD: lies at 0x2064, not on a sector: it cannot be moved"
    with pytest.raises(UnsupportedFeature, match=message):
        resize(writer, 2 * SIZE)


def test_a_flush_that_failed_is_never_made_good() -> None:
    writer = open_writer(FaultyStorage(MemoryStorage(build()), Fault(operation="flush")))
    writer.write(memoryview(b"x"), offset=0)
    for change in (
        writer.flush,
        writer.flush,
        lambda: writer.write(memoryview(b"x"), offset=0),
        lambda: resize(writer, 512),
    ):
        with pytest.raises(StorageError, match="flush"):
            change()


@pytest.mark.parametrize("operation", ["pwrite", "zero", "truncate", "allocate"])
@pytest.mark.parametrize("size", [512, 3 * SIZE])
@pytest.mark.parametrize("written", [0, 100])
def test_a_resize_that_failed_can_be_tried_again(operation: str, size: int, written: int) -> None:
    """Whichever call it was, and to whichever size the next one goes."""
    for call in itertools.count(1):
        storage = MemoryStorage(build())
        fault = Fault(operation=operation, call=call, written=written)
        writer = open_writer(faulty := FaultyStorage(storage, fault))
        try:
            resize(writer, size, "falloc")
        except StorageError:
            now = writer.metadata.virtual_size
            assert load(storage).virtual_size == now
        else:
            assert not faulty.fired
            break
        disk = DISK[:now].ljust(now, b"\0")
        for other in (2 * SIZE, 1024, size):
            resize(writer, other)
            disk = disk[:other].ljust(other, b"\0")
            writer.flush()
            assert disk_of(storage) == disk


def test_a_growth_that_could_not_be_taken_back_is_taken_back_later() -> None:
    storage = MemoryStorage(build())
    faults = (Fault(operation="pwrite", written=100), Fault(operation="truncate"))
    writer = open_writer(FaultyStorage(storage, *faults))
    with pytest.raises(StorageError):
        resize(writer, 2 * SIZE)
    assert storage.size() > SIZE + 512
    writer.write(memoryview(b"c"), offset=0)
    assert storage.to_bytes() == build()
