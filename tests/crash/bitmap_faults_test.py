"""Bitmaps on a storage of which every call fails in turn: what a bitmap says can be relied on, or
it says that it cannot."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qcowkit.testing.crash_disks import DiskKind
from qcowkit.testing.crash_oracle import CrashedDisk
from qcowkit.testing.crash_states import CrashState
from qcowkit.testing.crash_workload import USUAL, Guest, Plan
from qcowkit.testing.fault_loop import (
    FaultReport,
    FaultyFiles,
    judge_faulty,
    run_with_every_fault,
    use_faulty,
)
from tests.crash.bitmap_kinds import KINDS, TellsAllChanges

PLANS = (
    Plan(operations=10, weights={**USUAL, "reopen": 20, "resize": 0}),
    Plan(operations=10, weights={**USUAL, "reopen": 10, "resize": 20}),
)
pytestmark = pytest.mark.pinned("its kinds of images are its own")


def judge(kind: DiskKind, plan: Plan, files: FaultyFiles, guest: Guest) -> Iterator[str]:
    """What is wrong after a run with a failure."""
    yield from judge_faulty(kind, files, guest)
    oracle, moment = TellsAllChanges(kind, plan), files.tick()
    for keep in (True, False):
        contents = tuple(files.crash(keep=keep).live)
        state = CrashState(label="end", first=moment, last=moment, contents=contents)
        yield from oracle.judge(CrashedDisk(state, files, kind))


def fault(kind: DiskKind, *, seed: int, plan: Plan, most: int | None) -> FaultReport:
    made = kind.make()
    return run_with_every_fault(
        lambda files: use_faulty(kind, files, seed=seed, plan=plan),
        lambda: made,
        lambda files, guest: judge(kind, plan, files, guest),
        most=most,
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_failing_call_makes_no_bitmap_too_clean(name: str) -> None:
    for seed, plan in enumerate(PLANS):
        report = fault(KINDS[name], seed=seed, plan=plan, most=4)
        assert report.faults == (), f"seed {seed}: {report}"
        assert report.cases > 10


@pytest.mark.soak
@pytest.mark.parametrize("name", KINDS)
def test_no_failing_call_makes_a_bitmap_too_clean(name: str) -> None:
    for seed, plan in enumerate(PLANS):
        report = fault(KINDS[name], seed=seed, plan=plan, most=None)
        assert report.faults == (), f"seed {seed}: {report}"
