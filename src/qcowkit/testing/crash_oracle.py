"""What must hold of a disk after any crash: one small judge for each promise.

Reliability reference, section 3.4, oracles A to F. A judge yields what is wrong, in words. All
promises are asked of each state; what is read of it is read once."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qcowkit.budget import TRUSTED
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.errors import QcowkitError
from qcowkit.image.lineage import Layer
from qcowkit.image.metadata import load_metadata
from qcowkit.operations.check import CheckResult, Verdict, check_image
from qcowkit.testing.crash_states import CrashState
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.testing.guest_log import GuestLog

if TYPE_CHECKING:
    from qcowkit.image.chain import Chain

_SHOWN = 3


class Opener(Protocol):
    """How the files of a run become a disk. `format`: of the first file."""

    @property
    def format(self) -> str: ...

    def open(self, files: CrashFiles, *, writable: bool) -> Chain:
        """Raises any QcowkitError."""


class CrashedDisk:
    """The files after one crash. Every property is worked out once."""

    def __init__(self, state: CrashState, files: CrashFiles, opener: Opener) -> None:
        """files: of the run; theirs are the names and ways of the new ones."""
        self.state = state
        self.opener = opener
        self._like = files

    def fresh(self) -> CrashFiles:
        """The files as the crash left them, to do with as one likes."""
        return self._like.like([content.copy() for content in self.state.contents])

    @cached_property
    def content(self) -> bytes:
        """The whole guest disk, opened read-only. Raises any QcowkitError."""
        return read_disk(self.fresh(), self.opener)

    @cached_property
    def failure(self) -> str | None:
        """Why the disk cannot be opened or read; None if it can."""
        try:
            return None if self.content is not None else "empty"
        except QcowkitError as error:
            return f"{type(error).__name__}: {error}"

    @cached_property
    def verdict(self) -> CheckResult | None:
        """What a check of the first file finds; None where the format has no check."""
        return check_files(self.fresh(), self.opener)


def read_disk(files: CrashFiles, opener: Opener) -> bytes:
    """The whole guest disk, through handles that refuse to write."""
    with opener.open(files, writable=False) as chain:
        return chain.read(offset=0, length=chain.size)


def check_files(files: CrashFiles, opener: Opener) -> CheckResult | None:
    """Check the first file as it is; None for a format without metadata."""
    if opener.format == "raw":
        return None
    storage = files.open(writable=False)
    if opener.format == "qcow2":
        metadata = load_qcow2_metadata(storage, budget=TRUSTED, for_check=True)
        return check_image(Layer(storage=storage, metadata=metadata))
    other = load_metadata(storage, opener.format, budget=TRUSTED)
    return check_image(Layer(storage=storage, metadata=other))


def is_dirty(files: CrashFiles, opener: Opener) -> bool:
    """Whether refcounts are to be counted anew by the next writer: no promise holds of them."""
    if opener.format != "qcow2":
        return False
    metadata = load_metadata(files.open(writable=False), opener.format, budget=TRUSTED)
    return isinstance(metadata, Qcow2Metadata) and metadata.dirty


def describe_check(result: CheckResult) -> str:
    """The verdict and the first findings."""
    findings = "; ".join(str(finding) for finding in result.findings[:_SHOWN])
    return f"{result.verdict.value}: {findings}"


class Oracle(Protocol):
    """A promise. `name`: one word for reports."""

    @property
    def name(self) -> str: ...

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        """What breaks the promise, in words; nothing if it holds."""


class OpensReadOnly:
    """A: the disk can be opened and read without a byte being written."""

    name = "opens"

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        """See `Oracle`."""
        # A write through a read-only handle is an error like any other.
        if disk.failure is not None:
            yield disk.failure


class LeaksAtMost:
    """B: a check finds leaked clusters at most. Of a dirty image nothing is promised before it was
    opened for writing; `Recovers` sees to that."""

    name = "check"

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        """See `Oracle`."""
        try:
            found = disk.verdict
            if found is None or found.verdict in (Verdict.CLEAN, Verdict.LEAKS):
                return
            if not is_dirty(disk.fresh(), disk.opener):
                yield describe_check(found)
        except QcowkitError as error:
            yield f"cannot be checked: {type(error).__name__}: {error}"


class GuestDataKept:
    """C: each sector holds what the guest was promised, and never what belongs elsewhere."""

    name = "data"

    def __init__(self, log: GuestLog) -> None:
        """log: of the run."""
        self._log = log

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        """See `Oracle`."""
        if disk.failure is None:
            state = disk.state
            yield from self._log.judge(disk.content, first=state.first, last=state.last)


class WholeBeforeOrAfter:
    """F: an operation that is atomic has happened or has not. The guest disk is one of two."""

    name = "atomic"

    def __init__(self, *, before: bytes, after: bytes) -> None:
        """Guest content."""
        self._wanted = (before, after)

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        """See `Oracle`."""
        if disk.failure is None and disk.content not in self._wanted:
            yield "the disk is neither as before nor as after"


class ViewsIntact:
    """D: what was acknowledged and flushed beside the active disk (snapshots, bitmaps) is bit by
    bit as it was, also after further writing.

    views: reads them from a disk, by name. expected: what they hold. disturb: writes to the active
    disk, after which they are read again."""

    name = "views"

    def __init__(
        self,
        views: Callable[[CrashFiles], Mapping[str, bytes]],
        expected: Mapping[str, bytes],
        *,
        disturb: Callable[[Chain], None] | None = None,
    ) -> None:
        self._views = views
        self._expected = dict(expected)
        self._disturb = disturb

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        """See `Oracle`."""
        files = disk.fresh()
        try:
            yield from self._compare(files, "after the crash")
            if self._disturb is not None:
                with disk.opener.open(files, writable=True) as chain:
                    self._disturb(chain)
                yield from self._compare(files, "after further writes")
        except QcowkitError as error:
            yield f"{type(error).__name__}: {error}"

    def _compare(self, files: CrashFiles, when: str) -> Iterator[str]:
        found = self._views(files)
        for name, content in self._expected.items():
            if name not in found:
                yield f"{name} is missing {when}"
            elif found[name] != content:
                yield f"{name} has changed {when}"


class Recovers:
    """E: the disk can be opened for writing, flushed and closed; then a check finds leaks at most
    and no guest byte has changed. With `repair` the check is clean after it, and a second repair
    changes nothing.

    every: one of that many states is tried."""

    name = "recovery"

    def __init__(
        self, *, repair: Callable[[CrashFiles], None] | None = None, every: int = 1
    ) -> None:
        self._repair = repair
        self._every = every
        self._count = 0

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        """See `Oracle`."""
        self._count += 1
        if disk.failure is not None or self._count % self._every:
            return
        files = disk.fresh()
        try:
            with disk.opener.open(files, writable=True) as chain:
                chain.flush()
            yield from self._look(files, disk, (Verdict.CLEAN, Verdict.LEAKS), "after reopening")
            if self._repair is not None:
                yield from self._mend(self._repair, files, disk)
        except QcowkitError as error:
            yield f"{type(error).__name__}: {error}"

    def _mend(
        self, repair: Callable[[CrashFiles], None], files: CrashFiles, disk: CrashedDisk
    ) -> Iterator[str]:
        repair(files)
        yield from self._look(files, disk, (Verdict.CLEAN,), "after a repair")
        keys = [content.key() for content in files.live]
        repair(files)
        if keys != [content.key() for content in files.live]:
            yield "a second repair changed the image"

    @staticmethod
    def _look(
        files: CrashFiles, disk: CrashedDisk, wanted: Sequence[Verdict], when: str
    ) -> Iterator[str]:
        found = check_files(files, disk.opener)
        if found is not None and found.verdict not in wanted:
            yield f"{when}: {describe_check(found)}"
        if read_disk(files, disk.opener) != disk.content:
            yield f"{when} the guest disk has changed"


class PeerCheck:
    """B by another's judgement: `qemu-img check` finds leaks at most. Dirty images are left out.

    paths: where copies of the files go; names inside of images are looked up from the directory
    of the first. every: one of that many states is shown to it. secret: of an encrypted image."""

    name = "qemu-img check"
    _LEAKS = 3

    def __init__(self, paths: Sequence[Path], *, every: int, secret: bytes | None = None) -> None:
        self._paths = tuple(paths)
        self._image = ["-f", "qcow2", str(self._paths[0])]
        if secret is not None:
            self._image = [
                *("--object", f"secret,id=s,data={secret.decode()}", "--image-opts"),
                f"driver=qcow2,encrypt.key-secret=s,file.filename={self._paths[0]}",
            ]
        self._every = every
        self._count = 0

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        """See `Oracle`."""
        self._count += 1
        if disk.failure is not None or self._count % self._every:
            return
        if is_dirty(disk.fresh(), disk.opener):
            return
        for path, content in zip(self._paths, disk.state.contents, strict=True):
            path.write_bytes(content.to_bytes())
        command = ["qemu-img", "check", *self._image]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=self._paths[0].parent
        )
        if done.returncode not in (0, self._LEAKS):
            yield f"exit code {done.returncode}: {(done.stderr + done.stdout)[:400]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A broken promise. oracle: whose. state: the label of the state."""

    oracle: str
    state: str
    text: str

    def __str__(self) -> str:
        return f"{self.oracle}: {self.state}: {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashReport:
    """States that were judged, those among them with leaks, and what was broken."""

    states: int
    leaks: int
    violations: tuple[Violation, ...]

    def __str__(self) -> str:
        lines = [f"{self.states} states, {self.leaks} with leaks"]
        lines += [str(violation) for violation in self.violations[:_SHOWN]]
        return "\n".join(lines)


def judge_states(
    states: Iterable[CrashState],
    oracles: Sequence[Oracle],
    *,
    files: CrashFiles,
    opener: Opener,
    stop_at: int = 20,
) -> CrashReport:
    """Ask every promise of every state; stop after `stop_at` broken ones."""
    violations: list[Violation] = []
    count = leaks = 0
    for state in states:
        count += 1
        disk = CrashedDisk(state, files, opener)
        for oracle in oracles:
            violations += [
                Violation(oracle=oracle.name, state=state.label, text=text)
                for text in oracle.judge(disk)
            ]
        leaks += _leaks(disk)
        if len(violations) >= stop_at:
            break
    return CrashReport(states=count, leaks=leaks, violations=tuple(violations))


def _leaks(disk: CrashedDisk) -> bool:
    try:
        return disk.verdict is not None and disk.verdict.verdict is Verdict.LEAKS
    except QcowkitError:
        return False
