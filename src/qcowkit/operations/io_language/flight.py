"""Requests under way. Those that touch the same bytes are carried out in the order they came."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from qcowkit.operations.io_language.reports import Outcome

_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Guest bytes [start, stop) that a request reads or, with `changes`, changes."""

    start: int
    stop: int
    changes: bool

    def excludes(self, other: Span) -> bool:
        """Whether the two must not be under way together."""
        apart = self.stop <= other.start or other.stop <= self.start
        return (self.changes or other.changes) and not apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """One request under way. counts: whether its failure is one of the run."""

    span: Span
    future: Future[Outcome]
    counts: bool


class InFlight:
    """A small pool of threads, and what they have to do. Used from one thread.

    A request waits in its own thread for those before it. They came to the pool before it and so
    have a thread already: nobody waits for what cannot begin."""

    def __init__(self, *, ended: Callable[[], None]) -> None:
        """ended: called from a thread of the pool each time a request has ended."""
        self._ended = ended
        self._pool: ThreadPoolExecutor | None = None
        self._tickets: list[Ticket] = []

    def start(self, work: Callable[[], Outcome], span: Span, *, counts: bool = False) -> Ticket:
        """Begin a request."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="qcowkit-io")
        earlier = self._excluded_by(span)

        def carry_out() -> Outcome:
            wait(earlier)
            return work()

        future = self._pool.submit(carry_out)
        ticket = Ticket(span=span, future=future, counts=counts)
        self._tickets.append(ticket)
        future.add_done_callback(lambda _: self._ended())
        return ticket

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return any(not ticket.future.done() for ticket in self._tickets)

    def wait_for(self, span: Span) -> None:
        """Wait for what excludes a span."""
        wait(self._excluded_by(span))

    def drain(self) -> None:
        """Wait for everything."""
        wait([ticket.future for ticket in self._tickets])

    def take_finished(self) -> list[tuple[Outcome, bool]]:
        """What has ended since the last call, in the order it was begun, with `counts`."""
        done = [ticket for ticket in self._tickets if ticket.future.done()]
        self._tickets = [ticket for ticket in self._tickets if ticket not in done]
        return [(ticket.future.result(), ticket.counts) for ticket in done]

    def close(self) -> None:
        """Wait for everything and end the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None

    def _excluded_by(self, span: Span) -> list[Future[Outcome]]:
        return [
            ticket.future
            for ticket in self._tickets
            if not ticket.future.done() and ticket.span.excludes(span)
        ]
