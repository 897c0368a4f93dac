"""Power cuts and failing calls while a file is made shorter: the disk and its snapshots are what
they were at any moment, and the next run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from qcowkit.engine.events import QCOW2_REFORM_BARRIERS
from qcowkit.errors import QcowkitError
from qcowkit.operations.check import Verdict
from qcowkit.operations.compact import compact_image
from qcowkit.testing.crash_states import iter_crash_states
from qcowkit.testing.fault_loop import FaultyFiles, run_with_every_fault
from qcowkit.units import KiB
from tests.amending import Disk, Leaky, View, after_cut, files_of, make_disk, on

pytestmark = pytest.mark.pinned("its kinds of images are its own")

KINDS: dict[str, dict[str, Any]] = {
    "clusters of 512 bytes": {"cluster_bits": 9},
    "with a snapshot": {"cluster_bits": 9, "snapshots": 1},
    "compressed": {"cluster_bits": 12, "packed": True},
    "subclusters": {"cluster_bits": 14, "extended_l2": True},
    "version 2": {"cluster_bits": 10, "version": 2},
}


def holey(kind: str) -> Disk:
    disk = make_disk(size=96 * KiB, count=20, **KINDS[kind])
    chain = disk.open(writable=True)
    for offset in range(0, 96 * KiB, 32 * KiB):
        chain.discard(offset=offset, length=16 * KiB)
    chain.images[0].disk.close()  # type: ignore[attr-defined]
    return disk


def judge(left: Disk, before: View) -> Iterator[str]:
    if left.view() != before:
        yield "the disk or a snapshot has changed"
    verdict = left.check().verdict
    if verdict not in (Verdict.CLEAN, Verdict.LEAKS):
        yield f"a check says {verdict.value}"
    compact_image(left.layers()[0])
    if left.view() != before:
        yield "the disk or a snapshot has changed by the next run"
    if left.check().verdict not in (Verdict.CLEAN, Verdict.LEAKS):
        yield "a check finds corruptions after the next run"


def power_cuts(kind: str, *, budget: int, seed: int = 1, without: str = "") -> list[str]:
    disk = holey(kind)
    before, files = disk.view(), files_of(disk)
    live = on(files, disk)
    compact_image(live.layers()[0], barriers=Leaky(live.storage, without=without))
    found = []
    for state in iter_crash_states(files, seed=seed, budget=budget):
        try:
            faults = list(judge(after_cut(state.contents, disk), before))
        except QcowkitError as error:
            faults = [str(error)]
        found += [f"{state}: {text}" for text in faults]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_power_cut_leaves_the_disk_as_it_is(kind: str) -> None:
    assert power_cuts(kind, budget=30) == []


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_many_power_cuts_leave_the_disk_as_it_is(kind: str) -> None:
    for seed in range(3):
        assert power_cuts(kind, budget=300, seed=seed) == []


@pytest.mark.parametrize("name", QCOW2_REFORM_BARRIERS)
def test_a_barrier_that_is_left_out_is_missed(name: str) -> None:
    assert power_cuts("clusters of 512 bytes", budget=200, without=name) != []


def compact_faulty(files: FaultyFiles, disk: Disk) -> QcowkitError | None:
    try:
        compact_image(on(files, disk).layers()[0])
    except QcowkitError as error:
        return error
    return None


def judge_fault(
    files: FaultyFiles, failed: QcowkitError | None, disk: Disk, before: View
) -> Iterator[str]:
    if failed is None:
        yield "a call failed, and nobody was told"
    for keep in (True, False):
        yield from judge(after_cut(tuple(files.crash(keep=keep).live), disk), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_call_leaves_the_disk_as_it_is(kind: str) -> None:
    disk = holey(kind)
    before, files = disk.view(), files_of(disk)
    report = run_with_every_fault(
        lambda faulty: compact_faulty(faulty, disk),
        lambda: files,
        lambda faulty, failed: judge_fault(faulty, failed, disk, before),
        most=5,
    )
    assert report.faults == (), str(report)
    assert report.cases > 6
