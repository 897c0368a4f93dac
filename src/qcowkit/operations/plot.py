"""The cluster map of a disk, drawn: as SVG, as PNG, or in the terminal.

Each cell stands for an equal share of the guest disk; what it shows comes from the extents alone,
so no data is read, and memory does not grow with the disk."""

from __future__ import annotations

from typing import Literal

from qcowkit.errors import RequestError
from qcowkit.operations.map import MappedDisk
from qcowkit.operations.plotting.cells import measure_cells
from qcowkit.operations.plotting.png import render_png
from qcowkit.operations.plotting.scene import DARK, LIGHT, Scene, compose
from qcowkit.operations.plotting.svg import render_svg
from qcowkit.operations.plotting.terminal import GUTTER, render_terminal


def plot_svg(disk: MappedDisk, *, title: str, columns: int = 64, rows: int = 32) -> str:
    """A picture of `columns` by `rows` cells; it follows the reader's preference for light or dark.

    Raises RequestError when there is no cell or there are too many, and whatever the map raises."""
    return render_svg(_scene(disk, title=title, columns=columns, rows=rows))


def plot_png(
    disk: MappedDisk,
    *,
    title: str,
    columns: int = 64,
    rows: int = 32,
    theme: Literal["light", "dark"] = "light",
) -> bytes:
    """The same picture as a PNG file. Raises as `plot_svg`."""
    scene = _scene(disk, title=title, columns=columns, rows=rows)
    return render_png(scene, DARK if theme == "dark" else LIGHT)


def plot_terminal(
    disk: MappedDisk, *, columns: int = 80, rows: int = 16, color: bool = True
) -> str:
    """The map in characters, no line longer than `columns`, the map itself `rows` lines high.

    Without `color` each state has a character of its own and no escape sequence is written. Raises
    as `plot_svg`."""
    across = max(1, columns - GUTTER)
    cells = measure_cells(disk, cells=across * rows)
    return render_terminal(cells, across=across, color=color)


def _scene(disk: MappedDisk, *, title: str, columns: int, rows: int) -> Scene:
    if columns < 1 or rows < 1:
        raise RequestError(f"a picture of {columns} by {rows} cells cannot be drawn")
    return compose(measure_cells(disk, cells=columns * rows), title=title, columns=columns)
