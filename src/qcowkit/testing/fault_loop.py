"""Every call into the storage fails once: whichever it is, nothing that was flushed is lost.

A run is repeated with its first, second, third... call failing, until one ends without having
reached the call. Reliability reference, section 4.1."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from qcowkit.errors import StorageError
from qcowkit.storage.protocol import Storage
from qcowkit.testing.crash_effects import Content
from qcowkit.testing.crash_oracle import (
    CrashedDisk,
    GuestDataKept,
    LeaksAtMost,
    OpensReadOnly,
    Oracle,
    Recovers,
)
from qcowkit.testing.crash_states import CrashState, iter_crash_states
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.testing.crash_workload import Crashable, Guest, Plan
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.units import SECTOR

Result = TypeVar("Result")

READING = frozenset(["pread", "iter_data", "size"])
CHANGING = frozenset(["pwrite", "zero", "discard", "allocate", "truncate"])
GROWING = CHANGING - {"discard"}
FLUSHING = frozenset(["flush"])
# Left of a failing write: all but its last byte.
ALL_BUT_ONE = -1
# Requests after the one that met the fault.
_AFTERWARDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultKind:
    """One way to fail. operations: the calls that do, by name of the method. sticky: all later
    calls of these fail as well. written: bytes that a failing write leaves behind."""

    name: str
    operations: frozenset[str]
    errno: int
    sticky: bool = False
    written: int = 0


KINDS = (
    FaultKind(name="EIO", operations=READING | CHANGING, errno=errno.EIO),
    FaultKind(name="EIO for good", operations=CHANGING, errno=errno.EIO, sticky=True),
    FaultKind(name="ENOMEM", operations=READING, errno=errno.ENOMEM),
    FaultKind(name="EINTR", operations=CHANGING, errno=errno.EINTR),
    FaultKind(name="ENOSPC", operations=GROWING, errno=errno.ENOSPC, written=1),
    FaultKind(name="ENOSPC for good", operations=GROWING, errno=errno.ENOSPC, sticky=True),
    FaultKind(name="EDQUOT", operations=GROWING, errno=errno.EDQUOT, written=ALL_BUT_ONE),
    FaultKind(name="lost flush", operations=FLUSHING, errno=errno.EIO),
    FaultKind(name="lost flushes", operations=FLUSHING, errno=errno.EIO, sticky=True),
)
# For encrypted disks, for now: a failing write leaves whole sectors behind. With `KINDS` they show
# sectors that are neither old nor new where the same disk in clear shows none. Whether that is the
# torn ciphertext alone is not known yet, so these kinds prove less than those above.
SECTOR_KINDS = tuple(replace(kind, written=kind.written * SECTOR) for kind in KINDS)


class FaultyFiles(CrashFiles):
    """Files of which one call fails, counted over all of their handles. Not armed at first."""

    def __init__(
        self, contents: Sequence[Content], *, names: Sequence[str], discard_clears: bool
    ) -> None:
        super().__init__(contents, names=names, discard_clears=discard_clears)
        self._kind: FaultKind | None = None
        self._call = 0
        self.calls = 0
        self.met = ""

    @classmethod
    def of(cls, files: CrashFiles) -> FaultyFiles:
        """A copy of files, as they are now."""
        contents = [content.copy() for content in files.live]
        return cls(contents, names=files.names, discard_clears=files.discard_clears)

    def arm(self, kind: FaultKind, call: int) -> None:
        """From now on the `call`-th call (from 1) of that kind fails; 0 for none. `calls` counts
        them, `met` names the first one that failed."""
        self._kind, self._call, self.calls, self.met = kind, call, 0, ""

    def open(self, index: int = 0, *, writable: bool = True) -> Storage:
        """A new handle of one file, which fails when its time has come."""
        return _FaultyHandle(self, index, super().open(index, writable=writable))

    def meet(self, operation: str) -> Fault | None:
        """Count a call; its fault, if it has one."""
        kind = self._kind
        if kind is None or operation not in kind.operations:
            return None
        self.calls += 1
        if self.calls != self._call and not (kind.sticky and 0 < self._call < self.calls):
            return None
        self.met = self.met or operation
        return Fault(operation=operation, errno=kind.errno, written=kind.written)


class _FaultyHandle(FaultyStorage):
    """A handle whose faults are decided by its files, for all handles together."""

    def __init__(self, files: FaultyFiles, index: int, inner: Storage) -> None:
        super().__init__(inner)
        self._files = files
        self._index = index

    def _meet(self, operation: str) -> Fault | None:
        return self._files.meet(operation)

    def flush(self) -> None:
        """As the inner storage, or a fault that takes along what was not durable."""
        try:
            self._pass("flush")
        except StorageError:
            self._files.fail_flush(self._index)
            raise
        self._inner.flush()


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultReport:
    """cases: runs in which a call failed. faults: what was wrong after one, in words."""

    cases: int
    faults: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.cases} cases", *self.faults[:3]])


def run_with_every_fault(
    operation: Callable[[FaultyFiles], Result],
    make_files: Callable[[], CrashFiles],
    judge: Callable[[FaultyFiles, Result], Iterable[str]],
    *,
    kinds: Sequence[FaultKind] = KINDS,
    most: int | None = None,
    stop_at: int = 20,
) -> FaultReport:
    """Fail the first, second, third... call of each kind, until a run survives without meeting it.

    operation: opens the files, uses them, and takes every StorageError as it comes; it must do the
    same each time. judge: says what is wrong afterwards, with no fault any more. most: cases of a
    kind, evenly spread; None for all."""
    cases = 0
    faults: list[str] = []
    for kind in kinds:
        for call in _calls(operation, make_files, kind, most):
            files = FaultyFiles.of(make_files())
            files.arm(kind, call)
            result = operation(files)
            met = files.met
            files.arm(kind, 0)
            if not met:
                # A fault that is not met twice at the same call is no fault of the storage.
                break
            cases += 1
            where = f"{kind.name} at call {call}, a {met}"
            faults += [f"{where}: {text}" for text in judge(files, result)]
            if len(faults) >= stop_at:
                return FaultReport(cases=cases, faults=tuple(faults))
    return FaultReport(cases=cases, faults=tuple(faults))


def _calls(
    operation: Callable[[FaultyFiles], object],
    make_files: Callable[[], CrashFiles],
    kind: FaultKind,
    most: int | None,
) -> Iterator[int]:
    """Which calls fail: all, or so many of those of a run without faults."""
    if most is None:
        return itertools.count(1)
    files = FaultyFiles.of(make_files())
    files.arm(kind, 0)
    operation(files)
    count = files.calls
    return iter(sorted({1 + index * count // most for index in range(most)} if count else ()))


def use_faulty(disk: Crashable, files: FaultyFiles, *, seed: int, plan: Plan) -> Guest:
    """A guest's run on files that may fail: a request that fails is tried once more, a few others
    follow, then a flush and the end."""
    guest = Guest(disk, files, seed=seed, plan=plan)
    guest.try_to_open()
    left = plan.operations
    while left and guest.is_open and not guest.faults:
        before = guest.failures
        guest.step_stubbornly()
        left = min(left - 1, _AFTERWARDS) if guest.failures > before else left - 1
    if guest.is_open:
        guest.flush()
    if guest.is_open:
        guest.close()
    return guest


def judge_faulty(disk: Crashable, files: FaultyFiles, guest: Guest) -> Iterator[str]:
    """What is wrong after such a run: seen by the guest, found by reopening what the host has, or
    after a power cut now, also one that kept only some of what was not flushed."""
    yield from guest.faults
    log, moment = guest.log, files.tick()
    # Without the effects that a failed flush has lost.
    ends = [files.crash(keep=keep) for keep in (True, False)]
    states = [
        CrashState(label=label, first=moment, last=moment, contents=tuple(end.live))
        for label, end in zip(("reopened", "power cut"), ends, strict=True)
    ]
    states += iter_crash_states(files, seed=files.calls, budget=2, marks=log.marks)
    oracles: list[Oracle] = [OpensReadOnly(), LeaksAtMost(), GuestDataKept(log), Recovers()]
    for state in states:
        crashed = CrashedDisk(state, files, disk)
        for oracle in oracles:
            for text in oracle.judge(crashed):
                yield f"{state.label}: {oracle.name}: {text}"


def fault_disk(
    disk: Crashable,
    *,
    seed: int,
    plan: Plan,
    kinds: Sequence[FaultKind] = KINDS,
    most: int | None = None,
) -> FaultReport:
    """The loop for a guest's run on a new disk."""
    made = disk.make()
    return run_with_every_fault(
        lambda files: use_faulty(disk, files, seed=seed, plan=plan),
        lambda: made,
        lambda files, guest: judge_faulty(disk, files, guest),
        kinds=kinds,
        most=most,
    )
