"""qcow2 disks on a storage of which every call fails in turn: nothing flushed is lost, and no flush
succeeds after one that failed. Reliability reference, section 4.1, figure 11."""

from __future__ import annotations

import pytest

from qcowkit.testing.crash_workload import Plan
from qcowkit.testing.fault_loop import KINDS as FAULTS
from qcowkit.testing.fault_loop import SECTOR_KINDS, fault_disk
from tests.crash.crash_matrix import KINDS, PLANS

# One cluster of 2 MiB costs as much as a whole run of the others.
DISKS = [name for name in KINDS if name != "clusters of 2 MiB"]
# A seed with the plan that resizes most.
SHRINKING = len(PLANS) - 1


def plan_of(seed: int) -> Plan:
    return Plan(operations=14, weights=PLANS[seed % len(PLANS)].weights)


@pytest.mark.parametrize("name", DISKS)
def test_a_failing_call_loses_nothing_that_was_flushed(name: str) -> None:
    for seed in (len(name), SHRINKING):
        # A large disk is read as a whole after each request.
        most = 2 if KINDS[name].filled else 5
        kinds = SECTOR_KINDS if KINDS[name].secret else FAULTS
        report = fault_disk(KINDS[name], seed=seed, plan=plan_of(seed), kinds=kinds, most=most)
        assert report.faults == (), f"seed {seed}: {report}"
        assert report.cases > 10


@pytest.mark.soak
@pytest.mark.parametrize("number", range(len(FAULTS)), ids=lambda number: FAULTS[number].name)
@pytest.mark.parametrize("name", DISKS)
def test_every_failing_call_loses_nothing_that_was_flushed(name: str, number: int) -> None:
    fault = (SECTOR_KINDS if KINDS[name].secret else FAULTS)[number]
    for seed in range(len(PLANS)):
        report = fault_disk(KINDS[name], seed=seed, plan=plan_of(seed), kinds=[fault])
        assert report.faults == (), f"seed {seed}: {report}"
