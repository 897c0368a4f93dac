"""Two disks side by side, in windows: whatever fits into one, the whole is the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from qcowkit.extents.ranges import RangeSet
from qcowkit.image import chain
from qcowkit.operations import pairs
from qcowkit.operations.commit import CommitOptions, commit_layers
from qcowkit.operations.diff import diff
from qcowkit.operations.pairs import compare_part, iter_pairs, only_within, unequal_units
from qcowkit.operations.rebase import NewBase, RebaseOptions, rebase_layers
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.units import KiB, MiB
from tests.chain_disks import (
    EXTENDED,
    OPENING,
    SMALL,
    Kind,
    content,
    faults_of,
    layers_of,
    make_chain,
    open_disk,
)

pytestmark = pytest.mark.pinned("its kinds of images are its own")

SIZE = 9 * MiB + 512
FIRST = (Kind(size=SIZE, options=SMALL), Kind(format="raw", size=5 * MiB))
SECOND = (Kind(size=7 * MiB, options=EXTENDED), Kind(format="vpc", size=SIZE))
# Fewer entries than an aligned step has, about as many, and more than there are.
LIMITS = (16, 600, 1 << 17)
limited = pytest.mark.parametrize("limit", LIMITS)


def set_limit(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(pairs, "WINDOW_ENTRIES", limit)
    monkeypatch.setattr(chain, "WINDOW_ENTRIES", limit)
    monkeypatch.setattr(chain, "_LEAST_ENTRIES", limit)


def make(kinds: Sequence[Kind], seed: int) -> CrashFiles:
    return make_chain(kinds, seed=seed, count=150)


@limited
def test_windows_follow_one_another_and_end_where_they_should(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    set_limit(monkeypatch, limit)
    with open_disk(make(FIRST, 1), FIRST) as one, open_disk(make(SECOND, 2), SECOND) as other:
        found = list(iter_pairs(one, other, size=SIZE, align=MiB))
    assert found[0].start == 0
    assert [pair.stop for pair in found[:-1]] == [pair.start for pair in found[1:]]
    assert found[-1].stop == SIZE
    assert all(pair.stop % MiB == 0 for pair in found[:-1])
    for pair in found:
        for table in (pair.first, pair.second):
            table.check()
            assert (table.begin, table.end) == (pair.start, pair.stop)
    assert (len(found) > 1) == (limit < 1000)


@limited
def test_the_suspects_of_all_windows_are_those_of_one(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    def suspects() -> RangeSet:
        with open_disk(make(FIRST, 1), FIRST) as one, open_disk(make(SECOND, 2), SECOND) as other:
            found = [pair.suspects for pair in iter_pairs(one, other, size=SIZE, align=MiB)]
        starts = np.concatenate([part.start for part in found])
        return RangeSet.of(starts, np.concatenate([part.stop for part in found]))

    whole = suspects()
    set_limit(monkeypatch, limit)
    assert suspects() == whole


@pytest.mark.parametrize("given", [(True, False), (False, True)])
def test_no_disk_at_all_is_one_of_zeros(given: tuple[bool, bool]) -> None:
    with open_disk(make(FIRST, 1), FIRST) as disk:
        one, other = (disk if here else None for here in given)
        (pair,) = iter_pairs(one, other, size=SIZE, align=MiB)
        shown = np.frombuffer(disk.read(offset=0, length=SIZE), dtype=np.uint8)
    assert bool(pair.suspects.contains(np.flatnonzero(shown)).all())


@limited
def test_a_long_disk_is_rebased_window_by_window(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    set_limit(monkeypatch, limit)
    files, new = make(FIRST, 3), make(SECOND, 4)
    before = content(files, FIRST)
    rebase_layers(
        tuple(layers_of(files, FIRST, writable=(0,))),
        tuple(layers_of(new, SECOND)),
        NewBase(name="new", format="qcow2"),
        opening=OPENING,
        options=RebaseOptions(threads=2),
    )
    moved, kinds = files.like([files.live[0], *new.live]), (FIRST[0], *SECOND)
    assert content(CrashFiles(moved.live), kinds) == before
    assert faults_of(CrashFiles(moved.live, names=["a", "b", "c"]), kinds) == []


@limited
def test_a_long_disk_is_committed_window_by_window(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    set_limit(monkeypatch, limit)
    files = make(FIRST, 5)
    before = content(files, FIRST)
    layers = layers_of(files, FIRST, writable=(0, 1))
    commit_layers(layers, opening=OPENING, options=CommitOptions(threads=2))
    assert content(files, FIRST) == before
    assert content(files, FIRST, depth=1) == before


@limited
def test_long_disks_are_compared_window_by_window(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    set_limit(monkeypatch, limit)
    first, second = make(FIRST, 6), make(SECOND, 7)
    one = content(first, FIRST)
    other = content(second, SECOND).ljust(SIZE, b"\0")
    with open_disk(first, FIRST) as left, open_disk(second, SECOND) as right:
        found = diff(left, right, granularity=4 * KiB)
    expected = [at for at in range(0, SIZE, 4096) if one[at : at + 4096] != other[at : at + 4096]]
    stops = np.minimum(np.array(expected) + 4096, SIZE)
    assert found.changed == RangeSet.of(expected, stops)


@pytest.mark.parametrize("unit", [512, 4096])
def test_a_part_without_data_is_compared_as_its_zeros_would_be(unit: int) -> None:
    with open_disk(make(FIRST, 8), FIRST) as one, open_disk(make(SECOND, 9), SECOND) as other:
        for disks in ((one, other), (other, one), (one, None), (None, other)):
            (pair,) = iter_pairs(*disks, size=SIZE, align=MiB)
            buffers = (np.empty(MiB, dtype=np.uint8), np.empty(MiB, dtype=np.uint8))
            for start in range(0, SIZE, 64 * KiB):
                stop = min(start + 64 * KiB, SIZE)
                found = compare_part(
                    disks,
                    (pair.first, pair.second),
                    buffers,
                    start=start,
                    stop=stop,
                    unit=unit,
                )
                plain = [shown(disk, start, stop) for disk in disks]
                assert found.tolist() == unequal_units(plain[0], plain[1], unit).tolist()
                assert bytes(buffers[0][: stop - start]) == bytes(plain[0])


def test_what_is_not_asked_for_is_not_read_and_equal() -> None:
    asked = RangeSet.of([4096, MiB + 512], [12288, MiB + 1024])
    with open_disk(make(FIRST, 8), FIRST) as one, open_disk(make(SECOND, 9), SECOND) as other:
        (whole,) = iter_pairs(one, other, size=SIZE, align=MiB)
        part = only_within(whole, asked)
        for disk, table in ((one, part.first), (other, part.second)):
            table.check()
            assert (table.begin, table.end) == (0, SIZE)
            rows = chain.data_rows(table)
            assert bool(asked.contains(rows.start).all())
            assert bool(asked.contains(rows.start + rows.length - 1).all())
            buffer = np.empty(2 * MiB, dtype=np.uint8)
            pairs.read_part(disk, table, buffer, start=0, stop=2 * MiB)
            plain = shown(disk, 0, 2 * MiB).copy()
            plain[~asked.contains(np.arange(2 * MiB))] = 0
            assert np.array_equal(buffer, plain)


def shown(disk: chain.Chain | None, start: int, stop: int) -> pairs.Bytes:
    """What a disk holds, zeros behind its end."""
    data = b""
    if disk is not None and start < disk.size:
        data = disk.read(offset=start, length=min(stop, disk.size) - start)
    return np.frombuffer(data.ljust(stop - start, b"\0"), dtype=np.uint8)
