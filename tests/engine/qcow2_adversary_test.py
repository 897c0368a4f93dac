"""What once lost data or the image, each with the moment that did it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from qcowkit.engine.barriers import Barriers
from qcowkit.engine.findings import Effort
from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.engine.qcow2.snapshots import Snapshots
from qcowkit.errors import (
    CorruptMetadata,
    OperationError,
    QcowkitError,
    RequestError,
    StorageError,
)
from qcowkit.image.lineage import Layer
from qcowkit.image.metadata import RawMetadata
from qcowkit.image.registry import build_chain
from qcowkit.operations.check import Verdict, check_image
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import BuiltImage, Data, Verbatim, build_qcow2
from qcowkit.units import KiB, MiB

CLUSTER = 4 * KiB
pytestmark = pytest.mark.pinned("the places of its images are its own")


class Hooked(MemoryStorage):
    """Memory of which some calls do something else first."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.before_read: Callable[[int], None] = lambda offset: None
        self.before_write: Callable[[int, int], None] = lambda offset, length: None
        self.after_write: Callable[[int], None] = lambda offset: None
        self.before_cut: Callable[[int], None] = lambda size: None

    def pread(self, length: int, *, offset: int) -> bytes:
        self.before_read(offset)
        return super().pread(length, offset=offset)

    def pwrite(self, buffers: Sequence[Any], *, offset: int) -> None:
        self.before_write(offset, sum(memoryview(one).nbytes for one in buffers))
        super().pwrite(buffers, offset=offset)
        self.after_write(offset)

    def truncate(self, size: int) -> None:
        self.before_cut(size)
        super().truncate(size)


def fill(byte: int) -> Data:
    return Data(payload=bytes([byte]) * CLUSTER)


def open_disk(storage: MemoryStorage, *, writable: bool = True) -> Any:
    layer = Layer(storage=storage, metadata=load_qcow2_metadata(storage))
    return build_chain([layer], writable=writable, options=OpenOptions(cache_clean_interval=0))


def verdict(storage: MemoryStorage) -> Verdict:
    return check_image(Layer(storage=storage, metadata=load_qcow2_metadata(storage))).verdict


def reopened(storage: MemoryStorage) -> Any:
    return open_disk(MemoryStorage(storage.to_bytes()), writable=False)


def sound(storage: MemoryStorage) -> bool:
    copy = MemoryStorage(storage.to_bytes())
    return verdict(copy) in (Verdict.CLEAN, Verdict.LEAKS)


def test_a_full_disk_below_a_new_table_leaves_an_image_that_opens() -> None:
    storage = Hooked(build_qcow2(size=6 * MiB, clusters={0: fill(1)}).to_bytes())
    limit = storage.size()

    def full(offset: int, length: int) -> None:
        if offset + length > limit:
            raise StorageError("write", path="x", errno=errno.ENOSPC)

    storage.before_write = full
    storage.before_cut = lambda size: full(size, 0)
    disk = open_disk(storage)
    with pytest.raises(StorageError):
        disk.write(b"x" * CLUSTER, offset=4 * MiB)
    disk.flush()
    assert reopened(storage).read(offset=0, length=1) == b"\1"
    assert sound(storage)


def test_a_shrink_that_cannot_read_a_table_gives_nothing_away() -> None:
    clusters = {512 * table + index: fill(64 + table) for table in (1, 2) for index in range(4)}
    image = build_qcow2(size=6 * MiB, clusters=clusters)
    storage = Hooked(image.to_bytes())
    l1 = image.places["l1"]
    table = int.from_bytes(image.to_bytes()[l1 + 16 : l1 + 24], "big") & ((1 << 56) - 512)

    def unreadable(offset: int) -> None:
        if table <= offset < table + CLUSTER:
            raise StorageError("read", path="x", errno=errno.EIO)

    disk = open_disk(storage)
    storage.before_read = unreadable
    with pytest.raises(StorageError):
        disk.resize(MiB, shrink=True)
    storage.before_read = lambda offset: None
    disk.flush()
    for index in range(8):
        disk.write(b"Z" * CLUSTER, offset=index * CLUSTER)
    disk.flush()
    assert disk.size == 6 * MiB
    assert disk.read(offset=2 * MiB, length=1) == b"A"
    assert disk.read(offset=4 * MiB, length=1) == b"B"
    assert sound(storage)


def test_an_interrupt_behind_the_switch_of_a_snapshot_keeps_its_metadata() -> None:
    clusters = {index: fill(65 + index) for index in range(4)}
    storage = Hooked(build_qcow2(size=MiB, clusters=clusters).to_bytes())

    def interrupt(offset: int) -> None:
        if not offset:
            raise KeyboardInterrupt

    storage.after_write = interrupt
    changes = Snapshots(
        storage=storage,
        metadata=load_qcow2_metadata(storage),
        barriers=Barriers(storage),
        effort=Effort(stored=storage.size()),
    )
    with pytest.raises(KeyboardInterrupt):
        changes.create("s")
    assert reopened(storage).read(offset=0, length=1) == b"A"
    assert sound(storage)


def test_a_reader_whose_range_is_cut_off_ends() -> None:
    clusters = {512 + index: fill(65) for index in range(4)}
    storage = Hooked(build_qcow2(size=4 * MiB, clusters=clusters).to_bytes())
    disk = open_disk(storage)
    seen: list[object] = []

    def cut(offset: int) -> None:
        if threading.current_thread().name == "reader" and not seen:
            seen.append("cut")
            other = threading.Thread(target=lambda: disk.resize(MiB, shrink=True))
            other.start()
            other.join()

    def read() -> None:
        try:
            seen.append(disk.read(offset=2 * MiB, length=16 * KiB))
        except QcowkitError as error:
            seen.append(error)

    storage.before_read = cut
    reader = threading.Thread(target=read, name="reader", daemon=True)
    reader.start()
    reader.join(30)
    assert not reader.is_alive()
    assert len(seen) == 2


def test_a_table_that_is_gone_is_not_brought_back_by_a_reader() -> None:
    clusters = {0: fill(48)} | {1024 + index: fill(65) for index in range(4)}
    storage = Hooked(build_qcow2(size=6 * MiB, clusters=clusters).to_bytes())
    disk = open_disk(storage)
    tables = disk.images[0].mapping.tables
    before = tables.cache.stores
    place = tables.place(2)
    disk.resize(MiB, shrink=True)
    assert tables.cache.get_if(2, offset=place, stores=before) is None
    disk.resize(6 * MiB)
    assert disk.read(offset=4 * MiB, length=4) == bytes(4)
    for index in range(1, 8):
        disk.write(bytes([index]) * CLUSTER, offset=index * CLUSTER)
    disk.write(b"EVIL" * KiB, offset=4 * MiB)
    disk.close()
    found = reopened(storage)
    assert [found.read(offset=index * CLUSTER, length=1)[0] for index in range(1, 8)] == [
        *range(1, 8)
    ]
    assert found.read(offset=4 * MiB, length=4) == b"EVIL"


def test_a_file_that_cannot_be_cut_leaves_a_sound_image() -> None:
    storage = Hooked(build_qcow2(size=2 * MiB, cluster_bits=9).to_bytes())
    disk = open_disk(storage)
    disk.write(b"a" * (512 * 600), offset=MiB)
    disk.flush()

    def refuse(size: int) -> None:
        if size < storage.size():
            raise StorageError("truncate", path="x", errno=errno.EPERM)

    storage.before_cut = refuse
    disk.resize(MiB, shrink=True)
    for index in range(64):
        disk.write(b"c" * 512, offset=512 * (3 + index))
    disk.close()
    assert sound(storage)
    assert reopened(storage).read(offset=512 * 3, length=1) == b"c"


def test_a_used_cluster_that_counts_as_free_is_not_written_as_data_and_table() -> None:
    image = build_qcow2(size=6 * MiB, clusters={0: fill(48), 1: fill(49), 600: fill(50)})
    place = int.from_bytes(image.to_bytes()[image.places["l2"] + 8 :][:8], "big")
    host = place & ((1 << 56) - 512)
    image.patch(image.places["refcount_block"] + 2 * (host // CLUSTER), 0, width=2)
    disk = open_disk(MemoryStorage(image.to_bytes()))
    disk.write(b"a", offset=0)
    disk.write(b"b" * CLUSTER, offset=4 * MiB)
    disk.flush()
    with pytest.raises(CorruptMetadata, match="active-l2"):
        disk.write(b"G" * CLUSTER, offset=CLUSTER)


def with_descriptor(sectors: int) -> BuiltImage:
    plain = {0: fill(48), 1: fill(49)}
    l1 = build_qcow2(size=6 * MiB, clusters=plain).places["l1"]
    word = 1 << 62 | sectors << 58 | l1
    return build_qcow2(size=6 * MiB, clusters={**plain, 2: Verbatim(word=word)})


@pytest.mark.parametrize("sectors", [0, 7])
def test_a_compressed_cluster_that_lies_on_a_table_frees_no_table(sectors: int) -> None:
    disk = open_disk(MemoryStorage(with_descriptor(sectors).to_bytes()))
    with pytest.raises(CorruptMetadata, match="active-l1"):
        disk.write(b"x" * CLUSTER, offset=2 * CLUSTER)


def test_closing_a_disk_that_broke_tells_of_changes_that_are_lost() -> None:
    image = build_qcow2(size=6 * MiB, clusters={0: fill(48), 600: Verbatim(word=1 << 63 | 0x1200)})
    disk = open_disk(MemoryStorage(image.to_bytes()))
    disk.write(b"a" * CLUSTER, offset=CLUSTER)
    with pytest.raises(CorruptMetadata):
        disk.write(b"b", offset=600 * CLUSTER)
    with pytest.raises(CorruptMetadata):
        disk.close()


@pytest.mark.parametrize("way", ["write", "write_zeroes", "discard", "write_compressed"])
def test_a_change_that_a_shrink_has_overtaken_is_refused(way: str) -> None:
    storage = Hooked(build_qcow2(size=6 * MiB, clusters={0: fill(1), 1000: fill(2)}).to_bytes())
    disk = open_disk(storage)
    reach = disk.size
    disk.resize(MiB, shrink=True)
    # What a caller still believes who looked before.
    disk.size = reach
    where: dict[str, Any] = {"offset": 1000 * CLUSTER}
    if way.startswith("write") and way != "write_zeroes":
        with pytest.raises(RequestError, match="outside the disk"):
            getattr(disk, way)(bytes(CLUSTER), **where)
    else:
        with pytest.raises(RequestError, match="outside the disk"):
            getattr(disk, way)(length=CLUSTER, **where)
    disk.flush()
    assert verdict(storage) is Verdict.CLEAN


def test_a_raw_disk_stays_short_where_a_write_was_overtaken() -> None:
    storage = Hooked(bytes(MiB))
    layer = Layer(storage=storage, metadata=RawMetadata(virtual_size=MiB))
    disk = build_chain([layer], writable=True)
    shrinks = [512 * KiB]

    def shrink(offset: int, length: int) -> None:
        if shrinks:
            disk.resize(shrinks.pop(), shrink=True)

    storage.before_write = shrink
    with pytest.raises(RequestError, match="outside the disk"):
        disk.write(b"late", offset=MiB - 4)
    assert storage.size() == disk.size == 512 * KiB


def test_a_refcount_block_that_two_entries_name_ends_writing() -> None:
    built = build_qcow2(size=6 * MiB, clusters={0: fill(1)})
    storage = MemoryStorage(built.to_bytes())
    table = load_qcow2_metadata(storage).header.refcount_table_offset
    entry = storage.pread(8, offset=table)
    storage.pwrite([entry], offset=table + 8)
    with pytest.raises(CorruptMetadata, match="is that of entry 0 too"):
        open_disk(storage)


class Hollow(MemoryStorage):
    """A file that says to be far longer than it is, as a sparse one may be."""

    def size(self) -> int:
        return 1 << 50


def test_a_snapshot_of_a_huge_hollow_file_is_refused_before_memory_is_taken() -> None:
    storage = Hollow(build_qcow2(size=6 * MiB, clusters={0: fill(1)}).to_bytes())
    changes = Snapshots(
        storage=storage,
        metadata=load_qcow2_metadata(storage),
        barriers=Barriers(storage),
        effort=Effort(stored=64 * KiB),
    )
    with pytest.raises(OperationError, match="too complex"):
        changes.create("s")
