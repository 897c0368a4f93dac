"""Power cuts of disks with a record of dirty L2 tables: while they are written, while they are
recovered, and with each barrier left out. docs/adr/0013."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from qcowkit.engine.barriers import Barriers
from qcowkit.engine.events import QCOW2_RECOVERY_BARRIERS
from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.engine.qcow2.recovery import recover_recorded, valid_record
from qcowkit.engine.qcow2.recovery_plan import FullRepairNeeded
from qcowkit.engine.qcow2.repair import repair_qcow2
from qcowkit.engine.repairs import RepairMode
from qcowkit.image.chain import Chain
from qcowkit.operations.check import Verdict
from qcowkit.testing.crash_oracle import CrashedDisk, describe_check
from qcowkit.testing.crash_run import CrashPlan, crash_disk
from qcowkit.testing.crash_states import iter_crash_states
from qcowkit.testing.crash_storage import Content, CrashFiles
from qcowkit.testing.crash_workload import USUAL, Plan
from qcowkit.testing.mutation import without_barrier
from qcowkit.units import KiB, MiB
from tests.lazy_disks import (
    COVERAGE,
    RecordKind,
    check,
    closed,
    content,
    crash,
    full_table,
    lazy_kind,
    metadata_of,
    missing_blocks,
    recover,
)

EAGER = OpenOptions(discard=True, pass_discard_other=True, cache_clean_interval=0)
# Caches of the least size: tables are written back in the middle of operations.
TIGHT = OpenOptions(
    l2_cache_size=KiB,
    l2_cache_entry_size=512,
    refcount_cache_size=2 * KiB,
    cache_clean_interval=0,
)
KINDS = [
    lazy_kind("usual", size=512 * KiB, capacity=MiB, open_options=EAGER),
    lazy_kind("1 bit", size=384 * KiB, capacity=512 * KiB, options={"refcount_bits": 1}),
    lazy_kind("blocks are missing", size=512 * KiB, options={"refcount_bits": 64}),
    lazy_kind("least caches", size=512 * KiB, open_options=TIGHT, backing=640 * KiB),
    lazy_kind(
        "subclusters",
        size=MiB,
        capacity=2 * MiB,
        options={"cluster_size": 16 * KiB, "extended_l2": True},
    ),
    lazy_kind("data file", size=512 * KiB, capacity=MiB, data_file=True, open_options=EAGER),
    lazy_kind("tables beyond", size=64 * KiB, record_bits=8, options={"cluster_size": 512}),
]
PACKING = {**USUAL, "write": 20, "write_compressed": 40, "discard": 26}
RESIZING = {**USUAL, "resize": 16, "flush": 24}
PLANS = (Plan(operations=30), Plan(operations=40, weights=PACKING))
MORE_PLANS = (*PLANS, Plan(operations=40, weights=RESIZING))
GOOD = (Verdict.CLEAN, Verdict.LEAKS)


class RecordSuffices:
    """As long as the record of a dirty image holds, nothing else has to be looked at."""

    name = "record"

    def __init__(self) -> None:
        self.count = 0

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        """See `Oracle`."""
        if disk.failure is not None:
            return
        files = disk.fresh()
        storage = files.open()
        metadata = load_qcow2_metadata(storage)
        record = valid_record(metadata)
        if record is None:
            return
        self.count += 1
        try:
            recover_recorded(storage, metadata, record, barriers=Barriers(storage))
        except FullRepairNeeded as error:
            yield f"the record is not enough: {error}"
            return
        found = check(files.live[0].to_bytes())
        if found.verdict not in GOOD:
            yield describe_check(found)


def repair(files: CrashFiles) -> None:
    repair_qcow2(files.open(), mode=RepairMode.ALL)


def judge(kind: RecordKind, *, seed: int, plan: Plan, budget: int) -> None:
    suffices = RecordSuffices()
    report = crash_disk(
        kind,
        seed=seed,
        plan=CrashPlan(
            workload=plan, budget=budget, recover=2, again=20, repair=repair, extra=[suffices]
        ),
    )
    assert report.violations == (), str(report)
    assert suffices.count


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.name))
@pytest.mark.parametrize("seed", range(len(PLANS)))
def test_a_crash_loses_nothing_and_the_record_tells_all(kind: RecordKind, seed: int) -> None:
    judge(kind, seed=seed, plan=PLANS[seed], budget=60)


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.name))
@pytest.mark.parametrize("seed", range(100, 160))
def test_many_crashes_lose_nothing(kind: RecordKind, seed: int) -> None:
    judge(kind, seed=seed, plan=MORE_PLANS[seed % 3], budget=600)


# Single barriers


def faults(files: CrashFiles, kind: RecordKind, *, budget: int) -> list[str]:
    """What is wrong after cuts in a journal, before and after a recovery; at most one thing."""
    for state in iter_crash_states(files, seed=1, budget=budget):
        raw = state.contents[0].to_bytes()
        if not metadata_of(raw).dirty and check(raw).verdict not in GOOD:
            return [f"{state.label}: not dirty, and not sound"]
        before = content(kind, raw)
        after, _ = recover(raw)
        if check(after).verdict not in GOOD:
            return [f"{state.label}: recovered, and not sound"]
        if content(kind, after) != before:
            return [f"{state.label}: other data"]
    return []


def write_twice(kind: RecordKind, *, first: int, second: int) -> CrashFiles:
    """The journal of two flushed writes into two L2 tables, which are there already."""

    def prepare(chain: Chain) -> None:
        for table in (first, second):
            chain.write(b"0" * KiB, offset=table * COVERAGE)
        # The file has room for what comes: data that are late are no fault by themselves.
        chain.write(b"0" * 8 * KiB, offset=first * COVERAGE)
        chain.discard(offset=first * COVERAGE, length=8 * KiB)

    def use(chain: Chain) -> None:
        chain.write(b"1" * KiB, offset=first * COVERAGE + KiB)
        chain.flush()
        chain.write(b"2" * KiB, offset=second * COVERAGE + KiB)

    files = CrashFiles([Content.of(closed(kind, prepare))])
    crash(kind, use, files=files)
    return files


def recover_in_steps(raw: bytes) -> CrashFiles:
    """The journal of a recovery, and of the first change after it."""
    kind = lazy_kind(size=2304 * KiB)
    files = CrashFiles([Content.of(raw)])
    crash(kind, lambda chain: chain.write(b"n" * 512, offset=0), files=files)
    return files


@pytest.mark.parametrize("kind", [lazy_kind(), lazy_kind(record_bits=4)], ids=["named", "beyond"])
def test_no_table_changes_before_the_record_names_it_or_ends(kind: RecordKind) -> None:
    assert faults(write_twice(kind, first=1, second=5), kind, budget=400) == []


@pytest.mark.parametrize("kind", [lazy_kind(), lazy_kind(record_bits=4)], ids=["named", "beyond"])
def test_a_record_that_is_late_is_missed(kind: RecordKind) -> None:
    """The barrier between data and tables is that of the record too."""
    with without_barrier("data before tables") as skipped:
        files = write_twice(kind, first=1, second=5)
    assert skipped
    assert faults(files, kind, budget=400) != []


@pytest.mark.parametrize("make", [missing_blocks, full_table], ids=["missing blocks", "full table"])
def test_a_recovery_may_be_cut_anywhere(make: Callable[[], bytes]) -> None:
    assert faults(recover_in_steps(make()), lazy_kind(), budget=60) == []


def one_table() -> bytes:
    """Blocks are there for what was written before the crash."""
    return crash(lazy_kind(), lambda chain: chain.write(b"x" * KiB, offset=COVERAGE))


MISSED_BY = {
    "recovery: refcounts written": one_table,
    "recovery: refcount table written": missing_blocks,
    "recovery: refcount table switched": full_table,
}


@pytest.mark.parametrize("name", QCOW2_RECOVERY_BARRIERS)
def test_without_any_one_barrier_something_is_lost(name: str) -> None:
    """A crash test that does not notice proves nothing."""
    raw = MISSED_BY[name]()
    with without_barrier(name) as skipped:
        files = recover_in_steps(raw)
    assert skipped
    assert faults(files, lazy_kind(), budget=400) != []


def test_a_recovery_that_was_cut_short_twice_is_ended_by_the_third() -> None:
    kind, raw = lazy_kind(), missing_blocks()
    wanted = content(kind, raw)
    files = recover_in_steps(raw)
    for state in iter_crash_states(files, seed=2, budget=12):
        again = recover_in_steps(state.contents[0].to_bytes())
        for second in iter_crash_states(again, seed=3, budget=8):
            label = f"{state.label}; {second.label}"
            after, _ = recover(second.contents[0].to_bytes())
            assert check(after).verdict in GOOD, label
            assert content(kind, after)[KiB:] == wanted[KiB:], label
