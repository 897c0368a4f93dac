"""The simulator finds planted bugs, and finds nothing where there is nothing to find."""

from __future__ import annotations

import pytest

from qcowkit.testing.crash_run import CrashPlan, crash_disk
from qcowkit.testing.crash_workload import Plan, run_guest
from tests.testing.toys import BUGS, Toy

TOYS = CrashPlan(workload=Plan(operations=40), budget=600, again=0)


@pytest.mark.parametrize("two_files", [False, True])
def test_a_writer_that_keeps_the_order_is_never_accused(two_files: bool) -> None:
    for seed in range(3):
        report = crash_disk(Toy(two_files=two_files), seed=seed, plan=TOYS)
        assert report.violations == (), str(report)
        assert report.states > 300


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_within_a_thousand_states(bug: str) -> None:
    states = 0
    for seed in range(3):
        report = crash_disk(Toy(bug), seed=seed, plan=TOYS)
        states += report.states
        if report.violations:
            break
    assert report.violations, f"{bug} survived {states} states"
    assert states <= 1000


def test_data_of_another_sector_are_called_by_their_name() -> None:
    report = crash_disk(Toy("early reuse"), seed=0, plan=TOYS)
    assert any("of sector" in violation.text for violation in report.violations)


def test_the_same_seed_finds_the_same() -> None:
    first, second = (crash_disk(Toy("map before data"), seed=5, plan=TOYS) for _ in range(2))
    assert first == second


def test_a_guest_does_the_same_for_the_same_seed() -> None:
    first, second = (run_guest(Toy(), seed=7) for _ in range(2))
    assert first.files.effects == second.files.effects
    assert repr(first.log.operations) == repr(second.log.operations)
    assert repr(first.log.operations) != repr(run_guest(Toy(), seed=8).log.operations)
