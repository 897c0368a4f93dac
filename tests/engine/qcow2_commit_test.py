"""The order in which changes reach the file: the phases of docs/adr/0011."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qcowkit.codecs.qcow2.header import FIELD_OFFSETS
from qcowkit.engine.events import QCOW2_BARRIERS, QCOW2_STEPS
from qcowkit.engine.options import OpenOptions
from qcowkit.testing.qcow2_builder import SnapshotSpec
from qcowkit.units import KiB, MiB
from tests.engine.qcow2_rig import Rig

SIZE = 4 * KiB
GUEST = random.Random(1).randbytes(SIZE)
EAGER = OpenOptions(discard=True, pass_discard_other=True)


def story(rig: Rig) -> list[str]:
    """What was done to the file since it was last looked at, by the structure that it is about;
    the same thing done twice in a row is told once. To be asked right after a commit."""
    state, size = rig.state, rig.state.geometry.cluster_size
    header = state.header.header
    names = {0: "header"}
    table, count = header.refcount_table_offset, header.refcount_table_clusters
    names.update(dict.fromkeys(range(table // size, table // size + count), "refcount table"))
    first = header.l1_table_offset // size
    names.update(dict.fromkeys(range(first, first + -(-header.l1_size * 8 // size)), "L1"))
    blocks = [word & -512 for word in state.refcounts.table if word]
    names.update({block // size: "refcount block" for block in blocks})
    tables = [int(word) & 0xFF_FFFF_FFFF_FE00 for word in state.tables.l1]
    names.update({table // size: "L2" for table in tables if table})
    told: list[str] = []
    for call in rig.file.of("pwrite", "flush", "discard", "truncate"):
        name = call.operation
        if name == "pwrite":
            name = names.get(call.offset // size, "data")
        if not told or told[-1] != name:
            told.append(name)
    return told


def barriers(rig: Rig) -> list[str]:
    """The names of barriers in the order in which they were waited at."""
    return [event for event in rig.events if event in QCOW2_BARRIERS]


def test_nothing_but_data_is_written_before_a_flush() -> None:
    rig = Rig()
    rig.chain.write(GUEST, offset=0)
    rig.chain.write_zeroes(offset=SIZE, length=SIZE)
    rig.chain.discard(offset=0, length=SIZE)
    assert rig.file.of("flush", "discard") == []
    assert {call.data for call in rig.writes} == {GUEST}


@pytest.mark.pinned("clusters of 4 KiB", "extended_l2")
def test_an_allocating_write_is_flushed_with_two_barriers_and_so_is_a_new_table() -> None:
    rig = Rig()
    rig.chain.write(GUEST, offset=0)
    rig.chain.flush()
    # The file is made to hold the table before anything leads to it: the host may be full later.
    assert story(rig)[0] == "truncate"
    assert story(rig)[1:] == ["data", "refcount block", "flush", "L2", "L1", "flush"]
    rig.forget()
    rig.chain.write(GUEST, offset=SIZE)
    rig.chain.flush()
    assert story(rig) == ["data", "refcount block", "flush", "L2", "flush"]
    assert barriers(rig) == ["data and refcounts before tables", "flush"]


def test_a_write_in_place_is_flushed_with_one_barrier() -> None:
    rig = Rig(clusters={0: GUEST})
    rig.chain.write(b"x", offset=7)
    rig.chain.flush()
    assert story(rig) == ["data", "flush"]
    assert barriers(rig) == ["flush"]


def test_a_flush_without_a_change_does_nothing() -> None:
    rig = Rig(clusters={0: GUEST})
    rig.chain.flush()
    rig.read(0, SIZE)
    rig.chain.flush()
    assert rig.file.of("flush", "pwrite") == []


@pytest.mark.pinned("clusters of 4 KiB", "extended_l2")
@pytest.mark.parametrize("options", [OpenOptions(), EAGER])
def test_refcounts_go_down_once_nothing_durable_refers_to_the_cluster(
    options: OpenOptions,
) -> None:
    rig = Rig(clusters={0: GUEST, 1: GUEST}, options=options)
    rig.chain.discard(offset=0, length=SIZE)
    rig.chain.flush()
    hole = ["discard"] if options.discard else []
    assert story(rig) == ["L2", "flush", "refcount block", *hole, "flush"]
    assert barriers(rig) == ["mapping before releasing clusters", "flush"]


def test_a_shared_table_goes_after_its_copy_is_linked() -> None:
    rig = Rig(clusters={0: GUEST, 1: GUEST}, snapshots=[SnapshotSpec(id="1")])
    rig.chain.write(GUEST, offset=0)
    rig.chain.flush()
    expected = ["data", "refcount block", "flush", "L2", "L1", "flush"]
    # The copy of the table is written with the data: nothing refers to it yet.
    assert story(rig) == ["L2", *expected, "refcount block", "flush"]


def test_a_new_refcount_block_is_durable_before_its_table_and_that_before_the_mapping() -> None:
    rig = Rig(cluster_bits=9, refcount_order=6, size=64 * KiB)
    for index in range(64):
        rig.chain.write(GUEST[:512], offset=index * 512)
    rig.forget()
    rig.chain.flush()
    told = story(rig)
    assert told[:4] == ["refcount block", "flush", "refcount table", "flush"]
    assert told[4:] == ["L2", "L1", "flush"]


def test_a_moved_refcount_table_is_switched_to_by_one_write_of_12_bytes() -> None:
    rig = Rig(cluster_bits=9, refcount_order=6, size=4 * MiB)
    place = rig.metadata.header.refcount_table_offset
    rig.chain.write(bytes(range(256)) * 2 * 4200, offset=0)
    rig.chain.flush()
    heads = [call for call in rig.file.of("pwrite") if call.offset < 512]
    assert [(call.offset, call.length) for call in heads] == [
        (FIELD_OFFSETS["refcount_table_offset"], 12)
    ]
    told = story(rig)
    at = told.index("header")
    assert told[at - 2 : at + 2] == ["refcount table", "flush", "header", "flush"]
    assert "refcount table switch before mapping" in rig.events
    assert rig.reopened().header.refcount_table_offset != place
    assert rig.count(place) == 0
    rig.assert_clean()


def test_a_longer_l1_table_is_switched_to_by_one_write_of_12_bytes() -> None:
    rig = Rig(cluster_bits=9, size=32 * KiB, clusters={0: GUEST[:512]})
    old = rig.metadata.header.l1_table_offset
    rig.chain.resize(32 * KiB * 100)
    heads = [call for call in rig.file.of("pwrite") if call.offset < 512]
    assert [(call.offset, call.length) for call in heads] == [
        (FIELD_OFFSETS["l1_size"], 12),
        (FIELD_OFFSETS["size"], 8),
    ]
    told = story(rig)
    at = told.index("header")
    assert told[at - 2 : at + 2] == ["L1", "flush", "header", "flush"]
    assert rig.count(old) == 0
    rig.assert_clean()


def test_lazy_refcounts_promise_a_repair_first_and_count_at_the_end() -> None:
    rig = Rig(lazy_refcounts=True, clusters={5: GUEST})
    rig.chain.write(GUEST, offset=0)
    rig.chain.flush()
    assert story(rig) == ["data", "header", "flush", "L2", "flush"]
    assert rig.reopened().dirty
    rig.forget()
    rig.chain.write(GUEST, offset=SIZE)
    rig.chain.flush()
    assert story(rig) == ["data", "flush", "L2", "flush"]
    rig.forget()
    rig.image.disk.close()
    assert story(rig) == ["refcount block", "flush", "header", "flush"]
    assert not rig.reopened().dirty
    rig.assert_clean()


def test_data_of_an_external_file_are_durable_before_the_table_that_shows_them() -> None:
    rig = Rig(data_file_name="data")
    order: list[str] = []
    for name, storage in (("image", rig.file), ("data", rig.data)):
        storage.calls = Log(order, name)
    rig.chain.write(GUEST, offset=0)
    rig.chain.flush()
    durable = ["data flush", "image flush"]
    # Refcounts, then the new L2 table with its L1 entry; a barrier takes the data first.
    expected = ["image pwrite", *durable, "image pwrite", "image pwrite", *durable]
    assert order == ["data pwrite", *expected]


class Log(list[Any]):
    """Calls that are told to a list shared by several storages."""

    def __init__(self, order: list[str], name: str) -> None:
        super().__init__()
        self._order, self._name = order, name

    def append(self, call: Any) -> None:
        if call.operation in ("pwrite", "flush"):
            self._order.append(f"{self._name} {call.operation}")
        super().append(call)


def test_a_full_cache_of_changes_is_written_back_in_the_same_order() -> None:
    tight = OpenOptions(l2_cache_size=1 * KiB, l2_cache_entry_size=512)
    rig = Rig(cluster_bits=9, size=256 * KiB, options=tight)
    for table in range(4):
        rig.chain.write(GUEST[:512], offset=table * 32 * KiB)
    told = story(rig)
    assert "L2" in told
    assert told.index("refcount block") < told.index("flush") < told.index("L2")
    assert not rig.state.tables.cache.crowded
    assert "flush" not in rig.events


UNKNOWN = 1 << 5


@pytest.mark.pinned("feature bits", "compat=0.10")
def test_unknown_autoclear_bits_are_cleared_before_the_first_change_and_once() -> None:
    rig = Rig(Rig(clusters={0: GUEST}).built.set_field("autoclear_features", UNKNOWN))
    rig.read(0, SIZE)
    rig.chain.flush()
    assert rig.reopened().header.autoclear_features == UNKNOWN
    rig.chain.write(b"x", offset=0)
    assert story(rig) == ["header", "flush", "data"]
    assert rig.reopened().header.autoclear_features == 0
    rig.chain.write(b"y", offset=0)
    rig.chain.discard(offset=0, length=SIZE)
    rig.chain.flush()
    assert [call.offset for call in rig.file.of("pwrite")].count(
        FIELD_OFFSETS["autoclear_features"]
    ) == 1


def test_steps_are_told_by_their_names() -> None:
    rig = Rig(cluster_bits=9, refcount_order=6, size=4 * MiB, options=EAGER)
    rig.chain.write(bytes(range(256)) * 2 * 4200, offset=0)
    rig.chain.write_compressed(bytes(512), offset=4 * MiB - 512)
    rig.chain.discard(offset=0, length=MiB)
    rig.chain.resize(5 * MiB)
    rig.chain.resize(MiB, shrink=True)
    rig.image.disk.close()
    assert set(rig.events) <= {*QCOW2_BARRIERS, *QCOW2_STEPS}
    assert set(rig.events) >= {
        "cluster_alloc",
        "cluster_free",
        "l1_grow_activate_table",
        "l2_alloc_allocate",
        "l2_update",
        "refblock_update",
        "reftable_update",
        "write_compressed",
    }
