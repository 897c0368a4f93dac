"""VHDs as disks that the guest may change."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

import qcowkit
from qcowkit.engine.vhd.resize import resize_blocks
from qcowkit.errors import RequestError, StorageError, UnsupportedFeature
from qcowkit.extents.table import Hit
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.vhd_write import WritableVhdImage
from qcowkit.operations.check import Verdict, check_image, open_for_check
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.recording import RecordingStorage
from qcowkit.testing.vhd_builder import DIFFERENCING, DYNAMIC, FIXED, PARENT_ID, VhdBuilder
from qcowkit.units import SECTOR
from tests.image.disk_machine import DiskMachine
from tests.vhd_disks import BLOCK, build, build_child, content, load, open_disk, per_byte

KINDS = (FIXED, DYNAMIC, DIFFERENCING)
PARENT = per_byte(b"parent..", 5 * BLOCK + 512)


class VhdMachine(DiskMachine):
    disk_type = DYNAMIC

    def make(self) -> None:
        self.raw = bytes(VhdBuilder(size=self.size, disk_type=self.disk_type).build())

    def open(self) -> Chain:
        self.storage = MemoryStorage(self.raw)
        return open_disk(self.storage, self.below)

    def check_file(self) -> None:
        self.raw = self.storage.to_bytes()
        layer = open_for_check(MemoryStorage(self.raw), format="vpc")
        assert layer.warnings == ()
        assert check_image(layer).verdict is Verdict.CLEAN


class DifferencingMachine(VhdMachine):
    disk_type = DIFFERENCING
    below = PARENT


class FixedMachine(VhdMachine):
    disk_type = FIXED


TestDynamicDisk = VhdMachine.TestCase
TestDifferencingDisk = DifferencingMachine.TestCase
TestFixedDisk = FixedMachine.TestCase


def open_image(raw: bytes) -> tuple[MemoryStorage, WritableVhdImage]:
    storage = MemoryStorage(raw)
    return storage, WritableVhdImage(load(storage), storage)


def build_kind(kind: int) -> bytes:
    return build(disk_type=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_closing_a_changed_disk_makes_it_durable(kind: int) -> None:
    storage = RecordingStorage(memory := MemoryStorage(build_kind(kind)))
    image = WritableVhdImage(load(storage), storage)
    image.write(b"x" * 512, offset=1024)
    image.close()
    last = [call.operation for call in storage.calls if call.operation in ("flush", "close")][-2:]
    assert last == ["flush", "close"]
    assert content(memory, b"")[1024:1536] == b"x" * 512


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_was_only_read_is_left_as_it_is(kind: int) -> None:
    storage = RecordingStorage(MemoryStorage(build_kind(kind)))
    image = WritableVhdImage(load(storage), storage)
    image.extents(start=0, length=BLOCK)
    image.close()
    assert storage.of("pwrite", "zero", "truncate", "flush") == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_resize_changes_nothing(kind: int) -> None:
    raw = build_kind(kind)
    storage = RecordingStorage(memory := MemoryStorage(raw if kind == FIXED else raw[:-512]))
    image = WritableVhdImage(load(storage), storage)
    for size in (100, 512, 3000 << 30):
        with pytest.raises(RequestError):
            image.resize(size)
    image.close()
    assert storage.of("pwrite", "zero", "truncate", "flush") == []
    assert memory.to_bytes() == (raw if kind == FIXED else raw[:-512])


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_whose_flush_fails_at_the_end_is_closed_all_the_same(kind: int) -> None:
    faulty = FaultyStorage(
        memory := MemoryStorage(build_kind(kind)), Fault(operation="flush", sticky=True)
    )
    image = WritableVhdImage(load(faulty), faulty)
    image.attach(None)
    with pytest.raises(StorageError, match="flush"):
        image.resize(8 * BLOCK)
    with pytest.raises(StorageError, match="flush"):
        image.close()
    with pytest.raises(StorageError):
        memory.size()


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_follows_a_resize(kind: int) -> None:
    storage, image = open_image(build_kind(kind))
    image.resize(6 * BLOCK)
    assert (image.size, image.metadata.virtual_size) == (6 * BLOCK, 6 * BLOCK)
    image.resize(2 * BLOCK + 512, shrink=True)
    assert image.size == load(storage).virtual_size == 2 * BLOCK + 512
    assert image.metadata.data_end == load(storage).data_end


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_that_a_resize_has_cut_off_is_refused(kind: int) -> None:
    """Behind a fixed disk lies its footer."""
    _, image = open_image(build_kind(kind))
    image.resize(BLOCK, shrink=True)
    message = re.escape("range 0x1000 + 0x1 is outside the disk of 0x1000 bytes")
    with pytest.raises(RequestError, match=message):
        image.write(b"x", offset=BLOCK)
    with pytest.raises(RequestError, match=message):
        image.write_zeroes(offset=BLOCK, length=1)
    with pytest.raises(RequestError, match=message):
        image.discard(offset=BLOCK, length=1)
    with pytest.raises(RequestError, match=message):
        image.extents(start=BLOCK, length=1)


@pytest.mark.parametrize("kind", [DYNAMIC, DIFFERENCING])
def test_a_lookup_beyond_a_new_end_is_refused(kind: int) -> None:
    _, image = open_image(build_kind(kind))
    image.resize(BLOCK, shrink=True)
    with pytest.raises(RequestError, match="range 0x1000 \\+ 0x1 is outside the disk"):
        image.lookup(BLOCK)


def test_a_resize_that_failed_behind_the_footer_is_known() -> None:
    """The leading footer counts, so the disk has its new size."""
    memory = MemoryStorage(build())
    # The leading footer, then the one at the end.
    faulty = FaultyStorage(memory, Fault(operation="pwrite", call=2))
    image = WritableVhdImage(load(faulty), faulty)
    with pytest.raises(StorageError):
        image.resize(BLOCK, shrink=True)
    assert image.size == load(memory).virtual_size == BLOCK


def test_a_chain_whose_resize_failed_knows_its_size() -> None:
    faulty = FaultyStorage(MemoryStorage(build()), Fault(operation="pwrite", call=2))
    chain = open_disk(faulty)
    with pytest.raises(StorageError):
        chain.resize(BLOCK, shrink=True)
    assert chain.size == BLOCK
    assert chain.read(offset=0, length=chain.size) == bytes(BLOCK)


@pytest.mark.parametrize(
    ("kind", "mode", "message"),
    [
        (DYNAMIC, "metadata", "preallocation 'metadata': expected off for a dynamic VHD"),
        (DYNAMIC, "full", "preallocation 'full': expected off for a dynamic VHD"),
        (DIFFERENCING, "falloc", "preallocation 'falloc': expected off for a differencing VHD"),
        (FIXED, "metadata", "'metadata': expected off or falloc or full for a fixed VHD"),
    ],
)
def test_preallocation_that_cannot_be_is_refused_by_name(
    kind: int, mode: str, message: str
) -> None:
    storage, image = open_image(build_kind(kind))
    before = storage.to_bytes()
    with pytest.raises(RequestError, match=message):
        image.resize(8 * BLOCK, preallocation=mode)
    assert storage.to_bytes() == before


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_a_fixed_disk_grows_with_every_preallocation(mode: str) -> None:
    storage, image = open_image(build_kind(FIXED))
    image.resize(8 * BLOCK, preallocation=mode)
    assert content(storage) == bytes(8 * BLOCK)


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_clusters_are_refused_by_name(kind: int) -> None:
    _, image = open_image(build_kind(kind))
    with pytest.raises(RequestError, match="compressed clusters: a VHD has none"):
        image.write_compressed(bytes(BLOCK), offset=0)


def test_zeros_without_data_are_refused_over_a_parent_alone() -> None:
    for kind in (FIXED, DYNAMIC):
        open_image(build_kind(kind))[1].write_zeroes(offset=0, length=BLOCK, fallback=False)
    with pytest.raises(UnsupportedFeature, match="zeros without data"):
        open_image(build_child())[1].write_zeroes(offset=0, length=BLOCK, fallback=False)


def test_the_layers_below_may_be_attached_after_a_first_read() -> None:
    storage = MemoryStorage(build_child())
    image = WritableVhdImage(load(storage), storage)
    image.extents(start=0, length=BLOCK)
    chain = open_disk(MemoryStorage(build_child()), PARENT)
    assert chain.images[0].size == image.size
    image.attach(None)
    with pytest.raises(RequestError, match="the parent of this differencing VHD is not open"):
        image.write(b"x", offset=3)


def test_any_contiguous_buffer_can_be_written() -> None:
    storage, image = open_image(build())
    image.write(bytearray(b"abcd"), offset=0)
    image.write(memoryview(b"efgh").cast("I"), offset=4)
    image.flush()
    assert content(storage)[:8] == b"abcdefgh"


# Lookups


@pytest.mark.parametrize("kind", KINDS)
def test_the_lookup_of_a_byte_agrees_with_the_map(kind: int) -> None:
    _, image = open_image(build_kind(kind))
    image.write(b"x" * 512, offset=BLOCK + 512)
    image.write(b"y" * BLOCK, offset=2 * BLOCK)
    for offset in range(0, image.size, 300):
        found, host, run = image.lookup(offset)
        assert 0 < run <= image.size - offset
        if found is Hit.OTHER:
            continue
        (row,) = image.extents(start=offset, length=run)
        assert (row.length, row.host) == (run, host)
        assert found == {0: Hit.NONE, 5: Hit.DATA, 6: Hit.ZERO}[row.flags]


# Threads


def test_readers_go_on_while_blocks_move_and_come_and_go() -> None:
    """A resize moves the first blocks to make room for a longer table, whose bytes then lie where
    they lay. Nobody may see them."""
    disk = per_byte(b"abcdefgh", 16 * BLOCK)
    builder = VhdBuilder(size=len(disk))
    for index in range(16):
        builder.block(index, disk[index * BLOCK : (index + 1) * BLOCK])
    storage = MemoryStorage(builder.build())
    wrong: list[int] = []
    done = threading.Event()

    def look(chain: Chain, length: int) -> None:
        while not done.is_set():
            for offset in range(0, 8 * BLOCK, length):
                found = chain.read(offset=offset, length=length)
                if found != disk[offset : offset + length]:
                    wrong.append(offset)

    with open_disk(storage) as chain:
        threads = [threading.Thread(target=look, args=(chain, size)) for size in (512, 8 * BLOCK)]
        for thread in threads:
            thread.start()
        for blocks in (200, 400, 8, 1000, 9, 3000, 8):
            chain.resize(blocks * BLOCK, shrink=True)
        done.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_writers_of_several_threads_do_not_lose_one_another() -> None:
    storage = MemoryStorage(build(32, disk_type=DIFFERENCING))
    with open_disk(storage, b"") as chain:

        def write(number: int) -> None:
            for sector in range(number, 32 * 8, 4):
                chain.write(bytes([number + 1]) * SECTOR, offset=sector * SECTOR)
                if sector % 29 == 0:
                    chain.flush()

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = b"".join(bytes([sector % 4 + 1]) * SECTOR for sector in range(32 * 8))
    assert content(storage, b"") == expected


def test_a_bitmap_of_a_moved_block_is_never_remembered_as_full() -> None:
    """While it is read its block moves, and a table of ones takes its place."""
    storage = MemoryStorage(build(disk_type=DIFFERENCING))
    chain = open_disk(storage, b"")
    chain.write(b"x" * SECTOR, offset=0)
    chain.flush()
    image = chain.images[0]
    assert isinstance(image, WritableVhdImage)
    blocks = image._block_map()
    plain = blocks.storage.pread

    class Overtaken(RecordingStorage):
        def pread(self, length: int, *, offset: int) -> bytes:
            blocks.storage = storage
            resize_blocks(image._writer(), 300 * BLOCK, shrink=False)
            return plain(length, offset=offset)

    blocks.storage = Overtaken(storage)
    assert not blocks.is_full(0)
    assert not image._block_map().is_full(0)


# Through the front door


def test_a_child_is_written_over_its_parent_on_disk(tmp_path: Path) -> None:
    parent = VhdBuilder(size=4 * BLOCK).block(1, b"parent")
    parent.footer["unique_id"] = PARENT_ID.bytes
    child = VhdBuilder(size=4 * BLOCK, disk_type=DIFFERENCING)
    (tmp_path / "parent.vhd").write_bytes(parent.build())
    (tmp_path / "child.vhd").write_bytes(child.build())
    gate = ReferenceGate.below_image()
    before = (tmp_path / "parent.vhd").read_bytes()
    with qcowkit.open(tmp_path / "child.vhd", gate=gate, writable=True) as disk:
        disk.write(b"child", offset=BLOCK + 3)
    with qcowkit.open(tmp_path / "child.vhd", gate=gate) as disk:
        assert disk.read(offset=BLOCK, length=10) == b"parchild" + bytes(2)
    assert (tmp_path / "parent.vhd").read_bytes() == before


@pytest.mark.parametrize("kind", [FIXED, DYNAMIC])
def test_a_file_is_written_through_the_public_door(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "disk.vhd"
    path.write_bytes(build_kind(kind))
    with qcowkit.open(path, writable=True) as disk:
        disk.write(b"guest", offset=2 * BLOCK - 2)
        disk.write_zeroes(offset=2 * BLOCK, length=1, unmap=True)
        disk.discard(offset=3 * BLOCK, length=BLOCK)
        disk.resize(40 * BLOCK)
    with qcowkit.open(path) as disk:
        expected = bytes(2 * BLOCK - 2) + b"gu\0st"
        assert disk.read(offset=0, length=disk.size) == expected.ljust(40 * BLOCK, b"\0")
