"""Power cuts and failing calls while an overlay is committed: what the top shows never changes,
nothing is worse than leaks, and a second run completes the first."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from qcowkit.errors import OperationError, QcowkitError, StorageError
from qcowkit.operations.commit import CommitOptions, commit_layers
from qcowkit.testing.crash_states import iter_crash_states
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.testing.fault_loop import FaultyFiles, run_with_every_fault
from qcowkit.testing.mutation import without_barrier
from qcowkit.units import KiB
from tests.chain_disks import (
    EXTENDED,
    OPENING,
    QCOW2,
    RAW,
    SMALL,
    TINY,
    VHD,
    Kind,
    content,
    faults_of,
    layers_of,
    make_chain,
)

pytestmark = pytest.mark.pinned("its kinds of images are its own")

CHAINS: dict[str, tuple[Kind, ...]] = {
    "raw": (QCOW2, RAW),
    "vhd": (QCOW2, VHD),
    "qcow2": (Kind(options=TINY), QCOW2),
    "subclusters": (Kind(options=EXTENDED), Kind(options=EXTENDED)),
    "lazy": (Kind(options={"lazy_refcounts": True, **SMALL}),) * 2,
    "longer top": (Kind(size=160 * KiB, options=SMALL), Kind(options=TINY)),
    "three": (QCOW2, Kind(options=TINY), RAW),
}
CLOSING = "closing"


def commit(files: CrashFiles, kinds: Sequence[Kind]) -> None:
    """Into the lowest layer; only a direct base lets the overlay be emptied."""
    depth = len(kinds) - 1
    empty = depth == 1
    layers = layers_of(files, kinds, writable=(0, depth) if empty else (depth,))
    options = CommitOptions(empty=empty, threads=1)
    commit_layers(layers, depth=depth, opening=OPENING, options=options)


def judge(files: CrashFiles, kinds: Sequence[Kind], top: bytes) -> list[str]:
    """What is wrong with files that a crash or a failure has left."""
    depth = len(kinds) - 1
    if content(files, kinds) != top:
        return ["the top shows something else"]
    found = faults_of(files, kinds, leaks=True)
    commit(files, kinds)
    if content(files, kinds) != top:
        found.append("the top shows something else after the second run")
    if content(files, kinds, depth=depth)[: len(top)] != top:
        found.append("the second run has not completed the first")
    return found + faults_of(files, kinds, leaks=True)


def crash_faults(name: str, *, budget: int, seed: int = 1) -> list[str]:
    kinds = CHAINS[name]
    files = make_chain(kinds, seed=seed)
    top = content(files, kinds)
    commit(files, kinds)
    found = []
    for state in iter_crash_states(files, seed=seed, budget=budget):
        left = files.like([one.copy() for one in state.contents])
        try:
            found += [f"{state.label}: {text}" for text in judge(left, kinds, top)]
        except QcowkitError as error:
            found.append(f"{state.label}: {error}")
    return found


@pytest.mark.parametrize("name", CHAINS)
def test_a_power_cut_changes_nothing_that_the_top_shows(name: str) -> None:
    assert crash_faults(name, budget=60) == []


@pytest.mark.soak
@pytest.mark.parametrize("name", CHAINS)
def test_many_power_cuts_change_nothing_that_the_top_shows(name: str) -> None:
    for seed in range(4):
        assert crash_faults(name, budget=500, seed=seed) == []


def test_an_overlay_that_is_emptied_before_its_base_is_durable_is_noticed() -> None:
    with without_barrier("flush", "footer before what relies on it"):
        found = [line for name in ("qcow2", "raw") for line in crash_faults(name, budget=200)]
    assert found != []


@pytest.mark.parametrize("name", ["raw", "qcow2", "vhd"])
def test_whatever_call_fails_the_top_shows_the_same(name: str) -> None:
    kinds = CHAINS[name]
    made = make_chain(kinds)
    top = content(made, kinds)

    def operation(files: FaultyFiles) -> str | None:
        try:
            commit(files, kinds)
        except (StorageError, OperationError) as error:
            return str(error)
        return None

    def after(files: FaultyFiles, failure: str | None) -> list[str]:
        found = [] if failure else ["a failure was not reported"]
        for keep in (True, False):
            try:
                found += judge(files.crash(keep=keep), kinds, top)
            except QcowkitError as error:
                found.append(str(error))
        return found

    report = run_with_every_fault(operation, lambda: made, after, most=12)
    assert report.faults == (), str(report)
    assert report.cases > 40
