"""Snapshots of a disk that goes on changing: their content, their space, and all or nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.entries import OFFSET_MASK
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.findings import Effort
from qcowkit.engine.options import DEFAULT_OPTIONS
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.engine.qcow2.snapshots import Snapshots
from qcowkit.errors import RequestError, StorageError, UnsupportedFeature
from qcowkit.image.lineage import Layer
from qcowkit.image.registry import build_chain
from qcowkit.operations.check import Verdict, check_image
from qcowkit.operations.snapshot import list_snapshots
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.qcow2_builder import SnapshotSpec, build_qcow2
from qcowkit.units import KiB, MiB

pytestmark = pytest.mark.pinned("snapshots", "refcount_bits=1", "data_file")

SIZE = MiB
KINDS = [
    {"cluster_bits": 16},
    {"cluster_bits": 9},
    {"cluster_bits": 14, "extended_l2": True},
    {"cluster_bits": 9, "refcount_order": 6},
    {"cluster_bits": 12, "refcount_order": 2},
]


def snapshots_of(storage: Any) -> Snapshots:
    return Snapshots(
        storage=storage,
        metadata=load_qcow2_metadata(storage),
        barriers=Barriers(storage),
        effort=Effort(stored=storage.allocated()),
    )


def open_disk(storage: Any, *, writable: bool = False, snapshot: str | None = None) -> Any:
    layer = Layer(storage=storage, metadata=load_qcow2_metadata(storage))
    return build_chain(
        [layer], budget=TRUSTED, writable=writable, snapshot=snapshot, options=DEFAULT_OPTIONS
    )


def scribble(storage: Any, model: bytearray, seed: int) -> None:
    """A few writes, zeroes and discards; the disk is flushed, the storage stays open."""
    rng = random.Random(seed)
    disk = open_disk(storage, writable=True)
    for _ in range(8):
        offset = rng.randrange(len(model))
        length = min(rng.choice((512, 5000, 70000)), len(model) - offset)
        if rng.random() < 0.7:
            data = rng.randbytes(length)
            disk.write(data, offset=offset)
        else:
            data = bytes(length)
            disk.write_zeroes(offset=offset, length=length, unmap=True)
        model[offset : offset + length] = data
    disk.images[0].disk.close()


def content(storage: Any, snapshot: str | None = None) -> bytes:
    disk = open_disk(storage, snapshot=snapshot)
    return bytes(disk.read(offset=0, length=disk.size))


def verdict(storage: Any) -> Verdict:
    return check_image(Layer(storage=storage, metadata=load_qcow2_metadata(storage))).verdict


def make(kind: dict[str, Any]) -> MemoryStorage:
    return MemoryStorage(build_qcow2(size=SIZE, **kind).to_bytes())


@pytest.mark.pinned("its kinds of images are its own")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_snapshot_keeps_what_the_disk_was_while_the_disk_goes_on(kind: dict[str, Any]) -> None:
    storage, model = make(kind), bytearray(SIZE)
    kept = {}
    for number in range(3):
        scribble(storage, model, number)
        snapshots_of(storage).create(f"s{number}")
        kept[f"s{number}"] = bytes(model)
        assert verdict(storage) is Verdict.CLEAN
    scribble(storage, model, 7)
    assert content(storage) == model
    for name, data in kept.items():
        assert content(storage, name) == data
    assert verdict(storage) is Verdict.CLEAN


@pytest.mark.pinned("its kinds of images are its own")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_going_back_leaves_the_snapshot_as_it_is(kind: dict[str, Any]) -> None:
    storage, model = make(kind), bytearray(SIZE)
    scribble(storage, model, 1)
    snapshots_of(storage).create("then")
    then = bytes(model)
    scribble(storage, model, 2)
    changes = snapshots_of(storage)
    changes.apply(changes.metadata.find_snapshot("then"))
    assert content(storage) == then
    assert verdict(storage) is Verdict.CLEAN
    scribble(storage, bytearray(then), 3)
    assert content(storage, "then") == then


@pytest.mark.pinned("its kinds of images are its own")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_deleting_gives_up_what_only_the_snapshot_had(kind: dict[str, Any]) -> None:
    storage, model = make(kind), bytearray(SIZE)
    scribble(storage, model, 1)
    snapshots_of(storage).create("first")
    scribble(storage, model, 2)
    snapshots_of(storage).create("second")
    second = bytes(model)
    scribble(storage, model, 3)
    for name in ("first", "second"):
        changes = snapshots_of(storage)
        changes.delete(changes.metadata.find_snapshot(name))
        assert content(storage) == model
        assert verdict(storage) is Verdict.CLEAN
        if name == "first":
            assert content(storage, "second") == second
    assert load_qcow2_metadata(storage).snapshots == ()


def test_a_snapshot_has_the_size_that_the_disk_had() -> None:
    storage, model = make({"cluster_bits": 12}), bytearray(SIZE)
    scribble(storage, model, 1)
    snapshots_of(storage).create("small")
    disk = open_disk(storage, writable=True)
    disk.resize(4 * MiB)
    disk.images[0].disk.close()
    assert len(content(storage)) == 4 * MiB
    assert content(storage, "small") == model
    changes = snapshots_of(storage)
    changes.apply(changes.metadata.find_snapshot("small"))
    assert content(storage) == model
    assert verdict(storage) is Verdict.CLEAN


def test_a_refcount_that_would_overflow_is_refused_and_nothing_changes() -> None:
    storage, model = make({"cluster_bits": 12, "refcount_order": 0}), bytearray(SIZE)
    scribble(storage, model, 1)
    before = storage.to_bytes()
    with pytest.raises(RequestError, match="refcounts of 1 bits end at 1"):
        snapshots_of(storage).create("one too many")
    assert storage.to_bytes() == before


def test_names_are_unique_and_ids_count_on() -> None:
    storage = make({"cluster_bits": 12})
    snapshots_of(storage).create("one")
    snapshots_of(storage).create("two")
    with pytest.raises(RequestError, match="there is a snapshot 'one' already"):
        snapshots_of(storage).create("one")
    with pytest.raises(RequestError, match="empty"):
        snapshots_of(storage).create("")
    assert [one.id for one in load_qcow2_metadata(storage).snapshots] == ["1", "2"]


def test_a_disk_with_a_data_file_has_no_snapshots() -> None:
    storage = MemoryStorage(build_qcow2(size=SIZE, data_file_name="disk.data").to_bytes())
    with pytest.raises(UnsupportedFeature, match="external data file"):
        snapshots_of(storage).create("no")


@pytest.mark.parametrize("what", ["create", "apply", "delete"])
def test_a_failing_host_leaves_everything_as_it_was(what: str) -> None:
    model = bytearray(SIZE)
    sound = make({"cluster_bits": 12})
    scribble(sound, model, 1)
    snapshots_of(sound).create("then")
    then = bytes(model)
    scribble(sound, model, 2)
    raw, call = sound.to_bytes(), 0
    while True:
        call += 1
        inner = MemoryStorage(raw)
        faulty = FaultyStorage(inner, Fault(operation="pwrite", call=call, written=100))
        changes = snapshots_of(faulty)
        entry = changes.metadata.find_snapshot("then")
        try:
            changes.create("now") if what == "create" else getattr(changes, what)(entry)
        except StorageError:
            assert content(inner) == model
            assert content(inner, "then") == then
            assert verdict(inner) is Verdict.CLEAN
            continue
        break
    assert call > 4


def test_space_of_a_deleted_snapshot_goes_back_to_the_host() -> None:
    storage, model = make({"cluster_bits": 12}), bytearray(SIZE)
    disk = open_disk(storage, writable=True)
    disk.write(b"old!" * (16 * KiB), offset=0)
    disk.images[0].disk.close()
    snapshots_of(storage).create("then")
    disk = open_disk(storage, writable=True)
    disk.write(b"new!" * (16 * KiB), offset=0)
    disk.images[0].disk.close()
    changes = snapshots_of(storage)
    changes.delete(changes.metadata.find_snapshot("then"))
    assert b"old!" not in storage.to_bytes()
    assert content(storage)[: 64 * KiB] == b"new!" * (16 * KiB)
    assert model == bytes(SIZE)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_snapshot_counted_in_pieces_is_the_same(
    kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bytearray(SIZE)
    whole = MemoryStorage(build_qcow2(size=SIZE, **kind).to_bytes())
    scribble(whole, model, 1)
    pieces = MemoryStorage(whole.to_bytes())
    snapshots_of(whole).create("s", date_ns=0)
    monkeypatch.setattr("qcowkit.engine.qcow2.reform.WINDOW", 64)
    monkeypatch.setattr("qcowkit.engine.qcow2.reform._COUNTED_TOGETHER", 16)
    snapshots_of(pieces).create("s", date_ns=0)
    assert pieces.to_bytes() == whole.to_bytes()


@pytest.mark.pinned("clusters of 512 bytes, and a state behind the disk")
def test_the_state_of_a_machine_above_4_gib_is_kept_through_everything() -> None:
    """S002-07: its size, and the clusters behind the disk that hold it."""
    coverage, size = 64 * 512, 5 << 30
    state = {index: bytes([index]) * 512 for index in range(128, 140)}
    disk = dict.fromkeys(range(8), b"d" * 512)
    built = build_qcow2(
        cluster_bits=9,
        size=2 * coverage,
        l1_size=4,
        clusters=disk | state,
        snapshots=[SnapshotSpec(id="1", name="running", vm_state_size=size)],
    )
    storage = MemoryStorage(built.to_bytes())

    def state_of() -> bytes:
        """The first bytes of the state, through the snapshot's own tables."""
        entry = load_qcow2_metadata(storage).snapshots[0]
        assert entry.vm_state_size == size
        word = int.from_bytes(storage.pread(8, offset=entry.l1_offset + 16), "big")
        entry_word = int.from_bytes(storage.pread(8, offset=word & OFFSET_MASK), "big")
        return storage.pread(512, offset=entry_word & OFFSET_MASK)

    model = bytearray(b"d" * 4096 + bytes(2 * coverage - 4096))
    scribble(storage, model, 3)
    snapshots_of(storage).create("later")
    changes = snapshots_of(storage)
    changes.apply(changes.metadata.find_snapshot("running"))
    scribble(storage, bytearray(2 * coverage), 4)
    changes = snapshots_of(storage)
    changes.delete(changes.metadata.find_snapshot("later"))
    assert state_of() == bytes([128]) * 512
    assert content(storage, "running")[:4096] == b"d" * 4096
    assert verdict(storage) is Verdict.CLEAN
    listed = list_snapshots(Layer(storage=storage, metadata=load_qcow2_metadata(storage)))
    assert [one["vm-state-size"] for one in listed.as_json()] == [size]
