"""A session of the command language: one open disk, requests under way, and breaks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from qcowkit.errors import QcowkitError, RequestError
from qcowkit.operations.io_language.breakpoints import Breakpoints, observe_image
from qcowkit.operations.io_language.description import allocation, allocation_map, description
from qcowkit.operations.io_language.flight import InFlight, Span
from qcowkit.operations.io_language.grammar import Call, help_lines, help_of, parse_line
from qcowkit.operations.io_language.opening import (
    AIO_MODES,
    DISCARD_MODES,
    Opener,
    OpenRequest,
    temporary_overlay,
)
from qcowkit.operations.io_language.reports import Lines, Outcome, Report, exact_size
from qcowkit.operations.io_language.requests import ReadRequest, Request, parse_request
from qcowkit.operations.io_language.transfers import Target, carry_out, span_of
from qcowkit.units import INT64_MAX, SECTOR, parse_size

if TYPE_CHECKING:
    from qcowkit.image.chain import Chain

_DONE = Outcome()
# What must wait for requests under way, and cannot while one of them is stopped.
_WAITING = ("aio_flush", "flush", "truncate", "close", "reopen")
_FIXED_OPTIONS = ("driver", "filename", "file.filename", "file.driver")


class IoSession:
    """Runs commands on one disk at a time. Used from one thread; nothing is printed.

    A failed command is an outcome, never an exception: the next one can follow. `finish` ends it.
    """

    def __init__(
        self,
        opener: Opener,
        *,
        clock: Callable[[], float] = time.perf_counter,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """clock: seconds, for the figures. pause: sleeps so many seconds."""
        self.opener = opener
        self.invalid_reads = 0
        self.invalid_writes = 0
        self._clock = clock
        self._pause = pause
        self._target: Target | None = None
        self._request = OpenRequest()
        self._breaks = Breakpoints()
        self._flight = InFlight(ended=self._breaks.wake)
        self._commands: dict[str, Callable[[Call], Outcome]] = {
            "abort": lambda _: Outcome(ends=True, crash=True),
            "aio_flush": self._aio_flush,
            "alloc": self._alloc,
            "break": self._break,
            "close": lambda _: self._close(),
            "flush": self._flush,
            "help": self._help,
            "info": lambda _: _said(description(self.disk)),
            "length": lambda _: _said(Lines(lines=[exact_size(self.disk.size)])),
            "map": self._map,
            "open": self._open,
            "quit": lambda _: Outcome(ends=True),
            "remove_break": self._remove_break,
            "reopen": self._reopen,
            "resume": self._resume,
            "sigraise": self._sigraise,
            "sleep": self._sleep,
            "truncate": self._truncate,
            "wait_break": self._wait_break,
        }

    @property
    def disk(self) -> Chain:
        """The open disk. Raises RequestError where none is."""
        if self._target is None:
            raise RequestError("no image is open (see help open)")
        return self._target.chain

    # Running

    def run(self, line: str) -> Outcome:
        """One command, and the results of requests that have ended meanwhile."""
        try:
            call = parse_line(line)
            outcome = _DONE if call is None else self._dispatch(call)
        except QcowkitError as error:
            outcome = Outcome(errors=(str(error),), failed=True)
        return self._with_finished(outcome)

    def _dispatch(self, call: Call) -> Outcome:
        command = call.command
        if command.needs_disk:
            disk = self.disk
            if command.changes and not disk.writable:
                raise RequestError(f"{call.name}: the image is open read-only")
        own = self._commands.get(call.name)
        stopped = self._breaks.stopped
        if stopped is not None and (
            call.name in _WAITING or (command.changes and not call.name.startswith("aio_"))
        ):
            raise RequestError(
                f"{call.name}: a request is stopped at {stopped[1]} and holds the image: "
                f"resume {stopped[0]} first"
            )
        return self._transfer(call) if own is None else own(call)

    def _with_finished(self, outcome: Outcome) -> Outcome:
        """The results of what has ended belong to this moment, behind the command's own."""
        reports, errors, failed = [*outcome.reports], [*outcome.errors], outcome.failed
        for done, counts in self._flight.take_finished():
            reports += done.reports
            errors += done.errors
            failed = failed or (counts and done.failed)
        return replace(outcome, reports=tuple(reports), errors=tuple(errors), failed=failed)

    def finish(self) -> Outcome:
        """Let everything end, and close the disk; its failure is an outcome."""
        self._breaks.release_all()
        try:
            outcome = self._close() if self._target is not None else _DONE
        except QcowkitError as error:
            outcome = Outcome(errors=(f"close: {error}",), failed=True)
        outcome = self._with_finished(outcome)
        self._flight.close()
        return outcome

    # Reading and writing

    def _transfer(self, call: Call) -> Outcome:
        request = parse_request(call)
        target = self._target
        assert target is not None
        if request.invalid:
            return self._count_invalid(request)
        span, begun = span_of(target, request), self._clock()

        def work() -> Outcome:
            return carry_out(target, request, clock=self._clock, begun=begun)

        if request.is_async:
            self._flight.start(work, span)
            return _DONE
        if span.changes and self._breaks.armed:
            return self._stoppable(request.command, work, span)
        if self._breaks.stopped is None:
            self._flight.wait_for(span)
        return work()

    def _stoppable(self, command: str, work: Callable[[], Outcome], span: Span) -> Outcome:
        """In a thread, which a break may stop: then the session goes on without it."""
        ticket = self._flight.start(work, span, counts=True)
        self._breaks.wait_until(ticket.future.done)
        stopped = self._breaks.stopped
        if stopped is None or ticket.future.done():
            return _DONE
        tag, event = stopped
        return _said(Lines(lines=[f"{command} stopped at {event}, to be resumed: {tag}"]))

    def _count_invalid(self, request: Request) -> Outcome:
        if isinstance(request, ReadRequest):
            self.invalid_reads += 1
            kind, count = "read", self.invalid_reads
        else:
            self.invalid_writes += 1
            kind, count = "write", self.invalid_writes
        return _said(Lines(lines=[f"invalid {kind} request counted, {count} in all"]))

    def _aio_flush(self, call: Call) -> Outcome:
        self._settle(call.name)
        return _DONE

    def _settle(self, command: str) -> None:
        """Wait for all that is under way. Raises RequestError once something is stopped."""
        self._breaks.wait_until(lambda: not self._flight.busy)
        if self._breaks.stopped is not None:
            tag, event = self._breaks.stopped
            raise RequestError(f"{command}: a request was stopped at {event}: resume {tag} first")
        self._flight.drain()

    def _flush(self, call: Call) -> Outcome:
        return self._whole_disk(call.name, self.disk.flush)

    def _truncate(self, call: Call) -> Outcome:
        size = parse_size(call.operands[0], what="truncate: size")
        mode = call.value("m") or "off"
        disk = self.disk
        return self._whole_disk(
            call.name, lambda: disk.resize(size, shrink=True, preallocation=mode)
        )

    def _whole_disk(self, command: str, change: Callable[[], None]) -> Outcome:
        """A change that nothing may be under way beside."""
        self._settle(command)

        def work() -> Outcome:
            try:
                change()
            except QcowkitError as error:
                return Outcome(errors=(f"{command}: {error}",), failed=True)
            return _DONE

        if self._breaks.armed:
            return self._stoppable(command, work, Span(start=0, stop=INT64_MAX, changes=True))
        return work()

    # Looking

    def _alloc(self, call: Call) -> Outcome:
        offset = parse_size(call.operands[0], what="alloc: offset")
        length = SECTOR
        if len(call.operands) > 1:
            length = parse_size(call.operands[1], what="alloc: length")
        self._quieten()
        return _said(allocation(self.disk, offset=offset, length=length))

    def _map(self, call: Call) -> Outcome:
        self._quieten()
        return _said(allocation_map(self.disk))

    def _quieten(self) -> None:
        """Let changes end before their effect is looked at; not those that are stopped."""
        self._breaks.wait_until(lambda: not self._flight.busy)

    def _help(self, call: Call) -> Outcome:
        lines = help_of(call.operands[0]) if call.operands else help_lines()
        return _said(Lines(lines=lines))

    # Opening and closing

    def open(self, request: OpenRequest) -> None:
        """Open a disk. Raises QcowkitError, RequestError where one is open already."""
        if self._target is not None:
            raise RequestError("an image is open already: close it first")
        request.check()
        self.opener.check(request)
        chain = self.opener.open(request)
        if request.temporary:
            chain = temporary_overlay(chain)
        self._request = request
        self._target = Target(
            chain=chain,
            writethrough=request.writethrough,
            passes_discards=request.passes_discards,
            copy_on_read=request.copy_on_read,
        )

    def _open(self, call: Call) -> Outcome:
        options = self._options(call)
        aio = call.value("i")
        if aio is not None and aio not in AIO_MODES:
            raise RequestError(f"open: -i is {aio!r}, expected one of {', '.join(AIO_MODES)}")
        discard = call.value("d")
        if discard is not None:
            if discard not in DISCARD_MODES:
                expected = ", ".join(DISCARD_MODES)
                raise RequestError(f"open: -d is {discard!r}, expected one of {expected}")
            options.setdefault("discard", discard)
        request = OpenRequest(
            path=call.operands[0] if call.operands else None,
            options=options,
            writable=not call.has("r"),
            cache=call.value("t") or ("none" if call.has("n") else "writeback"),
            temporary=call.has("s"),
            copy_on_read=call.has("C"),
            force_share=call.has("U"),
        )
        self.open(request)
        return _DONE

    def _options(self, call: Call) -> dict[str, str]:
        return self.opener.parse(call.value("o") or "")

    def _close(self) -> Outcome:
        chain = self.disk
        self._breaks.release_all()
        self._flight.drain()
        self._target = None
        chain.close()
        return _DONE

    def _reopen(self, call: Call) -> Outcome:
        """The image is closed before it is opened again: two writers of one file ruin it."""
        old = self._request
        new = self._changed_request(call)
        new.check()
        self.opener.check(new)
        self._close()
        try:
            self.open(new)
        except QcowkitError as error:
            try:
                self.open(old)
            except QcowkitError as second:
                raise RequestError(f"reopen: {error}; and as before: {second}") from second
            raise RequestError(f"reopen: {error}; the image is open as before") from error
        return _DONE

    def _changed_request(self, call: Call) -> OpenRequest:
        old = self._request
        if call.has("r") and call.has("w"):
            raise RequestError("reopen: -r and -w exclude each other")
        if old.temporary:
            raise RequestError("reopen: what was changed lies in a temporary overlay, and would go")
        options = self._options(call)
        for key in _FIXED_OPTIONS:
            if key in options:
                raise RequestError(f"reopen: {key}= cannot change while an image is open")
        writable = call.has("w") or (old.writable and not call.has("r"))
        return replace(
            old,
            options={**old.options, **options},
            writable=writable,
            cache=call.value("c") or old.cache,
        )

    # Breaks

    def _break(self, call: Call) -> Outcome:
        event, tag = call.operands
        observe_image(self.disk, self._breaks.reached)
        self._breaks.add(event, tag)
        return _DONE

    def _remove_break(self, call: Call) -> Outcome:
        self._breaks.remove(call.operands[0])
        return _DONE

    def _resume(self, call: Call) -> Outcome:
        self._breaks.resume(call.operands[0])
        return _DONE

    def _wait_break(self, call: Call) -> Outcome:
        tag = call.operands[0]
        self._breaks.wait_until(lambda: not self._flight.busy)
        stopped = self._breaks.stopped
        if stopped is None or stopped[0] != tag:
            # One request holds the image: while it is stopped, no other comes to an event.
            raise RequestError(f"wait_break: no request came to the break {tag!r}")
        return _DONE

    # The process

    def _sleep(self, call: Call) -> Outcome:
        self._pause(_whole(call, "milliseconds") / 1000)
        return _DONE

    def _sigraise(self, call: Call) -> Outcome:
        return Outcome(signal=_whole(call, "signal"))


def _said(*reports: Report) -> Outcome:
    return Outcome(reports=reports)


def _whole(call: Call, what: str) -> int:
    text = call.operands[0]
    if not (text.isascii() and text.isdecimal()):
        raise RequestError(f"{call.name}: {what} {text!r} is not a whole number")
    return int(text)
