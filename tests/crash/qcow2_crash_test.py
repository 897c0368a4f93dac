"""qcow2 disks after a power cut at any moment: nothing flushed is lost, nothing foreign is shown,
and a check finds leaks at most. Reliability reference, section 3.4, figure 7."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcowkit.testing.crash_disks import DiskKind
from qcowkit.testing.crash_oracle import CrashReport, Oracle, PeerCheck
from qcowkit.testing.crash_run import CrashPlan, crash_disk
from tests.crash.crash_matrix import KINDS, PLANS, repair
from tests.crash.qcow2_oracles import NothingBehindTheEnd

# States of one kind: dear ones have fewer. Together a commit is tried with 10,000.
BUDGET = 480
DEAR = {
    "clusters of 2 MiB": 60,
    "refcount table grows": 200,
    "lazy refcounts, refcount table grows": 120,
    # Every opening derives the key anew.
    "luks, backing": 120,
    "luks, subclusters": 120,
}
WANTED = 10_000
every_kind = pytest.mark.parametrize("name", list(KINDS))


def budget_of(name: str) -> int:
    return DEAR.get(name, BUDGET)


def crash(kind: DiskKind, *, seed: int, budget: int, extra: tuple[Oracle, ...] = ()) -> CrashReport:
    oracles = extra if kind.backing else (NothingBehindTheEnd(), *extra)
    plan = CrashPlan(
        workload=PLANS[seed % len(PLANS)], budget=budget, extra=oracles, repair=repair, recover=4
    )
    return crash_disk(kind, seed=seed, plan=plan)


def test_the_kinds_together_are_tried_with_ten_thousand_states() -> None:
    assert sum(budget_of(name) for name in KINDS) >= WANTED


@every_kind
def test_a_crash_loses_nothing_that_was_flushed(name: str) -> None:
    share = budget_of(name) // len(PLANS)
    for seed in range(len(PLANS)):
        report = crash(KINDS[name], seed=seed, budget=share)
        assert report.violations == (), f"seed {seed}: {report}"
        assert report.states >= share


@pytest.mark.soak
@every_kind
@pytest.mark.parametrize("seed", range(1000, 1025))
def test_many_crashes_lose_nothing_that_was_flushed(name: str, seed: int) -> None:
    report = crash(KINDS[name], seed=seed, budget=budget_of(name) // 2)
    assert report.violations == (), str(report)


@pytest.mark.peer("qemu-img")
@every_kind
def test_qemu_finds_leaks_at_most(name: str, tmp_path: Path) -> None:
    # The names that `DiskKind` puts into its images.
    (tmp_path / "base").touch()
    paths = [tmp_path / "image", tmp_path / "data"][: 1 + KINDS[name].data_file]
    peer = PeerCheck(paths, every=8, secret=KINDS[name].secret)
    report = crash(KINDS[name], seed=50, budget=40, extra=(peer,))
    assert report.violations == (), str(report)
