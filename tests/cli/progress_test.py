"""Progress: silent, as JSON, as a bar, and when SIGUSR1 asks."""

from __future__ import annotations

import io
import json
import os
import signal

from hypothesis import given
from hypothesis import strategies as st

from qcowkit.cli.progress import Progress, draw_bar
from qcowkit.units import MiB


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_json_progress_is_one_object_a_line() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(style="json", label="x", stream=stream, clock=clock) as progress:
        for done in range(5):
            clock.now += 1
            progress(done * MiB, 4 * MiB)
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert all(set(record) == {"done", "total", "rate"} for record in records)
    assert records[-1] == {"done": 4 * MiB, "total": 4 * MiB, "rate": 4 * MiB // 5}


def test_progress_is_not_drawn_more_often_than_its_interval() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(style="json", label="x", stream=stream, clock=clock)
    for done in range(1000):
        progress(done, 1000)
    assert len(stream.getvalue().splitlines()) == 1


def test_a_bar_is_drawn_on_a_terminal_only() -> None:
    for stream in (io.StringIO(), Terminal()):
        with Progress(style="bar", label="convert", stream=stream) as progress:
            progress(1, 2)
        assert bool(stream.getvalue()) == stream.isatty()


def test_a_finished_bar_stays_on_its_line() -> None:
    stream = Terminal()
    with Progress(style="bar", label="convert", stream=stream) as progress:
        progress(2, 2)
    assert stream.getvalue().startswith("\r")
    assert stream.getvalue().endswith("\n")
    assert "100.0 %" in stream.getvalue()


def test_a_signal_is_answered_with_one_line_whatever_the_style() -> None:
    stream = io.StringIO()
    with Progress(style="none", label="x", stream=stream) as progress:
        progress(1, 8)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stream.getvalue() == "    (12.50/100%)\n"


def test_the_handler_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Progress(style="none", label="x", stream=io.StringIO()):
        assert signal.getsignal(signal.SIGUSR1) is not before
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_closed_stream_is_no_failure() -> None:
    stream = io.StringIO()
    with Progress(style="json", label="x", stream=stream) as progress:
        stream.close()
        progress(1, 2)


@given(
    done=st.integers(0, 1 << 60),
    total=st.integers(0, 1 << 60),
    rate=st.integers(0, 1 << 50),
    columns=st.integers(1, 300),
)
def test_a_bar_never_leaves_its_line(done: int, total: int, rate: int, columns: int) -> None:
    assert len(draw_bar("convert", done, total, rate=rate, columns=columns)) <= columns
