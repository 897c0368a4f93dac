"""Power cuts and failing calls during a rebase: the disk shows the same, over the old base or the
new one, and a second run completes the first."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from qcowkit.errors import QcowkitError, StorageError
from qcowkit.operations.rebase import NewBase, RebaseOptions, rebase_layers
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

Chains = tuple[tuple[Kind, ...], tuple[Kind, ...]]
CASES: dict[str, Chains] = {
    "raw to qcow2": ((QCOW2, RAW), (QCOW2,)),
    "to nothing": ((Kind(options=TINY), QCOW2), ()),
    "from nothing": ((QCOW2,), (VHD,)),
    "subclusters": ((Kind(options=EXTENDED), RAW), (Kind(options=EXTENDED), RAW)),
    "lazy": ((Kind(options={"lazy_refcounts": True, **SMALL}), RAW), (RAW,)),
    "clusters of 64 KiB": ((Kind(options={"cluster_size": 64 * KiB}), RAW), (RAW,)),
}
# Long enough to reach beyond the first sector.
NAME = "new" * 200


def make(case: Chains, seed: int) -> CrashFiles:
    old, new = case
    files = make_chain(old, seed=seed)
    others = make_chain(new, seed=seed + 50).live if new else []
    return CrashFiles([*files.live, *others])


def rebase(files: CrashFiles, case: Chains) -> None:
    old, new = case
    kinds = [*old, *new]
    rebase_layers(
        tuple(layers_of(files, kinds, writable=(0,), depths=range(len(old)))),
        tuple(layers_of(files, kinds, depths=range(len(old), len(kinds)))),
        NewBase(name=NAME, format=new[0].format) if new else NewBase(name=None),
        opening=OPENING,
        options=RebaseOptions(threads=1),
    )


def view(files: CrashFiles, case: Chains) -> tuple[CrashFiles, Sequence[Kind], bool]:
    """The image over the base that its header names, and whether that is the new one."""
    old, new = case
    metadata = layers_of(files, old)[0].metadata
    names = [one.names[0] for one in metadata.references]
    if names == ([NAME] if new else []):
        return files.like([files.live[0], *files.live[len(old) :]]), (old[0], *new), True
    assert names == (["base"] if len(old) > 1 else [])
    return files.like(files.live[: len(old)]), old, False


def judge(files: CrashFiles, case: Chains, before: bytes) -> list[str]:
    """What is wrong with files that a crash or a failure has left."""
    chain, kinds, done = view(files, case)
    if content(chain, kinds) != before:
        return [f"the disk shows something else over the {'new' if done else 'old'} base"]
    found = faults_of(chain, kinds, leaks=True)
    if not done:
        rebase(files, case)
        chain, kinds, done = view(files, case)
        if not done or content(chain, kinds) != before:
            found.append("the second run has not completed the first")
    return found + faults_of(chain, kinds, leaks=True)


def crash_faults(name: str, *, budget: int, seed: int = 1) -> list[str]:
    case = CASES[name]
    files = make(case, seed)
    before = content(files.like(files.live[: len(case[0])]), case[0])
    rebase(files, case)
    found = []
    for state in iter_crash_states(files, seed=seed, budget=budget):
        left = files.like([one.copy() for one in state.contents])
        try:
            found += [f"{state.label}: {text}" for text in judge(left, case, before)]
        except QcowkitError as error:
            found.append(f"{state.label}: {error}")
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_power_cut_leaves_the_disk_over_one_base_or_the_other(name: str) -> None:
    assert crash_faults(name, budget=60) == []


@pytest.mark.soak
@pytest.mark.parametrize("name", CASES)
def test_many_power_cuts_leave_the_disk_over_one_base_or_the_other(name: str) -> None:
    for seed in range(4):
        assert crash_faults(name, budget=500, seed=seed) == []


def test_a_base_that_is_named_before_the_copies_are_durable_is_noticed() -> None:
    names = ("flush", "mapping before releasing clusters", "what the first cluster will name")
    with without_barrier(*names):
        found = [
            line
            for name in ("raw to qcow2", "to nothing")
            for line in crash_faults(name, budget=200)
        ]
    assert found != []


@pytest.mark.parametrize("name", ["raw to qcow2", "clusters of 64 KiB"])
def test_whatever_call_fails_the_disk_shows_the_same(name: str) -> None:
    case = CASES[name]
    made = make(case, 1)
    before = content(made.like(made.live[: len(case[0])]), case[0])

    def operation(files: FaultyFiles) -> str | None:
        try:
            rebase(files, case)
        except StorageError as error:
            return str(error)
        return None

    def after(files: FaultyFiles, failure: str | None) -> list[str]:
        found = [] if failure else ["a failure was not reported"]
        for keep in (True, False):
            try:
                found += judge(files.crash(keep=keep), case, before)
            except QcowkitError as error:
                found.append(str(error))
        return found

    report = run_with_every_fault(operation, lambda: made, after, most=12)
    assert report.faults == (), str(report)
    assert report.cases > 40
