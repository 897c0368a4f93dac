"""Guest writes: how many calls they take, what is copied beside them, and where they end up."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qcowkit.codecs.qcow2.entries import ALL_ZERO, COPIED, READS_ZERO
from qcowkit.errors import RequestError
from qcowkit.extents.table import Flag
from qcowkit.testing.qcow2_builder import Compressed, Data, SnapshotSpec, Zero
from qcowkit.testing.recording import Call
from qcowkit.units import KiB, MiB
from tests.engine.qcow2_rig import Rig

# Subclusters are copied and kept by rules of their own, which have tests of their own here.
pytestmark = pytest.mark.pinned("clusters of 4 KiB without subclusters", "extended_l2")

SIZE = 4 * KiB
BASE = random.Random(0).randbytes(MiB)
GUEST = random.Random(1).randbytes(64 * KiB)
WIDE: dict[str, Any] = {"cluster_bits": 14, "extended_l2": True}


def written(call: Call, offset: int, length: int) -> bool:
    return (call.offset, call.length) == (offset, length)


@pytest.mark.parametrize("below", [None, BASE])
@pytest.mark.parametrize("spec", [{}, WIDE, {"data_file_name": "data"}, {"version": 2}])
@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (100, 7), (SIZE - 1, 2), (3, 5 * SIZE)])
def test_an_allocating_write_is_one_write(
    spec: dict[str, Any], below: bytes | None, offset: int, length: int
) -> None:
    """S003-35."""
    rig = Rig(below=below, **spec)
    rig.warm()
    rig.chain.write(GUEST[:length], offset=offset)
    assert len(rig.writes) == 1
    before = (below or b"").ljust(MiB, b"\0")
    expected = before[:offset] + GUEST[:length] + before[offset + length :]
    assert rig.read(0, MiB) == expected


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("offset", "length", "reads"),
    [
        # Head and tail of one cluster come with one read, those of several with one each.
        (100, 7, 1),
        (100, SIZE - 100, 1),
        (0, 7, 1),
        (0, SIZE, 0),
        (100, 3 * SIZE, 2),
        (SIZE, 3 * SIZE, 0),
    ],
)
def test_what_is_copied_is_read_once(offset: int, length: int, reads: int, again: bool) -> None:
    rig = Rig(below=BASE, watch=False)
    if again:
        # From the second request on there is a shorter way.
        rig.chain.write(b"x", offset=MiB - 1)
    rig.warm()
    rig.chain.write(GUEST[:length], offset=offset)
    assert len(rig.base.of("pread")) == reads
    assert (
        rig.read(0, 5 * SIZE) == BASE[:offset] + GUEST[:length] + BASE[offset + length : 5 * SIZE]
    )


def test_zeros_beside_the_data_are_not_written_where_the_file_never_was() -> None:
    """S001-23: what lies beyond the end of the file reads as zeros already."""
    rig = Rig()
    rig.warm()
    rig.chain.write(b"x" * 10, offset=SIZE + 100)
    (call,) = rig.writes
    assert written(call, rig.host(SIZE) + 100, 10)
    assert rig.memory.size() == rig.host(SIZE) + 110
    assert rig.file.of("zero", "allocate", "truncate") == []


@pytest.mark.pinned("host offsets of the plain layout", "compat=0.10")
@pytest.mark.parametrize("below", [None, b"", BASE[:SIZE]])
def test_zeros_of_a_cluster_that_was_used_before_come_with_the_data(below: bytes | None) -> None:
    """S001-23: one write of a whole cluster, no call of its own for the zeros."""
    rig = Rig(clusters={0: GUEST[:SIZE], 5: GUEST[:SIZE]}, below=below)
    old = rig.host(0)
    rig.chain.discard(offset=0, length=SIZE)
    rig.chain.flush()
    rig.forget()
    rig.chain.write(b"x" * 10, offset=SIZE + 100)
    assert rig.host(SIZE) == old
    (call,) = rig.writes
    assert written(call, old, SIZE)
    assert rig.file.of("zero") == []
    assert rig.read(SIZE, SIZE) == bytes(100) + b"x" * 10 + bytes(SIZE - 110)


def test_a_cluster_of_its_own_is_written_in_place() -> None:
    rig = Rig(clusters={3: GUEST[:SIZE]})
    host = rig.host(3 * SIZE)
    rig.forget()
    rig.chain.write(b"x" * 10, offset=3 * SIZE + 50)
    (call,) = rig.writes
    assert written(call, host + 50, 10)
    assert not rig.state.tables.cache.dirty
    assert "cluster_alloc" not in rig.events


def test_neighbours_that_lie_together_are_written_in_place_with_one_write() -> None:
    rig = Rig(clusters=dict.fromkeys(range(8), GUEST[:SIZE]))
    host = rig.host(0)
    rig.warm()
    rig.chain.write(GUEST[: 6 * SIZE], offset=SIZE // 2)
    (call,) = rig.writes
    assert written(call, host + SIZE // 2, 6 * SIZE)


def test_clusters_that_lie_apart_take_a_write_each() -> None:
    rig = Rig(clusters={0: GUEST[:SIZE], 2: GUEST[:SIZE]})
    rig.chain.write(GUEST[:SIZE], offset=SIZE)
    rig.forget()
    rig.chain.write(GUEST[: 3 * SIZE], offset=0)
    hosts = [rig.host(index * SIZE) for index in range(3)]
    assert [(call.offset, call.length) for call in rig.writes] == [(host, SIZE) for host in hosts]


def test_zeros_that_have_a_cluster_keep_it_and_its_count() -> None:
    """S001-03, S003-40: nothing is allocated, nothing freed, and the halves read as zeros."""
    rig = Rig(clusters={2: Zero(payload=GUEST[:SIZE])})
    host, counts = rig.host(2 * SIZE), rig.stored_counts()
    rig.warm()
    rig.chain.write(b"x" * 10, offset=2 * SIZE + 50)
    (call,) = rig.writes
    assert written(call, host, SIZE)
    assert rig.word(2) == host | COPIED
    rig.chain.flush()
    assert rig.stored_counts() == counts
    assert rig.read(2 * SIZE, SIZE) == bytes(50) + b"x" * 10 + bytes(SIZE - 60)


def test_zeros_whose_cluster_is_shared_get_another() -> None:
    snapshot = SnapshotSpec(id="1")
    rig = Rig(clusters={2: Zero(payload=GUEST[:SIZE])}, snapshots=[snapshot])
    host = rig.host(2 * SIZE)
    rig.chain.write(b"x", offset=2 * SIZE)
    assert rig.host(2 * SIZE) != host
    rig.chain.flush()
    assert rig.count(host) == 1
    rig.assert_clean()


def test_a_shared_cluster_is_left_to_the_snapshot() -> None:
    rig = Rig(clusters={2: GUEST[:SIZE]}, snapshots=[SnapshotSpec(id="1")])
    host = rig.host(2 * SIZE)
    rig.chain.write(b"x" * 10, offset=2 * SIZE + 50)
    assert rig.host(2 * SIZE) != host
    assert rig.read(2 * SIZE, SIZE) == GUEST[:50] + b"x" * 10 + GUEST[60:SIZE]
    rig.chain.flush()
    assert rig.memory.pread(SIZE, offset=host) == GUEST[:SIZE]
    assert (rig.count(host), rig.count(rig.host(2 * SIZE))) == (1, 1)
    rig.assert_clean()


@pytest.mark.pinned("several compressed clusters in one", "cluster_size=512")
def test_a_compressed_cluster_is_unpacked_into_a_new_one() -> None:
    packed = Rig(size=MiB)
    packed.chain.write_compressed(b"ab" * (SIZE // 2), offset=0)
    packed.chain.flush()
    old = packed.host(0)
    packed.forget()
    packed.chain.write(b"x" * 10, offset=50)
    assert packed.flags(0) & Flag.DATA
    assert not packed.flags(0) & Flag.COMPRESSED
    assert packed.word(0) & COPIED
    packed.chain.flush()
    assert packed.count(old) == 0
    assert packed.read(0, SIZE) == (b"ab" * 25) + b"x" * 10 + b"ab" * ((SIZE - 60) // 2)
    packed.assert_clean()


# Subclusters.

PART = 512


def test_only_the_subclusters_at_the_edges_are_copied() -> None:
    """S001-14, S002-04: the cluster has 16 KiB, the copy a few hundred bytes."""
    rig = Rig(below=BASE, **WIDE)
    rig.warm()
    offset, length = 3 * PART + 100, 2 * PART
    rig.chain.write(GUEST[:length], offset=offset)
    (call,) = rig.writes
    assert written(call, rig.host(offset) - 100, 3 * PART)
    assert call.data == BASE[3 * PART : offset] + GUEST[:length] + BASE[offset + length : 6 * PART]
    assert rig.bitmap(0) == 0b111 << 3
    (read,) = rig.base.of("pread")
    assert (read.offset, read.length) == (3 * PART, 3 * PART)


def test_aligned_subclusters_need_no_copy() -> None:
    rig = Rig(below=BASE, **WIDE)
    rig.warm()
    rig.chain.write(GUEST[: 4 * PART], offset=8 * PART)
    assert rig.base.calls == []
    assert rig.bitmap(0) == 0b1111 << 8
    assert not rig.flags(0) & Flag.PRESENT
    assert rig.flags(8 * PART) & Flag.DATA


def test_a_cluster_that_has_its_place_takes_more_subclusters_there() -> None:
    """S001-13, S001-21: their bits are set from the start of the copy to its end."""
    rig = Rig(below=BASE, clusters={0: Data(payload=GUEST[: 16 * KiB], bitmap=1)}, **WIDE)
    host = rig.row(0).host
    rig.warm()
    rig.chain.write(b"x" * 10, offset=7 * PART + 505)
    (call,) = rig.writes
    assert written(call, host + 7 * PART, 2 * PART)
    assert rig.bitmap(0) == 0b11 << 7 | 1
    assert rig.word(0) == host | COPIED
    assert rig.read(7 * PART, 2 * PART) == (
        BASE[7 * PART : 7 * PART + 505] + b"x" * 10 + BASE[7 * PART + 515 : 9 * PART]
    )


def test_a_subcluster_of_zeros_becomes_data_in_place() -> None:
    rig = Rig(below=BASE, clusters={0: Zero(payload=GUEST[: 16 * KiB])}, **WIDE)
    rig.warm()
    rig.chain.write(b"x", offset=PART + 1)
    assert rig.bitmap(0) == ALL_ZERO & ~(1 << 33) | 0b10
    assert rig.read(PART, PART) == b"\0x" + bytes(PART - 2)
    assert rig.base.calls == []


def test_a_write_over_several_clusters_copies_at_its_two_ends_only() -> None:
    """S001-14."""
    size = 16 * KiB
    rig = Rig(below=BASE, **WIDE)
    rig.warm()
    offset, stop = size - 100, 2 * size + 100
    rig.chain.write(GUEST[: stop - offset], offset=offset)
    assert [rig.bitmap(index) for index in range(3)] == [1 << 31, 0xFFFF_FFFF, 1]
    assert sum(call.length for call in rig.base.of("pread")) == 2 * (PART - 100)
    assert rig.read(0, 3 * size) == BASE[:offset] + GUEST[: stop - offset] + BASE[stop : 3 * size]


# Places.


def test_an_external_cluster_lies_at_its_guest_offset() -> None:
    rig = Rig(data_file_name="data")
    rig.chain.write(b"x" * 10, offset=5)
    assert rig.word(0) == COPIED
    assert rig.row(0).host == 0
    rig.chain.write(b"y" * 10, offset=9 * SIZE)
    assert rig.row(9 * SIZE).host == 9 * SIZE
    rig.chain.flush()
    rig.assert_clean()


def test_nothing_is_written_behind_the_end_of_the_disk() -> None:
    """A data file would be a longer disk then."""
    rig = Rig(data_file_name="data", size=3 * SIZE - 512)
    rig.chain.write(b"x", offset=3 * SIZE - 513)
    rig.chain.flush()
    assert rig.data.size() == 3 * SIZE - 512


@pytest.mark.pinned("one L2 table", "cluster_size=512")
def test_consecutive_writes_end_up_side_by_side() -> None:
    rig = Rig()
    for index in range(20):
        rig.chain.write(GUEST[:SIZE], offset=index * SIZE)
    assert len(rig.image.extents(start=0, length=20 * SIZE)) == 1


def test_a_write_outside_of_the_disk_is_refused() -> None:
    rig = Rig(size=3 * SIZE)
    with pytest.raises(RequestError, match="is outside the disk of 0x3000 bytes"):
        rig.chain.write(b"xy", offset=3 * SIZE - 1)
    assert rig.file.of("pwrite") == []


def test_no_bytes_change_nothing() -> None:
    rig = Rig(clusters={0: GUEST[:SIZE]})
    rig.chain.write(b"", offset=0)
    rig.chain.write(b"", offset=MiB)
    rig.chain.flush()
    assert rig.file.of("pwrite") == []


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_written(kind: type) -> None:
    rig = Rig()
    rig.chain.write(kind(b"abc"), offset=7)
    assert rig.read(7, 3) == b"abc"


def test_a_zero_entry_loses_its_flag() -> None:
    rig = Rig(clusters={0: Zero()})
    assert rig.word(0) == READS_ZERO
    rig.chain.write(b"x", offset=0)
    assert rig.word(0) == rig.host(0) | COPIED


@pytest.mark.pinned("bytes compressed by the test", "compression_type=zstd", "cluster_size=512")
def test_a_compressed_cluster_of_the_builder_is_read_before_it_is_changed() -> None:
    source = Rig(size=MiB)
    source.chain.write_compressed(GUEST[:100] * 40 + bytes(96), offset=0)
    row = source.row(0)
    payload = source.memory.pread(row.stored, offset=row.host)
    rig = Rig(clusters={1: Compressed(payload=payload)})
    rig.chain.write(b"x", offset=SIZE)
    assert rig.read(SIZE, SIZE) == (b"x" + GUEST[1:100] + GUEST[:100] * 39 + bytes(96))
