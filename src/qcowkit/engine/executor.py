"""Ordered parallel work: a bounded number of items in flight, results in the order of the items."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
    ) -> Iterator[Result]:
        """work(item) for all items, in order, a bounded number ahead of the consumer.

        The first failure is raised where its result would have come. Raises Cancelled."""
        waiting: deque[Future[Result]] = deque()
        source = iter(items)
        try:
            while True:
                while len(waiting) < self._ahead and (item := next(source, _END)) is not _END:
                    waiting.append(self._pool.submit(work, item))  # type: ignore[arg-type]
                if not waiting:
                    return
                result = waiting.popleft().result()
                self.check_cancelled()
                yield result
        finally:
            for future in waiting:
                future.cancel()

    def check_cancelled(self) -> None:
        """Raise Cancelled when the caller withdrew the work."""
        if self._cancel.is_set():
            raise Cancelled("the operation was cancelled")

    def background(self) -> Background:
        """Work whose results nobody waits for one by one."""
        return Background(self._pool, most=self._ahead)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


_END = object()


class Background:
    """Calls in flight, a bounded number; their failures surface at the next call or at `wait`."""

    def __init__(self, pool: ThreadPoolExecutor, *, most: int) -> None:
        self._pool = pool
        self._most = most
        self._waiting: deque[Future[None]] = deque()

    def submit(self, work: Callable[[], None]) -> None:
        """Queue a call; waits for the oldest when too many are in flight."""
        while len(self._waiting) >= self._most or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(work))

    def wait(self) -> None:
        """Until all calls have ended. Raises the first failure."""
        while self._waiting:
            self._waiting.popleft().result()


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
