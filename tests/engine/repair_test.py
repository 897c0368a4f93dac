"""Repair of one qcow2 file: what it changes, what it leaves alone, what it refuses."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.engine.findings import Severity
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.engine.qcow2.repair import repair_for_writing
from qcowkit.engine.repairs import RepairMode
from qcowkit.errors import CorruptMetadata, OperationError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import (
    BitmapSpec,
    SnapshotSpec,
    Zero,
    make_luks_area,
)
from qcowkit.testing.recording import RecordingStorage
from qcowkit.units import KiB, MiB
from tests.damage import (
    COPIED,
    DAMAGES,
    EXTENDED,
    TWO,
    Damage,
    flip,
    get_count,
    host_of,
    make,
    set_count,
    set_feature,
    set_word,
    share,
    spoil_at_random,
    table_entry,
    word_of,
)
from tests.qcow2_oracle import view_of, worsened
from tests.repairing import corruptions, kinds, repair, repair_bytes

WRITES = ("pwrite", "zero", "discard", "allocate", "truncate", "flush")
SMALL_WINDOW = 256
# Nothing that shares a cluster, which narrow refcounts cannot count.
PLAIN = {0: b"zero", 1: b"one", 2: Zero(payload=b"old"), 5: Zero(), 9: b"nine"}

SOUND: dict[str, dict[str, Any]] = {
    "plain": {},
    "version 2": {"version": 2, "clusters": {0: b"a", 5: b"b"}},
    "extended": EXTENDED,
    "snapshots": {"snapshots": TWO},
    "bitmaps": {"bitmaps": [BitmapSpec(name="a", bits=b"\1"), BitmapSpec(name="b")]},
    "LUKS": {"luks": make_luks_area()},
    "data file": {"data_file_name": "disk.raw", "clusters": {0: b"a", 3: b"b"}},
}


@pytest.fixture(params=DAMAGES.values(), ids=DAMAGES)
def damage(request: pytest.FixtureRequest) -> Damage:
    found: Damage = request.param
    return found


# Every damage


@pytest.mark.pinned("writes counts of 16 bits", "refcount_bits=64")
def test_a_repair_changes_what_is_wrong_and_nothing_else(damage: Damage) -> None:
    repaired, changes = repair(MemoryStorage(damage.make().to_bytes()))
    assert kinds(changes) == damage.kinds
    assert len(corruptions(repaired)) == damage.left
    if not damage.left:
        assert repaired.after.clean
        assert repaired.metadata.header.incompatible_features & 3 == 0


def test_the_guest_reads_the_same_after_a_repair(damage: Damage) -> None:
    raw = damage.make().to_bytes()
    assert worsened(view_of(raw), repair_bytes(raw), raw) == []


def test_a_second_repair_finds_nothing_to_do(damage: Damage) -> None:
    once = repair_bytes(damage.make().to_bytes())
    storage = RecordingStorage(MemoryStorage(once))
    _, changes = repair(storage)
    assert not changes
    assert storage.of(*WRITES) == []


def test_small_windows_repair_as_one_does(damage: Damage) -> None:
    image = damage.make()
    window = max(SMALL_WINDOW, image.header.geometry.refcounts_per_block)
    raw = image.to_bytes()
    assert repair_bytes(raw, window_clusters=window) == repair_bytes(raw)


def test_a_repair_of_leaks_changes_no_content_and_raises_no_count(damage: Damage) -> None:
    raw = damage.make().to_bytes()
    storage = MemoryStorage(raw)
    if "SNAPSHOTS" in damage.kinds or not damage.leaks_mode:
        with pytest.raises((OperationError, CorruptMetadata)):
            repair(storage, RepairMode.LEAKS)
        assert storage.to_bytes() == raw
        return
    _, changes = repair(storage, RepairMode.LEAKS)
    assert kinds(changes) <= {"LOWERED", "COPIED", "BITS", "AUTOCLEAR"}
    assert worsened(view_of(raw), storage.to_bytes(), raw) == []


@pytest.mark.parametrize("changes", SOUND.values(), ids=SOUND)
@pytest.mark.parametrize("mode", RepairMode)
def test_nothing_is_written_to_a_sound_image(changes: dict[str, Any], mode: RepairMode) -> None:
    storage = RecordingStorage(MemoryStorage(make(**changes).to_bytes()))
    repaired, log = repair(storage, mode)
    assert repaired.after is repaired.before
    assert not log
    assert storage.of(*WRITES) == []


# Counts and flags


@pytest.mark.parametrize("order", range(7))
def test_counts_of_every_width_are_put_right(order: int) -> None:
    image = make(refcount_order=order, clusters=PLAIN)
    raw = image.to_bytes()
    noise = random.Random(order)
    most = min(image.header.geometry.refcount_max, 9)
    for host in range(0, len(image.data), 512):
        if noise.random() < 0.5:
            set_count(image, host, noise.randint(0, most))
    storage = MemoryStorage(image.to_bytes())
    repaired, _ = repair(storage)
    assert repaired.after.clean
    assert storage.to_bytes() == raw


def test_a_count_above_all_that_is_counted_is_lowered() -> None:
    image = make(refcount_order=6)
    raw = image.to_bytes()
    set_count(image, host_of(image, 0), 1 << 63)
    assert repair_bytes(image.to_bytes()) == raw


def test_a_count_that_is_too_narrow_stays_and_so_does_its_flag() -> None:
    image = make(refcount_order=0, clusters=PLAIN)
    share(image, 0, 1)
    storage = MemoryStorage(image.to_bytes())
    repaired, changes = repair(storage)
    assert kinds(changes) == {"LOWERED"}
    host = host_of(image, 0)
    assert corruptions(repaired) == [
        f"cluster at host offset {host:#x}: refcount is 1, expected 2 from its references"
    ]
    assert not repair(storage)[1]


def test_a_repair_of_leaks_sets_the_flag_of_a_cluster_that_is_shared_no_more() -> None:
    image = make()
    raw = image.to_bytes()
    set_count(image, host_of(image, 0), 2)
    flip(image, 0, COPIED)
    assert repair_bytes(image.to_bytes(), RepairMode.LEAKS) == raw


def test_a_repair_of_leaks_leaves_low_counts_alone() -> None:
    image = make()
    set_count(image, host_of(image, 0), 0)
    set_count(image, host_of(image, 9), 3)
    storage = MemoryStorage(image.to_bytes())
    repaired, changes = repair(storage, RepairMode.LEAKS)
    assert kinds(changes) == {"LOWERED"}
    assert len(corruptions(repaired)) == 2


def test_flags_of_an_external_data_file_say_that_clusters_are_there() -> None:
    image = make(data_file_name="disk.raw", clusters={0: b"a", 3: b"b", 4: b"c"})
    raw = image.to_bytes()
    flip(image, 3, COPIED)
    storage = MemoryStorage(image.to_bytes())
    repaired, changes = repair(storage)
    assert kinds(changes) == {"COPIED"}
    assert repaired.after.clean
    assert storage.to_bytes() == raw


def test_a_cluster_of_a_data_file_that_lies_elsewhere_is_left_alone() -> None:
    image = make(data_file_name="disk.raw", clusters={0: b"a", 3: b"b"})
    set_word(image, 3, 0x4000)
    raw = image.to_bytes()
    assert repair_bytes(raw) == raw


def test_tables_that_are_data_as_well_are_not_written() -> None:
    # Entry 9 leads to the L2 table itself: a flag changed there would change the guest's data.
    image = make()
    set_word(image, 9, image.places["l2"])
    flip(image, 0, COPIED)
    raw = image.to_bytes()
    storage = MemoryStorage(raw)
    repaired, _ = repair(storage)
    assert any("2 other" in one or "1 other" in one for one in corruptions(repaired))
    place = image.places["l2"]
    assert storage.to_bytes()[place : place + 512] == raw[place : place + 512]


def test_the_count_of_a_table_that_is_data_as_well_keeps_writers_from_both() -> None:
    image = make()
    set_word(image, 9, image.places["l2"])
    storage = MemoryStorage(image.to_bytes())
    repair(storage)
    after = storage.to_bytes()
    l1 = int.from_bytes(after[image.places["l1"] :][:8], "big")
    assert l1 == image.places["l2"]
    assert view_of(after).counts[image.places["l2"] >> 9] == 2


# What leads nowhere


def test_leaks_are_kept_while_entries_lead_nowhere() -> None:
    image = make(cluster_bits=12)
    host = host_of(image, 0)
    set_word(image, 0, COPIED | host + 0x200)
    raw = image.to_bytes()
    for mode in RepairMode:
        storage = MemoryStorage(raw)
        repaired, changes = repair(storage, mode)
        assert not changes
        assert repaired.after.log.count(Severity.LEAK) == 1
        assert storage.to_bytes() == raw


def test_a_rebuild_keeps_the_whole_file_while_entries_lead_nowhere() -> None:
    image = make(cluster_bits=12)
    lost = host_of(image, 0)
    set_word(image, 0, COPIED | lost + 0x200)
    table_entry(image, 0, 0)
    storage = MemoryStorage(image.to_bytes())
    repaired, changes = repair(storage)
    assert kinds(changes) == {"REBUILD"}
    assert view_of(storage.to_bytes()).counts[lost >> 12] == 1
    assert len(corruptions(repaired)) == 1


def test_a_file_does_not_grow_over_a_place_that_an_entry_leads_to() -> None:
    image = make()
    set_word(image, 0, COPIED | len(image.data) + 512)
    table_entry(image, 0, 0)
    raw = image.to_bytes()
    storage = MemoryStorage(raw)
    with pytest.raises(
        OperationError,
        match=r"the repair has no room for new tables: the file would grow over host offset "
        rf"{len(raw) + 512:#x}, where something is missing\Z",
    ):
        repair(storage)
    assert storage.to_bytes() == raw


def test_a_file_does_not_grow_over_the_missing_end_of_a_table() -> None:
    image = make(size=8 * MiB, clusters={0: b"x"})
    # The L1 table of 1 KiB moves to the end of the file, which ends inside of its last cluster.
    place = len(image.data)
    image.data.extend(image.data[image.places["l1"] :][:2048])
    image.set_field("l1_table_offset", place).cut(place + 1900)
    image.set_field("refcount_table_clusters", 0)
    raw = image.to_bytes()
    storage = MemoryStorage(raw)
    with pytest.raises(OperationError, match="has no room for new tables"):
        repair(storage)
    assert storage.to_bytes() == raw


# Before writing


def test_an_image_that_is_not_dirty_is_not_looked_at() -> None:
    storage = RecordingStorage(MemoryStorage(make().to_bytes()))
    metadata = load_qcow2_metadata(storage)
    storage.calls.clear()
    assert repair_for_writing(storage, metadata) is metadata
    assert storage.calls == []


def test_a_dirty_image_is_sound_before_it_is_written() -> None:
    image = make()
    raw = image.to_bytes()
    set_count(image, host_of(image, 0), 0)
    set_count(image, host_of(image, 9), 7)
    set_feature(image, 1)
    storage = MemoryStorage(image.to_bytes())
    metadata = repair_for_writing(storage, load_qcow2_metadata(storage))
    assert not metadata.dirty
    assert storage.to_bytes() == raw


def test_a_dirty_image_that_stays_corrupt_is_not_written() -> None:
    image = make(cluster_bits=12)
    set_word(image, 0, COPIED | host_of(image, 0) + 0x200)
    set_feature(image, 1)
    raw = image.to_bytes()
    storage = MemoryStorage(raw)
    with pytest.raises(
        CorruptMetadata,
        match=r"image: the dirty bit is set, and a repair leaves 1 faults, expected none before "
        r"writing; the first: L2 table at host offset 0x2000, entry 0: data cluster offset",
    ):
        repair_for_writing(storage, load_qcow2_metadata(storage))
    assert storage.to_bytes() == raw


def test_bits_stay_while_something_is_left_to_warn_of() -> None:
    image = make(cluster_bits=12)
    set_word(image, 0, COPIED | host_of(image, 0) + 0x200)
    set_count(image, host_of(image, 1), 0)
    set_feature(image, 3)
    storage = MemoryStorage(image.to_bytes())
    repaired, changes = repair(storage)
    assert kinds(changes) == {"RAISED"}
    assert repaired.metadata.dirty
    assert repaired.metadata.corrupt


# Random damage

FUZZED: dict[str, dict[str, Any]] = {
    "plain": {},
    "version 2": {"version": 2, "clusters": {0: b"a", 5: b"b", 64: b"c"}},
    "snapshots": {"snapshots": TWO, "size": 128 * KiB},
    "extended": EXTENDED,
    "narrow": {"refcount_order": 1, "snapshots": [SnapshotSpec(id="1")], "clusters": PLAIN},
}


@given(st.sampled_from(list(FUZZED)), st.randoms(use_true_random=False))
def test_random_counts_and_flags_are_put_right(name: str, noise: random.Random) -> None:
    image = make(**FUZZED[name])
    raw = image.to_bytes()
    size = 1 << image.header.cluster_bits
    most = min(image.header.geometry.refcount_max, 5)
    for _ in range(noise.randint(1, 12)):
        set_count(image, noise.randrange(len(raw) // size) * size, noise.randint(0, most))
    used = [index for index in range(10) if word_of(image, index)]
    for index in noise.sample(used, noise.randint(0, len(used))):
        flip(image, index, COPIED if host_of(image, index) else 0)
    if noise.random() < 0.3:
        flip(image, used[0], 1 << noise.randint(56, 61))
    storage = MemoryStorage(image.to_bytes())
    repaired, _ = repair(storage)
    assert repaired.after.clean
    assert storage.to_bytes() == raw
    assert get_count(image, 0) >= 0


def assert_no_readable_data_are_lost(name: str, noise: random.Random) -> None:
    image = make(**FUZZED[name])
    spoil_at_random(image, noise)
    raw = image.to_bytes()
    storage = MemoryStorage(raw)
    mode = noise.choice(list(RepairMode))
    try:
        repaired, _ = repair(storage, mode)
    except (OperationError, CorruptMetadata):
        assert storage.to_bytes() == raw
        return
    after = storage.to_bytes()
    assert worsened(view_of(raw), after, raw) == []
    assert repaired.after.log.count(Severity.ERROR) == 0
    assert not repair(storage, mode)[1]
    assert storage.to_bytes() == after


@given(st.sampled_from(list(FUZZED)), st.randoms(use_true_random=False))
def test_random_damage_never_costs_readable_data(name: str, noise: random.Random) -> None:
    assert_no_readable_data_are_lost(name, noise)


@pytest.mark.soak
@pytest.mark.parametrize("name", list(FUZZED))
def test_a_lot_of_random_damage_never_costs_readable_data(name: str) -> None:
    for seed in range(10_000):
        assert_no_readable_data_are_lost(name, random.Random(seed))
