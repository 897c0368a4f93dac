"""qcow2 disks on a storage of which every call fails in turn: nothing flushed is lost, and no flush
succeeds after one that failed. Reliability reference, section 4.1, figure 11."""

from __future__ import annotations

import pytest

from qcowkit.testing.crash_workload import Plan
from qcowkit.testing.fault_loop import KINDS as FAULTS
from qcowkit.testing.fault_loop import FaultKind, fault_disk
from tests.crash.crash_matrix import KINDS, PLANS

# One cluster of 2 MiB costs as much as a whole run of the others.
DISKS = [name for name in KINDS if name != "clusters of 2 MiB"]


def plan_of(seed: int) -> Plan:
    return Plan(operations=14, weights=PLANS[seed % len(PLANS)].weights)


@pytest.mark.parametrize("name", DISKS)
def test_a_failing_call_loses_nothing_that_was_flushed(name: str) -> None:
    report = fault_disk(KINDS[name], seed=len(name), plan=plan_of(len(name)), most=7)
    assert report.faults == (), str(report)
    assert report.cases > 30


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("name", DISKS)
def test_every_failing_call_loses_nothing_that_was_flushed(name: str, fault: FaultKind) -> None:
    for seed in range(5):
        report = fault_disk(KINDS[name], seed=seed, plan=plan_of(seed), kinds=[fault])
        assert report.faults == (), f"seed {seed}: {report}"
