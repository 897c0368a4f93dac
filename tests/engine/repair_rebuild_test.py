"""New refcount structures and new snapshot tables: where they are put, and what they hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2 import header
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.engine.qcow2 import repair_snapshots
from qcowkit.engine.qcow2.repair_rebuild import plan_area
from qcowkit.errors import CorruptMetadata, OperationError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import (
    SnapshotSpec,
)
from qcowkit.units import KiB, MiB
from tests.damage import (
    COPIED,
    TWO,
    make,
    set_word,
    spoil_snapshots,
    table_entry,
)
from tests.qcow2_oracle import view_of, worsened
from tests.repairing import kinds, repair

SMALL_WINDOW = 256


class Device(MemoryStorage):
    """A block device: it never grows."""

    def __init__(self, data: bytes, *, size: int) -> None:
        super().__init__(data.ljust(size, b"\0"))
        self._caps = replace(self._caps, block_device=True)


def test_a_device_is_rebuilt_behind_its_last_cluster_in_use() -> None:
    image = make()
    table_entry(image, 0, 0)
    storage = Device(image.to_bytes(), size=64 * KiB)
    repaired, changes = repair(storage)
    assert kinds(changes) == {"REBUILD"}
    assert repaired.after.clean
    assert repaired.metadata.header.refcount_table_offset < 32 * KiB
    assert storage.size() == 64 * KiB


def test_a_device_without_room_is_left_as_it_is() -> None:
    image = make()
    table_entry(image, 0, 0)
    storage = Device(image.to_bytes(), size=len(image.data))
    with pytest.raises(OperationError, match=r"the device has no 2 clusters behind the last one"):
        repair(storage)
    assert storage.to_bytes() == image.to_bytes()


def test_a_device_with_lost_data_is_not_rebuilt() -> None:
    image = make()
    table_entry(image, 0, 0)
    set_word(image, 0, COPIED | 1 << 40)
    storage = Device(image.to_bytes(), size=64 * KiB)
    with pytest.raises(OperationError, match="free clusters of a device may hold their data"):
        repair(storage)


@pytest.mark.pinned("windows of one block", "refcount_bits=1")
def test_a_rebuild_of_many_blocks_counts_itself() -> None:
    clusters = {index: b"%d" % index for index in range(900)}
    image = make(size=MiB, clusters=clusters)
    image.set_field("refcount_table_clusters", 0)
    storage = MemoryStorage(image.to_bytes())
    repaired, _ = repair(storage, window_clusters=SMALL_WINDOW)
    assert repaired.after.clean
    assert worsened(view_of(image.to_bytes()), storage.to_bytes(), image.to_bytes()) == []


@given(
    st.lists(st.integers(0, 5000), max_size=20),
    st.integers(0, 100_000),
    st.integers(9, 12),
    st.integers(0, 6),
)
def test_an_area_counts_all_that_is_used_and_itself(
    used: list[int], first: int, bits: int, order: int
) -> None:
    geometry = Geometry(cluster_bits=bits, refcount_order=order)
    area = plan_area(np.unique(np.array(used, dtype=np.int64)), first=first, geometry=geometry)
    per_block = geometry.refcounts_per_block
    own = set(range(first // per_block, (first + area.clusters - 1) // per_block + 1))
    assert set(area.blocks.tolist()) == set(used) | own
    assert area.table_clusters * geometry.cluster_size // 8 > int(area.blocks[-1])
    if area.table_clusters > 1:
        shorter = (area.table_clusters - 1) * geometry.cluster_size // 8
        assert shorter <= int(area.blocks[-1])


# Snapshots


def test_more_snapshots_than_an_image_may_have_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = make(snapshots=[SnapshotSpec(id=str(number)) for number in range(6)])
    for module in (header, repair_snapshots):
        monkeypatch.setattr(module, "MAX_SNAPSHOTS", 4)
    storage = MemoryStorage(image.to_bytes())
    repaired, changes = repair(storage)
    assert repaired.after.clean
    assert [entry.id for entry in repaired.metadata.snapshots] == ["0", "1", "2", "3"]
    (told,) = (group for group in changes.groups if group.kind.name == "SNAPSHOTS")
    assert told.texts == (
        "6 snapshots in a table of at most 4 entries and 67108864 bytes: the last 2 are dropped",
    )


def test_a_table_that_would_be_too_long_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    image = make(snapshots=TWO)
    spoil_snapshots(image, extra=1500)
    monkeypatch.setattr(repair_snapshots, "MAX_SNAPSHOT_TABLE_BYTES", 100)
    storage = MemoryStorage(image.to_bytes())
    repaired, _ = repair(storage)
    assert [entry.id for entry in repaired.metadata.snapshots] == ["1"]
    assert repaired.after.clean


def test_extra_data_keep_their_first_kilobyte() -> None:
    image = make(snapshots=TWO)
    spoil_snapshots(image, extra=1500)
    repaired, _ = repair(MemoryStorage(image.to_bytes()))
    last = repaired.metadata.snapshots[-1]
    assert (last.id, last.disk_size) == ("2", 64 * KiB)
    assert last.unknown_extra == b"\x77" * 1000


def test_an_entry_that_nobody_can_mend_is_refused_as_by_a_check() -> None:
    image = make(snapshots=TWO)
    image.patch(image.places["snapshots"], 0x123)
    raw = image.to_bytes()
    storage = MemoryStorage(raw)
    with pytest.raises(CorruptMetadata, match="L1 table offset 0x123 is not a multiple of"):
        repair(storage)
    assert storage.to_bytes() == raw


def test_a_refused_rebuild_takes_the_new_snapshot_table_back() -> None:
    image = make(snapshots=TWO)
    spoil_snapshots(image, extra=1500)
    table_entry(image, 0, 0)
    # There is room for the snapshot table, and for nothing behind it.
    set_word(image, 0, COPIED | len(image.data) + 4 * 512)
    raw = image.to_bytes()
    storage = MemoryStorage(raw)
    with pytest.raises(OperationError, match="no room"):
        repair(storage)
    assert storage.to_bytes() == raw
