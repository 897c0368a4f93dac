"""The fault loop: every call fails in turn, and writers that take failures lightly are found."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from qcowkit.errors import StorageError
from qcowkit.testing.crash_effects import Content
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.testing.crash_workload import Plan
from qcowkit.testing.fault_loop import (
    ALL_BUT_ONE,
    KINDS,
    FaultKind,
    FaultyFiles,
    fault_disk,
    run_with_every_fault,
)
from tests.testing.toys import Toy, ToyDisk

WRITES = FaultKind(name="writes", operations=frozenset(["pwrite"]), errno=errno.ENOSPC)
FLUSHES = FaultKind(name="flushes", operations=frozenset(["flush"]), errno=errno.EIO)
PLAN = Plan(operations=12)


def make_files() -> CrashFiles:
    return CrashFiles([Content.of(b"....")])


def three_writes(files: FaultyFiles) -> list[int]:
    """Which of three writes failed."""
    storage, failed = files.open(), []
    for index in range(3):
        try:
            storage.pwrite([b"x"], offset=index)
        except StorageError:
            failed.append(index)
    return failed


@pytest.mark.parametrize(
    "sticky, expected", [(False, [[0], [1], [2]]), (True, [[0, 1, 2], [1, 2], [2]])]
)
def test_each_call_fails_in_turn(sticky: bool, expected: list[list[int]]) -> None:
    seen = []
    kind = FaultKind(name="", operations=WRITES.operations, errno=errno.EIO, sticky=sticky)

    def judge(files: FaultyFiles, failed: list[int]) -> Iterator[str]:
        seen.append(failed)
        yield from ()

    report = run_with_every_fault(three_writes, make_files, judge, kinds=[kind])
    assert seen == expected
    assert report.cases == 3


def test_what_the_judge_says_is_reported_with_the_call() -> None:
    report = run_with_every_fault(
        three_writes, make_files, lambda files, failed: [f"{failed} failed"], kinds=[WRITES]
    )
    assert report.faults[1] == "writes at call 2, a pwrite: [1] failed"


def test_cases_can_be_spread_over_a_long_run() -> None:
    seen = []
    run_with_every_fault(
        three_writes,
        make_files,
        lambda _, failed: seen.append(failed) or [],
        kinds=[WRITES],
        most=2,
    )
    assert seen == [[0], [1]]


@pytest.mark.parametrize("written, expected", [(0, b"...."), (1, b"x..."), (ALL_BUT_ONE, b"xyz.")])
def test_a_failing_write_leaves_what_the_kind_says(written: int, expected: bytes) -> None:
    files = FaultyFiles.of(make_files())
    files.arm(FaultKind(name="", operations=WRITES.operations, errno=5, written=written), 1)
    storage = files.open()
    with pytest.raises(StorageError):
        storage.pwrite([b"xy", b"z!"], offset=0)
    assert storage.pread(4, offset=0) == expected


def test_a_failing_flush_takes_along_what_was_not_durable() -> None:
    files = FaultyFiles.of(make_files())
    files.arm(FLUSHES, 1)
    storage = files.open()
    storage.pwrite([b"x"], offset=0)
    with pytest.raises(StorageError):
        storage.flush()
    storage.flush()
    assert storage.pread(4, offset=0) == b"x..."
    assert files.crash().live[0].to_bytes() == b"...."
    assert files.failed_flushes == 1


def test_calls_are_counted_over_all_handles() -> None:
    files = FaultyFiles.of(make_files())
    files.arm(WRITES, 2)
    files.open().pwrite([b"x"], offset=0)
    with pytest.raises(StorageError):
        files.open().pwrite([b"x"], offset=0)


class CarefulToy(Toy):
    """Refuses everything once a flush has failed, as a right writer does."""

    def open(self, files: CrashFiles, *, writable: bool) -> ToyDisk:
        return CarefulDisk(self, files, writable=writable)


class CarefulDisk(ToyDisk):
    failed = False

    def flush(self) -> None:
        if self.failed:
            raise StorageError("flush", path="<toy>", errno=errno.EIO)
        try:
            super().flush()
        except StorageError:
            self.failed = True
            raise


def test_a_careful_writer_is_never_accused() -> None:
    report = fault_disk(CarefulToy(), seed=1, plan=PLAN, most=16)
    assert report.faults == (), str(report)
    assert report.cases > 100


def test_a_writer_that_flushes_again_after_a_failure_is_found() -> None:
    report = fault_disk(Toy(), seed=1, plan=PLAN, kinds=[FLUSHES])
    assert any("an earlier one had failed" in fault for fault in report.faults)


class ForgetfulToy(Toy):
    """Changes its map before it knows that the data could be written."""

    def open(self, files: CrashFiles, *, writable: bool) -> ToyDisk:
        return ForgetfulDisk(self, files, writable=writable)


class ForgetfulDisk(CarefulDisk):
    def write_sector(self, index: int, data: bytes) -> None:
        slot = self.free_slot()
        self.give_up(index)
        self.map[index] = slot
        self.data.pwrite([data], offset=slot * 512)


def test_a_writer_whose_memory_says_what_the_disk_does_not_is_found() -> None:
    # What the failing write hits must hold something, or zeros are what was there before.
    plan = Plan(operations=12, weights={"write": 10, "flush": 3}, longest=200)
    report = fault_disk(ForgetfulToy(), seed=0, plan=plan, kinds=KINDS[:1], most=80)
    assert any("expected value" in fault for fault in report.faults), str(report)
