"""Stopping a request at a metadata event, to look at what lies on disk at that moment.

The names of events are in `engine/events.py`: steps, and barriers with underscores for blanks. A
stopped request holds the image (docs/adr/0010), so nothing else changes it meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from qcowkit.engine.barriers import Observer
from qcowkit.engine.events import QCOW2_BARRIERS, QCOW2_STEPS
from qcowkit.errors import RequestError, UnsupportedFeature
from qcowkit.image.chain import Chain
from qcowkit.image.qcow2_write import WritableQcow2Image

EVENTS = {name.replace(" ", "_"): name for name in (*QCOW2_STEPS, *QCOW2_BARRIERS)}


@dataclass(slots=True, kw_only=True, eq=False)
class _Stop:
    """A request that waits, and since when it need not."""

    tag: str
    event: str
    released: bool = False


def observe_image(chain: Chain, observer: Observer) -> None:
    """Let `observer` be told of the events of the top image. Raises UnsupportedFeature where it is
    not a qcow2 image that is open for writing."""
    top = chain.images[0]
    if not isinstance(top, WritableQcow2Image):
        state = "writable" if chain.writable else "read-only"
        raise UnsupportedFeature(
            "break", reason=f"expected a writable qcow2 image, found a {state} {chain.format} image"
        )
    top.disk.state.barriers.observe = observer


class Breakpoints:
    """What is to be stopped, and what was. Safe from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._armed: list[tuple[str, str]] = []
        self._stops: list[_Stop] = []

    @property
    def armed(self) -> bool:
        """Whether a request could be stopped."""
        return bool(self._armed)

    @property
    def stopped(self) -> tuple[str, str] | None:
        """(tag, event) of what is stopped first, None where nothing is."""
        with self._changed:
            return next(((one.tag, one.event) for one in self._stops if not one.released), None)

    def add(self, event: str, tag: str) -> None:
        """Stop the next request that comes to an event. Raises RequestError for an unknown one."""
        if event not in EVENTS:
            raise RequestError(f"break: event {event!r} is unknown; known are {', '.join(EVENTS)}")
        with self._changed:
            self._armed.append((EVENTS[event], tag))

    def remove(self, tag: str) -> None:
        """Take back every break with a tag, and let its requests go on. RequestError: none."""
        with self._changed:
            kept = [one for one in self._armed if one[1] != tag]
            removed = len(kept) < len(self._armed)
            self._armed = kept
            if not self._release(tag) and not removed:
                raise RequestError(f"remove_break: there is no break {tag!r}")

    def resume(self, tag: str) -> None:
        """Let the requests that were stopped with a tag go on. RequestError: none were."""
        with self._changed:
            if not self._release(tag):
                raise RequestError(f"resume: no request is stopped at {tag!r}")

    def release_all(self) -> None:
        """No break is left, and nothing stopped."""
        with self._changed:
            self._armed.clear()
            for stop in self._stops:
                stop.released = True
            self._changed.notify_all()

    def wake(self) -> None:
        """Somebody who waits should look again: a request has ended."""
        with self._changed:
            self._changed.notify_all()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait until `happened`, or until something is stopped."""
        with self._changed:
            self._changed.wait_for(lambda: happened() or self._has_stopped())

    def reached(self, event: str) -> None:
        """The observer: the request of this thread stops here if it is to."""
        if not self._armed:
            return
        with self._changed:
            for one in self._armed:
                if one[0] == event:
                    self._armed.remove(one)
                    self._hold(_Stop(tag=one[1], event=event))
                    return

    def _hold(self, stop: _Stop) -> None:
        self._stops.append(stop)
        self._changed.notify_all()
        self._changed.wait_for(lambda: stop.released)
        self._stops.remove(stop)

    def _release(self, tag: str) -> bool:
        found = [stop for stop in self._stops if stop.tag == tag and not stop.released]
        for stop in found:
            stop.released = True
        self._changed.notify_all()
        return bool(found)

    def _has_stopped(self) -> bool:
        return any(not stop.released for stop in self._stops)
