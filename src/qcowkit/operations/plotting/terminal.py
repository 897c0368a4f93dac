"""A cluster map in characters, with or without colours. Pure."""

from __future__ import annotations

from qcowkit.operations.plotting.cells import LEVELS, CellMap, State
from qcowkit.operations.plotting.scene import STATE_NAMES, percent
from qcowkit.units import ceil_div, format_size

# Room for an offset left of the map.
GUTTER = 10

# Without colours the characters tell the states apart; with them they tell how full a cell is.
_MONO = {
    State.DATA: "█",
    State.COMPRESSED: "▓",
    State.BACKING: "▒",
    State.ZERO: "░",
    State.UNALLOCATED: "·",
}
_SHADES = "░▒▓█"
# Of the 256 colours: readable on light and on dark ground.
_COLORS = {
    State.DATA: "38;5;33",
    State.COMPRESSED: "38;5;169",
    State.BACKING: "38;5;36",
    State.ZERO: "38;5;178",
    State.UNALLOCATED: "38;5;245",
}


def render_terminal(cells: CellMap, *, across: int, color: bool) -> str:
    """Lines of `across` cells led by their offsets, a legend, and the sizes; ends in a newline."""
    states, levels = (column.tolist() for column in cells.looks())
    lines = []
    for begin in range(0, len(cells), across):
        row = range(begin, min(begin + across, len(cells)))
        cell_row = [(State(states[cell]), levels[cell]) for cell in row]
        lines.append(f"{format_size(cells.offset(begin)):>{GUTTER - 2}}  {_row(cell_row, color)}")
    lines += ["", *_legend(cells, color=color), _sum(cells, color=color)]
    return "\n".join(lines) + "\n"


def _row(cells: list[tuple[State, int]], color: bool) -> str:
    if not color:
        return "".join(_MONO[state] for state, _ in cells)
    parts, current = [], None
    for state, level in cells:
        if state is not current:
            parts.append(f"\x1b[{_COLORS[state]}m")
            current = state
        parts.append(_glyph(state, level))
    return "".join(parts) + "\x1b[0m"


def _glyph(state: State, level: int) -> str:
    return _MONO[state] if state is State.UNALLOCATED else _SHADES[level]


def _legend(cells: CellMap, *, color: bool) -> list[str]:
    totals = cells.totals
    lines = []
    for state in State:
        mark = _row([(state, LEVELS - 1)] * 2, color)
        share = percent(totals[state], cells.size)
        size = format_size(totals[state])
        lines.append(f"{'':{GUTTER}}{mark} {STATE_NAMES[state]:<12} {size:>9}  {share:>6}")
    return lines


def _sum(cells: CellMap, *, color: bool) -> str:
    if not len(cells):
        return f"{'':{GUTTER}}the disk is empty"
    per_cell = format_size(ceil_div(cells.size, len(cells)))
    line = f"{'':{GUTTER}}{format_size(cells.size)} in {len(cells)} cells of {per_cell}"
    return f"{line}, {_SHADES} by how much is used" if color else line
