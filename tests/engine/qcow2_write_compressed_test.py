"""Compressed writes: packing, sharing of host clusters, and what is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qcowkit.codecs.qcow2.entries import COMPRESSED, COPIED, compressed_extent
from qcowkit.errors import RequestError
from qcowkit.extents.table import Flag
from qcowkit.testing.qcow2_builder import Compressed, SnapshotSpec, Zero
from qcowkit.units import KiB, MiB
from tests.engine.qcow2_rig import Rig

pytestmark = pytest.mark.pinned("clusters of 4 KiB", "extended_l2", "cluster_size=512")

SIZE = 4 * KiB


def text(seed: int, length: int = SIZE) -> bytes:
    """What compresses to about a quarter."""
    noise = random.Random(seed).randbytes(SIZE // 4)
    return (noise * (length // len(noise) + 1))[:length]


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(SIZE)


@pytest.mark.pinned("shared host clusters", "refcount_bits=1")
def test_neighbours_are_packed_into_one_host_cluster() -> None:
    rig = Rig()
    for index in range(3):
        rig.chain.write_compressed(text(index), offset=index * SIZE)
    rows = [rig.row(index * SIZE) for index in range(3)]
    assert all(row.flags & Flag.COMPRESSED for row in rows)
    for before, after in zip(rows, rows[1:], strict=False):
        assert before.host < after.host < before.host + before.stored
    rig.chain.flush()
    assert len({row.host // SIZE for row in rows}) == 1
    assert rig.count(rows[0].host) == 3
    assert rig.read(0, 3 * SIZE) == b"".join(text(index) for index in range(3))
    rig.assert_clean()


@pytest.mark.pinned("shared host clusters", "refcount_bits=1")
def test_a_request_of_many_clusters_is_packed_across_host_clusters() -> None:
    rig = Rig()
    content = b"".join(text(index) for index in range(30))
    rig.chain.write_compressed(content, offset=0)
    rig.chain.flush()
    assert rig.read(0, len(content)) == content
    assert rig.memory.size() < 20 * SIZE
    crossing = [
        row
        for row in (rig.row(index * SIZE) for index in range(30))
        if row.host // SIZE != (row.host + row.stored - 1) // SIZE
    ]
    assert crossing
    rig.assert_clean()


@pytest.mark.parametrize("order", range(7))
def test_a_host_cluster_is_shared_by_as_many_as_can_be_counted(order: int) -> None:
    """With one bit each has a cluster of its own."""
    rig = Rig(refcount_order=order)
    most = min((1 << (1 << order)) - 1, 20)
    for index in range(20):
        rig.chain.write_compressed(bytes([index]) * SIZE, offset=index * SIZE)
    rig.chain.flush()
    owners = [rig.host(index * SIZE) // SIZE for index in range(20)]
    assert max(owners.count(owner) for owner in owners) == most
    assert rig.read(0, 20 * SIZE) == b"".join(bytes([index]) * SIZE for index in range(20))
    rig.assert_clean()


def test_the_cursor_is_dropped_when_its_host_cluster_is_freed() -> None:
    """Otherwise the last compressed cluster lands in one that was given to another guest cluster;
    qemu-img 7.2 destroys the data there."""
    rig = Rig(cluster_bits=16, size=4 * MiB)
    size = 64 * KiB
    rig.chain.write_compressed(b"a" * size, offset=0)
    rig.chain.discard(offset=0, length=size)
    rig.chain.flush()
    rig.chain.write(b"b" * size, offset=size)
    rig.chain.write_compressed(b"c" * size, offset=2 * size)
    rig.chain.flush()
    assert rig.read(size, 2 * size) == b"b" * size + b"c" * size
    rig.assert_clean()


def test_the_cursor_is_dropped_without_a_flush_too() -> None:
    rig = Rig(cluster_bits=16, size=4 * MiB)
    size = 64 * KiB
    rig.chain.write_compressed(b"a" * size, offset=0)
    rig.chain.discard(offset=0, length=size)
    rig.chain.write(b"b" * size, offset=size)
    rig.chain.write_compressed(b"c" * size, offset=2 * size)
    rig.chain.flush()
    assert rig.read(0, 3 * size) == bytes(size) + b"b" * size + b"c" * size
    rig.assert_clean()


@pytest.mark.pinned("bytes compressed by another image", "compression_type=zstd")
def test_a_decoded_cluster_is_forgotten_when_its_place_is_used_again() -> None:
    source = Rig()
    source.chain.write_compressed(b"a" * SIZE, offset=0)
    row = source.row(0)
    payload = source.memory.pread(row.stored, offset=row.host)
    rig = Rig(clusters={0: Compressed(payload=payload)})
    host = rig.host(0)
    assert rig.read(7, 2) == b"aa"
    rig.chain.discard(offset=0, length=SIZE)
    rig.chain.flush()
    # The first free cluster of the file.
    rig.chain.write_compressed(b"b" * SIZE, offset=SIZE)
    assert rig.host(SIZE) == host
    assert rig.read(SIZE + 7, 2) == b"bb"


def test_what_does_not_shrink_is_stored_plain() -> None:
    rig = Rig()
    rig.chain.write_compressed(noise(1), offset=0)
    assert rig.word(0) == rig.host(0) | COPIED
    assert rig.read(0, SIZE) == noise(1)


def test_a_compressed_entry_is_never_marked_as_copied_and_has_no_bitmap() -> None:
    """S001-22."""
    size = 16 * KiB
    for before in ([], [Zero()], [Zero(payload=None)]):
        clusters = dict(enumerate(before))
        rig = Rig(cluster_bits=14, extended_l2=True, clusters=clusters)
        rig.chain.write_compressed(b"a" * size, offset=0)
        assert rig.word(0) & (COMPRESSED | COPIED) == COMPRESSED
        assert rig.bitmap(0) == 0
        rig.chain.flush()
        rig.assert_clean()


def test_the_last_short_cluster_of_the_disk_is_padded_with_zeros() -> None:
    rig = Rig(size=3 * SIZE - 512)
    rig.chain.write_compressed(text(1, SIZE - 512), offset=2 * SIZE)
    assert rig.flags(2 * SIZE) & Flag.COMPRESSED
    assert rig.read(2 * SIZE, SIZE - 512) == text(1, SIZE - 512)
    rig.chain.resize(3 * SIZE)
    assert rig.read(3 * SIZE - 512, 512) == bytes(512)


def test_a_descriptor_counts_its_sectors_from_the_first_byte() -> None:
    rig = Rig()
    rig.chain.write_compressed(text(1) + text(2), offset=0)
    for index in range(2):
        host, stored = compressed_extent(rig.word(index), geometry=rig.state.geometry)
        assert (host + stored) % 512 == 0
        row = rig.row(index * SIZE)
        assert (row.host, row.stored) == (host, stored)


def test_a_table_shared_with_a_snapshot_is_copied_before() -> None:
    rig = Rig(clusters={0: noise(1)}, snapshots=[SnapshotSpec(id="1")])
    rig.chain.write_compressed(text(1), offset=5 * SIZE)
    rig.chain.flush()
    rig.assert_clean()
    assert rig.read(0, SIZE) == noise(1)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_both_kinds_of_compression_are_read_back(kind: str) -> None:
    rig = Rig(compression_type=int(kind == "zstd"))
    rig.chain.write_compressed(text(1), offset=0)
    rig.chain.flush()
    assert rig.read(0, SIZE) == text(1)
    rig.assert_clean()


# Refused, and nothing changed.


@pytest.mark.parametrize(
    ("spec", "length", "offset", "message"),
    [
        ({}, SIZE, 512, "compressed write of 4096 bytes at 0x200: only whole clusters of 4096"),
        ({}, 512, 0, "compressed write of 512 bytes at 0x0: only whole clusters of 4096 bytes"),
        ({"data_file_name": "data"}, SIZE, 0, "compressed clusters cannot lie in an external"),
        ({"clusters": {1: noise(1)}}, 3 * SIZE, 0, "the cluster at guest offset 0x1000 is alloc"),
        ({"clusters": {1: Zero(payload=noise(1))}}, SIZE, SIZE, "guest offset 0x1000 is alloc"),
    ],
)
def test_what_cannot_be_compressed_is_refused(
    spec: dict[str, Any], length: int, offset: int, message: str
) -> None:
    rig = Rig(**spec)
    before = rig.memory.to_bytes()
    with pytest.raises(RequestError, match=message):
        rig.chain.write_compressed(text(1, length), offset=offset)
    rig.chain.flush()
    assert rig.memory.to_bytes() == before


def test_a_compressed_cluster_is_not_compressed_again() -> None:
    rig = Rig()
    rig.chain.write_compressed(text(1), offset=0)
    with pytest.raises(RequestError, match="is allocated already"):
        rig.chain.write_compressed(text(2), offset=0)
    assert rig.read(0, SIZE) == text(1)


def test_a_reader_finds_a_new_entry_inside_of_the_file() -> None:
    """It takes no lock, and must not call an entry malformed that is a moment old."""
    rig = Rig()
    rig.chain.write(b"x", offset=9 * SIZE)
    refresh, seen = rig.state.refresh_rules, list[bytes]()

    def look_before() -> None:
        seen.append(rig.read(0, SIZE))
        refresh()

    rig.state.refresh_rules = look_before  # type: ignore[method-assign]
    rig.chain.write_compressed(text(1), offset=0)
    assert seen == [bytes(SIZE)]
    assert rig.read(0, SIZE) == text(1)
