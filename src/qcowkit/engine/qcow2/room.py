"""Where new metadata, and data that move, may be written: host clusters that nothing refers to."""

from __future__ import annotations

import numpy as np

from qcowkit.errors import OperationError
from qcowkit.extents.table import Int64Array


class NoRoom(OperationError):
    """Internal: the free clusters below the new end do not suffice."""

    def __init__(self) -> None:
        super().__init__("there is no room below the new end of the file")


class Room:
    """Host clusters from `first` on, where nothing lies. `end`: one past the last that is used."""

    def __init__(self, *, first: int) -> None:
        self.end = first

    def take(self, count: int) -> int:
        """The first of `count` clusters side by side."""
        first = self.end
        self.end += count
        return first

    def take_scattered(self, count: int) -> Int64Array:
        """`count` clusters, ascending, side by side as far as that can be; int64."""
        first = self.take(count)
        return np.arange(first, first + count, dtype=np.int64)


class Holes(Room):
    """The clusters of a list, lowest first, and none behind it."""

    def __init__(self, free: Int64Array, *, end: int) -> None:
        """free: ascending. end: one past the last cluster that stays where it is."""
        super().__init__(first=end)
        self._free = free
        self._at = 0

    def take(self, count: int) -> int:
        """The first of `count` clusters side by side. Raises NoRoom."""
        free = self._free[self._at :]
        if count == 1:
            return int(self.take_scattered(1)[0])
        starts = np.flatnonzero(free[count - 1 :] - free[: max(0, len(free) - count + 1)] < count)
        if not len(starts):
            raise NoRoom
        index = self._at + int(starts[0])
        first = int(self._free[index])
        self._free = np.delete(self._free, np.s_[index : index + count])
        self.end = max(self.end, first + count)
        return first

    def take_scattered(self, count: int) -> Int64Array:
        """The `count` lowest clusters. Raises NoRoom."""
        found = self._free[self._at : self._at + count]
        if len(found) < count:
            raise NoRoom
        self._at += count
        if count:
            self.end = max(self.end, int(found[-1]) + 1)
        return found
