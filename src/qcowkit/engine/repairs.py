"""What a repair changes, and how it tells. Numpy-free; knows no format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from qcowkit.engine.findings import FindingLog

if TYPE_CHECKING:
    from qcowkit.engine.executor import ProgressReport
    from qcowkit.errors import StorageError

# Of each kind of change, so many are told one by one.
KEPT_CHANGES = 20


class RepairMode(Enum):
    """LEAKS: only give lost space back. ALL: also mend what is corrupt."""

    LEAKS = "leaks"
    ALL = "all"


class ChangeKind(Enum):
    """What is changed, in the order in which a repair does it."""

    AUTOCLEAR = "unknown autoclear bits cleared"
    SNAPSHOTS = "snapshot table rewritten"
    REBUILD = "refcounts rebuilt"
    RAISED = "refcounts raised"
    ENTRY = "table entries mended"
    COPIED = "COPIED flags corrected"
    LOWERED = "refcounts lowered"
    BITS = "header bits cleared"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeGroup:
    """All changes of one kind. texts: the first of them, one line each."""

    kind: ChangeKind
    count: int
    texts: tuple[str, ...]

    def render(self) -> Iterator[str]:
        """Lines to read, without line ends."""
        yield f"{self.kind.value:30}  {self.count:,}"
        yield from (f"  {text}" for text in self.texts)
        if self.count > len(self.texts):
            yield f"  and {self.count - len(self.texts):,} more"


class ChangeLog:
    """Counts all changes and keeps the texts of the first `limit` of each kind."""

    def __init__(self, *, limit: int = KEPT_CHANGES) -> None:
        self._limit = limit
        self._counts: dict[ChangeKind, int] = {}
        self._texts: dict[ChangeKind, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def count(self, kind: ChangeKind) -> int:
        """How many there are, kept or not."""
        return self._counts.get(kind, 0)

    def add(self, kind: ChangeKind, text: str) -> None:
        """Record one change."""
        self.add_many(kind, 1, lambda _: text)

    def add_many(self, kind: ChangeKind, count: int, make: Callable[[int], str]) -> None:
        """Count `count` changes; only texts that are kept are made, by their number from 0."""
        if not count:
            return
        texts = self._texts.setdefault(kind, [])
        texts.extend(make(number) for number in range(min(count, self._limit - len(texts))))
        self._counts[kind] = self.count(kind) + count

    @property
    def groups(self) -> tuple[ChangeGroup, ...]:
        """The kinds that there are, in the order of the enumeration."""
        return tuple(
            ChangeGroup(kind=kind, count=self._counts[kind], texts=tuple(self._texts[kind]))
            for kind in ChangeKind
            if kind in self._counts
        )


class StrictLog(FindingLog):
    """The log of a walk that changes what it sees: what cannot be read ends it. Faults were told
    by the check before, and are not kept."""

    def __init__(self) -> None:
        super().__init__(limit=0)

    def failure(self, structure: str, error: StorageError, *, host_offset: int) -> None:
        """Raise it: counts without everything that was to be read would be wrong."""
        raise error


class Steps:
    """One progress report for several walks, each over the same bytes."""

    def __init__(self, progress: ProgressReport | None, *, count: int) -> None:
        """`count`: how many walks are expected; more of them all count as the last."""
        self._progress = progress
        self._count = count
        self._begun = 0
        self._total = 0

    def next(self) -> ProgressReport:
        """The report for the next walk."""
        step = min(self._begun, self._count - 1)
        self._begun += 1

        def report(done: int, total: int) -> None:
            self._total = total
            if self._progress is not None:
                self._progress(step * total + done, self._count * total)

        return report

    def finish(self) -> None:
        """Everything is done, in however many walks."""
        if self._progress is not None:
            self._progress(self._count * self._total, self._count * self._total)
