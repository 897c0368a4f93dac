"""Where things go when a file gets shorter: holes, and how short it can be."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.engine.findings import Effort
from qcowkit.engine.qcow2.census import Census, take_census
from qcowkit.engine.qcow2.compaction import plan_limit
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.engine.qcow2.room import Holes, NoRoom, Room
from qcowkit.errors import OperationError, StorageError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import build_qcow2
from qcowkit.units import MiB

pytestmark = pytest.mark.pinned("geometries of its own")

GEOMETRY = Geometry(cluster_bits=12)


def holes(*free: int, end: int = 0) -> Holes:
    return Holes(np.array(free, dtype=np.int64), end=end)


def test_room_behind_everything_is_side_by_side() -> None:
    room = Room(first=5)
    assert (room.take(2), room.take(1)) == (5, 7)
    assert room.take_scattered(3).tolist() == [8, 9, 10]
    assert room.end == 11


def test_holes_are_filled_from_the_lowest() -> None:
    room = holes(1, 3, 4, 9, end=2)
    assert room.take_scattered(2).tolist() == [1, 3]
    assert room.take(1) == 4
    assert room.end == 5
    assert room.take(1) == 9
    with pytest.raises(NoRoom):
        room.take(1)


def test_what_must_lie_together_gets_the_first_run_that_is_long_enough() -> None:
    room = holes(1, 3, 4, 6, 7, 8, 12)
    assert room.take(3) == 6
    assert room.take(2) == 3
    assert room.take_scattered(2).tolist() == [1, 12]
    with pytest.raises(NoRoom):
        room.take(2)


def test_the_end_is_behind_what_stays_and_what_was_given_out() -> None:
    room = holes(1, 2, 7, end=5)
    room.take(2)
    assert room.end == 5
    room.take(1)
    assert room.end == 8


def census(text: str) -> Census:
    """D: data, T: a table, F: what stays, R: refcounts, a dot: nothing."""
    cells = np.array(list(text))
    return Census(
        used=cells != ".",
        data=cells == "D",
        fixed=cells == "F",
        counts=int(np.count_nonzero(cells == "R")),
        packed=0,
    )


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        # A new table, a refcount block and a refcount table have to fit beside the data.
        ("FRRT....DD......", 9),
        ("FRRT.......D", 8),
        ("FRRTDDDD", 8),
        ("FRRTDD.D", 8),
        ("FRRT.....DDF", 12),
    ],
)
def test_the_limit_is_the_lowest_below_which_everything_fits(text: str, limit: int) -> None:
    assert plan_limit(census(text), GEOMETRY, slack=0, most=100) == limit


def test_a_round_moves_no_more_than_it_may() -> None:
    text = "FRRT" + "." * 20 + "D" * 10
    assert plan_limit(census(text), GEOMETRY, slack=0, most=3) == len(text) - 3


class Unreadable(MemoryStorage):
    """Memory of which one place cannot be read."""

    place = -1

    def pread(self, length: int, *, offset: int) -> bytes:
        self._fail(offset)
        return super().pread(length, offset=offset)

    def pread_into(self, buffer: memoryview, *, offset: int) -> int:
        self._fail(offset)
        return super().pread_into(buffer, offset=offset)

    def _fail(self, offset: int) -> None:
        if offset == self.place:
            raise StorageError("read", path="x", errno=errno.EIO)


def test_a_table_that_cannot_be_read_is_no_reason_for_a_repair() -> None:
    built = build_qcow2(size=MiB, clusters={0: b"x" * 4096})
    storage = Unreadable(built.to_bytes())
    metadata = load_qcow2_metadata(storage)
    storage.place = built.places["l2"]
    with pytest.raises(OperationError, match="not all tables can be read"):
        take_census(storage, metadata, effort=Effort(stored=MiB))
