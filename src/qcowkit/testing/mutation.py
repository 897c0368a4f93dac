"""Leave out barriers on purpose: a test that then notices nothing proves nothing.

Reliability reference, section 3.4, "Mutation proof"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qcowkit.engine.barriers import Barriers


@contextmanager
def without_barrier(*names: str) -> Iterator[list[str]]:
    """Within this block every barrier of these names lets everything pass, in all images.

    What was written stays pending, so that the next barrier flushes it. Yields a list that gets
    the name each time one was left out that would have flushed. Not for several threads."""
    sound = Barriers.wait
    skipped: list[str] = []

    def wait(self: Barriers, name: str) -> None:
        if name not in names:
            sound(self, name)
            return
        self.check()
        if self.pending:
            skipped.append(name)

    Barriers.wait = wait  # type: ignore[method-assign]
    try:
        yield skipped
    finally:
        Barriers.wait = sound  # type: ignore[method-assign]
