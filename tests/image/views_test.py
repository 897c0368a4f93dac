"""Disks made of other disks, against slices and sums of bytes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowkit.errors import CorruptMetadata, RequestError, StorageError
from qcowkit.extents.algebra import clip
from qcowkit.extents.table import ExtentTable, Flag, concatenate, make_table
from qcowkit.image.views import Concatenation, Padded, Salvaged, Window
from qcowkit.units import MiB


class Pieces:
    """A disk of runs, data or not, that gives its extents a few rows at a time."""

    images: tuple[Any, ...] = (None, None)

    def __init__(self, runs: list[tuple[int, bool]], *, window: int = 2, seed: int = 1) -> None:
        self.size = sum(length for length, _ in runs)
        self.window = window
        starts = [sum(length for length, _ in runs[:index]) for index in range(len(runs))]
        data = Flag.DATA | Flag.PRESENT
        self.table = make_table(
            starts,
            [length for length, _ in runs] if runs else 0,
            [data if full else Flag.NONE for _, full in runs] if runs else 0,
            layer=1,
            host=starts if runs else -1,
        )
        self.content = b"".join(
            bytes([(seed * 50 + index) % 255 + 1] if full else [0]) * length
            for index, (length, full) in enumerate(runs)
        )

    def iter_extents(
        self, *, start: int = 0, length: int | None = None, align: int = 1
    ) -> Iterator[ExtentTable]:
        assert align == 1, "views align for themselves"
        stop = self.size if length is None else start + length
        part = clip(self.table, start, stop)
        for first in range(0, len(part), self.window):
            yield part.take(slice(first, first + self.window))

    def read_table(self, table: ExtentTable, buffer: memoryview) -> None:
        table.check()
        assert len(buffer) == table.end - table.begin
        assert not len(table) or bool((table.layer == 1).all())
        buffer[:] = bytes(len(buffer))
        for row in table:
            if row.flags & Flag.DATA:
                assert row.host == row.start
                at = row.start - table.begin
                buffer[at : at + row.length] = self.content[row.start : row.start + row.length]


runs = st.lists(st.tuples(st.integers(1, 700), st.booleans()), max_size=8)
pieces = st.builds(Pieces, runs, window=st.integers(1, 3), seed=st.integers(1, 5))


def check_view(view: Any, want: bytes, more: Any) -> None:
    """Extents by windows of any alignment cover the range, and reading them gives the content."""
    assert view.size == len(want)
    align = 1 << more.draw(st.integers(0, 10))
    start = more.draw(st.integers(0, len(want)))
    length = more.draw(st.integers(0, len(want) - start))
    position = start
    for table in view.iter_extents(start=start, length=length, align=align):
        table.check()
        assert table.begin == position < table.end
        position = table.end
        assert position % align == 0 or position == start + length
        buffer = bytearray(b"\xcc" * (table.end - table.begin))
        view.read_table(table, memoryview(buffer))
        assert buffer == want[table.begin : table.end]
        for row in table:
            if not row.flags & Flag.DATA:
                assert not any(want[row.start : row.start + row.length])
    assert position == start + length


@settings(max_examples=150, deadline=None)
@given(disk=pieces, more=st.data())
def test_a_window_is_a_slice(disk: Pieces, more: Any) -> None:
    start = more.draw(st.integers(0, disk.size))
    length = more.draw(st.integers(0, disk.size - start))
    view = Window(disk, start=start, length=length)
    check_view(view, disk.content[start : start + length], more)


@settings(max_examples=150, deadline=None)
@given(disks=st.lists(pieces, min_size=1, max_size=4), more=st.data())
def test_a_concatenation_is_a_sum(disks: list[Pieces], more: Any) -> None:
    view = Concatenation(disks)
    assert len(view.images) == 2 * len(disks)
    check_view(view, b"".join(disk.content for disk in disks), more)


@settings(max_examples=100, deadline=None)
@given(disk=pieces, extra=st.integers(0, 900), more=st.data())
def test_a_padded_disk_ends_in_zeros_of_its_top(disk: Pieces, extra: int, more: Any) -> None:
    view = Padded(disk, size=disk.size + extra)
    check_view(view, disk.content + bytes(extra), more)
    table = concatenate(list(view.iter_extents()))
    assert [(row.layer, row.flags) for row in table if row.start >= disk.size] == (
        [(0, Flag.ZERO | Flag.PRESENT)] if extra else []
    )


def test_padding_never_cuts() -> None:
    assert Padded(Pieces([(9, True)]), size=5).size == 9


@settings(max_examples=100, deadline=None)
@given(disk=pieces, more=st.data())
def test_salvage_changes_nothing_of_a_sound_disk(disk: Pieces, more: Any) -> None:
    reports: list[Any] = []
    check_view(Salvaged(disk, report=lambda *spot: reports.append(spot)), disk.content, more)
    assert reports == []


@settings(max_examples=100, deadline=None)
@given(disks=st.lists(pieces, min_size=1, max_size=3), extra=st.integers(0, 99), more=st.data())
def test_views_of_views_work(disks: list[Pieces], extra: int, more: Any) -> None:
    whole = Concatenation(disks)
    start = more.draw(st.integers(0, whole.size))
    view = Padded(
        Salvaged(Window(whole, start=start, length=whole.size - start), report=print),
        size=whole.size - start + extra,
    )
    content = b"".join(disk.content for disk in disks)
    check_view(view, content[start:] + bytes(extra), more)


def test_a_window_beyond_its_disk_is_refused() -> None:
    with pytest.raises(RequestError, match="range 0x5 \\+ 0x6 is outside the disk of 0xa bytes"):
        Window(Pieces([(10, True)]), start=5, length=6)


class Broken(Pieces):
    """A disk of 64 MiB whose tables or data cannot be read in some places."""

    def __init__(self, tables: list[int], data: list[int] | None = None) -> None:
        super().__init__([(MiB, True)] * 64, window=3)
        self.tables, self.data = tables, data or []
        self.looks = 0

    def iter_extents(
        self, *, start: int = 0, length: int | None = None, align: int = 1
    ) -> Iterator[ExtentTable]:
        stop = self.size if length is None else start + length
        for table in super().iter_extents(start=start, length=length, align=align):
            self.looks += 1
            if any(table.begin <= at < table.end and at < stop for at in self.tables):
                raise CorruptMetadata("L2 table", reason="broken")
            yield table

    def read_table(self, table: ExtentTable, buffer: memoryview) -> None:
        if any(table.begin <= at < table.end for at in self.data):
            raise StorageError("read", path="disk", errno=errno.EIO)
        super().read_table(table, buffer)


def salvage(disk: Broken) -> tuple[list[Any], Salvaged, list[ExtentTable]]:
    reports: list[Any] = []
    view = Salvaged(disk, report=lambda *spot: reports.append(spot))
    return reports, view, list(view.iter_extents(align=2 * MiB))


def test_broken_tables_cost_one_step_each() -> None:
    disk = Broken([5 * MiB + 7, 40 * MiB])
    reports, view, tables = salvage(disk)
    assert [spot[:2] for spot in reports] == [(4 * MiB, 2 * MiB), (40 * MiB, 2 * MiB)]
    table = concatenate(tables)
    table.check()
    assert (table.begin, table.end) == (0, 64 * MiB)
    lost = [(row.start, row.length) for row in table if not row.flags]
    assert lost == [(4 * MiB, 2 * MiB), (40 * MiB, 2 * MiB)]
    assert disk.looks < 200


def test_a_spot_that_was_given_up_stays_a_hole_and_is_reported_once() -> None:
    disk = Broken([9 * MiB])
    reports, view, before = salvage(disk)
    disk.tables = []
    after = list(view.iter_extents(align=2 * MiB))
    assert concatenate(after).to_numpy().tolist() == concatenate(before).to_numpy().tolist()
    assert len(reports) == 1
    (part,) = view.iter_extents(start=9 * MiB, length=10)
    assert [(row.start, row.length, row.flags) for row in part] == [(9 * MiB, 10, 0)]


def test_a_disk_without_any_readable_table_is_one_hole() -> None:
    reports, _, tables = salvage(Broken(list(range(0, 64 * MiB, MiB))))
    assert sum(length for _, length, _ in reports) == 64 * MiB
    assert not concatenate(tables).flags.any()


def test_data_that_cannot_be_read_are_zeros_row_by_row() -> None:
    disk = Broken([], [3 * MiB])
    reports, view, tables = salvage(disk)
    table = clip(concatenate(tables), 2 * MiB, 5 * MiB)
    buffer = bytearray(b"\xcc" * 3 * MiB)
    view.read_table(table, memoryview(buffer))
    assert buffer[:MiB] == disk.content[2 * MiB : 3 * MiB]
    assert buffer[MiB : 2 * MiB] == bytes(MiB)
    assert buffer[2 * MiB :] == disk.content[4 * MiB : 5 * MiB]
    assert [(start, length) for start, length, _ in reports] == [(3 * MiB, MiB)]
