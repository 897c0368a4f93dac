"""Random guests: what they do to a disk, and what they were promised, from a seed.

Requests are whole sectors, each stamped with its address and the request's value. A guest looks at
the whole disk after each request, so that a fault without any crash is found as well."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from qcowkit.errors import QcowkitError, RequestError, StorageError
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.testing.guest_log import GuestLog, Int64Array
from qcowkit.testing.stamps import make_stamps
from qcowkit.units import SECTOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from qcowkit.image.chain import Chain
    from qcowkit.testing.guest_log import GuestOperation

# How often each request comes, relative to the others.
USUAL: Mapping[str, int] = {
    "write": 40,
    "write_compressed": 10,
    "write_zeroes": 12,
    "discard": 10,
    "flush": 14,
    "resize": 4,
    "reopen": 4,
}
# Sectors of a long request where clusters are small.
_LONG = 32


class Crashable(Protocol):
    """A disk that a guest can use: see `DiskKind`."""

    @property
    def format(self) -> str: ...

    @property
    def cluster_size(self) -> int: ...

    @property
    def sectors(self) -> int: ...

    @property
    def compresses(self) -> bool: ...

    def backing_values(self) -> Int64Array: ...

    def initial_values(self) -> Int64Array: ...

    def make(self) -> CrashFiles: ...

    def open(self, files: CrashFiles, *, writable: bool) -> Chain: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A run that is over. faults: what was wrong without any crash, in words. closed: the moment
    at which the disk was closed for good; None if it never was."""

    files: CrashFiles
    log: GuestLog
    faults: tuple[str, ...] = ()
    closed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """operations: how many requests. weights: how often each comes. look: the disk is read after
    every so many requests. longest: sectors of a request, 0 for what suits the disk. closing: how
    likely the disk is closed at the end, and not left without a flush."""

    operations: int = 50
    weights: Mapping[str, int] = field(default_factory=lambda: USUAL)
    look: int = 1
    longest: int = 0
    closing: float = 0.5


def run_guest(
    disk: Crashable,
    *,
    seed: int,
    plan: Plan | None = None,
    files: CrashFiles | None = None,
    initial: Int64Array | None = None,
) -> Recorded:
    """Let a guest use a new disk, or `files` that hold `initial` values; nothing fails."""
    plan = plan or Plan()
    files = disk.make() if files is None else files
    guest = Guest(disk, files, seed=seed, plan=plan, initial=initial)
    guest.open()
    for _ in range(plan.operations):
        guest.step()
        if guest.faults:
            break
    if guest.is_open and guest.noise.random() < plan.closing:
        guest.close()
    closed = None if guest.is_open else files.tick()
    return Recorded(files=files, log=guest.log, faults=tuple(guest.faults), closed=closed)


class Guest:
    """One user of one disk. Deterministic: the same seed, the same requests.

    failures: how many requests raised StorageError. faults: what was found wrong, in words."""

    def __init__(
        self,
        disk: Crashable,
        files: CrashFiles,
        *,
        seed: int,
        plan: Plan,
        initial: Int64Array | None = None,
    ) -> None:
        self.noise = random.Random(seed)
        self.plan = plan
        self.faults: list[str] = []
        self.failures = 0
        self._disk = disk
        self._files = files
        self._chain: Chain | None = None
        self._steps = 0
        self._failed_flushes = 0
        self._per_cluster = max(1, disk.cluster_size // SECTOR)
        initial = disk.initial_values() if initial is None else initial
        last = int(initial.max(initial=0))
        self.log = GuestLog(
            files.tick,
            capacity=max(disk.sectors, len(initial)),
            # Two values for each request: an odd or an even one is taken.
            limit=max(last, 8) + 2 * plan.operations + 4,
            initial=initial,
            backing=disk.backing_values(),
            durable_sizes=disk.format == "qcow2",
        )
        self._names = [name for name in plan.weights if self._can(name)]
        self._weights = [plan.weights[name] for name in self._names]

    def _can(self, name: str) -> bool:
        return name != "write_compressed" or self._disk.compresses

    @property
    def chain(self) -> Chain:
        """The open disk."""
        assert self._chain is not None, "the disk is not open"
        return self._chain

    def open(self) -> None:
        """Open the disk for writing."""
        self._chain = self._disk.open(self._files, writable=True)
        self._failed_flushes = self._files.failed_flushes

    def try_to_open(self) -> None:
        """Open the disk, unless the host fails."""
        try:
            self.open()
        except StorageError:
            self.failures += 1

    def close(self) -> None:
        """Close the disk, which flushes it."""
        self._attempt(self.log.begin_flush(), self.chain.close)
        self._chain = None

    @property
    def is_open(self) -> bool:
        """Whether there is a disk that can be asked."""
        return self._chain is not None

    def step(self) -> None:
        """The next request, and a look at the disk."""
        (name,) = self.noise.choices(self._names, self._weights)
        getattr(self, f"_{name}")()
        self._steps += 1
        if self._steps % self.plan.look == 0:
            self._look()

    def step_stubbornly(self) -> None:
        """The next request; one that fails is tried once more."""
        state, failures = self.noise.getstate(), self.failures
        self.step()
        if self.failures > failures and self.is_open:
            self.noise.setstate(state)
            self.step()

    def flush(self) -> None:
        """Ask for what was acknowledged to be durable."""
        self._flush()

    def _look(self) -> None:
        content = None if self._chain is None or self.faults else self._read_all()
        if content is not None:
            self.faults += self.log.now().judge(content)

    def _read_all(self) -> bytes | None:
        """The whole disk; None where the host does not give it."""
        try:
            return self.chain.read(offset=0, length=self.chain.size)
        except StorageError:
            self.failures += 1
        except QcowkitError as error:
            self.faults.append(f"reading: {type(error).__name__}: {error}")
        return None

    def _attempt(self, operation: GuestOperation, call: Callable[[], None]) -> bool:
        """Make a request and note how it went. Refusals leave no trace in the log."""
        try:
            call()
        except RequestError:
            self.log.withdraw(operation)
            return False
        except QcowkitError as error:
            if isinstance(error, StorageError):
                self.failures += 1
            else:
                self.faults.append(f"{operation!r}: {type(error).__name__}: {error}")
            size = self.chain.size // SECTOR if operation.size is not None else None
            self.log.fail(operation, size=size)
            return False
        self.log.acknowledge(operation)
        if operation.kind == "flush" and self._files.failed_flushes > self._failed_flushes:
            self.faults.append("a flush was acknowledged although an earlier one had failed")
        return True

    # Requests

    def _range(self, *, aligned: bool = False) -> tuple[int, int]:
        """Sectors [start, stop) within the disk: short or long, at the edges of clusters or not."""
        noise, size, cluster = self.noise, self.log.size, self._per_cluster
        longest = self.plan.longest or max(8, min(size // 4, max(_LONG, 4 * cluster)))
        shorts = 1, noise.randint(1, 2 * cluster), cluster
        length = noise.choice((*shorts, noise.randint(1, longest), noise.randint(1, longest)))
        start = noise.randrange(size)
        if aligned or noise.random() < 0.4:
            start -= start % cluster
            length += -length % cluster
        stop = min(size, start + min(length, max(longest, cluster)))
        if aligned and stop < size:
            stop -= stop % cluster
        return (start, stop) if start < stop else (0, min(size, cluster))

    def _write(self) -> None:
        start, stop = self._range()
        value = self.log.next_value(noisy=self.noise.random() < 0.5)
        data = make_stamps(first=start, count=stop - start, value=value)
        operation = self.log.begin_write(start=start, stop=stop, value=value)
        self._attempt(operation, lambda: self.chain.write(data, offset=start * SECTOR))

    def _write_compressed(self) -> None:
        # Only clusters that are not allocated can be written so; a full disk has few of them.
        value = self.log.next_value(noisy=self.noise.random() < 0.25)
        for _ in range(4):
            start, stop = self._range(aligned=True)
            data = make_stamps(first=start, count=stop - start, value=value)
            operation = self.log.begin_write(start=start, stop=stop, value=value)
            refused = not self._attempt(operation, self._compressed(data, start))
            if not refused or operation.failed:
                return

    def _compressed(self, data: bytes, start: int) -> Callable[[], None]:
        return lambda: self.chain.write_compressed(data, offset=start * SECTOR)

    def _write_zeroes(self) -> None:
        start, stop = self._range()
        unmap = self.noise.random() < 0.5
        operation = self.log.begin_write(start=start, stop=stop, value=0)
        offset, length = start * SECTOR, (stop - start) * SECTOR
        self._attempt(
            operation, lambda: self.chain.write_zeroes(offset=offset, length=length, unmap=unmap)
        )

    def _discard(self) -> None:
        start, stop = self._range()
        operation = self.log.begin_discard(start=start, stop=stop)
        offset, length = start * SECTOR, (stop - start) * SECTOR
        if self._attempt(operation, lambda: self.chain.discard(offset=offset, length=length)):
            content = self._read_all()
            if content is not None:
                self.faults += self.log.observe(operation, content)

    def _flush(self) -> None:
        self._attempt(self.log.begin_flush(), self.chain.flush)

    def _resize(self) -> None:
        old, most = self.log.size, self.log.capacity
        size = self.noise.randint(max(1, old // 2), most)
        if self.noise.random() < 0.5:
            size = max(self._per_cluster, size - size % self._per_cluster)
        operation = self.log.begin_resize(size)
        self._attempt(operation, lambda: self.chain.resize(size * SECTOR, shrink=size < old))

    def _reopen(self) -> None:
        failures = self.failures
        self.close()
        # What a failed close has lost is not asked for again from a new image.
        if self.failures == failures:
            self.try_to_open()
