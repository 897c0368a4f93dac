"""Power cuts and failing calls while options change: the disk and its snapshots are what they were
at any moment, and the change can be begun again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from qcowkit.engine.events import QCOW2_REFORM_BARRIERS
from qcowkit.errors import QcowkitError
from qcowkit.operations.check import Verdict
from qcowkit.testing.crash_states import iter_crash_states
from qcowkit.testing.fault_loop import FaultyFiles, run_with_every_fault
from qcowkit.units import KiB
from tests.amending import Disk, Leaky, View, after_cut, files_of, make_disk, on

pytestmark = pytest.mark.pinned("its kinds of images are its own")

SIZE = 96 * KiB
Case = tuple[dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "wider refcounts": ({"cluster_bits": 9, "snapshots": 1}, {"refcount_bits": 64}),
    "narrower refcounts": ({"cluster_bits": 12}, {"refcount_bits": 1}),
    "lazy refcounts": ({"cluster_bits": 12}, {"lazy_refcounts": True}),
    "upgrade": ({"cluster_bits": 9, "version": 2, "snapshots": 1}, {"compat": "1.1"}),
    "downgrade": ({"cluster_bits": 9, "snapshots": 1}, {"compat": "0.10"}),
    "downgrade over a base": ({"cluster_bits": 12, "base": 64 * KiB}, {"compat": "0.10"}),
    "subclusters on": ({"cluster_bits": 14, "snapshots": 1}, {"extended_l2": True}),
    "subclusters off": (
        {"cluster_bits": 14, "extended_l2": True, "base": 64 * KiB, "snapshots": 1},
        {"extended_l2": False},
    ),
    "subclusters off in a data file": (
        {"cluster_bits": 14, "extended_l2": True, "base": 64 * KiB, "data_file": True},
        {"extended_l2": False},
    ),
    "smaller clusters": (
        {"cluster_bits": 13, "snapshots": 1, "packed": True},
        {"cluster_size": 2 * KiB},
    ),
    "larger clusters": (
        {"cluster_bits": 9, "snapshots": 1, "packed": True, "base": 40 * KiB},
        {"cluster_size": 4 * KiB},
    ),
    "larger clusters in a data file": (
        {"cluster_bits": 9, "base": 40 * KiB, "data_file": True},
        {"cluster_size": 4 * KiB},
    ),
    "another compression": (
        {"cluster_bits": 12, "snapshots": 1, "packed": True, "count": 20},
        {"compression_type": "zstd"},
    ),
    "several at once": (
        {"cluster_bits": 14, "extended_l2": True, "snapshots": 1, "packed": True},
        {"extended_l2": False, "cluster_size": 4 * KiB, "compat": "0.10"},
    ),
}


def made(case: str) -> Disk:
    return make_disk(size=SIZE, **CASES[case][0])


def judge(left: Disk, before: View, options: dict[str, Any]) -> Iterator[str]:
    """What is wrong in a state that an interruption has left."""
    if left.view() != before:
        yield "the disk or a snapshot has changed"
    verdict = left.check().verdict
    if verdict not in (Verdict.CLEAN, Verdict.LEAKS):
        yield f"a check says {verdict.value}"
    left.amend(**options)
    if left.view() != before:
        yield "the disk or a snapshot has changed once the change was begun again"
    if left.check().verdict not in (Verdict.CLEAN, Verdict.LEAKS):
        yield "a check finds corruptions once the change was begun again"


def power_cuts(case: str, *, budget: int, seed: int = 1, without: str = "") -> list[str]:
    disk, options = made(case), CASES[case][1]
    before, files = disk.view(), files_of(disk)
    live = on(files, disk)
    storages = [one for one in (live.data, live.storage) if one is not None]
    live.amend(barriers=Leaky(*storages, without=without), **options)
    found = []
    for state in iter_crash_states(files, seed=seed, budget=budget):
        try:
            faults = list(judge(after_cut(state.contents, disk), before, options))
        except QcowkitError as error:
            faults = [str(error)]
        found += [f"{state}: {text}" for text in faults]
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_power_cut_leaves_the_disk_as_it_is(case: str) -> None:
    assert power_cuts(case, budget=24) == []


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES)
def test_many_power_cuts_leave_the_disk_as_it_is(case: str) -> None:
    for seed in range(3):
        assert power_cuts(case, budget=300, seed=seed) == []


@pytest.mark.parametrize("name", QCOW2_REFORM_BARRIERS[:1])
@pytest.mark.parametrize("case", ["wider refcounts", "subclusters off", "larger clusters"])
def test_a_barrier_that_is_left_out_is_missed(case: str, name: str) -> None:
    assert power_cuts(case, budget=200, without=name) != []


def amend_faulty(files: FaultyFiles, disk: Disk, options: dict[str, Any]) -> QcowkitError | None:
    try:
        on(files, disk).amend(**options)
    except QcowkitError as error:
        return error
    return None


def judge_fault(
    files: FaultyFiles, failed: QcowkitError | None, disk: Disk, before: View, case: str
) -> Iterator[str]:
    if failed is None:
        # Only what is given back at the end may fail in silence, and nothing does.
        yield "a call failed, and nobody was told"
    options = CASES[case][1]
    for keep in (True, False):
        left = after_cut(tuple(files.crash(keep=keep).live), disk)
        yield from judge(left, before, options)


@pytest.mark.parametrize("case", CASES)
def test_a_failing_call_leaves_the_disk_as_it_is(case: str) -> None:
    disk, options = made(case), CASES[case][1]
    before, files = disk.view(), files_of(disk)
    report = run_with_every_fault(
        lambda faulty: amend_faulty(faulty, disk, options),
        lambda: files,
        lambda faulty, failed: judge_fault(faulty, failed, disk, before, case),
        most=4,
    )
    assert report.faults == (), str(report)
    assert report.cases > 6
