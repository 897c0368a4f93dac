"""Power cuts in the middle of a repair: no moment is worse than before it began, the next repair
ends what this one left, and every barrier is needed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from qcowkit.engine.barriers import Barriers
from qcowkit.engine.findings import Severity
from qcowkit.engine.qcow2.repair import repair_qcow2
from qcowkit.engine.repairs import ChangeLog, RepairMode
from qcowkit.errors import CorruptMetadata, OperationError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.crash_states import CrashState, iter_crash_states
from qcowkit.testing.crash_storage import Content, CrashFiles
from qcowkit.units import KiB
from tests.damage import DAMAGES, EXTENDED, TWO, make, spoil_at_random
from tests.qcow2_oracle import view_of, worsened

BUDGET = 150
REPAIRED = {name: damage for name, damage in DAMAGES.items() if damage.kinds}


class Watched(Barriers):
    """Barriers that may leave one out. `seen`: the names of those that were waited for."""

    def __init__(self, storage: Storage, *, without: str | None = None) -> None:
        super().__init__(storage)
        self._without = without
        self.seen: list[str] = []

    def wait(self, name: str) -> None:
        if self.pending:
            self.seen.append(name)
            if name == self._without:
                return
        super().wait(name)


def run_repair(raw: bytes, *, without: str | None = None) -> tuple[CrashFiles, Watched]:
    """The journal of a repair."""
    files = CrashFiles([Content.of(raw)])
    storage = files.open()
    barriers = Watched(storage, without=without)
    repair_qcow2(storage, mode=RepairMode.ALL, barriers=barriers)
    return files, barriers


def states(files: CrashFiles, budget: int = BUDGET) -> Iterator[tuple[CrashState, bytes]]:
    for state in iter_crash_states(files, seed=1, budget=budget):
        yield state, state.contents[0].to_bytes()


def faults(raw: bytes, files: CrashFiles, budget: int = BUDGET) -> list[str]:
    """What is wrong in any state of a run, and with what is durable at its end."""
    before = view_of(raw)
    found = [
        f"{state.label}: {fault}"
        for state, left in states(files, budget)
        for fault in worsened(before, left, raw)
    ]
    done = files.crash(keep=False).live[0].to_bytes()
    if done != files.live[0].to_bytes():
        found.append("the repair returns before all of it is durable")
    return found


@pytest.mark.parametrize("name", list(REPAIRED))
def test_no_moment_is_worse_than_before(name: str) -> None:
    raw = REPAIRED[name].make().to_bytes()
    files, _ = run_repair(raw)
    assert faults(raw, files) == []


@pytest.mark.parametrize("name", list(REPAIRED))
def test_the_next_repair_ends_what_was_begun(name: str) -> None:
    raw = REPAIRED[name].make().to_bytes()
    before = view_of(raw)
    files, _ = run_repair(raw)
    for state, left in states(files):
        storage = MemoryStorage(left)
        repaired = repair_qcow2(storage, mode=RepairMode.ALL)
        corruptions = repaired.after.log.count(Severity.CORRUPTION)
        assert corruptions == REPAIRED[name].left, state.label
        assert worsened(before, storage.to_bytes(), raw) == [], state.label
        changes = ChangeLog()
        repair_qcow2(storage, mode=RepairMode.ALL, changes=changes)
        assert not changes, state.label


def test_a_cut_in_the_second_repair_is_no_worse_either() -> None:
    raw = DAMAGES["snapshot table and refcounts"].make().to_bytes()
    before = view_of(raw)
    files, _ = run_repair(raw)
    for state, left in states(files, 40):
        again, _ = run_repair(left)
        for second, remains in states(again, 20):
            label = f"{state.label}; {second.label}"
            assert worsened(before, remains, raw) == [], label


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(500))
def test_no_moment_of_any_repair_is_worse_than_before(seed: int) -> None:
    noise = random.Random(seed)
    image = make(**noise.choice([{}, {"snapshots": TWO, "size": 128 * KiB}, EXTENDED]))
    spoil_at_random(image, noise)
    raw = image.to_bytes()
    try:
        files, _ = run_repair(raw)
    except (OperationError, CorruptMetadata):
        return
    assert faults(raw, files, 1000) == []


# Which damage shows that a barrier is needed.
BARRIERS = {
    "repair: unknown autoclear bits cleared": "unknown autoclear bits",
    "repair: snapshot table written": "snapshot with too much extra data",
    "repair: snapshot table switched": "snapshot table that is an L2 table",
    "repair: refcounts written": "no refcount table",
    "repair: refcounts switched": "shared and a bad table",
    "repair: counts raised": "shared",
    "repair: entries written": "preallocated zeros unaligned",
    "repair: counts lowered": "leak with its flag",
    "repair: all tables written": "leak with its flag",
    "repair: header bits cleared": "dirty",
}


def test_all_barriers_are_known() -> None:
    seen: set[str] = set()
    for damage in REPAIRED.values():
        seen.update(run_repair(damage.make().to_bytes())[1].seen)
    assert seen == set(BARRIERS)


@pytest.mark.parametrize("barrier", list(BARRIERS))
def test_a_barrier_that_is_left_out_is_missed(barrier: str) -> None:
    raw = DAMAGES[BARRIERS[barrier]].make().to_bytes()
    files, watched = run_repair(raw, without=barrier)
    assert barrier in watched.seen
    assert faults(raw, files, 1000) != []
