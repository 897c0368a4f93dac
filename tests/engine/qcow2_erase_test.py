"""Zeroing and discarding: by entries where that can be, without touching what lies beside."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qcowkit.codecs.qcow2.entries import ALL_ALLOCATED, ALL_ZERO, COPIED, READS_ZERO
from qcowkit.engine.options import OpenOptions
from qcowkit.errors import UnsupportedFeature
from qcowkit.extents.table import Flag
from qcowkit.testing.qcow2_builder import Cluster, Compressed, Data, SnapshotSpec, Zero
from qcowkit.units import GiB, KiB, MiB, TiB
from tests.engine.qcow2_rig import Rig

pytestmark = pytest.mark.pinned("clusters of 4 KiB without subclusters", "extended_l2")

SIZE, WIDE_SIZE, PART = 4 * KiB, 16 * KiB, 512
GUEST = random.Random(1).randbytes(MiB)
BASE = random.Random(2).randbytes(MiB)
WIDE: dict[str, Any] = {"cluster_bits": 14, "extended_l2": True}
DISCARD = OpenOptions(discard=True)


def packed(size: int) -> Compressed:
    source = Rig(cluster_bits=size.bit_length() - 1)
    source.chain.write_compressed(b"abcd" * (size // 4), offset=0)
    row = source.row(0)
    return Compressed(payload=source.memory.pread(row.stored, offset=row.host))


def mixed(size: int, *, compressed: bool = True) -> dict[int, Cluster]:
    """Clusters of every state, one behind the other, beginning with data."""
    states: list[Cluster | None] = [
        GUEST[:size],
        None,
        Zero(),
        Zero(payload=GUEST[:size]),
        packed(size) if compressed else GUEST[:size],
        GUEST[-size:],
    ]
    if size == WIDE_SIZE:
        states[1] = Data(payload=GUEST[:size], bitmap=0x00FF_0F0F)
    return {index: state for index, state in enumerate(states) if state is not None}


# Content.


@pytest.mark.pinned("bytes compressed by another image", "compression_type=zstd")
@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize("base", [None, BASE])
@pytest.mark.parametrize(
    ("size", "spec"),
    [
        (SIZE, {}),
        (SIZE, {"version": 2}),
        (SIZE, {"data_file_name": "data"}),
        (WIDE_SIZE, WIDE),
        (WIDE_SIZE, {**WIDE, "data_file_name": "data"}),
    ],
)
def test_a_zeroed_range_reads_as_zeros_and_the_rest_as_before(
    size: int, spec: dict[str, Any], base: bytes | None, unmap: bool
) -> None:
    """S001-16: at every alignment."""
    plain = spec.get("version") == 2
    clusters = mixed(size, compressed="data_file_name" not in spec)
    if plain:
        clusters = {key: one for key, one in clusters.items() if not isinstance(one, Zero)}
    part = size // 32
    edges = [0, 7, part - 1, part, 3 * part + 1, 8 * part, size - part, size - 1]
    for first in range(5):
        begins = [first * size + edge for edge in edges]
        ends = [index * size + edge for index in (first, first + 1) for edge in edges]
        for begin, end in [(begin, end) for begin in begins for end in ends if begin < end][::7]:
            rig = Rig(clusters=clusters, below=base, **spec)
            before = rig.read(0, 7 * size)
            rig.chain.write_zeroes(offset=begin, length=end - begin, unmap=unmap)
            expected = before[:begin] + bytes(end - begin) + before[end:]
            assert rig.read(0, 7 * size) == expected
            rig.chain.flush()
            rig.assert_clean()


def test_only_whole_clusters_are_discarded() -> None:
    rig = Rig(clusters=dict.fromkeys(range(4), GUEST[:SIZE]))
    rig.chain.discard(offset=1, length=3 * SIZE)
    assert rig.read(0, 4 * SIZE) == GUEST[:SIZE] + bytes(2 * SIZE) + GUEST[:SIZE]
    rig.chain.discard(offset=1, length=SIZE)
    assert rig.read(0, SIZE) == GUEST[:SIZE]


def test_the_end_of_the_disk_ends_a_whole_cluster() -> None:
    rig = Rig(size=3 * SIZE - 512, clusters={2: GUEST[: SIZE - 512]})
    host = rig.host(2 * SIZE)
    rig.chain.discard(offset=2 * SIZE, length=SIZE - 512)
    assert rig.read(2 * SIZE, SIZE - 512) == bytes(SIZE - 512)
    rig.chain.flush()
    assert rig.count(host) == 0
    rig.assert_clean()


@pytest.mark.pinned("zero clusters", "compat=0.10")
@pytest.mark.parametrize("spec", [{}, WIDE])
def test_a_discard_over_a_base_reads_as_zeros_and_is_seen_as_such(spec: dict[str, Any]) -> None:
    """S002-06: not as what lies below."""
    rig = Rig(below=BASE, **spec)
    size = rig.state.geometry.cluster_size
    rig.chain.discard(offset=0, length=2 * size)
    assert rig.read(0, 3 * size) == bytes(2 * size) + BASE[2 * size : 3 * size]
    assert rig.flags(0) == Flag.ZERO | Flag.PRESENT
    assert rig.host(0) == -1


def test_version_2_cannot_discard_over_a_base_and_does_nothing() -> None:
    rig = Rig(version=2, clusters={0: GUEST[:SIZE]}, below=BASE)
    rig.chain.discard(offset=0, length=2 * SIZE)
    assert rig.read(0, 2 * SIZE) == GUEST[:SIZE] + BASE[SIZE : 2 * SIZE]
    rig.chain.flush()
    assert rig.file.of("pwrite") == []


def test_version_2_zeroes_over_a_base_by_writing() -> None:
    rig = Rig(version=2, below=BASE)
    rig.chain.write_zeroes(offset=100, length=SIZE)
    assert rig.read(0, 2 * SIZE) == BASE[:100] + bytes(SIZE) + BASE[100 + SIZE : 2 * SIZE]
    assert rig.flags(100) & Flag.DATA


def test_nothing_to_do_is_done_by_doing_nothing() -> None:
    rig = Rig(clusters={0: Zero(), 1: GUEST[:SIZE]})
    for request in (rig.chain.write_zeroes, rig.chain.discard):
        request(offset=0, length=SIZE)
        request(offset=5 * SIZE, length=0)
        request(offset=SIZE + 7, length=0)
    rig.chain.write_zeroes(offset=SIZE + 7, length=0, fallback=False)
    rig.chain.discard(offset=2 * SIZE, length=MiB - 2 * SIZE)
    rig.chain.flush()
    assert rig.file.of("pwrite", "flush") == []


# Subclusters.


def test_zeroing_subclusters_flips_bits_and_nothing_else() -> None:
    """S001-31: head and tail as well; nothing is written, allocated or freed."""
    rig = Rig(clusters=dict.fromkeys(range(3), GUEST[:WIDE_SIZE]), **WIDE)
    counts, words = rig.stored_counts(), [rig.word(index) for index in range(3)]
    rig.forget()
    begin, end = WIDE_SIZE - 3 * PART, 2 * WIDE_SIZE + 5 * PART
    rig.chain.write_zeroes(offset=begin, length=end - begin, unmap=True)
    assert rig.writes == []
    assert rig.word(0) == words[0]
    assert rig.bitmap(0) == 0b111 << 61 | ALL_ALLOCATED >> 3
    assert (rig.word(1), rig.bitmap(1)) == (0, ALL_ZERO)
    assert rig.word(2) == words[2]
    assert rig.bitmap(2) == 0b11111 << 32 | ALL_ALLOCATED & ~0b11111
    rig.chain.flush()
    changed = [
        index
        for index, pair in enumerate(zip(counts, rig.stored_counts(), strict=False))
        if pair[0] != pair[1]
    ]
    assert changed == [(words[1] & ~COPIED) // WIDE_SIZE]
    rig.assert_clean()


def test_subclusters_over_a_base_are_zeroed_without_a_cluster() -> None:
    rig = Rig(below=BASE, **WIDE)
    rig.warm()
    rig.chain.write_zeroes(offset=2 * PART, length=3 * PART, fallback=False)
    assert (rig.word(0), rig.bitmap(0)) == (0, 0b111 << 34)
    assert "cluster_alloc" not in rig.events
    assert rig.read(0, 6 * PART) == BASE[: 2 * PART] + bytes(3 * PART) + BASE[5 * PART : 6 * PART]


def test_a_part_of_a_subcluster_is_zeroed_by_its_bit_where_the_rest_is_zero_already() -> None:
    rig = Rig(clusters={0: Data(payload=GUEST[:WIDE_SIZE], bitmap=0b10)}, **WIDE)
    rig.warm()
    rig.chain.write_zeroes(offset=100, length=PART - 100, fallback=False)
    assert rig.bitmap(0) == 1 << 32 | 0b10
    rig.chain.write_zeroes(offset=PART + 100, length=10)
    assert rig.bitmap(0) == 1 << 32 | 0b10
    assert len(rig.writes) == 1
    assert (
        rig.read(PART, PART) == GUEST[PART : PART + 100] + bytes(10) + GUEST[PART + 110 : 2 * PART]
    )


@pytest.mark.pinned("bytes compressed by another image", "compression_type=zstd")
@pytest.mark.parametrize("where", ["begins", "ends", "lies"])
def test_a_part_of_a_compressed_cluster_is_zeroed_by_writing_or_refused(where: str) -> None:
    """Without the way out nothing at all is changed, wherever in the range the cluster is."""
    clusters: dict[int, Cluster] = {
        0: GUEST[:WIDE_SIZE],
        1: packed(WIDE_SIZE),
        2: GUEST[:WIDE_SIZE],
    }
    begin, end = {
        "begins": (WIDE_SIZE + 3 * PART, 3 * WIDE_SIZE),
        "ends": (0, WIDE_SIZE + 3 * PART),
        "lies": (WIDE_SIZE + 3 * PART, WIDE_SIZE + 5 * PART),
    }[where]
    rig = Rig(clusters=clusters, **WIDE)
    before = rig.read(0, 4 * WIDE_SIZE)
    with pytest.raises(UnsupportedFeature, match="compressed cluster at guest offset 0x4000"):
        rig.chain.write_zeroes(offset=begin, length=end - begin, fallback=False)
    assert rig.read(0, 4 * WIDE_SIZE) == before
    rig.chain.flush()
    assert rig.file.of("pwrite") == []
    rig.chain.write_zeroes(offset=begin, length=end - begin)
    assert rig.read(0, 4 * WIDE_SIZE) == before[:begin] + bytes(end - begin) + before[end:]


def test_a_whole_compressed_cluster_is_zeroed_by_its_entry() -> None:
    rig = Rig(clusters={1: packed(WIDE_SIZE)}, **WIDE)
    rig.chain.write_zeroes(offset=WIDE_SIZE, length=WIDE_SIZE, fallback=False)
    assert (rig.word(1), rig.bitmap(1)) == (0, ALL_ZERO)
    assert rig.writes == []


@pytest.mark.parametrize(
    ("spec", "below", "offset", "message"),
    [
        ({}, None, 100, "guest bytes 0x64 to 0x1000 can only be zeroed by writing zeros"),
        ({"version": 2}, BASE, 0, "guest bytes 0x0 to 0x1000 can only be zeroed by writing"),
    ],
)
def test_zeros_that_would_have_to_be_written_are_refused_on_demand(
    spec: dict[str, Any], below: bytes | None, offset: int, message: str
) -> None:
    rig = Rig(clusters={0: GUEST[:SIZE]}, below=below, **spec)
    with pytest.raises(UnsupportedFeature, match=message):
        rig.chain.write_zeroes(offset=offset, length=SIZE - offset, fallback=False)
    rig.chain.flush()
    assert rig.file.of("pwrite") == []


# Space.


@pytest.mark.pinned("zero clusters", "compat=0.10")
def test_zeroing_keeps_the_cluster_and_unmapping_gives_it_up() -> None:
    rig = Rig(clusters={0: GUEST[:SIZE], 1: GUEST[:SIZE]})
    kept, freed = rig.host(0), rig.host(SIZE)
    rig.chain.write_zeroes(offset=0, length=SIZE)
    rig.chain.write_zeroes(offset=SIZE, length=SIZE, unmap=True)
    assert (rig.word(0), rig.word(1)) == (kept | COPIED | READS_ZERO, READS_ZERO)
    rig.chain.flush()
    assert (rig.count(kept), rig.count(freed)) == (1, 0)
    rig.assert_clean()


def test_a_cluster_shared_with_a_snapshot_loses_one_reference() -> None:
    rig = Rig(clusters={0: GUEST[:SIZE]}, snapshots=[SnapshotSpec(id="1")], options=DISCARD)
    host = rig.host(0)
    rig.chain.discard(offset=0, length=SIZE)
    rig.chain.flush()
    assert rig.count(host) == 1
    assert rig.file.of("discard") == []
    assert rig.memory.pread(SIZE, offset=host) == GUEST[:SIZE]
    rig.assert_clean()


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        (OpenOptions(), False),
        (OpenOptions(discard=True), True),
        (OpenOptions(discard=True, pass_discard_request=False), False),
        (OpenOptions(pass_discard_request=True), True),
    ],
)
@pytest.mark.parametrize("request_kind", ["discard", "unmap"])
def test_the_host_gets_the_space_as_the_options_say(
    options: OpenOptions, passed: bool, request_kind: str
) -> None:
    rig = Rig(clusters=dict.fromkeys(range(3), GUEST[:SIZE]), options=options)
    host = rig.host(0)
    if request_kind == "discard":
        rig.chain.discard(offset=0, length=3 * SIZE)
    else:
        rig.chain.write_zeroes(offset=0, length=3 * SIZE, unmap=True)
    assert rig.file.of("discard") == []
    rig.chain.flush()
    holes = [(call.offset, call.length) for call in rig.file.of("discard")]
    assert holes == ([(host, 3 * SIZE)] if passed else [])


def test_zeros_without_unmap_are_never_passed_down() -> None:
    rig = Rig(clusters={0: GUEST[:SIZE]}, options=DISCARD)
    rig.chain.write_zeroes(offset=0, length=SIZE)
    rig.chain.flush()
    assert rig.file.of("discard") == []


@pytest.mark.pinned("zero clusters", "compat=0.10")
def test_discarded_clusters_that_keep_their_place_are_hollowed_out_at_once() -> None:
    options = OpenOptions(discard=True, discard_no_unref=True)
    rig = Rig(clusters={0: GUEST[:SIZE], 1: packed(SIZE)}, options=options)
    host, compressed = rig.host(0), rig.host(SIZE)
    rig.chain.discard(offset=0, length=2 * SIZE)
    assert [(call.offset, call.length) for call in rig.file.of("discard")] == [(host, SIZE)]
    rig.chain.flush()
    assert (rig.word(0), rig.word(1)) == (host | COPIED | READS_ZERO, READS_ZERO)
    assert (rig.count(host), rig.count(compressed)) == (1, 0)
    rig.chain.write(b"x", offset=0)
    assert rig.host(0) == host
    assert rig.read(0, SIZE) == b"x" + bytes(SIZE - 1)


def test_a_data_file_gets_the_discard_at_the_guest_offset() -> None:
    rig = Rig(data_file_name="data", clusters={3: GUEST[:SIZE]}, options=DISCARD)
    rig.chain.discard(offset=3 * SIZE, length=SIZE)
    assert [(call.offset, call.length) for call in rig.data.of("discard")] == [(3 * SIZE, SIZE)]
    assert rig.word(3) == READS_ZERO


@pytest.mark.parametrize("unmap", [False, True])
def test_a_raw_data_file_has_the_zeros_itself(unmap: bool) -> None:
    rig = Rig(data_file_name="data", data_file_raw=True, clusters={3: GUEST[:SIZE]})
    rig.chain.write_zeroes(offset=3 * SIZE, length=SIZE, unmap=unmap)
    assert rig.data.pread(SIZE, offset=3 * SIZE) == bytes(SIZE)
    rig.chain.write(GUEST[:SIZE], offset=5 * SIZE)
    rig.chain.discard(offset=5 * SIZE, length=SIZE)
    assert rig.data.pread(SIZE, offset=5 * SIZE) == bytes(SIZE)


# Long ranges.


@pytest.mark.pinned("zero clusters", "compat=0.10")
def test_one_call_covers_more_than_4_gib() -> None:
    """S003-37: bytes and 64 bits, whatever the edges."""
    rig = Rig(size=TiB, cluster_bits=21)
    begin, end = 3 * GiB + 7, TiB - 5 * MiB
    rig.chain.write(b"left", offset=begin - 4)
    rig.chain.write(b"right", offset=end)
    rig.chain.write(b"middle", offset=700 * GiB)
    rig.chain.write_zeroes(offset=begin, length=end - begin, unmap=True)
    assert rig.read(begin - 4, 8) == b"left\0\0\0\0"
    assert rig.read(end - 4, 9) == b"\0\0\0\0right"
    assert rig.read(700 * GiB, 6) == bytes(6)
    table = rig.image.extents(start=4 * GiB, length=end - 4 * GiB - 4 * MiB)
    assert {row.flags for row in table} == {Flag.ZERO | Flag.PRESENT}


def test_a_discard_of_a_whole_empty_disk_makes_no_tables() -> None:
    """S003-37."""
    rig = Rig(size=64 * TiB, cluster_bits=21)
    rig.chain.write(b"x", offset=9 * TiB)
    rig.chain.flush()
    size = rig.memory.size()
    rig.chain.discard(offset=0, length=64 * TiB)
    rig.chain.flush()
    assert rig.memory.size() == size
    assert rig.read(9 * TiB, 1) == b"\0"
    rig.assert_clean()
