"""Progress of a long verb on standard error: a bar on a terminal, JSON lines, or one line when
SIGUSR1 asks. Numpy-free; drawn without a library, so that it costs nothing at start-up."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self, TextIO

from qcowkit.units import format_size

# Seconds between two drawings.
_INTERVALS = {"bar": 0.1, "json": 0.5}
_NARROW = 40


class Progress:
    """Called with bytes done and bytes in total, as often as the work likes.

    style: `bar` (silent unless `stream` is a terminal), `json` or `none`. As a context it answers
    SIGUSR1 with a line whatever the style, and leaves a finished bar behind."""

    def __init__(
        self,
        *,
        style: str,
        label: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stderr
        self._style = style if style != "bar" or self._stream.isatty() else "none"
        self._label = label
        self._clock = clock
        self._begun = clock()
        self._drawn = float("-inf")
        self._done = 0
        self._total = 0
        self._before: Any = None

    @classmethod
    def of(cls, args: Namespace, label: str) -> Progress:
        """The reporter that the flags -p, --progress and -q ask for."""
        quiet = getattr(args, "quiet", False)
        return cls(style="none" if quiet else args.progress, label=label)

    def __call__(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        if self._style == "none":
            return
        now = self._clock()
        if now - self._drawn >= _INTERVALS[self._style]:
            self._drawn = now
            self._draw(now)

    def __enter__(self) -> Self:
        self._before = _answer(self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            _answer(self._before)
        if self._style != "none" and self._drawn > float("-inf"):
            self._draw(self._clock())
        if self._style == "bar" and self._drawn > float("-inf"):
            self._write("\n")

    def line(self) -> str:
        """What has been done so far, in the words of qemu-img."""
        percent = 100 * self._done / self._total if self._total else 0.0
        return f"    ({percent:.2f}/100%)"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._write(self.line() + "\n")

    def _draw(self, now: float) -> None:
        rate = int(self._done / (now - self._begun)) if now > self._begun else 0
        if self._style == "json":
            record = {"done": self._done, "total": self._total, "rate": rate}
            self._write(json.dumps(record) + "\n")
            return
        columns = shutil.get_terminal_size().columns
        bar = draw_bar(self._label, self._done, self._total, rate=rate, columns=columns - 1)
        self._write(f"\r{bar}\x1b[K")

    def _write(self, text: str) -> None:
        # Progress is never worth a failure: a closed standard error only falls silent.
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, RuntimeError, ValueError):
            self._style = "none"


def draw_bar(label: str, done: int, total: int, *, rate: int, columns: int) -> str:
    """One line of at most `columns` characters; sizes in bytes, `rate` in bytes a second."""
    share = min(done / total, 1.0) if total else 0.0
    facts = f"{100 * share:5.1f} %  {format_size(done)} of {format_size(total)}"
    facts += f"  {format_size(rate)}/s"
    if rate and total > done:
        left = (total - done) // rate
        facts += f"  {left // 60}:{left % 60:02} left"
    width = columns - len(label) - len(facts) - 6
    if columns < _NARROW or width < 8:
        return f"{label}  {facts}"[:columns]
    full = int(width * share)
    return f"{label}  [{'#' * full}{'.' * (width - full)}]  {facts}"


def _answer(handler: Any) -> Any:
    """Let `handler` answer SIGUSR1; returns the handler before it, or None outside of the main
    thread, where no handler can be set."""
    try:
        return signal.signal(signal.SIGUSR1, handler)
    except ValueError:
        return None
