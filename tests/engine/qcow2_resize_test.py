"""Growing and shrinking: what is written in which order, and what must not show up again."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.entries import COPIED
from qcowkit.codecs.qcow2.header import FIELD_OFFSETS
from qcowkit.engine.options import OpenOptions
from qcowkit.errors import RequestError
from qcowkit.extents.table import Flag
from qcowkit.image.lineage import Layer
from qcowkit.image.metadata import load_metadata
from qcowkit.image.registry import build_chain
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.qcow2_builder import SnapshotSpec, build_qcow2
from qcowkit.units import KiB, MiB
from tests.engine.qcow2_rig import Rig

pytestmark = pytest.mark.pinned("sizes of tables")

SIZE, COVERAGE = 512, 32 * KiB
GUEST = random.Random(1).randbytes(256 * KiB)
SMALL: dict[str, Any] = {"cluster_bits": 9, "size": 64 * KiB}


def headers(rig: Rig) -> list[tuple[int, int]]:
    """Writes into the header."""
    return [(call.offset, call.length) for call in rig.file.of("pwrite") if call.offset < SIZE]


# Growing.


def test_growing_within_the_last_l2_table_is_one_write() -> None:
    rig = Rig(size=64 * KiB)
    rig.chain.resize(128 * KiB)
    assert headers(rig) == [(FIELD_OFFSETS["size"], 8)]
    assert len(rig.file.of("pwrite")) == len(rig.file.of("flush")) == 1
    assert rig.reopened().virtual_size == rig.chain.size == 128 * KiB


def test_entries_behind_the_disk_are_cleared_before_the_disk_reaches_them() -> None:
    """They are of a VM state: its clusters are given up and never seen by the guest."""
    size = 4 * COVERAGE
    hidden = dict.fromkeys(range(128, 140), GUEST[:SIZE])
    rig = Rig(cluster_bits=9, size=2 * COVERAGE, l1_size=4, clusters=hidden)
    table = rig.built.places["l2"]
    rig.chain.resize(size)
    assert rig.read(0, size) == bytes(size)
    assert rig.metadata.header.l1_table_offset == rig.reopened().header.l1_table_offset
    assert rig.count(table) in (0, 1)
    rig.chain.write(GUEST[: 2 * COVERAGE], offset=2 * COVERAGE)
    rig.chain.flush()
    assert rig.read(2 * COVERAGE, 2 * COVERAGE) == GUEST[: 2 * COVERAGE]
    rig.assert_clean()


def test_the_vm_state_of_a_snapshot_survives_the_growth_of_the_disk() -> None:
    hidden = dict.fromkeys(range(128, 140), GUEST[:SIZE])
    rig = Rig(
        cluster_bits=9,
        size=2 * COVERAGE,
        l1_size=4,
        clusters=hidden,
        snapshots=[SnapshotSpec(id="1", vm_state_size=12 * SIZE)],
    )
    rig.chain.resize(4 * COVERAGE)
    rig.chain.write(GUEST[: 4 * COVERAGE], offset=0)
    rig.chain.flush()
    rig.assert_clean()
    l1 = rig.metadata.snapshots[0].l1_offset
    table = int.from_bytes(rig.memory.pread(8, offset=l1 + 16), "big") & ~COPIED
    host = int.from_bytes(rig.memory.pread(8, offset=table), "big") & ~COPIED
    assert rig.memory.pread(SIZE, offset=host) == GUEST[:SIZE]


@pytest.mark.parametrize(
    "spec", [SMALL, {"cluster_bits": 14, "extended_l2": True, "size": 64 * KiB}]
)
def test_entries_of_both_sizes_are_counted(spec: dict[str, Any]) -> None:
    """S001-09: tables of 8 and of 16 bytes an entry cover what their size says."""
    rig = Rig(**spec)
    for size in (COVERAGE * 3, MiB + SIZE, 9 * MiB, 300 * MiB, 7 * MiB + SIZE):
        rig.chain.resize(size, shrink=True)
        assert len(rig.state.tables.l1) >= rig.state.geometry.l1_entries(size)
        rig.chain.write(b"end", offset=size - 3)
        rig.chain.flush()
        assert rig.reopened().virtual_size == size
        assert rig.read(size - 3, 3) == b"end"
        rig.assert_clean()


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocated_subclusters_over_a_base_stay_transparent(mode: str) -> None:
    """S001-30, S002-05: clusters have their places, and say nothing of their content."""
    base = GUEST[: 192 * KiB]
    rig = Rig(cluster_bits=14, extended_l2=True, size=256 * KiB, below=base)
    rig.chain.resize(512 * KiB, preallocation=mode)
    for offset in range(256 * KiB, 512 * KiB, 16 * KiB):
        assert rig.row(offset).host > 0
        assert not rig.flags(offset) & Flag.PRESENT
    assert rig.read(0, 512 * KiB) == base.ljust(512 * KiB, b"\0")
    host = rig.host(300 * KiB)
    rig.chain.write(b"x" * 10, offset=300 * KiB + 600)
    assert rig.host(300 * KiB) == host
    assert rig.read(300 * KiB, 1024) == bytes(600) + b"x" * 10 + bytes(414)
    rig.chain.flush()
    rig.assert_clean()


def test_preallocation_over_a_base_is_refused_without_subclusters() -> None:
    rig = Rig(**SMALL, below=GUEST)
    with pytest.raises(RequestError, match=r"needs subclusters \(extended_l2=on\)"):
        rig.chain.resize(128 * KiB, preallocation="metadata")
    assert rig.file.of("pwrite") == []


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocated_clusters_reach_to_the_end_of_the_file_and_are_written_in_place(
    mode: str,
) -> None:
    rig = Rig(**SMALL)
    rig.chain.resize(256 * KiB, preallocation=mode)
    rows = rig.image.extents(start=64 * KiB, length=192 * KiB)
    last = max(row.host + row.length for row in rows)
    assert rig.memory.size() >= last
    rig.assert_clean()
    rig.forget()
    rig.chain.write(GUEST[: 4 * SIZE], offset=100 * KiB)
    assert "cluster_alloc" not in rig.events


# Shrinking.


def test_what_is_cut_off_is_durable_before_the_size_and_the_size_before_the_cut() -> None:
    rig = Rig(**SMALL)
    rig.chain.write(GUEST[: 64 * KiB], offset=0)
    rig.chain.flush()
    rig.forget()
    rig.chain.resize(16 * KiB, shrink=True)
    calls = [call.operation for call in rig.file.of("pwrite", "flush", "truncate")]
    sized = next(
        index
        for index, call in enumerate(rig.file.of("pwrite", "flush", "truncate"))
        if call.operation == "pwrite" and call.offset == FIELD_OFFSETS["size"]
    )
    cut = calls.index("truncate")
    assert "flush" in calls[:sized]
    assert calls[sized - 1] == "flush"
    assert "flush" in calls[sized:cut]
    assert headers(rig) == [(FIELD_OFFSETS["size"], 8)]


def test_the_file_ends_with_the_last_cluster_in_use() -> None:
    """S003-21."""
    rig = Rig(**SMALL, clusters=dict.fromkeys(range(128), GUEST[:SIZE]))
    rig.chain.write(GUEST[:COVERAGE], offset=0)
    rig.chain.resize(SIZE, shrink=True)
    counts = rig.stored_counts()
    last = max(index for index, count in enumerate(counts) if count)
    assert rig.memory.size() == (last + 1) * SIZE
    rig.assert_clean()


def test_a_file_that_cannot_be_cut_only_stays_long() -> None:
    memory = MemoryStorage(build_qcow2(**SMALL).to_bytes())
    # The first call makes room for a table, the second would cut the file.
    rig = Rig(**SMALL, storage=FaultyStorage(memory, Fault(operation="truncate", call=2)))
    rig.memory = memory
    rig.chain.write(GUEST[:COVERAGE], offset=COVERAGE)
    rig.chain.flush()
    length = memory.size()
    rig.chain.resize(COVERAGE, shrink=True)
    assert memory.size() == length
    assert rig.reopened().virtual_size == COVERAGE
    rig.assert_clean()
    rig.chain.resize(SIZE, shrink=True)
    assert memory.size() <= length


def test_shrinking_copies_nothing() -> None:
    """S003-22."""
    rig = Rig(**SMALL, clusters=dict.fromkeys(range(128), GUEST[:SIZE]))
    rig.chain.resize(20 * KiB + SIZE, shrink=True)
    data = {GUEST[:SIZE]}
    assert not [call for call in rig.file.of("pwrite") if call.data in data]
    assert rig.file.of("clone_to", "copy_to") == []


def test_freed_clusters_become_holes() -> None:
    """S003-22: those that the cut does not take anyway."""
    rig = Rig(**SMALL, clusters=dict.fromkeys(range(128), GUEST[:SIZE]))
    hosts = {rig.host(index * SIZE) for index in range(64, 128)}
    rig.chain.resize(COVERAGE, shrink=True)
    holes = {
        offset
        for call in rig.file.of("discard")
        for offset in range(call.offset, call.offset + call.length, SIZE)
    }
    assert hosts <= holes


def test_tables_that_are_gone_are_in_no_cache() -> None:
    """S003-23: what lives in their clusters next is not taken for them."""
    rig = Rig(cluster_bits=9, refcount_order=6, size=256 * KiB)
    rig.chain.write(GUEST, offset=0)
    rig.chain.flush()
    rig.chain.resize(COVERAGE, shrink=True)
    tables, blocks = rig.state.tables.cache, rig.state.refcounts.blocks
    assert {key for key in range(8) if tables.find(key) is not None} == {0}
    used = rig.state.refcounts.last_used
    assert len(blocks) <= used + 1
    rig.chain.resize(256 * KiB)
    assert rig.read(COVERAGE, 224 * KiB) == bytes(224 * KiB)
    other = GUEST[::-1]
    rig.chain.write(other, offset=0)
    rig.chain.flush()
    assert rig.read(0, 256 * KiB) == other
    rig.assert_clean()


def test_a_cut_inside_a_cluster_hides_the_rest_when_the_disk_grows_again() -> None:
    rig = Rig(clusters={0: GUEST[: 4 * KiB], 1: GUEST[: 4 * KiB]}, below=GUEST)
    rig.chain.resize(4 * KiB + SIZE, shrink=True)
    rig.chain.resize(64 * KiB)
    kept = GUEST[: 4 * KiB] + GUEST[:SIZE]
    assert rig.read(0, 64 * KiB) == kept.ljust(64 * KiB, b"\0")
    rig.chain.flush()
    rig.assert_clean()


def test_a_snapshot_keeps_what_the_disk_gave_up() -> None:
    rig = Rig(
        **SMALL,
        clusters={index: GUEST[index * SIZE : (index + 1) * SIZE] for index in range(128)},
        snapshots=[SnapshotSpec(id="1")],
        options=OpenOptions(discard=True, pass_discard_other=True),
    )
    rig.chain.resize(SIZE, shrink=True)
    rig.chain.resize(64 * KiB)
    rig.chain.write(GUEST[::-1][: 64 * KiB], offset=0)
    rig.chain.flush()
    rig.assert_clean()
    storage = MemoryStorage(rig.memory.to_bytes())
    layer = Layer(storage=storage, metadata=load_metadata(storage, "qcow2", budget=TRUSTED))
    with build_chain([layer], snapshot="1") as snapshot:
        assert snapshot.read(offset=0, length=64 * KiB) == GUEST[: 64 * KiB]


def test_a_disk_without_a_byte_can_grow_again() -> None:
    rig = Rig(**SMALL, clusters={0: GUEST[:SIZE]})
    rig.chain.resize(0, shrink=True)
    rig.chain.flush()
    assert rig.read(0, 0) == b""
    rig.assert_clean()
    rig.chain.resize(64 * KiB)
    assert rig.read(0, 64 * KiB) == bytes(64 * KiB)


@pytest.mark.parametrize(
    ("spec", "size", "options", "message"),
    [
        ({}, 7, {}, "size 7 is not a multiple of 512"),
        ({}, 512, {}, "size 512 is below the disk's 65536: shrinking drops what lies behind"),
        ({}, 512, {"shrink": True, "preallocation": "full"}, "no meaning when a disk shrinks"),
        ({}, MiB, {"preallocation": "some"}, "preallocation 'some' is unknown; known are off"),
        (
            {},
            1 << 40,
            {},
            "size 1099511627776 is above 137438953472, the most that clusters of 512",
        ),
        (
            {"version": 2, "snapshots": [SnapshotSpec(id="1")]},
            512,
            {"shrink": True},
            "version 2 snapshots do not keep a size of their own",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(
    spec: dict[str, Any], size: int, options: dict[str, Any], message: str
) -> None:
    rig = Rig(**SMALL, **spec)
    before = rig.memory.to_bytes()
    with pytest.raises(RequestError, match=message):
        rig.chain.resize(size, **options)
    assert rig.memory.to_bytes() == before
    assert rig.chain.size == 64 * KiB
