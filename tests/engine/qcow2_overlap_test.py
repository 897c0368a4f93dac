"""Where metadata lie, and what is told to whoever is about to write there. Row 43."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.entries import COPIED
from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.overlap import ALL, CACHED, CONSTANT, OverlapGuard, chosen_checks
from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.testing.qcow2_builder import BitmapSpec, SnapshotSpec, build_qcow2
from qcowkit.units import KiB
from tests.engine.qcow2_rig import Rig

pytestmark = pytest.mark.pinned("places of structures")

SIZE = 512


def guard_of(*names: str) -> OverlapGuard:
    return OverlapGuard(frozenset(names or ALL), cluster_bits=9)


def hits(guard: OverlapGuard, cluster: int, *, ignore: str = "") -> bool:
    """Whether a write to one cluster is refused, by both ways of asking."""

    def refused(ask: Callable[[], None]) -> bool:
        try:
            ask()
        except CorruptMetadata:
            return True
        return False

    one = refused(lambda: guard.check(first=cluster, count=1, ignore=ignore))
    if not ignore:
        assert refused(lambda: guard.check_many(np.array([cluster], np.int64))) == one
    return one


@pytest.mark.parametrize(
    ("template", "names"), [("none", ()), ("constant", CONSTANT), ("cached", CACHED), ("all", ALL)]
)
def test_a_template_chooses_what_is_looked_for(template: str, names: tuple[str, ...]) -> None:
    options = OpenOptions(overlap_check=template)  # type: ignore[arg-type]
    assert chosen_checks(options) == frozenset(names)


def test_single_checks_are_switched_on_top_of_the_template() -> None:
    options = OpenOptions(
        overlap_check="constant", overlap_checks={"active-l2": True, "main-header": False}
    )
    assert chosen_checks(options) == {*CONSTANT, "active-l2"} - {"main-header"}


def test_an_unknown_check_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="overlap-check.l3 is unknown; known are main-header"):
        chosen_checks(OpenOptions(overlap_checks={"l3": True}))


def test_a_region_covers_every_cluster_that_it_touches() -> None:
    guard = guard_of()
    guard.add_region("active-l1", offset=5 * SIZE, length=SIZE + 8)
    assert [hits(guard, cluster) for cluster in range(4, 8)] == [False, True, True, False]
    guard.add_region("snapshot-table", offset=9 * SIZE, length=0)
    assert not hits(guard, 9)


def test_tables_and_blocks_are_covered_one_by_one() -> None:
    guard = guard_of()
    guard.add_tables(np.array([0, 7 * SIZE | COPIED, 3 * SIZE], np.uint64))
    guard.add_blocks(array("Q", [9 * SIZE, 0, 11 * SIZE]))
    assert [cluster for cluster in range(14) if hits(guard, cluster)] == [3, 7, 9, 11]


def test_what_is_not_asked_for_is_not_found() -> None:
    guard = guard_of("active-l2")
    guard.add_region("active-l1", offset=0, length=SIZE)
    guard.add_tables(np.array([3 * SIZE], np.uint64))
    guard.note("refcount-block", first=5)
    assert [cluster for cluster in range(7) if hits(guard, cluster)] == [3]


def test_the_structure_that_is_being_written_does_not_hinder_itself() -> None:
    guard = guard_of()
    guard.add_region("active-l1", offset=2 * SIZE, length=SIZE)
    guard.add_tables(np.array([3 * SIZE], np.uint64))
    guard.note("refcount-table", first=4)
    for cluster, name in ((2, "active-l1"), (3, "active-l2"), (4, "refcount-table")):
        assert hits(guard, cluster)
        assert not hits(guard, cluster, ignore=name)


def test_a_message_names_the_structure_and_the_place() -> None:
    guard = guard_of()
    guard.add_region("refcount-table", offset=4 * SIZE, length=3 * SIZE)
    with pytest.raises(CorruptMetadata) as caught:
        guard.check(first=1, count=9)
    assert str(caught.value) == (
        "data cluster at host offset 0x800: overlaps the metadata that refcount-table protects: "
        "writing would destroy them"
    )


def test_released_clusters_are_anybodys() -> None:
    guard = guard_of()
    guard.add_region("active-l1", offset=2 * SIZE, length=5 * SIZE)
    guard.add_tables(np.array([9 * SIZE, 10 * SIZE], np.uint64))
    guard.note("active-l2", first=12, count=3)
    guard.forget(first=3, count=2)
    guard.forget(first=10, count=1)
    guard.forget(first=13, count=1)
    assert [cluster for cluster in range(16) if hits(guard, cluster)] == [2, 5, 6, 9, 12, 14]
    guard.forget(first=0, count=1000)
    assert [cluster for cluster in range(16) if hits(guard, cluster)] == []


steps = st.lists(
    st.tuples(
        st.sampled_from(["region", "tables", "note", "forget"]),
        st.integers(0, 30),
        st.integers(1, 8),
    ),
    max_size=12,
)


@given(steps=steps, first=st.integers(0, 40), count=st.integers(1, 10))
def test_a_guard_is_a_set_of_clusters(
    steps: list[tuple[str, int, int]], first: int, count: int
) -> None:
    guard, taken = guard_of(), set[int]()
    for kind, start, length in steps:
        clusters = range(start + 1, start + 1 + length)
        if kind == "region":
            guard.add_region("active-l1", offset=(start + 1) * SIZE, length=length * SIZE)
        elif kind == "tables":
            guard.add_tables(np.array([cluster * SIZE for cluster in clusters], np.uint64))
        elif kind == "note":
            guard.note("refcount-block", first=start + 1, count=length)
        else:
            guard.forget(first=start + 1, count=length)
            taken.difference_update(clusters)
            continue
        taken.update(clusters)
    assert {cluster for cluster in range(50) if hits(guard, cluster)} == taken
    asked = set(range(first, first + count))
    if asked & taken:
        with pytest.raises(CorruptMetadata):
            guard.check(first=first, count=count)
        with pytest.raises(CorruptMetadata):
            guard.check_many(np.array(sorted(asked, reverse=True), np.int64))
    else:
        guard.check(first=first, count=count)
        guard.check_many(np.array(sorted(asked, reverse=True), np.int64))


def test_all_structures_of_an_image_are_known() -> None:
    built = build_qcow2(
        size=256 * KiB,
        cluster_bits=9,
        clusters={index * 64: b"x" for index in range(4)},
        snapshots=[SnapshotSpec(id="1", clusters={0: b"y"})],
        bitmaps=[BitmapSpec(name="b", flags=0)],
    )
    rig = Rig(built, options=OpenOptions(overlap_check="all"))
    guard = rig.state.guard
    places = {"header": 0, **built.places}
    del places["bitmap_table"]
    for place in places.values():
        assert hits(guard, place // SIZE)
    snapshot = rig.metadata.snapshots[0]
    assert hits(guard, snapshot.l1_offset // SIZE)
    table = int.from_bytes(built.data[snapshot.l1_offset : snapshot.l1_offset + 8], "big")
    assert hits(guard, (table & ~COPIED) // SIZE)
    assert not hits(guard, rig.host(0) // SIZE)


@pytest.mark.pinned("clusters of 4 KiB", "cluster_size=512")
def test_tables_of_snapshots_are_looked_at_only_where_all_is_asked_for() -> None:
    built = build_qcow2(snapshots=[SnapshotSpec(id="1", clusters={0: b"y"})])
    rig = Rig(built)
    place = rig.metadata.snapshots[0].l1_offset
    table = int.from_bytes(built.data[place : place + 8], "big") & ~COPIED
    rig.state.guard.check(first=table >> 12, count=1)


def test_tables_that_are_made_are_known_from_then_on_and_forgotten_when_they_go() -> None:
    rig = Rig(cluster_bits=9, size=64 * KiB)
    rig.chain.write(b"x", offset=40 * KiB)
    table = int(rig.state.tables.l1[1]) & ~COPIED
    assert hits(rig.state.guard, table // SIZE)
    rig.chain.flush()
    rig.chain.resize(32 * KiB, shrink=True)
    assert not hits(rig.state.guard, table // SIZE)
    rig.chain.write(b"y" * SIZE, offset=0)
    rig.chain.flush()
    rig.assert_clean()


def test_looking_costs_the_same_whatever_the_length_of_the_refcount_table() -> None:
    """S003-41: empty entries are left out once, when the image is opened."""
    guards = []
    for length in (8, 1 << 20):
        guard = guard_of()
        words = array("Q", bytes(8 * length))
        words[3] = 9 * SIZE
        guard.add_blocks(words)
        guards.append(guard)
    sizes = [sum(len(known) for known in guard._single.values()) for guard in guards]
    assert sizes == [1, 1]
    assert all(hits(guard, 9) for guard in guards)


def test_the_last_refcount_table_entry_in_use_is_remembered() -> None:
    """S003-41."""
    rig = Rig(cluster_bits=9, refcount_order=6, size=64 * KiB)
    store = rig.state.refcounts
    assert store.last_used == max(index for index, word in enumerate(store.table) if word)
    rig.chain.write(bytes(range(256)) * 200, offset=0)
    assert store.last_used == max(index for index, word in enumerate(store.table) if word)
