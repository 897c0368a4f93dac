"""VHD and raw disks whose host fails at any one call: retries work and nothing is lost.

Reliability reference, sections 4.1 and 4.2."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qcowkit.testing.crash_disks import DiskKind
from qcowkit.testing.crash_oracle import CrashedDisk, GuestDataKept, OpensReadOnly, Recovers
from qcowkit.testing.crash_states import CrashState
from qcowkit.testing.crash_workload import USUAL, Guest, Plan
from qcowkit.testing.fault_loop import (
    KINDS as FAULTS,
)
from qcowkit.testing.fault_loop import FaultKind, FaultyFiles, run_with_every_fault, use_faulty
from tests.crash.vhd_kinds import KINDS, BlocksSound, VhdKind

PLAN = Plan(operations=14, weights={**USUAL, "resize": 16}, look=3)


def judge(kind: VhdKind | DiskKind, files: FaultyFiles, guest: Guest) -> Iterator[str]:
    """What is wrong after a run: seen by the guest, or found in what the host has, with or without
    what was not flushed."""
    yield from guest.faults
    moment = files.tick()
    for label, keep in (("reopened", True), ("power cut", False)):
        contents = tuple(files.crash(keep=keep).live)
        state = CrashState(label=label, first=moment, last=moment, contents=contents)
        disk = CrashedDisk(state, files, kind)
        oracles = [OpensReadOnly(), GuestDataKept(guest.log), Recovers()]
        if kind.format != "raw":
            oracles.append(BlocksSound())
        for oracle in oracles:
            yield from (f"{label}: {oracle.name}: {text}" for text in oracle.judge(disk))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize(
    "kind",
    [*KINDS, DiskKind(name="raw", format="raw", capacity=96 << 10)],
    ids=lambda kind: kind.name,
)
def test_whichever_call_fails_nothing_that_was_flushed_is_lost(
    kind: VhdKind | DiskKind, fault: FaultKind
) -> None:
    made = kind.make()
    report = run_with_every_fault(
        lambda files: use_faulty(kind, files, seed=11, plan=PLAN),
        lambda: made,
        lambda files, guest: judge(kind, files, guest),
        kinds=[fault],
        most=25,
    )
    assert report.faults == ()
    assert report.cases
