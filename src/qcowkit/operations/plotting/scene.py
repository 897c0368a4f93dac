"""The picture of a cluster map as boxes and labels, before it is SVG or PNG. Pure.

Lengths are in units: one pixel of SVG, two of PNG."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from qcowkit.operations.plotting.cells import LEVELS, CellMap, State
from qcowkit.units import ceil_div, format_size

Color = tuple[int, int, int]

STATE_NAMES = {
    State.DATA: "data",
    State.COMPRESSED: "compressed",
    State.BACKING: "from backing",
    State.ZERO: "zero",
    State.UNALLOCATED: "unallocated",
}

_MARGIN = 24
_PITCH = 11  # from one cell to the next
_CELL = 10
_LABELS = 64  # room for the offsets left of the grid
_LEGEND = 138  # one entry of the legend
_BAR = 8
_TITLE_ADVANCE = 10  # the widest that any of the fonts takes a character


class Ink(Enum):
    """How a label is written. The value names its class in SVG."""

    TITLE = "title"
    TEXT = "text"
    MUTED = "muted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colours of one background; `states` in the order of State."""

    background: Color
    ink: Color
    muted: Color
    states: tuple[Color, ...]

    def fill(self, state: int, level: int) -> Color:
        """The colour of a state, paler the less of a cell it takes."""
        full, none = self.states[state], self.states[State.UNALLOCATED]
        weight = 40 + 60 * level // (LEVELS - 1)
        red, green, blue = (
            (a * weight + b * (100 - weight)) // 100 for a, b in zip(full, none, strict=True)
        )
        return red, green, blue


LIGHT = Theme(
    background=(255, 255, 255),
    ink=(27, 32, 40),
    muted=(104, 113, 126),
    states=((43, 108, 217), (188, 62, 134), (23, 148, 128), (235, 172, 38), (229, 232, 237)),
)
DARK = Theme(
    background=(19, 22, 27),
    ink=(233, 236, 241),
    muted=(146, 155, 168),
    states=((88, 153, 255), (233, 113, 181), (52, 196, 172), (247, 196, 84), (43, 48, 57)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A filled rectangle; x, y: its upper left corner."""

    x: int
    y: int
    width: int
    height: int
    state: int
    level: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A line of text; y: its base line. x: its left end, or its right end with `to_left`."""

    x: int
    y: int
    text: str
    ink: Ink
    to_left: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """All that is drawn, and a sentence for who cannot see it."""

    width: int
    height: int
    title: str
    summary: str
    boxes: tuple[Box, ...]
    labels: tuple[Label, ...]


def compose(cells: CellMap, *, title: str, columns: int) -> Scene:
    """Lay out title, grid, proportional bar and legend; `columns` cells a row."""
    left, top = _MARGIN + _LABELS, _MARGIN + 52
    rows = max(1, ceil_div(len(cells), columns))
    inner = max(columns * _PITCH - (_PITCH - _CELL), _LEGEND * len(State) - 24)
    bar = top + rows * _PITCH + 18
    per_cell = format_size(ceil_div(cells.size, max(1, len(cells))))
    facts = (
        f"{format_size(cells.size)}, {len(cells)} cells of {per_cell}, fainter where partly used"
    )
    boxes = [
        *_grid(cells, columns=columns, left=left, top=top),
        *_bar(cells.totals, left=left, top=bar, width=inner),
        *(
            Box(x=left + _LEGEND * state, y=bar + 28, width=10, height=10, state=state, level=3)
            for state in State
        ),
    ]
    labels = [
        Label(x=left, y=_MARGIN + 14, text=_shorten(title, inner // _TITLE_ADVANCE), ink=Ink.TITLE),
        Label(x=left, y=_MARGIN + 36, text=facts, ink=Ink.MUTED),
        *_offsets(cells, columns=columns, x=left - 10, top=top),
        *_legend(cells, left=left, top=bar + 28),
    ]
    return Scene(
        width=left + inner + _MARGIN,
        height=bar + 28 + 30 + _MARGIN,
        title=title,
        summary=summary_line(cells),
        boxes=tuple(boxes),
        labels=tuple(labels),
    )


def summary_line(cells: CellMap) -> str:
    """Sizes of all states in one line of text."""
    parts = (f"{STATE_NAMES[state]} {format_size(cells.totals[state])}" for state in State)
    return f"{format_size(cells.size)}: {', '.join(parts)}"


def percent(part: int, whole: int) -> str:
    """A share as `12.3 %`; what exists is never `0.0 %`, what is not all never `100 %`."""
    if part in (0, whole):
        return "100 %" if part else "0 %"
    share = 100 * part / whole
    return "<0.1 %" if share < 0.1 else f"{min(share, 99.9):.1f} %"


def _shorten(text: str, room: int) -> str:
    """At most `room` characters; what is left out shows as three dots."""
    return text if len(text) <= room else f"{text[: max(0, room - 3)]}..."


def _grid(cells: CellMap, *, columns: int, left: int, top: int) -> Iterator[Box]:
    states, levels = cells.looks()
    for cell, (state, level) in enumerate(zip(states.tolist(), levels.tolist(), strict=True)):
        row, column = divmod(cell, columns)
        yield Box(
            x=left + column * _PITCH,
            y=top + row * _PITCH,
            width=_CELL,
            height=_CELL,
            state=state,
            level=level,
        )


def _bar(totals: list[int], *, left: int, top: int, width: int) -> Iterator[Box]:
    """All states side by side; whatever exists gets at least one unit."""
    whole = sum(totals)
    if not whole:
        yield Box(x=left, y=top, width=width, height=_BAR, state=State.UNALLOCATED, level=3)
        return
    exist = [state for state in State if totals[state]]
    spare = width - len(exist)
    start, passed = left, 0
    for count, state in enumerate(exist, start=1):
        passed += totals[state]
        stop = left + count + spare * passed // whole
        yield Box(x=start, y=top, width=stop - start, height=_BAR, state=state, level=3)
        start = stop


def _offsets(cells: CellMap, *, columns: int, x: int, top: int) -> Iterator[Label]:
    rows = ceil_div(len(cells), columns)
    for row in range(0, rows, max(2, ceil_div(rows, 12))):
        yield Label(
            x=x,
            y=top + row * _PITCH + _CELL - 1,
            text=format_size(cells.offset(row * columns)),
            ink=Ink.MUTED,
            to_left=True,
        )


def _legend(cells: CellMap, *, left: int, top: int) -> Iterator[Label]:
    totals = cells.totals
    for state in State:
        x = left + _LEGEND * state + 17
        yield Label(x=x, y=top + 9, text=STATE_NAMES[state], ink=Ink.TEXT)
        size = f"{format_size(totals[state])}, {percent(totals[state], cells.size)}"
        yield Label(x=x, y=top + 26, text=size, ink=Ink.MUTED)
