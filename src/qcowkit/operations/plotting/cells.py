"""A guest disk reduced to a fixed number of cells, whatever its size. Pure but for the map."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from qcowkit.errors import RequestError
from qcowkit.extents.table import ExtentTable, Flag, Int64Array
from qcowkit.operations.map import MappedDisk, batches
from qcowkit.units import SECTOR, ceil_div

MAX_CELLS = 1 << 20
# How full of its state a cell is, in steps: 0 is up to a quarter, 3 is above three.
LEVELS = 4


class State(IntEnum):
    """What a byte of the disk is, in the order of legends.

    DATA and COMPRESSED lie in the top image, BACKING is data of an image below it, ZERO is
    recorded as zeros, UNALLOCATED is recorded nowhere."""

    DATA = 0
    COMPRESSED = 1
    BACKING = 2
    ZERO = 3
    UNALLOCATED = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CellMap:
    """Equal shares of a disk of `size` bytes.

    shares: int64 bytes of each State in each cell, shape (cells, 5); row i stands for the guest
    range [i * size // cells, (i + 1) * size // cells)."""

    size: int
    shares: Int64Array

    def __len__(self) -> int:
        """The number of cells."""
        return len(self.shares)

    def offset(self, cell: int) -> int:
        """The first guest byte of a cell."""
        return cell * self.size // len(self)

    @property
    def totals(self) -> list[int]:
        """Bytes of each State on the whole disk."""
        return [int(total) for total in self.shares.sum(axis=0)]

    def looks(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """The State and the level, 0 to 3, that each cell is drawn with.

        A cell with any data shows the kind of data it has most of, so that nothing that is stored
        goes unseen; then comes zero. The level is by the share of that family in the cell."""
        data = self.shares[:, : State.ZERO]
        amount, zero = data.sum(axis=1), self.shares[:, State.ZERO]
        state = np.where(zero > 0, int(State.ZERO), int(State.UNALLOCATED))
        state = np.where(amount > 0, data.argmax(axis=1), state)
        shown = np.where(amount > 0, amount, zero)
        size = np.maximum(self.shares.sum(axis=1), 1)
        level = np.clip(np.ceil(shown / size * LEVELS).astype(np.intp) - 1, 0, LEVELS - 1)
        level[state == State.UNALLOCATED] = LEVELS - 1
        return state, level


def measure_cells(disk: MappedDisk, *, cells: int) -> CellMap:
    """The disk in `cells` cells, or one a sector if it is smaller than that.

    Reads the map once, in memory bounded by a window of it and the cells. Raises RequestError for
    less than one cell or more than 2**20, and whatever reading the map raises."""
    if not 1 <= cells <= MAX_CELLS:
        raise RequestError(f"{cells} cells cannot be drawn, expected 1 to {MAX_CELLS}")
    size = disk.size
    cells = min(cells, ceil_div(size, SECTOR))
    shares = np.zeros((cells, len(State)), dtype=np.int64)
    # In Python integers: size times cells may be above 2**63.
    if cells:
        edges = np.array([cell * size // cells for cell in range(cells + 1)], dtype=np.int64)
        for table in batches(disk.iter_extents(start=0, length=size)):
            _add(shares, edges, table)
    return CellMap(size=size, shares=shares)


def _states(table: ExtentTable) -> npt.NDArray[np.intp]:
    data = (table.flags & int(Flag.DATA)) != 0
    packed = (table.flags & int(Flag.COMPRESSED)) != 0
    here = np.where(packed, int(State.COMPRESSED), int(State.DATA))
    stored = np.where(table.layer > 0, int(State.BACKING), here)
    present = (table.flags & int(Flag.PRESENT)) != 0
    absent = np.where(present, int(State.ZERO), int(State.UNALLOCATED))
    return np.where(data, stored, absent)


def _add(shares: Int64Array, edges: Int64Array, table: ExtentTable) -> None:
    """Add the bytes of a table to the cells it reaches: prefix sums, asked at the cells' edges."""
    first = int(np.searchsorted(edges, table.begin, side="right")) - 1
    last = int(np.searchsorted(edges, table.end, side="left"))
    points = np.clip(edges[first : last + 1], table.begin, table.end)
    row = np.searchsorted(table.start, points, side="right") - 1
    within = points - table.start[row]
    states = _states(table)
    for state in State:
        chosen = states == state
        if chosen.any():
            before = np.cumsum(table.length * chosen) - table.length * chosen
            shares[first:last, state] += np.diff(before[row] + within * chosen[row])
