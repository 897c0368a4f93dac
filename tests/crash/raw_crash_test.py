"""Raw disks after a power cut at any moment, and on a storage of which every call fails in turn."""

from __future__ import annotations

import pytest

from qcowkit.testing.crash_disks import DiskKind
from qcowkit.testing.crash_run import CrashPlan, crash_disk
from qcowkit.testing.crash_workload import Plan
from qcowkit.testing.fault_loop import fault_disk
from qcowkit.testing.mutation import without_barrier
from qcowkit.units import KiB

PLAN = Plan(operations=40)


@pytest.fixture(params=[True, False], ids=["discards clear", "discards keep"])
def disk(request: pytest.FixtureRequest) -> DiskKind:
    clears: bool = request.param
    return DiskKind(
        name="raw", format="raw", size=64 * KiB, capacity=96 * KiB, discard_clears=clears
    )


def test_a_crash_loses_nothing_that_was_flushed(disk: DiskKind) -> None:
    for seed in range(3):
        plan = CrashPlan(workload=PLAN, budget=300, again=30)
        report = crash_disk(disk, seed=seed, plan=plan)
        assert report.violations == (), f"seed {seed}: {report}"
        assert report.states >= 150


def test_a_failing_call_loses_nothing_that_was_flushed(disk: DiskKind) -> None:
    report = fault_disk(disk, seed=1, plan=Plan(operations=14), most=10)
    assert report.faults == (), str(report)
    assert report.cases >= 40


def test_a_flush_that_is_left_out_is_missed(disk: DiskKind) -> None:
    with without_barrier("flush") as skipped:
        report = crash_disk(disk, seed=0, plan=CrashPlan(workload=PLAN, budget=300, again=0))
    assert skipped
    assert report.violations
