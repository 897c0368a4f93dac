"""Raw disks that the guest may change."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcowkit
from qcowkit.budget import TRUSTED
from qcowkit.errors import RequestError, StorageError
from qcowkit.image.chain import Chain
from qcowkit.image.metadata import RawMetadata, load_metadata
from qcowkit.image.raw_write import WritableRawImage
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.device import MemoryDevice
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.recording import RecordingStorage
from tests.image.disk_machine import DiskMachine
from tests.vhd_disks import changes, per_byte

SIZE = 8192
DISK = per_byte(b"content!", SIZE)


def open_image(storage: Storage) -> WritableRawImage:
    metadata = load_metadata(storage, "raw", budget=TRUSTED)
    assert isinstance(metadata, RawMetadata)
    return WritableRawImage(metadata, storage)


class RawMachine(DiskMachine):
    unit = 1

    def make(self) -> None:
        self.raw = bytes(self.size)

    def open(self) -> Chain:
        self.storage = MemoryStorage(self.raw)
        image = open_image(self.storage)
        return Chain([image], top=image)

    def check_file(self) -> None:
        self.raw = self.storage.to_bytes()


TestRawDisk = RawMachine.TestCase


def test_every_change_is_one_call_to_the_host() -> None:
    storage = RecordingStorage(MemoryStorage(DISK))
    image = open_image(storage)
    image.write(b"new", offset=100)
    image.write_zeroes(offset=10, length=20, unmap=True, fallback=False)
    image.discard(offset=4096, length=4096)
    image.flush()
    assert changes(storage.calls) == [
        ("pwrite", 100, 3),
        ("zero", 10, 20),
        ("discard", 4096, 4096),
        ("flush", 0, 0),
    ]


@pytest.mark.parametrize(
    ("size", "shown"), [(0, 0), (100, 512), (SIZE + 1, SIZE + 512), (512, 512)]
)
def test_a_file_gets_exactly_the_size_and_the_disk_whole_sectors(size: int, shown: int) -> None:
    storage = MemoryStorage(DISK)
    image = open_image(storage)
    image.resize(size, shrink=True)
    assert storage.to_bytes() == DISK[:size].ljust(size, b"\0")
    assert image.size == image.metadata.virtual_size == shown == open_image(storage).size


def test_the_rest_of_a_last_sector_can_be_written() -> None:
    storage = MemoryStorage(b"x" * 100)
    image = open_image(storage)
    image.write(b"end", offset=509)
    assert storage.to_bytes() == (b"x" * 100).ljust(509, b"\0") + b"end"


def test_a_smaller_size_must_be_meant() -> None:
    image = open_image(MemoryStorage(DISK))
    message = "size 100 is below the disk's 8192, and shrinking was not asked for"
    with pytest.raises(RequestError, match=message):
        image.resize(100)
    assert image.size == SIZE


def test_added_space_can_be_reserved() -> None:
    storage = RecordingStorage(MemoryStorage(DISK))
    open_image(storage).resize(3 * SIZE, preallocation="falloc")
    assert changes(storage.calls) == [("truncate", 0, 3 * SIZE), ("allocate", SIZE, 2 * SIZE)]


def test_added_space_can_be_written() -> None:
    storage = RecordingStorage(MemoryStorage(DISK))
    open_image(storage).resize(3 * SIZE, preallocation="full")
    assert changes(storage.calls) == [("truncate", 0, 3 * SIZE), ("pwrite", SIZE, 2 * SIZE)]


@pytest.mark.parametrize(("mode", "operation"), [("falloc", "allocate"), ("full", "pwrite")])
def test_a_file_that_does_not_get_its_space_keeps_its_size(mode: str, operation: str) -> None:
    storage = MemoryStorage(DISK)
    image = open_image(FaultyStorage(storage, Fault(operation=operation, written=100)))
    with pytest.raises(StorageError):
        image.resize(3 * SIZE, preallocation=mode)
    assert storage.to_bytes() == DISK
    assert image.size == SIZE
    image.resize(3 * SIZE, preallocation=mode)
    assert image.size == 3 * SIZE


def test_metadata_cannot_be_preallocated() -> None:
    message = "preallocation 'metadata': expected off, falloc or full for a raw disk"
    with pytest.raises(RequestError, match=message):
        open_image(MemoryStorage(DISK)).resize(3 * SIZE, preallocation="metadata")


@pytest.mark.parametrize("size", [SIZE - 512, SIZE + 512])
def test_a_device_keeps_its_size(size: int) -> None:
    image = open_image(MemoryDevice(DISK, size=SIZE))
    with pytest.raises(RequestError, match=f"size {size}: a device has 8192 bytes and keeps them"):
        image.resize(size, shrink=True)
    image.resize(SIZE)
    assert image.size == SIZE


def test_compressed_clusters_are_refused_by_name() -> None:
    with pytest.raises(RequestError, match="compressed clusters: a raw disk has none"):
        open_image(MemoryStorage(DISK)).write_compressed(bytes(512), offset=0)


def test_a_flush_that_failed_is_never_made_good() -> None:
    image = open_image(FaultyStorage(MemoryStorage(DISK), Fault(operation="flush")))
    image.write(b"x", offset=0)
    for change in (
        image.flush,
        image.flush,
        lambda: image.write(b"x", offset=0),
        lambda: image.write_zeroes(offset=0, length=1),
        lambda: image.discard(offset=0, length=512),
        lambda: image.resize(512, shrink=True),
    ):
        with pytest.raises(StorageError, match="flush"):
            change()


def test_closing_a_changed_disk_makes_it_durable() -> None:
    storage = RecordingStorage(MemoryStorage(DISK))
    image = open_image(storage)
    image.write(b"x", offset=0)
    image.close()
    assert [call.operation for call in storage.calls] == ["pwrite", "flush", "close"]


def test_a_disk_that_was_only_read_is_not_flushed() -> None:
    storage = RecordingStorage(MemoryStorage(DISK))
    open_image(storage).close()
    assert [call.operation for call in storage.calls] == ["close"]


def test_a_file_is_written_through_the_public_door(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(DISK)
    with qcowkit.open(path, format="raw", writable=True) as disk:
        disk.write(b"guest", offset=1000)
        disk.write_zeroes(offset=4096, length=4096, unmap=True)
        disk.resize(SIZE + 4096)
        assert disk.size == SIZE + 4096
    expected = (DISK[:1000] + b"guest" + DISK[1005:4096]).ljust(SIZE + 4096, b"\0")
    assert path.read_bytes() == expected
