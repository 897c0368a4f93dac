"""Options changed in place: the disk, its snapshots and a clean check stay, whatever is changed."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.engine.qcow2.amend_plan import Amendment
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.errors import (
    CorruptMetadata,
    QcowkitError,
    RequestError,
    StorageError,
    UnsupportedFeature,
)
from qcowkit.image.lineage import Layer
from qcowkit.image.metadata import RawMetadata
from qcowkit.operations.amend import AmendOptions, amend_image
from qcowkit.operations.check import Verdict
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.device import MemoryDevice
from qcowkit.testing.qcow2_builder import BitmapSpec, SnapshotSpec, Zero, build_qcow2
from qcowkit.units import KiB, MiB
from tests.amending import Disk, make_disk

pytestmark = pytest.mark.pinned("its kinds of images are its own")

KINDS: dict[str, dict[str, Any]] = {
    "clusters of 512 bytes": {"cluster_bits": 9, "packed": True},
    "clusters of 64 KiB": {"cluster_bits": 16, "size": MiB, "packed": True},
    "over a longer base": {"cluster_bits": 12, "base": 400 * KiB, "packed": True},
    "over a shorter base": {"cluster_bits": 14, "base": 100 * KiB},
    "with snapshots": {"cluster_bits": 12, "snapshots": 2, "packed": True},
    "with snapshots over a base": {"cluster_bits": 14, "snapshots": 2, "base": 200 * KiB},
    "subclusters": {"cluster_bits": 14, "extended_l2": True, "packed": True},
    "subclusters over a base": {"cluster_bits": 15, "extended_l2": True, "base": 300 * KiB},
    "subclusters with snapshots": {"cluster_bits": 14, "extended_l2": True, "snapshots": 2},
    "version 2": {"cluster_bits": 12, "version": 2, "snapshots": 1},
    "version 2 over a base": {"cluster_bits": 14, "version": 2, "base": 100 * KiB},
    "data file": {"cluster_bits": 14, "data_file": True},
    "data file over a base": {"cluster_bits": 12, "data_file": True, "base": 200 * KiB},
    "data file with subclusters": {"cluster_bits": 14, "data_file": True, "extended_l2": True},
    "zstd": {"cluster_bits": 14, "compression_type": 1, "packed": True, "snapshots": 1},
    "wide refcounts": {"cluster_bits": 12, "refcount_order": 6},
    "narrow refcounts": {"cluster_bits": 12, "refcount_order": 0, "packed": True},
}
OPTIONS: list[dict[str, Any]] = [
    {"refcount_bits": 1},
    {"refcount_bits": 4},
    {"refcount_bits": 64},
    {"lazy_refcounts": True},
    {"compat": "0.10"},
    {"compat": "1.1"},
    {"extended_l2": True},
    {"extended_l2": False},
    {"compression_type": "zlib"},
    {"compression_type": "zstd"},
    {"cluster_size": 512},
    {"cluster_size": 16 * KiB},
    {"cluster_size": 64 * KiB},
    {"cluster_size": 2 * MiB},
    {"cluster_size": 128 * KiB, "extended_l2": True},
    {"cluster_size": 4 * KiB, "extended_l2": False, "refcount_bits": 32},
    {"compat": "0.10", "extended_l2": False, "refcount_bits": 16, "compression_type": "zlib"},
    {"size": 3 * MiB, "compat": "1.1", "lazy_refcounts": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_option_changes_and_the_disk_does_not(kind: str, options: dict[str, Any]) -> None:
    disk = make_disk(**KINDS[kind])
    before, raw = disk.view(), disk.storage.pread(disk.storage.size(), offset=0)
    try:
        disk.amend(**options)
    except RequestError:
        # Whatever is refused leaves every byte as it was.
        assert disk.storage.pread(disk.storage.size(), offset=0) == raw
        return
    grown = max(0, options.get("size", 0) - len(before[""]))
    assert disk.view() == before | {"": before[""] + bytes(grown)}
    assert disk.check().verdict is Verdict.CLEAN
    assert_said(disk, options)
    # What comes next finds everything where the tables say.
    disk.scribble(77)
    assert disk.check().verdict is Verdict.CLEAN
    later = disk.view()
    assert {name: later[name] for name in before if name} == {
        name: data for name, data in before.items() if name
    }


def assert_said(disk: Disk, options: dict[str, Any]) -> None:
    metadata = load_qcow2_metadata(disk.storage)
    geometry = metadata.geometry
    found = {
        "refcount_bits": geometry.refcount_bits,
        "lazy_refcounts": metadata.lazy_refcounts,
        "compat": {2: "0.10", 3: "1.1"}[metadata.header.version],
        "extended_l2": geometry.extended_l2,
        "compression_type": metadata.compression_type,
        "cluster_size": geometry.cluster_size,
        "size": metadata.virtual_size,
    }
    assert {key: found[key] for key in options} == options


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(400))
def test_any_options_change_any_disk(seed: int) -> None:
    rng = random.Random(seed)
    kind = rng.choice(list(KINDS))
    options = {key: value for one in rng.sample(OPTIONS, 2) for key, value in one.items()}
    disk = make_disk(**{**KINDS[kind], "seed": seed})
    before = disk.view()
    try:
        disk.amend(**options)
    except RequestError:
        assert disk.view() == before
    found = disk.view()
    assert found | {"": found[""][: len(before[""])]} == before
    assert disk.check().verdict is Verdict.CLEAN


# What stays where it is


def test_smaller_clusters_leave_data_in_place() -> None:
    disk = make_disk(cluster_bits=16, size=MiB)
    before = disk.open().extents()
    disk.amend(cluster_size=4 * KiB)
    after = disk.open().extents()
    places = {int(start): int(host) for start, host in zip(before.start, before.host, strict=True)}
    moved = [
        start
        for start, host in zip(after.start.tolist(), after.host.tolist(), strict=True)
        if host >= 0 and start in places and places[start] != host
    ]
    assert moved == []


def test_subclusters_move_no_data_when_they_are_switched_on() -> None:
    disk = make_disk(cluster_bits=16, size=MiB)
    before = disk.open().extents().host.tolist()
    disk.amend(extended_l2=True)
    assert disk.open().extents().host.tolist() == before


@pytest.mark.parametrize(
    "options", [{"refcount_bits": 64}, {"cluster_size": 4 * KiB}, {"extended_l2": True}], ids=str
)
def test_an_image_on_a_device_is_amended_behind_what_is_used(options: dict[str, Any]) -> None:
    made = make_disk(cluster_bits=14)
    raw = made.storage.pread(made.storage.size(), offset=0)
    disk = Disk(storage=MemoryDevice(raw, size=4 * MiB))
    before = disk.view()
    disk.amend(**options)
    assert disk.view() == before
    assert disk.check().verdict is Verdict.CLEAN


def test_a_full_device_has_no_room_for_new_tables() -> None:
    made = make_disk(cluster_bits=14)
    raw = made.storage.pread(made.storage.size(), offset=0)
    disk = Disk(storage=MemoryDevice(raw, size=len(raw)))
    before = disk.view()
    with pytest.raises(StorageError, match="No space left on device"):
        disk.amend(cluster_size=4 * KiB)
    assert disk.view() == before
    assert disk.check().verdict is Verdict.CLEAN


def test_zero_clusters_become_nothing_in_version_2_without_a_base() -> None:
    spec = build_qcow2(clusters={0: Zero(), 1: Zero(payload=b"x"), 2: b"data"})
    disk = Disk(storage=MemoryStorage(spec.to_bytes()))
    before = disk.view()
    disk.amend(compat="0.10")
    assert disk.view() == before
    assert disk.check().allocated_clusters == 1


def test_zero_clusters_hide_the_base_in_version_2() -> None:
    spec = build_qcow2(
        clusters={0: Zero(), 2: b"data"}, backing_name="base.raw", backing_format="raw"
    )
    disk = Disk(storage=MemoryStorage(spec.to_bytes()), base=b"\xff" * MiB)
    before = disk.view()
    disk.amend(compat="0.10")
    assert disk.view() == before
    assert disk.check().allocated_clusters == 2


def test_what_is_said_already_is_not_written_again() -> None:
    disk = make_disk(cluster_bits=12)
    raw = disk.storage.pread(disk.storage.size(), offset=0)
    done = disk.amend(refcount_bits=16, compat="1.1", extended_l2=False, cluster_size=4 * KiB)
    assert done.render() == "nothing to change"
    assert disk.storage.pread(disk.storage.size(), offset=0) == raw


def test_the_steps_are_told_in_their_order() -> None:
    disk = make_disk(cluster_bits=12, version=2)
    done = disk.amend(compat="1.1", lazy_refcounts=True, refcount_bits=32, size=MiB)
    assert done.changes == (
        "compat=1.1",
        "refcount_bits=32",
        "lazy_refcounts=on",
        f"size={MiB}",
    )


def test_lazy_refcounts_bring_the_record_that_new_images_have() -> None:
    disk = make_disk(cluster_bits=16)
    disk.amend(lazy_refcounts=True)
    assert load_qcow2_metadata(disk.storage).extensions.dirty_tables is not None
    assert disk.check().verdict is Verdict.CLEAN
    disk.scribble(3)
    assert disk.check().verdict is Verdict.CLEAN


def test_a_data_file_gets_another_name() -> None:
    disk = make_disk(cluster_bits=16, data_file=True)
    assert disk.amend(data_file="other.raw").changes == ("data_file=other.raw",)
    assert load_qcow2_metadata(disk.storage).extensions.data_file == "other.raw"


def test_a_data_file_need_not_be_a_raw_disk_any_more() -> None:
    built = build_qcow2(data_file_name="data.raw", data_file_raw=True)
    disk = Disk(storage=MemoryStorage(built.to_bytes()), data=MemoryStorage(bytes(MiB)))
    assert disk.amend(data_file_raw=False).changes == ("data_file_raw=off",)
    assert not load_qcow2_metadata(disk.storage).data_file_raw


def test_a_snapshot_table_of_old_becomes_one_of_version_3() -> None:
    spec = build_qcow2(version=2, snapshots=[SnapshotSpec(id="1", name="old")])
    storage = MemoryStorage(spec.to_bytes())
    place = spec.places["snapshots"]
    entry = bytearray(storage.pread(40, offset=place))
    names = storage.pread(4, offset=place + 40 + 24)
    entry[36:40] = bytes(4)
    storage.pwrite([(bytes(entry) + names).ljust(72, b"\0")], offset=place)
    disk = Disk(storage=storage)
    assert [one.name for one in load_qcow2_metadata(storage).snapshots] == ["old"]
    disk.amend(compat="1.1")
    assert [one.name for one in load_qcow2_metadata(storage).snapshots] == ["old"]
    assert disk.check().verdict is Verdict.CLEAN


def test_names_come_closer_to_the_header_of_small_clusters() -> None:
    disk = make_disk(cluster_bits=16, size=MiB, base=100 * KiB)
    # With the names of features and a name behind them the first cluster uses more than a sector.
    metadata = load_qcow2_metadata(disk.storage)
    assert metadata.header.backing_file_offset >= 512
    before = disk.view()
    disk.amend(cluster_size=512)
    assert disk.view() == before
    assert load_qcow2_metadata(disk.storage).backing_name == "base.raw"
    assert disk.check().verdict is Verdict.CLEAN


def test_names_that_are_too_long_for_small_clusters_are_refused() -> None:
    built = build_qcow2(cluster_bits=16, backing_name="n" * 600, backing_format="raw")
    disk = Disk(storage=MemoryStorage(built.to_bytes()), base=bytes(512))
    with pytest.raises(RequestError, match="has no room in clusters of 512 bytes"):
        disk.amend(cluster_size=512)
    assert disk.storage.pread(disk.storage.size(), offset=0) == built.to_bytes()


def test_bitmaps_stay_with_the_disk() -> None:
    bitmap = BitmapSpec(name="b", bits=b"\xff" * 4)
    built = build_qcow2(cluster_bits=14, bitmaps=[bitmap], clusters={0: b"x", 3: Zero()})
    disk = Disk(storage=MemoryStorage(built.to_bytes()))
    before = load_qcow2_metadata(disk.storage).bitmaps
    disk.amend(extended_l2=True, compression_type="zstd", refcount_bits=32)
    assert load_qcow2_metadata(disk.storage).bitmaps == before
    assert disk.check().verdict is Verdict.CLEAN
    with pytest.raises(RequestError, match="persistent bitmaps, which are made of clusters"):
        disk.amend(cluster_size=32 * KiB)
    with pytest.raises(RequestError, match=r"compat=0\.10 excludes .*persistent bitmaps"):
        disk.amend(compat="0.10")


def with_machine_state() -> Disk:
    """A disk of 1 MiB whose snapshot has a machine state behind it, one cluster of it zero."""
    behind = (1 << 14) // 8
    snapshot = SnapshotSpec(
        id="1",
        name="vm",
        vm_state_size=20000,
        disk_size=64 * MiB,
        clusters={0: b"then", 2: Zero(), behind: b"state", behind + 1: Zero()},
    )
    built = build_qcow2(cluster_bits=14, size=64 * MiB, clusters={0: b"now"}, snapshots=[snapshot])
    # It was built with a table for both, and is a smaller disk.
    place = built.places["snapshots"] + 48
    built.data[24:32] = built.data[place : place + 8] = MiB.to_bytes(8, "big")
    return Disk(storage=MemoryStorage(built.to_bytes()))


def machine_state(disk: Disk) -> bytes:
    """The first bytes of it, by way of the tables."""
    metadata = load_qcow2_metadata(disk.storage)
    (entry,) = metadata.snapshots
    mask = 0x00FF_FFFF_FFFF_FE00
    place = entry.l1_offset + 8 * metadata.geometry.l1_entries(entry.disk_size)
    for _ in range(2):
        place = int.from_bytes(disk.storage.pread(8, offset=place), "big") & mask
    return disk.storage.pread(5, offset=place)


@pytest.mark.parametrize(
    "options",
    [
        {"compat": "0.10"},
        {"refcount_bits": 64},
        {"extended_l2": True},
        {"cluster_size": 4 * KiB},
        {"cluster_size": 512},
    ],
    ids=str,
)
def test_a_machine_state_stays_behind_its_snapshot(options: dict[str, Any]) -> None:
    disk = with_machine_state()
    before = disk.view()
    disk.amend(**options)
    assert disk.view() == before
    assert machine_state(disk) == b"state"
    assert disk.check().verdict is Verdict.CLEAN


def test_a_machine_state_does_not_move() -> None:
    disk = with_machine_state()
    raw = disk.storage.pread(disk.storage.size(), offset=0)
    with pytest.raises(RequestError, match="holds the state of a machine, which would have to"):
        disk.amend(cluster_size=64 * KiB)
    assert disk.storage.pread(disk.storage.size(), offset=0) == raw


# What is refused

REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"refcount_order": 5},
        {"compat": "0.10"},
        "compat=0.10 excludes refcount_bits=32, which has to be 16",
    ),
    ({"cluster_bits": 14, "extended_l2": True}, {"compat": "0.10"}, "excludes extended_l2=on"),
    ({"data_file": True}, {"compat": "0.10"}, "excludes an external data file"),
    ({"version": 2}, {"lazy_refcounts": True}, "compat=0.10 excludes lazy_refcounts=on"),
    ({"version": 2}, {"compression_type": "zstd"}, "compat=0.10 excludes compression_type=zstd"),
    (
        {"cluster_bits": 14, "compression_type": 1, "packed": True, "count": 30},
        {"compat": "0.10"},
        "excludes compression_type=zstd, and the image has such clusters",
    ),
    ({"cluster_bits": 12}, {"extended_l2": True}, "needs clusters of 16384 bytes at least"),
    ({}, {"data_file": "x"}, "data_file names another file"),
    ({"data_file": True}, {"data_file_raw": True}, "data_file_raw=on is possible when"),
    ({}, {"refcount_bits": 3}, "refcount_bits is 3, expected a power of two, at most 64"),
    ({}, {"cluster_size": 1000}, "cluster_size is 1000, expected a power of two from 512 to"),
    ({}, {"compat": "1.2"}, "compat is '1.2', expected 0.10 or 1.1"),
    ({}, {"compression_type": "lz4"}, "compression_type is 'lz4', expected zlib or zstd"),
    ({}, {"size": 4096}, "size is 4096, below the disk's 262144"),
    (
        {"snapshots": 2, "refcount_order": 3},
        {"refcount_bits": 1},
        "refcounts of 1 bits end at 1",
    ),
    ({"data_file": True}, {"data_file": ""}, "data_file is empty"),
]


@pytest.mark.parametrize(("kind", "options", "reason"), REFUSED, ids=str)
def test_what_cannot_be_is_refused_by_name(
    kind: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    disk = make_disk(**kind)
    raw = disk.storage.pread(disk.storage.size(), offset=0)
    with pytest.raises(RequestError) as caught:
        disk.amend(**options)
    assert reason in str(caught.value)
    assert disk.storage.pread(disk.storage.size(), offset=0) == raw


def test_version_2_keeps_no_snapshot_of_another_size() -> None:
    disk = make_disk(snapshots=1)
    disk.amend(size=MiB)
    with pytest.raises(RequestError, match=r"snapshot 1 \('s0'\), whose disk has 262144 bytes"):
        disk.amend(compat="0.10")


def test_version_2_keeps_no_large_machine_state() -> None:
    spec = build_qcow2(snapshots=[SnapshotSpec(id="1", name="big", vm_state_size=1 << 33)])
    disk = Disk(storage=MemoryStorage(spec.to_bytes()))
    with pytest.raises(RequestError, match="whose machine state has 8589934592 bytes"):
        disk.amend(compat="0.10")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (AmendOptions(backing_file="other.raw"), "backing_file cannot be amended: rebase"),
        (AmendOptions(backing_fmt="qcow2"), "backing_fmt cannot be amended: rebase"),
    ],
)
def test_the_backing_file_is_changed_by_rebase(options: AmendOptions, reason: str) -> None:
    disk = make_disk(base=4096)
    with pytest.raises(RequestError, match=reason):
        amend_image(disk.layers(), options, budget=TRUSTED)
    same = AmendOptions(backing_file="base.raw", backing_fmt="raw")
    assert amend_image(disk.layers(), same, budget=TRUSTED).changes == ()


def test_other_formats_have_no_options() -> None:
    layer = Layer(storage=MemoryStorage(bytes(512)), metadata=RawMetadata(virtual_size=512))
    with pytest.raises(UnsupportedFeature, match="raw images have no options"):
        amend_image([layer], AmendOptions(amendment=Amendment()), budget=TRUSTED)


def test_a_corrupt_image_is_repaired_first() -> None:
    disk = make_disk()
    disk.storage.pwrite([(2).to_bytes(8, "big")], offset=72)
    with pytest.raises(CorruptMetadata, match="has to be repaired"):
        disk.amend(refcount_bits=32)


def test_a_broken_table_ends_it_with_the_image_as_it_was() -> None:
    built = build_qcow2(clusters={0: b"data"})
    built.data[built.places["l2"] + 7] |= 0x1E
    disk = Disk(storage=MemoryStorage(built.to_bytes()))
    with pytest.raises(QcowkitError, match=r"L2 table at host offset 0x[0-9a-f]+, entry 0"):
        disk.amend(cluster_size=64 * KiB)
    assert disk.storage.pread(disk.storage.size(), offset=0) == built.to_bytes()
