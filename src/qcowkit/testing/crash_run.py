"""A whole experiment from one seed: a guest's run, its crash states, their judges, and crashes
within the recovery of some of them. Reliability reference, section 3.4."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from qcowkit.testing.crash_oracle import (
    CrashedDisk,
    CrashReport,
    GuestDataKept,
    LeaksAtMost,
    OpensReadOnly,
    Oracle,
    Recovers,
    Violation,
    judge_states,
)
from qcowkit.testing.crash_states import CrashState, iter_crash_states
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.testing.crash_workload import Crashable, Plan, Recorded, run_guest
from qcowkit.testing.guest_log import values_of

_AGAIN_SEED = 0x2C


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashPlan:
    """workload: what the guest does. budget: states at most, those of second crashes not counted.

    recover: one state of so many is opened for writing. again: one state of so many is used
    further and crashed again, 0 for none; again_budget: states of each of these. repair: makes the
    check of an image clean. stop_at: so many broken promises end the run. extra: more judges."""

    workload: Plan = field(default_factory=Plan)
    budget: int | None = 500
    recover: int = 2
    again: int = 50
    again_budget: int = 12
    repair: Callable[[CrashFiles], None] | None = None
    stop_at: int = 20
    extra: Sequence[Oracle] = ()


def crash_disk(disk: Crashable, *, seed: int, plan: CrashPlan | None = None) -> CrashReport:
    """Run a guest on a new disk and judge what crashes leave of it. The same seed, the same
    result."""
    plan = plan or CrashPlan()
    recorded = run_guest(disk, seed=seed, plan=plan.workload)
    return judge_run(disk, recorded, seed=seed, plan=plan)


def judge_run(disk: Crashable, recorded: Recorded, *, seed: int, plan: CrashPlan) -> CrashReport:
    """Judge the crash states of a run. What was wrong without a crash is a violation too."""
    files, log = recorded.files, recorded.log
    oracles: list[Oracle] = [
        OpensReadOnly(),
        LeaksAtMost(),
        GuestDataKept(log),
        Recovers(repair=plan.repair, every=plan.recover),
        *plan.extra,
    ]
    again: CrashesAgain | None = None
    if plan.again:
        again = CrashesAgain(disk, plan=plan, seed=seed)
        oracles.append(again)
    states = iter_crash_states(files, seed=seed, budget=plan.budget, marks=log.marks)
    report = judge_states(states, oracles, files=files, opener=disk, stop_at=plan.stop_at)
    faults = tuple(
        Violation(oracle="guest", state="no crash", text=text) for text in recorded.faults
    )
    return replace(
        report,
        states=report.states + (again.states if again else 0),
        violations=faults + report.violations,
    )


class CrashesAgain:
    """Double crashes: a disk that was recovered is used, and crashes again.

    states: how many of the second crashes were judged."""

    name = "again"

    def __init__(self, disk: Crashable, *, plan: CrashPlan, seed: int) -> None:
        """plan: its `again` and `again_budget` are used."""
        self._disk = disk
        self._plan = plan
        self._noise = random.Random(seed ^ _AGAIN_SEED)
        self.states = 0

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        """See `Oracle`."""
        if disk.failure is not None or self._noise.randrange(self._plan.again):
            return
        seed = self._noise.getrandbits(32)
        workload = Plan(operations=4, weights=self._plan.workload.weights, look=4)
        recorded = run_guest(
            self._disk,
            seed=seed,
            plan=workload,
            files=disk.fresh(),
            initial=values_of(disk.content),
        )
        plan = replace(self._plan, again=0, budget=self._plan.again_budget, recover=2, extra=())
        report = judge_run(self._disk, recorded, seed=seed, plan=plan)
        self.states += report.states
        for violation in report.violations:
            yield f"second crash: {violation}"


def iter_runs(seed: int, count: int) -> Iterator[int]:
    """Seeds of `count` runs."""
    noise = random.Random(seed)
    for _ in range(count):
        yield noise.getrandbits(32)


def states_of(recorded: Recorded, *, seed: int, budget: int | None) -> Iterator[CrashState]:
    """The states of a run, for judges of one's own."""
    return iter_crash_states(recorded.files, seed=seed, budget=budget, marks=recorded.log.marks)
