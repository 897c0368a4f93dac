"""What a guest was promised: operations with their begin and end, and what each sector may hold.

After a crash a sector holds the last value acknowledged before the last completed flush, or one
written since. The log says which these are at any moment. Reliability reference, section 3.4, C."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcowkit.testing.stamps import FOREIGN, describe_sector, make_stamps, read_stamps
from qcowkit.units import SECTOR

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class GuestOperation:
    """One request of the guest on sectors [start, stop), made by `GuestLog`.

    value: what the sectors hold afterwards, None for an operation without content. keeps: the old
    value is as good (a discard). size: sectors of the disk afterwards. also: of a disk that
    shrinks, what its lost part may show meanwhile. begun, done: moments. failed: it raised."""

    def __init__(
        self,
        kind: str,
        *,
        start: int = 0,
        stop: int = 0,
        value: int | None = None,
        keeps: bool = False,
        size: int | None = None,
        also: Int64Array | None = None,
    ) -> None:
        self.kind = kind
        self.begun = 0
        self.start, self.stop = start, stop
        self.value = value
        self.keeps = keeps
        self.size = size
        self.also = also
        self.done: int | None = None
        self.failed = False
        self.observed: Int64Array | None = None

    def __repr__(self) -> str:
        text = f"{self.kind} [{self.start}, {self.stop})"
        if self.value is not None:
            text += f" value {self.value}"
        if self.size is not None:
            text += f" size {self.size}"
        return text + (" failed" if self.failed else "") + f" at {self.begun}..{self.done}"

    @property
    def acknowledged(self) -> bool:
        """It returned without an error."""
        return self.done is not None and not self.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """What the disk may be at a moment. values: sector by value, true for what it may hold; true
    in the last column for a sector that may be a mixture of these, since a write to it failed.
    sizes: of the disk, in sectors."""

    values: BoolArray
    sizes: frozenset[int]

    def judge(self, content: bytes, found: Int64Array | None = None) -> list[str]:
        """What is wrong with a disk of that content, in words; empty if nothing is.

        found: its values, where they are known already."""
        count = len(content) // SECTOR
        if count not in self.sizes:
            sizes = ", ".join(str(size) for size in sorted(self.sizes))
            return [f"the disk has {count} sectors, expected one of {sizes}"]
        found = read_stamps(content) if found is None else found
        known = (found >= 0) & (found < self.values.shape[1] - 1)
        fine = known & self.values[np.arange(count), np.where(known, found, 0)]
        return [
            complaint
            for index in np.flatnonzero(~fine).tolist()
            if (complaint := self._complain(index, content[index * SECTOR : (index + 1) * SECTOR]))
        ]

    def _complain(self, index: int, sector: bytes) -> str:
        values = np.flatnonzero(self.values[index, :-1]).tolist()
        if self.values[index, -1] and _is_mixture(sector, index, values):
            return ""
        expected = ", ".join(str(value) for value in values) or "none"
        return f"sector {index} holds {describe_sector(sector)}, expected value {expected}"


def _is_mixture(sector: bytes, index: int, values: Sequence[int]) -> bool:
    """Whether each byte is that of one of the values."""
    found = np.frombuffer(sector, dtype=np.uint8)
    fine = np.zeros(SECTOR, dtype=np.bool_)
    for value in values:
        stamp = make_stamps(first=index, count=1, value=value) if value else bytes(SECTOR)
        fine |= found == np.frombuffer(stamp, dtype=np.uint8)
    return bool(fine.all())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stable:
    """The disk as of a completed flush. position: operations before it are accounted for."""

    moment: int
    position: int
    values: BoolArray
    sizes: frozenset[int]


class GuestLog:
    """Operations of one guest, one after the other."""

    def __init__(
        self,
        clock: Callable[[], int],
        *,
        capacity: int,
        limit: int,
        initial: Int64Array,
        backing: Int64Array | None = None,
        durable_sizes: bool = False,
    ) -> None:
        """clock: the next moment. capacity: sectors of the largest size that the disk will have.
        limit: values are below this. initial: values at the start, whose count is the disk's size.
        backing: values of what lies below. durable_sizes: a new size is promised to be durable
        when the resize returns, what was written before not."""
        self._clock = clock
        self._durable_sizes = durable_sizes
        self._limit = limit
        self._backing = np.zeros(0, dtype=np.int64) if backing is None else backing
        self._size = len(initial)
        self._last_value = int(max(initial.max(initial=0), self._backing.max(initial=0)))
        self._known: dict[int, Allowed] = {}
        self.operations: list[GuestOperation] = []
        values = np.zeros((capacity, limit + 1), dtype=np.bool_)
        values[np.arange(len(initial)), initial] = True
        values[len(initial) :, 0] = True
        sizes = frozenset([self._size])
        self._stable = [_Stable(moment=0, position=0, values=values, sizes=sizes)]

    @property
    def size(self) -> int:
        """Sectors that the disk has by what was acknowledged."""
        return self._size

    @property
    def marks(self) -> list[int]:
        """Moments at which the promises changed, ascending."""
        ends = [one.done for one in self.operations if one.done is not None]
        return sorted([one.begun for one in self.operations] + ends)

    @property
    def capacity(self) -> int:
        """Sectors of the largest size that the disk may have."""
        return len(self._stable[0].values)

    def next_value(self, *, noisy: bool) -> int:
        """A value that was not used yet; noisy: one whose stamps do not compress."""
        value = self._last_value + 1
        if bool(value & 1) is not noisy:
            value += 1
        assert value < self._limit, f"value {value} is not below the limit {self._limit}"
        self._last_value = value
        return value

    # What the guest does

    def begin_write(self, *, start: int, stop: int, value: int) -> GuestOperation:
        """Sectors [start, stop) get that value; 0 for zeros."""
        return self._begin(GuestOperation("write", start=start, stop=stop, value=value))

    def begin_discard(self, *, start: int, stop: int) -> GuestOperation:
        """Sectors [start, stop) become zeros or stay."""
        return self._begin(GuestOperation("discard", start=start, stop=stop, value=0, keeps=True))

    def begin_resize(self, size: int) -> GuestOperation:
        """The disk gets `size` sectors: what is added is zeros, what is cut off may be anything
        that was there, above or below, until it is gone."""
        start, stop = min(size, self._size), max(size, self._size)
        also = None
        if size < self._size:
            also = np.zeros(stop - start, dtype=np.int64)
            below = self._backing[start:stop]
            also[: len(below)] = below
        operation = GuestOperation("resize", start=start, stop=stop, value=0, size=size, also=also)
        return self._begin(operation)

    def begin_flush(self) -> GuestOperation:
        """What was acknowledged before is durable when this ends."""
        return self._begin(GuestOperation("flush"))

    def _begin(self, operation: GuestOperation) -> GuestOperation:
        assert not self.operations or self.operations[-1].done is not None, "one at a time"
        operation.begun = self._clock()
        self.operations.append(operation)
        return operation

    def acknowledge(self, operation: GuestOperation) -> None:
        """It returned without an error."""
        operation.done = self._clock()
        if operation.size is not None:
            self._size = operation.size
        if operation.kind == "flush":
            position = self.operations.index(operation)
            self._stable.append(self._fold(position, moment=operation.done))

    def fail(self, operation: GuestOperation, *, size: int | None = None) -> None:
        """It raised: it may have happened, in part, even of a sector, or not at all. size: sectors
        that the disk says it has now."""
        operation.done = self._clock()
        operation.failed = True
        self._size = self._size if size is None else size

    def withdraw(self, operation: GuestOperation) -> None:
        """It was refused, and shall have changed nothing."""
        assert self.operations[-1] is operation
        self.operations.pop()

    def observe(self, operation: GuestOperation, content: bytes) -> list[str]:
        """Say what a reader saw after a discard, whole disk: from now on it is what was meant.

        Returns what is wrong with it, in words."""
        wrong = self.now().judge(content)
        if not wrong:
            part = content[operation.start * SECTOR : operation.stop * SECTOR]
            operation.observed = read_stamps(part, first=operation.start)
        return wrong

    # What it may find

    def now(self) -> Allowed:
        """What a reader may find without any crash: like after a flush that ends now."""
        stable = self._fold(len(self.operations))
        return Allowed(values=stable.values, sizes=stable.sizes)

    def allowed(self, moment: int) -> Allowed:
        """What may be there after a crash at that moment."""
        mark = bisect_right(self.marks, moment)
        if mark not in self._known:
            self._known[mark] = self._allow(moment)
        return self._known[mark]

    def _allow(self, moment: int) -> Allowed:
        stable = next(one for one in reversed(self._stable) if one.moment <= moment)
        values, sizes = stable.values.copy(), set(stable.sizes)
        for operation in self.operations[stable.position :]:
            if operation.begun > moment:
                break
            if self._lasts(operation, moment):
                _enforce(values, sizes, operation)
            else:
                _admit(values, sizes, operation)
        return Allowed(values=values, sizes=frozenset(sizes))

    def _lasts(self, operation: GuestOperation, moment: int) -> bool:
        """Whether it was durable at that moment without a flush."""
        done = operation.done if operation.acknowledged else None
        resized = operation.kind == "resize" and self._durable_sizes
        return resized and done is not None and done <= moment

    def judge(self, content: bytes, *, first: int, last: int) -> list[str]:
        """What is wrong with the disk if the crash came between two moments, in words.

        The strictest of them are the first, the last and those at which a flush ended."""
        found = read_stamps(content)
        ends = [one.moment for one in self._stable if first < one.moment < last]
        for moment in (first, *ends, last):
            wrong = self.allowed(moment).judge(content, found)
            if wrong:
                return wrong
        return []

    def _fold(self, position: int, *, moment: int = 0) -> _Stable:
        """The last stable state and what was acknowledged after it, before `position`."""
        stable = self._stable[-1]
        values, sizes = stable.values.copy(), set(stable.sizes)
        for operation in self.operations[stable.position : position]:
            if not operation.acknowledged:
                _admit(values, sizes, operation)
            else:
                _enforce(values, sizes, operation)
        return _Stable(moment=moment, position=position, values=values, sizes=frozenset(sizes))


def _admit(values: BoolArray, sizes: set[int], operation: GuestOperation) -> None:
    """What it does may have happened."""
    rows = values[operation.start : operation.stop]
    if operation.value is not None:
        rows[:, operation.value] = True
        rows[:, -1] |= operation.failed
    if operation.also is not None:
        rows[np.arange(len(rows)), operation.also] = True
    if operation.size is not None:
        sizes.add(operation.size)


def _enforce(values: BoolArray, sizes: set[int], operation: GuestOperation) -> None:
    """What it does has happened."""
    rows = values[operation.start : operation.stop]
    if operation.observed is not None:
        # A mixture has no value, and stays one.
        known = np.flatnonzero(operation.observed >= 0)
        rows[known] = False
        rows[known, operation.observed[known]] = True
    elif operation.value is not None:
        if not operation.keeps:
            rows[:] = False
        rows[:, operation.value] = True
    if operation.size is not None:
        sizes.clear()
        sizes.add(operation.size)


def values_of(content: bytes) -> Int64Array:
    """What a disk holds, as the start of another log. AssertionError for foreign sectors."""
    found = read_stamps(content)
    assert not np.any(found == FOREIGN), "the disk holds sectors that nobody wrote there"
    return found


def sector_values(count: int, runs: Sequence[tuple[int, int, int]]) -> Int64Array:
    """`count` sectors of zeros but for runs of (start, stop, value)."""
    values = np.zeros(count, dtype=np.int64)
    for start, stop, value in runs:
        values[start:stop] = value
    return values
