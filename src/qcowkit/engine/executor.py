"""Ordered parallel work: a bounded number of items in flight, results in the order of the items."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from qcowkit.errors import Cancelled, RequestError

Item = TypeVar("Item")
Result = TypeVar("Result")


class ProgressReport(Protocol):
    """Called from one thread, now and then: bytes done so far, bytes in all."""

    def __call__(self, done: int, total: int) -> None: ...


def ignore_progress(done: int, total: int) -> None:
    """The reporter of those who do not want to know."""


def default_threads() -> int:
    """As many as the processors this process may use."""
    return max(1, len(os.sched_getaffinity(0)))


class BufferPool:
    """Buffers of one size, used again and again: fresh memory costs a page fault every 4 KiB."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[npt.NDArray[np.uint8]] = []

    def take(self) -> npt.NDArray[np.uint8]:
        """A buffer of shape (size,), content arbitrary."""
        try:
            return self._free.pop()
        except IndexError:
            return np.empty(self.size, dtype=np.uint8)

    def give(self, buffer: npt.NDArray[np.uint8]) -> None:
        """Return a buffer that nobody uses any more."""
        self._free.append(buffer)


class Workers:
    """A pool of threads with ordered results. A context manager: leaving it waits for all."""

    def __init__(
        self, threads: int | None = None, *, cancel: threading.Event | None = None
    ) -> None:
        count = default_threads() if threads is None else threads
        if count < 1:
            raise RequestError(f"{count} threads are too few, at least 1 is needed")
        self.threads = count
        self._cancel = cancel or threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix="qcowkit")
        self._ahead = 2 * count

    def map_ordered(
        self, work: Callable[[Item], Result], items: Iterable[Item]
    ) -> Generator[Result, None, None]:
        """work(item) for all items, in order, a bounded number ahead of the consumer.

        The first failure is raised where its result would have come. Raises Cancelled. However
        the iteration ends, no call is running any more; close the iterator to leave it early."""
        waiting: deque[Future[Result]] = deque()
        source = iter(items)
        try:
            while True:
                while len(waiting) < self._ahead and (item := next(source, _END)) is not _END:
                    waiting.append(self._pool.submit(work, item))  # type: ignore[arg-type]
                if not waiting:
                    return
                # It leaves the queue once it has ended: an interrupt must not lose sight of it.
                result = waiting[0].result()
                waiting.popleft()
                self.check_cancelled()
                yield result
        finally:
            # Whoever leaves early must find no thread at work on what they close next.
            # The latest first: none may begin whose turn waits for one that never will.
            for future in reversed(waiting):
                future.cancel()
            wait(waiting)

    def check_cancelled(self) -> None:
        """Raise Cancelled when the caller withdrew the work."""
        if self._cancel.is_set():
            raise Cancelled("the operation was cancelled")

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


_END = object()


class Turnstile:
    """Lets the holders of tickets 0, 1, 2 ... pass one at a time, in that order.

    What is done inside is serial and deterministic; before and after it, work is parallel."""

    def __init__(self) -> None:
        self._next = 0
        self._failed: int | None = None
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def turn(self, ticket: int) -> Iterator[None]:
        """Wait for the turn of `ticket`, and give way at the end.

        Raises Cancelled when an earlier ticket gave up: its turn would never end."""
        with self._changed:
            while self._next != ticket:
                if self._failed is not None and self._failed < ticket:
                    raise Cancelled("an earlier part of the work failed")
                self._changed.wait()
        try:
            yield
        except BaseException:
            self.give_up(ticket)
            raise
        with self._changed:
            self._next = ticket + 1
            self._changed.notify_all()

    def give_up(self, ticket: int) -> None:
        """The holder of `ticket` failed at or before its turn; all later ones are turned away."""
        with self._changed:
            self._failed = ticket if self._failed is None else min(ticket, self._failed)
            self._changed.notify_all()


class RateLimit:
    """At most `rate` bytes a second on average; None for no limit."""

    def __init__(self, rate: int | None) -> None:
        self._rate = rate
        self._begun = time.monotonic()
        self._spent = 0

    def spend(self, count: int) -> None:
        """Wait until `count` more bytes are due."""
        if self._rate is None:
            return
        self._spent += count
        ahead = self._spent / self._rate - (time.monotonic() - self._begun)
        if ahead > 0:
            time.sleep(ahead)
