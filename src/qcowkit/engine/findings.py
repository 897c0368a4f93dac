"""What a check finds, and how much work it may cost. Numpy-free; knows no format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from qcowkit.errors import Cancelled, OperationError, StorageError
from qcowkit.units import GiB

if TYPE_CHECKING:
    import threading

    from qcowkit.engine.executor import ProgressReport

MAX_FINDINGS = 1000
# What is read may be a multiple of what the host has stored, and this much in any case.
WORK_FACTOR = 16
FREE_WORK = GiB


class Severity(Enum):
    """CORRUPTION: data are lost or will be. LEAK: space is lost. ERROR: something could not be
    checked."""

    CORRUPTION = "corruption"
    LEAK = "leak"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong. host_offset: bytes, of the structure; index: the entry in it."""

    severity: Severity
    structure: str
    reason: str
    host_offset: int | None = None
    index: int | None = None

    def __str__(self) -> str:
        place = self.structure
        if self.host_offset is not None:
            place += f" at host offset {self.host_offset:#x}"
        if self.index is not None:
            place += f", entry {self.index}"
        return f"{place}: {self.reason}"


class FindingLog:
    """Counts all findings and keeps the first `limit` of each severity."""

    def __init__(self, *, limit: int = MAX_FINDINGS) -> None:
        self._limit = limit
        self._counts = dict.fromkeys(Severity, 0)
        self._kept: dict[Severity, list[Finding]] = {severity: [] for severity in Severity}

    def count(self, severity: Severity) -> int:
        """How many there are, kept or not."""
        return self._counts[severity]

    @property
    def kept(self) -> tuple[Finding, ...]:
        """The findings with their text: errors, corruptions, leaks."""
        order = (Severity.ERROR, Severity.CORRUPTION, Severity.LEAK)
        return tuple(finding for severity in order for finding in self._kept[severity])

    def add(
        self,
        severity: Severity,
        structure: str,
        *,
        reason: str,
        host_offset: int | None = None,
        index: int | None = None,
    ) -> None:
        """Record one finding."""
        self.add_many(
            severity,
            1,
            lambda _: Finding(
                severity=severity,
                structure=structure,
                reason=reason,
                host_offset=host_offset,
                index=index,
            ),
        )

    def corruption(
        self,
        structure: str,
        *,
        reason: str,
        host_offset: int | None = None,
        index: int | None = None,
    ) -> None:
        """Record one corruption."""
        self.add(
            Severity.CORRUPTION, structure, reason=reason, host_offset=host_offset, index=index
        )

    def failure(self, structure: str, error: StorageError, *, host_offset: int) -> None:
        """Record what the host would not let us read."""
        self.add(Severity.ERROR, structure, reason=str(error), host_offset=host_offset)

    def add_many(self, severity: Severity, count: int, make: Callable[[int], Finding]) -> None:
        """Count `count` findings; only those that are kept are made, by their number from 0."""
        kept = self._kept[severity]
        kept.extend(make(number) for number in range(min(count, self._limit - len(kept))))
        self._counts[severity] += count


class Effort:
    """Bounds the bytes that a check reads and touches: what it costs must follow from the space
    that an image takes, not from what it claims. Reports progress; stops when cancelled."""

    def __init__(
        self,
        *,
        stored: int,
        factor: int = 1,
        progress: ProgressReport | None = None,
        cancel: threading.Event | None = None,
    ) -> None:
        """stored: bytes that the host has allocated for the image. factor: how much more may be
        done than in a check."""
        self._limit = factor * (WORK_FACTOR * stored + FREE_WORK)
        self._spent = 0
        self._progress = progress
        self._cancel = cancel

    def spend(self, count: int) -> None:
        """Before `count` more bytes. Raises OperationError above the limit, and Cancelled."""
        self._spent += count
        if self._spent > self._limit:
            raise OperationError(
                f"the image is too complex to check: its tables ask for more than {self._limit} "
                "bytes of work, far above what the file holds"
            )
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled("the check was cancelled")

    def report(self, done: int, total: int) -> None:
        """Tell the caller, in bytes."""
        if self._progress is not None:
            self._progress(done, total)
