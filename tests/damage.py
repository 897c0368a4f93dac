"""Images that are damaged in one way each, for tests of repair: small, with known content."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qcowkit.codecs.qcow2.snapshots import encode_snapshots
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import (
    BuiltImage,
    Cluster,
    Compressed,
    Data,
    SnapshotSpec,
    Zero,
    build_qcow2,
)
from qcowkit.units import KiB, MiB, align_up

COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET = 0xFF_FFFF_FFFF_FE00


def packed(content: bytes) -> Compressed:
    """A compressed cluster of any size up to 64 KiB that begins with `content`."""
    deflate = zlib.compressobj(wbits=-12)
    return Compressed(payload=deflate.compress(content.ljust(64 * KiB, b"\0")) + deflate.flush())


CLUSTERS: dict[int, Cluster] = {
    0: b"zero",
    1: b"one",
    2: Zero(payload=b"old"),
    3: packed(random.Random(3).randbytes(700)),
    4: packed(b"second" * 100),
    5: Zero(),
    9: b"nine",
}

EXTENDED_CLUSTERS: dict[int, Cluster] = {
    0: b"zero",
    1: Data(payload=b"one", bitmap=0xFF),
    2: Zero(payload=b"old"),
    3: Zero(),
    4: Data(payload=b"", bitmap=0),
    5: packed(b"five"),
}


def make(**changes: Any) -> BuiltImage:
    """A small disk with clusters of every kind, 512 bytes each."""
    return build_qcow2(**{"cluster_bits": 9, "size": 64 * KiB, "clusters": CLUSTERS, **changes})


def word_of(image: BuiltImage, index: int) -> int:
    """An entry of the first L2 table."""
    return int.from_bytes(image.data[_place(image, index) :][:8], "big")


def set_word(image: BuiltImage, index: int, word: int) -> None:
    """Replace it; of extended entries the first word."""
    image.patch(_place(image, index), word)


def flip(image: BuiltImage, index: int, bits: int) -> None:
    """Change bits of it."""
    set_word(image, index, word_of(image, index) ^ bits)


def _place(image: BuiltImage, index: int) -> int:
    return image.places["l2"] + index * image.header.geometry.l2_entry_size


def host_of(image: BuiltImage, index: int) -> int:
    """The host offset in an entry that is not compressed."""
    return word_of(image, index) & OFFSET


def get_count(image: BuiltImage, host: int) -> int:
    """The refcount of a cluster by its host offset; the blocks lie one behind the other."""
    bits = image.header.geometry.refcount_bits
    index = host >> image.header.cluster_bits
    place = image.places["refcount_block"] + index * bits // 8
    if bits >= 8:
        return int.from_bytes(image.data[place : place + bits // 8], "big")
    return image.data[place] >> index * bits % 8 & ((1 << bits) - 1)


def set_count(image: BuiltImage, host: int, count: int) -> None:
    """Replace it."""
    bits = image.header.geometry.refcount_bits
    index = host >> image.header.cluster_bits
    place = image.places["refcount_block"] + index * bits // 8
    if bits >= 8:
        image.patch(place, count, width=bits // 8)
        return
    shift = index * bits % 8
    mask = ((1 << bits) - 1) << shift
    image.data[place] = image.data[place] & ~mask | count << shift


def share(image: BuiltImage, first: int, second: int) -> None:
    """Two entries for one cluster, which is counted once: the other's cluster is lost."""
    set_word(image, second, word_of(image, first))


def end_of(image: BuiltImage) -> int:
    """Where the next cluster of the file would be."""
    return align_up(len(image.data), 1 << image.header.cluster_bits)


def table_entry(image: BuiltImage, index: int, word: int) -> None:
    """Replace an entry of the refcount table."""
    image.patch(image.places["refcount_table"] + index * 8, word)


def set_feature(image: BuiltImage, bits: int) -> None:
    """Set incompatible bits: 1 dirty, 2 corrupt."""
    image.set_field("incompatible_features", image.header.incompatible_features | bits)


def spoil_snapshots(image: BuiltImage, *, extra: int, count: int = 1) -> None:
    """Give the last snapshot that much extra data, in a new table at the end of the file. count:
    the refcount of its clusters; those of the old table are free."""
    snapshots = load_qcow2_metadata(MemoryStorage(image.to_bytes()), for_check=True).snapshots
    table, last = encode_snapshots(snapshots[:-1]), snapshots[-1]
    raw = bytearray(encode_snapshots([last]))
    names = len(last.id.encode()) + len(last.name.encode())
    raw[36:40] = struct.pack(">I", extra)
    more = bytes(raw[40 : 40 + min(24, extra)]).ljust(extra, b"\x77")
    entry = bytes(raw[:40]) + more + bytes(raw[64 : 64 + names])
    place = end_of(image)
    image.cut(place)
    image.data.extend(table + entry)
    image.cut(end_of(image))
    image.set_field("snapshots_offset", place)
    size = 1 << image.header.cluster_bits
    for host in range(place, len(image.data), size):
        set_count(image, host, count)
    for host in range(image.places["snapshots"], image.places["refcount_table"], size):
        set_count(image, host, 0)


def spoil_at_random(image: BuiltImage, noise: random.Random) -> None:
    """Counts, flags and words of tables: a little of each, at places that the noise chooses."""
    size, end = 1 << image.header.cluster_bits, len(image.data)
    most = min(image.header.geometry.refcount_max, 5)
    for _ in range(noise.choice([0, 3, 12])):
        set_count(image, noise.randrange(end // size) * size, noise.randint(0, most))
    for index in (0, 1, 2, 9):
        if host_of(image, index) and noise.random() < 0.3:
            flip(image, index, COPIED)
    if noise.random() < 0.3:
        share(image, 0, 1)
    if noise.random() < 0.3:
        word = noise.choice([0, 0x300, 1 << 45, host_of(image, 0)])
        table_entry(image, noise.randrange(3), word)
    for _ in range(noise.choice([0, 0, 1, 4])):
        _spoil_word(image, noise, end)
    if image.header.version == 3 and noise.random() < 0.3:
        set_feature(image, noise.randint(1, 3))
    if image.header.nb_snapshots and noise.random() < 0.3:
        spoil_snapshots(image, extra=noise.choice([3, 1500]))


def _spoil_word(image: BuiltImage, noise: random.Random, end: int) -> None:
    names = ("l1", "l2", "refcount_table", "refcount_block")
    place = image.places[noise.choice(names)] + noise.randrange(16) * 8
    value = noise.choice(
        [
            0,
            noise.randrange(end // 512) * 512,
            COPIED | noise.randrange(end // 512) * 512,
            noise.randrange(2 * end),
            1 << noise.randrange(64),
            noise.getrandbits(64),
        ]
    )
    image.patch(place, value)


Spoil = Callable[[BuiltImage], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """An image and what is done to it. kinds: the changes of a repair, by the names of ChangeKind.

    left: corruptions that no repair mends. leaks_mode: whether a repair of leaks may try."""

    spoil: Spoil
    kinds: frozenset[str]
    build: dict[str, Any] = field(default_factory=dict)
    left: int = 0
    leaks_mode: bool = True

    def make(self) -> BuiltImage:
        """The damaged image."""
        image = make(**self.build)
        self.spoil(image)
        return image


def _damage(
    spoil: Spoil, *kinds: str, left: int = 0, leaks_mode: bool = True, **build: Any
) -> Damage:
    return Damage(
        spoil=spoil, kinds=frozenset(kinds), left=left, leaks_mode=leaks_mode, build=build
    )


def _all(*steps: Spoil) -> Spoil:
    def spoil(image: BuiltImage) -> None:
        for step in steps:
            step(image)

    return spoil


def _leak(image: BuiltImage) -> None:
    set_count(image, host_of(image, 9), 2)
    flip(image, 9, COPIED)


def _lose_counts(image: BuiltImage) -> None:
    for index in (0, 1):
        set_count(image, host_of(image, index), 0)


def _take_for_table(image: BuiltImage) -> None:
    """The second L1 entry leads to the snapshot table."""
    table = int.from_bytes(image.data[64:72], "big")
    image.patch(image.places["l1"] + 8, table)
    set_count(image, table, 2)


SNAPSHOT = [SnapshotSpec(id="1", name="first")]
TWO = [SnapshotSpec(id="1"), SnapshotSpec(id="2", clusters={0: b"own", 7: b"other"})]
EXTENDED: dict[str, Any] = {
    "cluster_bits": 14,
    "extended_l2": True,
    "size": 4 * MiB,
    "clusters": EXTENDED_CLUSTERS,
}

DAMAGES: dict[str, Damage] = {
    "leak": _damage(lambda i: set_count(i, host_of(i, 0), 3), "LOWERED"),
    "leak with its flag": _damage(_leak, "LOWERED", "COPIED"),
    "leak beyond the end": _damage(lambda i: set_count(i, 230 * 512, 1), "LOWERED"),
    "count of zero": _damage(lambda i: set_count(i, host_of(i, 1), 0), "RAISED"),
    "shared": _damage(lambda i: share(i, 0, 1), "RAISED", "COPIED", "LOWERED"),
    "shared and a bad table": _damage(
        _all(lambda i: share(i, 0, 1), lambda i: table_entry(i, 1, 0x300)),
        "REBUILD",
        "COPIED",
        leaks_mode=False,
    ),
    "shared and dirty": _damage(
        _all(lambda i: share(i, 0, 1), lambda i: set_feature(i, 1)),
        "RAISED",
        "COPIED",
        "LOWERED",
        "BITS",
    ),
    "COPIED missing": _damage(lambda i: flip(i, 0, COPIED), "COPIED"),
    "COPIED wrong": _damage(lambda i: flip(i, 0, COPIED), "COPIED", snapshots=SNAPSHOT),
    "COPIED missing in L1": _damage(lambda i: i.patch(i.places["l1"], i.places["l2"]), "COPIED"),
    "COPIED on compressed": _damage(lambda i: flip(i, 3, COPIED), "ENTRY"),
    "reserved bits in L2": _damage(lambda i: flip(i, 0, 0x3F00_0000_0000_00A0), "ENTRY"),
    "reserved bits in L1": _damage(
        lambda i: i.patch(i.places["l1"], COPIED | i.places["l2"] | 0x101), "ENTRY"
    ),
    "reserved bits of a snapshot": _damage(
        lambda i: i.patch(_snapshot_l1(i), i.places["l2"] | 1), "ENTRY", snapshots=SNAPSHOT
    ),
    "preallocated zeros unaligned": _damage(
        lambda i: set_word(i, 2, COPIED | host_of(i, 2) + 0x200 | 1),
        "ENTRY",
        "LOWERED",
        cluster_bits=12,
    ),
    "preallocated zeros beyond the end": _damage(
        lambda i: set_word(i, 2, COPIED | 1 << 40 | 1), "ENTRY", "LOWERED"
    ),
    "bit 0 in an extended entry": _damage(lambda i: flip(i, 1, 1), "ENTRY", **EXTENDED),
    "reserved bits in an extended entry": _damage(
        lambda i: flip(i, 2, 1 << 60), "ENTRY", **EXTENDED
    ),
    "extended zeros unaligned": _damage(
        lambda i: flip(i, 2, 0x200), "ENTRY", "LOWERED", **EXTENDED
    ),
    "dirty": _damage(lambda i: set_feature(i, 1), "BITS"),
    "dirty and stale": _damage(
        _all(_lose_counts, _leak, lambda i: set_feature(i, 1)),
        "RAISED",
        "LOWERED",
        "COPIED",
        "BITS",
    ),
    "corrupt": _damage(lambda i: set_feature(i, 3), "BITS"),
    "unknown autoclear bits": _damage(
        _all(_leak, lambda i: i.set_field("autoclear_features", 0xF0)),
        "AUTOCLEAR",
        "LOWERED",
        "COPIED",
    ),
    "no refcount table": _damage(
        lambda i: i.set_field("refcount_table_clusters", 0), "REBUILD", leaks_mode=False
    ),
    "reserved bits in the refcount table": _damage(
        lambda i: table_entry(i, 0, i.places["refcount_block"] | 3), "REBUILD", leaks_mode=False
    ),
    "zeros unaligned and a bad table": _damage(
        _all(
            lambda i: set_word(i, 2, COPIED | host_of(i, 2) + 0x200 | 1),
            lambda i: table_entry(i, 1, 0x300),
        ),
        "REBUILD",
        "ENTRY",
        "LOWERED",
        cluster_bits=12,
        leaks_mode=False,
    ),
    "refcount block unaligned": _damage(
        lambda i: table_entry(i, 0, i.places["refcount_block"] + 0x100),
        "REBUILD",
        leaks_mode=False,
        cluster_bits=12,
    ),
    "refcount block beyond the end": _damage(
        lambda i: table_entry(i, 0, 1 << 50), "REBUILD", leaks_mode=False
    ),
    "refcount block missing": _damage(lambda i: table_entry(i, 0, 0), "REBUILD", leaks_mode=False),
    "refcount block twice": _damage(
        lambda i: table_entry(i, 1, i.places["refcount_block"]), "REBUILD", leaks_mode=False
    ),
    "refcount block is a data cluster": _damage(
        lambda i: table_entry(i, 0, host_of(i, 9)), "REBUILD", leaks_mode=False
    ),
    "snapshot with too much extra data": _damage(
        lambda i: spoil_snapshots(i, extra=1500), "SNAPSHOTS", "RAISED", "LOWERED", snapshots=TWO
    ),
    "snapshot with too little extra data": _damage(
        lambda i: spoil_snapshots(i, extra=8), "SNAPSHOTS", "RAISED", "LOWERED", snapshots=TWO
    ),
    "snapshot table that nobody counts": _damage(
        _all(lambda i: spoil_snapshots(i, extra=1500, count=0), lambda i: set_feature(i, 1)),
        "SNAPSHOTS",
        "RAISED",
        "BITS",
        snapshots=SNAPSHOT,
    ),
    "snapshot table that is an L2 table": _damage(
        _all(lambda i: spoil_snapshots(i, extra=8), _take_for_table),
        "SNAPSHOTS",
        "RAISED",
        "ENTRY",
        left=3,
        snapshots=SNAPSHOT,
    ),
    "snapshot table and refcounts": _damage(
        _all(lambda i: spoil_snapshots(i, extra=1500), lambda i: table_entry(i, 0, 0)),
        "SNAPSHOTS",
        "REBUILD",
        "LOWERED",
        snapshots=TWO,
        leaks_mode=False,
    ),
    "data unaligned": _damage(
        lambda i: set_word(i, 0, COPIED | host_of(i, 0) + 0x200), left=1, cluster_bits=12
    ),
    "data beyond the end": _damage(lambda i: set_word(i, 0, COPIED | 1 << 40), left=1),
    "L2 table unaligned": _damage(
        lambda i: i.patch(i.places["l1"], COPIED | i.places["l2"] + 0x200), left=1, cluster_bits=12
    ),
}


def _snapshot_l1(image: BuiltImage) -> int:
    metadata = load_qcow2_metadata(MemoryStorage(image.to_bytes()))
    return metadata.snapshots[0].l1_offset
