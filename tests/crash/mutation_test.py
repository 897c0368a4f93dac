"""Each barrier of the qcow2 engine left out in turn: a crash test has to notice within a thousand
states, or it proves nothing. Reliability reference, section 3.4, figure 10."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pytest

from qcowkit.engine.events import QCOW2_BARRIERS
from qcowkit.testing.crash_disks import DiskKind
from qcowkit.testing.crash_oracle import Oracle
from qcowkit.testing.crash_run import CrashPlan, judge_run
from qcowkit.testing.crash_workload import USUAL, Plan, Recorded, run_guest
from qcowkit.testing.mutation import without_barrier
from qcowkit.units import KiB
from tests.crash.crash_matrix import FILLING, KINDS
from tests.crash.qcow2_oracles import CleanOnceClosed, NothingBehindTheEnd, UntouchedWhileMarked

LIMIT = 1000
RESIZING = {**USUAL, "resize": 40, "reopen": 0}
Judges = Callable[[Recorded], Sequence[Oracle]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A disk and a guest that miss the barriers. judges: what has to be asked beside the usual."""

    kind: DiskKind
    plan: Plan
    judges: Judges = lambda _: ()


MARKED = DiskKind(
    name="unknown autoclear bits",
    size=64 * KiB,
    filled=32 * KiB,
    options={"cluster_size": 512},
    autoclear=1 << 40,
)
# A host that leaves discarded bytes where they are.
KEEPING = replace(KINDS["data file"], discard_clears=False)
USUAL_CASE = Case(kind=KINDS["clusters of 512 bytes"], plan=Plan(operations=40))
LAZY = Case(kind=KINDS["lazy refcounts"], plan=Plan(operations=16, weights=FILLING))
SHRINKING = Case(kind=KINDS["refcount table grows"], plan=Plan(operations=16, weights=RESIZING))

CASES: Mapping[tuple[str, ...], Case] = {
    ("autoclear bits before the first change",): Case(
        kind=MARKED, plan=Plan(operations=10), judges=lambda _: [UntouchedWhileMarked(MARKED)]
    ),
    # The barrier between data and tables is the one that has to hold both back.
    ("dirty bit before unaccounted clusters", "data before tables"): LAZY,
    ("refcount table before mapping",): Case(
        kind=KINDS["64 bits a refcount"], plan=Plan(operations=30, weights=FILLING)
    ),
    ("refcount table switch before mapping",): Case(
        kind=KINDS["refcount table grows"],
        # What was discarded is allocated again, in tables that are there already.
        plan=Plan(operations=16, weights={"write": 50, "discard": 30, "flush": 6}, longest=96),
    ),
    ("data before tables",): LAZY,
    ("data and refcounts before tables",): USUAL_CASE,
    ("L1 table before its switch",): Case(
        kind=KINDS["64 bits a refcount"], plan=Plan(operations=16, weights=RESIZING)
    ),
    ("mapping before releasing clusters",): USUAL_CASE,
    ("flush",): USUAL_CASE,
    ("refcounts before the dirty bit is cleared",): LAZY,
    ("dirty bit cleared",): Case(
        kind=LAZY.kind,
        plan=replace(LAZY.plan, closing=1),
        judges=lambda recorded: [CleanOnceClosed(recorded.closed)],
    ),
    ("tables before the new size",): Case(
        kind=KINDS["clusters of 4 KiB, backing, discards passed down"],
        plan=Plan(operations=16, weights=RESIZING),
    ),
    ("new size",): Case(
        kind=KINDS["64 bits a refcount"], plan=Plan(operations=16, weights=RESIZING)
    ),
    ("tables before the smaller size",): Case(
        kind=KEEPING,
        plan=Plan(operations=16, weights=RESIZING),
        judges=lambda _: [NothingBehindTheEnd()],
    ),
    # Each of the two makes the new size durable before the guest is told.
    ("smaller size", "cut of the file"): Case(
        kind=KINDS["clusters of 512 bytes"], plan=Plan(operations=16, weights=RESIZING)
    ),
    ("refcount table before its blocks go",): SHRINKING,
}


def states_until_noticed(names: Sequence[str], case: Case) -> int | None:
    """How many states it takes; None if nobody notices within the limit."""
    states = seed = 0
    while states < LIMIT and seed < 40:
        with without_barrier(*names) as skipped:
            recorded = run_guest(case.kind, seed=seed, plan=case.plan)
            if skipped:
                plan = CrashPlan(
                    workload=case.plan,
                    budget=min(250, LIMIT - states),
                    again=0,
                    stop_at=1,
                    extra=case.judges(recorded),
                )
                report = judge_run(case.kind, recorded, seed=seed, plan=plan)
                states += report.states
                if report.violations:
                    return states
        seed += 1
    return None


def test_every_barrier_of_the_engine_is_left_out_once() -> None:
    assert {name for names in CASES for name in names} == set(QCOW2_BARRIERS)
    assert len(CASES) >= 12


@pytest.mark.parametrize("names", list(CASES), ids=" and ".join)
def test_a_barrier_that_is_left_out_is_missed(names: tuple[str, ...]) -> None:
    assert states_until_noticed(names, CASES[names]) is not None


@pytest.mark.parametrize("names", list(CASES), ids=" and ".join)
def test_with_its_barrier_the_same_experiment_finds_nothing(names: tuple[str, ...]) -> None:
    case = CASES[names]
    for seed in range(2):
        recorded = run_guest(case.kind, seed=seed, plan=case.plan)
        plan = CrashPlan(workload=case.plan, budget=60, again=0, extra=case.judges(recorded))
        report = judge_run(case.kind, recorded, seed=seed, plan=plan)
        assert report.violations == (), str(report)
