"""What an adversary has found in the changes of whole images: commit, amend, compact, capsules."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcowkit.codecs.qcow2.header import FIELD_OFFSETS
from qcowkit.codecs.qcow2.snapshots import SnapshotEntry, encode_snapshots
from qcowkit.engine import findings
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.engine.qcow2.refcount_store import RefcountStore
from qcowkit.errors import OperationError
from qcowkit.operations.bitmap import list_bitmaps
from qcowkit.operations.capsule import make_capsule
from qcowkit.operations.check import Verdict
from qcowkit.operations.compact import compact_image
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.device import MemoryDevice
from qcowkit.testing.qcow2_builder import BitmapSpec, build_qcow2
from qcowkit.units import KiB, MiB, align_up
from tests.amending import Disk, make_disk

pytestmark = pytest.mark.pinned("its kinds of images are its own")

SECRET = b"of the guest, 16"


def test_a_first_cluster_that_has_grown_holds_nothing_of_the_guest() -> None:
    disk = Disk(storage=MemoryStorage(build_qcow2(size=4 * MiB, cluster_bits=12).to_bytes()))
    chain = disk.open(writable=True)
    chain.write(SECRET * (64 * KiB), offset=0)
    chain.images[0].disk.close()  # type: ignore[attr-defined]
    disk.amend(cluster_size=64 * KiB)
    assert SECRET not in disk.storage.pread(64 * KiB, offset=0)
    assert disk.check().verdict is Verdict.CLEAN


def test_a_capsule_has_nothing_of_what_lay_where_tables_are_now(tmp_path: Path) -> None:
    bitmaps = [BitmapSpec(name="b")]
    built = build_qcow2(size=4 * MiB, cluster_bits=16, bitmaps=bitmaps)
    disk = Disk(storage=MemoryStorage(built.to_bytes()))
    disk.snapshot("s")
    found = load_qcow2_metadata(disk.storage)
    header, directory = found.header, found.extensions.bitmaps
    assert directory is not None
    places = (0, header.l1_table_offset, header.snapshots_offset, found.snapshots[0].l1_offset)
    for place in (*places, directory.directory_offset, found.bitmaps[0].table_offset):
        # As left by a writer that does not clear what it allocates.
        disk.storage.pwrite([SECRET], offset=place + 60 * KiB)
    make_capsule(disk.layers()[0], tmp_path / "disk.capsule")
    assert SECRET not in (tmp_path / "disk.capsule").read_bytes()


@pytest.mark.parametrize("kind", [{}, {"packed": True, "snapshots": 1}])
def test_an_image_on_a_device_is_compacted_once(kind: dict[str, Any]) -> None:
    disk = make_disk(cluster_bits=12, count=40, **kind)
    chain = disk.open(writable=True)
    for offset in range(0, chain.size - 48 * KiB, 96 * KiB):
        chain.discard(offset=offset, length=48 * KiB)
    chain.images[0].disk.close()  # type: ignore[attr-defined]
    size = align_up(disk.storage.size(), 4 * KiB)
    raw = disk.storage.pread(size, offset=0).ljust(size, b"\0")
    device = Disk(storage=MemoryDevice(raw, size=4 * MiB))
    before = device.view()
    done = compact_image(device.layers()[0]).done
    assert device.view() == before
    assert device.check().verdict is Verdict.CLEAN
    assert 0 < done.rounds < 5
    assert done.after < done.before <= len(raw)
    assert compact_image(device.layers()[0]).done.rounds == 0


def test_snapshots_that_share_one_large_table_are_not_read_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(findings, "FREE_WORK", 0)
    monkeypatch.setattr(findings, "WORK_FACTOR", 1)
    raw = bytearray(build_qcow2(size=1 * MiB, cluster_bits=16).to_bytes())
    place, table = align_up(len(raw), 64 * KiB), 1 * MiB // 8
    entries = [
        SnapshotEntry(
            id=str(number),
            name="",
            l1_offset=place + 64 * KiB,
            l1_entries=table,
            date_sec=0,
            date_nsec=0,
            disk_size=1 * MiB,
        )
        for number in range(40)
    ]
    raw += bytes(place - len(raw)) + encode_snapshots(entries).ljust(64 * KiB, b"\0")
    raw += bytes(1 * MiB)
    struct.pack_into(">IQ", raw, FIELD_OFFSETS["nb_snapshots"], len(entries), place)
    disk = Disk(storage=MemoryStorage(raw))
    with pytest.raises(OperationError, match="too complex"):
        disk.amend(extended_l2=True)
    assert disk.storage.pread(len(raw) + 1, offset=0) == raw


class Impatient(MemoryStorage):
    """Interrupted once, when the disk's new size is durable."""

    def __init__(self, raw: bytes, *, size: int) -> None:
        super().__init__(raw)
        self._wanted: int | None = size

    def flush(self) -> None:
        super().flush()
        found = int.from_bytes(self.pread(8, offset=FIELD_OFFSETS["size"]), "big")
        if found == self._wanted:
            self._wanted = None
            raise KeyboardInterrupt


def test_bitmaps_reach_over_a_disk_whose_growth_was_interrupted_at_its_end() -> None:
    # One entry of its table is for 2 MiB.
    bitmaps = [BitmapSpec(name="b", granularity_bits=9)]
    raw = build_qcow2(size=1 * MiB, cluster_bits=9, bitmaps=bitmaps).to_bytes()
    disk = Disk(storage=Impatient(raw, size=4 * MiB))
    chain = disk.open(writable=True)
    with pytest.raises(KeyboardInterrupt):
        chain.resize(4 * MiB)
    chain.images[0].disk.close()  # type: ignore[attr-defined]
    (found,) = list_bitmaps(disk.layers()[0]).bitmaps
    assert disk.open().size == 4 * MiB
    assert found.bits is not None
    assert found.bits.dirty_bytes >= 3 * MiB


@pytest.mark.parametrize("length", [4 * KiB, 128 * KiB])
def test_what_is_counted_down_when_somebody_interrupts_is_not_counted_down_again(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(storage=MemoryStorage(build_qcow2(size=1 * MiB, cluster_bits=12).to_bytes()))
    chain = disk.open(writable=True)
    chain.write(b"\1" * length, offset=0)
    chain.images[0].disk.close()  # type: ignore[attr-defined]
    disk.snapshot("s")
    chain = disk.open(writable=True)
    chain.write(b"\2" * length, offset=0)
    for name in ("add", "add_scattered"):
        monkeypatch.setattr(RefcountStore, name, interrupted(getattr(RefcountStore, name)))
    with pytest.raises(KeyboardInterrupt):
        chain.flush()
    monkeypatch.undo()
    chain.images[0].disk.close()  # type: ignore[attr-defined]
    assert disk.check().verdict is Verdict.CLEAN
    assert disk.view()["1"][:length] == b"\1" * length


def interrupted(call: Callable[..., object]) -> Callable[..., object]:
    """Does its work, and is interrupted then, where it counts down."""

    def counted(*args: Any) -> object:
        found = call(*args)
        if args[-1] < 0:
            raise KeyboardInterrupt
        return found

    return counted
