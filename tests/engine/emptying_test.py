"""An image made empty by one switch: what it gives up, what stays, and when it refuses."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qcowkit.engine.barriers import Barriers
from qcowkit.engine.findings import Effort
from qcowkit.engine.qcow2.emptying import Emptier
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.engine.qcow2.snapshots import Snapshots
from qcowkit.errors import RequestError
from qcowkit.image.chain import Chain
from qcowkit.image.lineage import Layer
from qcowkit.image.registry import build_chain
from qcowkit.operations.check import Verdict, check_image
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.crash_states import iter_crash_states
from qcowkit.testing.crash_storage import Content, CrashFiles
from qcowkit.testing.qcow2_builder import Compressed, Data, Zero, build_qcow2
from qcowkit.units import KiB

pytestmark = pytest.mark.pinned("its kinds of images are its own")

SIZE = 128 * KiB
KINDS: dict[str, dict[str, Any]] = {
    "512": {"cluster_bits": 9},
    "4k": {"cluster_bits": 12},
    "narrow": {"cluster_bits": 12, "refcount_order": 0},
    "wide": {"cluster_bits": 9, "refcount_order": 6},
    "extended": {"cluster_bits": 14, "extended_l2": True},
    "version 2": {"cluster_bits": 9, "version": 2},
}


def disk_of(storage: Storage, *, snapshot: str | None = None, writable: bool = False) -> Chain:
    layer = Layer(storage=storage, metadata=load_qcow2_metadata(storage))
    return build_chain([layer], snapshot=snapshot, writable=writable)


def content(storage: Storage, *, snapshot: str | None = None) -> bytes:
    disk = disk_of(storage, snapshot=snapshot)
    return disk.read(offset=0, length=disk.size)


def fill(storage: Storage, seed: int) -> None:
    rng = random.Random(seed)
    disk: Any = disk_of(storage, writable=True)
    for _ in range(10):
        disk.write(rng.randbytes(5000), offset=rng.randrange(SIZE - 5000))
    disk.images[0].disk.close()


def empty(storage: Storage) -> None:
    Emptier(
        storage=storage,
        metadata=load_qcow2_metadata(storage),
        barriers=Barriers(storage),
        effort=Effort(stored=storage.allocated()),
    ).run()


def verdict(storage: Storage) -> Verdict:
    return check_image(Layer(storage=storage, metadata=load_qcow2_metadata(storage))).verdict


def image(kind: str) -> MemoryStorage:
    storage = MemoryStorage(build_qcow2(size=SIZE, **KINDS[kind]).to_bytes())
    fill(storage, 1)
    return storage


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_allocated_and_nothing_leaks(kind: str) -> None:
    storage = image(kind)
    empty(storage)
    assert content(storage) == bytes(SIZE)
    assert verdict(storage) is Verdict.CLEAN
    assert not disk_of(storage).extents().flags.any()
    fill(storage, 2)
    assert verdict(storage) is Verdict.CLEAN


def test_every_kind_of_cluster_is_given_up() -> None:
    clusters = {
        0: Data(payload=b"d" * 4096),
        1: Zero(payload=b"z" * 4096),
        2: Zero(),
        5: Compressed(payload=b"\0" * 40),
        6: Compressed(payload=b"\1" * 40),
    }
    storage = MemoryStorage(build_qcow2(size=SIZE, cluster_bits=12, clusters=clusters).to_bytes())
    empty(storage)
    assert not disk_of(storage).extents().flags.any()
    assert verdict(storage) is Verdict.CLEAN


def test_a_snapshot_keeps_what_it_has() -> None:
    storage = image("4k")
    Snapshots(
        storage=storage,
        metadata=load_qcow2_metadata(storage),
        barriers=Barriers(storage),
        effort=Effort(stored=storage.allocated()),
    ).create("kept")
    before = content(storage)
    fill(storage, 2)
    empty(storage)
    assert content(storage, snapshot="kept") == before
    assert content(storage) == bytes(SIZE)
    assert verdict(storage) is Verdict.CLEAN


def test_an_image_that_was_left_dirty_is_refused() -> None:
    storage = image("4k")
    storage.pwrite([(1).to_bytes(8, "big")], offset=72)
    before = storage.to_bytes()
    with pytest.raises(RequestError, match=r"has to be repaired first \(check -r all\)"):
        empty(storage)
    assert storage.to_bytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_power_cut_leaves_it_full_or_empty(kind: str) -> None:
    storage = image(kind)
    before = content(storage)
    files = CrashFiles([Content.of(storage.to_bytes())])
    empty(files.open())
    seen = set()
    for state in iter_crash_states(files, seed=1, budget=80):
        left = MemoryStorage(state.contents[0].to_bytes())
        found = content(left)
        assert found in (before, bytes(SIZE)), state.label
        assert verdict(left) in (Verdict.CLEAN, Verdict.LEAKS), state.label
        seen.add(found == before)
    assert seen == {True, False}
