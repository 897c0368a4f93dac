"""Disks that are only a map: for whatever asks a disk for its size and extents, and no more."""

from __future__ import annotations

from collections.abc import Iterator

from qcowkit.extents.algebra import clip
from qcowkit.extents.table import ExtentTable


class TableDisk:
    """A disk of one table, which begins at guest offset 0, in windows of `window` rows."""

    def __init__(self, table: ExtentTable, *, window: int = 3) -> None:
        """window: rows of one table of `iter_extents`."""
        assert table.begin == 0, f"the table begins at {table.begin}"
        self.table = table
        self.window = window
        self.size = table.end

    def iter_extents(self, *, start: int, length: int) -> Iterator[ExtentTable]:
        """Windows over [start, start + length), ascending."""
        part = clip(self.table, start, start + length)
        for first in range(0, len(part), self.window):
            yield part.take(slice(first, first + self.window))
