"""Power cuts while a snapshot is taken, gone back to or deleted: wholly before or wholly after, and
whatever the guest writes next changes no snapshot."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from qcowkit.engine.barriers import Barriers
from qcowkit.engine.events import QCOW2_REFORM_BARRIERS
from qcowkit.engine.findings import Effort
from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.engine.qcow2.snapshots import Snapshots
from qcowkit.errors import QcowkitError
from qcowkit.image.lineage import Layer
from qcowkit.image.registry import build_chain
from qcowkit.operations.check import Verdict, check_image
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.crash_states import iter_crash_states
from qcowkit.testing.crash_storage import Content, CrashFiles
from qcowkit.testing.qcow2_builder import build_qcow2
from qcowkit.units import KiB

SIZE = 128 * KiB
KINDS: dict[str, dict[str, Any]] = {
    "512": {"cluster_bits": 9},
    "4k": {"cluster_bits": 12},
    "wide": {"cluster_bits": 9, "refcount_order": 6},
    "narrow": {"cluster_bits": 12, "refcount_order": 2},
    "extended": {"cluster_bits": 14, "extended_l2": True},
    "version 2": {"cluster_bits": 9, "version": 2},
}
VERBS: dict[str, Callable[[Snapshots], object]] = {
    "create": lambda one: one.create("new"),
    "apply": lambda one: one.apply(one.metadata.find_snapshot("first")),
    "delete": lambda one: one.delete(one.metadata.find_snapshot("first")),
}
View = dict[str, bytes]


class Leaky(Barriers):
    """Barriers of which one waits for nothing."""

    def __init__(self, storage: Storage, without: str) -> None:
        super().__init__(storage)
        self._without = without

    def wait(self, name: str) -> None:
        if name != self._without:
            super().wait(name)


def disk_of(storage: Storage, *, snapshot: str | None = None, writable: bool = False) -> Any:
    layer = Layer(storage=storage, metadata=load_qcow2_metadata(storage))
    # Many disks are open at once, which need no threads.
    options = OpenOptions(cache_clean_interval=0)
    return build_chain([layer], snapshot=snapshot, writable=writable, options=options)


def scribble(storage: Storage, seed: int, *, count: int = 12) -> None:
    rng = random.Random(seed)
    disk = disk_of(storage, writable=True)
    for _ in range(count):
        offset = rng.randrange(SIZE - 5000)
        disk.write(rng.randbytes(rng.choice((512, 700, 5000))), offset=offset)
    disk.images[0].disk.close()


def view_of(storage: Storage) -> View:
    """The content of the disk, under no name, and of every snapshot."""
    names = [one.name for one in load_qcow2_metadata(storage).snapshots]
    views = {"": disk_of(storage)} | {name: disk_of(storage, snapshot=name) for name in names}
    return {name: disk.read(offset=0, length=disk.size) for name, disk in views.items()}


def changes(storage: Storage, barriers: Barriers | None = None) -> Snapshots:
    return Snapshots(
        storage=storage,
        metadata=load_qcow2_metadata(storage),
        barriers=barriers or Barriers(storage),
        effort=Effort(stored=storage.allocated()),
    )


def image_of(kind: str) -> bytes:
    """A disk with two snapshots that has changed since."""
    storage = MemoryStorage(build_qcow2(size=SIZE, **KINDS[kind]).to_bytes())
    for number, name in enumerate(("first", "second")):
        scribble(storage, number)
        changes(storage).create(name)
    scribble(storage, 7)
    return storage.to_bytes()


def faults(kind: str, verb: str, *, budget: int, seed: int = 1, without: str = "") -> list[str]:
    """What is wrong in any state that a power cut may leave."""
    raw = image_of(kind)
    files = CrashFiles([Content.of(raw)])
    storage = files.open()
    barriers = Leaky(storage, without) if without else Barriers(storage)
    before = view_of(MemoryStorage(raw))
    VERBS[verb](changes(storage, barriers))
    # What comes next must not be mixed with it either.
    scribble(storage, 9, count=2)
    storage.flush()
    done = MemoryStorage(raw)
    VERBS[verb](changes(done))
    after = view_of(done)
    final = view_of(storage)[""]
    found = []
    for state in iter_crash_states(files, seed=seed, budget=budget):
        left = MemoryStorage(state.contents[0].to_bytes())
        try:
            fault = judge(left, before, after, final)
        except QcowkitError as error:
            fault = str(error)
        if fault:
            found.append(f"{state}: {fault}")
    return found


def is_between(disk: bytes, first: bytes, last: bytes) -> bool:
    """Whether each sector is that of one or the other."""
    parts = (slice(at, at + 512) for at in range(0, len(disk), 512))
    return len(disk) == len(first) and all(disk[at] in (first[at], last[at]) for at in parts)


def judge(storage: MemoryStorage, before: View, after: View, final: bytes) -> str:
    """Why a state is wrong; empty if it is not. final: the disk once the guest has written on."""
    found = view_of(storage)
    disk = found[""]
    if disk != before[""] and not is_between(disk, after[""], final):
        return "the disk is neither what it was nor what it was to become"
    names = set(found)
    kept = {name: data for name, data in found.items() if name}
    if names not in (set(before), set(after)):
        return f"the snapshots are {sorted(names)}"
    wanted = [one for one in (before, after) if names == set(one)]
    if not any(kept == {name: one[name] for name in kept} for one in wanted):
        return "a snapshot has changed"
    verdict = check_image(Layer(storage=storage, metadata=load_qcow2_metadata(storage))).verdict
    if verdict not in (Verdict.CLEAN, Verdict.LEAKS):
        return f"a check says {verdict.value}"
    scribble(storage, 11)
    later = view_of(storage)
    if {name: data for name, data in later.items() if name} != kept:
        return "a later write has changed a snapshot"
    return ""


@pytest.mark.pinned("its kinds of images are its own")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_power_cut_leaves_all_or_nothing(kind: str, verb: str) -> None:
    assert faults(kind, verb, budget=40) == []


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", VERBS)
def test_many_power_cuts_leave_all_or_nothing(kind: str, verb: str) -> None:
    for seed in range(4):
        assert faults(kind, verb, budget=300, seed=seed) == []


@pytest.mark.pinned("its kinds of images are its own")
@pytest.mark.parametrize("name", QCOW2_REFORM_BARRIERS)
def test_a_barrier_that_is_left_out_is_missed(name: str) -> None:
    found = [line for verb in VERBS for line in faults("4k", verb, budget=120, without=name)]
    assert found != []
