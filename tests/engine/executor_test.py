"""Ordered parallel work: order, failures, bounds and ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from qcowkit.engine import executor
from qcowkit.engine.executor import (
    BufferPool,
    RateLimit,
    Turnstile,
    Workers,
    default_threads,
    ignore_progress,
)
from qcowkit.errors import Cancelled, RequestError


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    barrier = threading.Barrier(min(threads, 2))

    def work(item: int) -> int:
        if item < 2 and threads > 1:
            barrier.wait(10)
        return item * item

    with Workers(threads) as workers:
        assert list(workers.map_ordered(work, range(100))) == [item * item for item in range(100)]


def test_no_items_are_no_results() -> None:
    with Workers(2) as workers:
        assert list(workers.map_ordered(str, [])) == []


def test_the_first_failure_surfaces_in_its_place() -> None:
    def work(item: int) -> int:
        if item in (3, 4):
            raise RequestError(f"item {item}")
        return item

    with Workers(3) as workers:
        results = workers.map_ordered(work, range(10))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(RequestError, match="item 3"):
            next(results)


def test_a_failing_source_of_items_surfaces() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise RequestError("no more")

    with Workers(1) as workers, pytest.raises(RequestError, match="no more"):
        list(workers.map_ordered(str, items()))


def test_work_runs_a_bounded_number_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    with Workers(2) as workers:
        results = workers.map_ordered(str, items())
        next(results)
        assert len(taken) <= 5
        results.close()
    assert len(taken) <= 5


def test_leaving_early_waits_for_what_runs_and_drops_the_rest() -> None:
    begun, ended = threading.Semaphore(0), []
    release = threading.Event()

    def work(item: int) -> int:
        begun.release()
        if item:
            release.wait(10)
        ended.append(item)
        return item

    with Workers(2) as workers:
        results = workers.map_ordered(work, range(100))
        next(results)
        for _ in range(3):
            begun.acquire(timeout=10)
        threading.Timer(0.01, release.set).start()
        results.close()
        assert set(ended) >= {0, 1, 2}
        assert len(ended) <= 5


def test_cancelled_work_stops_at_the_next_result() -> None:
    cancel = threading.Event()
    with Workers(1, cancel=cancel) as workers:
        results = workers.map_ordered(str, range(10))
        next(results)
        cancel.set()
        with pytest.raises(Cancelled, match="the operation was cancelled"):
            next(results)


def test_no_threads_are_refused() -> None:
    with pytest.raises(RequestError, match="0 threads are too few, at least 1 is needed"):
        Workers(0)


def test_there_is_a_thread_by_default() -> None:
    assert default_threads() >= 1
    with Workers() as workers:
        assert workers.threads == default_threads()
    ignore_progress(0, 0)


def test_tickets_pass_in_order_whoever_comes_first() -> None:
    turnstile, passed = Turnstile(), []

    def hold(ticket: int) -> None:
        with turnstile.turn(ticket):
            passed.append(ticket)

    threads = [threading.Thread(target=hold, args=(ticket,)) for ticket in reversed(range(20))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert passed == list(range(20))


def test_a_ticket_that_gives_up_turns_the_later_ones_away() -> None:
    turnstile = Turnstile()
    turnstile.give_up(1)
    with turnstile.turn(0):
        pass
    with pytest.raises(Cancelled, match="an earlier part of the work failed"), turnstile.turn(2):
        pass


def test_a_failure_inside_a_turn_turns_the_later_ones_away() -> None:
    turnstile = Turnstile()
    with pytest.raises(RequestError), turnstile.turn(0):
        raise RequestError("no")
    with pytest.raises(Cancelled), turnstile.turn(1):
        pass


def test_work_in_turns_ends_when_its_consumer_leaves() -> None:
    """Whatever is dropped, nobody may wait for the turn of an item that never begins."""
    for leave_after in range(1, 12):
        turnstile = Turnstile()

        def work(item: int, turnstile: Turnstile = turnstile) -> int:
            with turnstile.turn(item):
                return item

        with Workers(3) as workers:
            results = workers.map_ordered(work, range(1000))
            for _ in range(leave_after):
                next(results)
            results.close()


def test_work_in_turns_shows_the_failure_and_not_what_follows_from_it() -> None:
    turnstile = Turnstile()

    def work(item: int) -> int:
        if item == 5:
            turnstile.give_up(item)
            raise RequestError("item 5")
        with turnstile.turn(item):
            return item

    with Workers(4) as workers, pytest.raises(RequestError, match="item 5"):
        list(workers.map_ordered(work, range(1000)))


def test_a_buffer_that_was_given_back_is_used_again() -> None:
    pool = BufferPool(16)
    first, second = pool.take(), pool.take()
    assert first is not second
    assert (first.shape, first.dtype) == ((16,), np.uint8)
    pool.give(first)
    assert pool.take() is first


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_a_rate_makes_up_for_what_is_ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(executor, "time", clock)
    limit = RateLimit(1000)
    limit.spend(500)
    limit.spend(500)
    clock.now += 5
    limit.spend(1000)
    assert clock.slept == pytest.approx([0.5, 0.5])


def test_no_rate_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(executor, "time", clock)
    RateLimit(None).spend(1 << 60)
    assert clock.slept == []
