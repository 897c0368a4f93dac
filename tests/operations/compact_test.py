"""Files made shorter: the disk stays, the holes go."""

from __future__ import annotations

from typing import Any

import pytest

from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.errors import CorruptMetadata, RequestError, UnsupportedFeature
from qcowkit.image.lineage import Layer
from qcowkit.image.metadata import RawMetadata
from qcowkit.operations.check import Verdict
from qcowkit.operations.compact import compact_image
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import BitmapSpec, build_qcow2
from qcowkit.units import KiB, MiB
from tests.amending import Disk, make_disk

pytestmark = pytest.mark.pinned("its kinds of images are its own")

KINDS: dict[str, dict[str, Any]] = {
    "clusters of 512 bytes": {"cluster_bits": 9, "packed": True},
    "clusters of 64 KiB": {"cluster_bits": 16, "size": 4 * MiB},
    "compressed": {"cluster_bits": 14, "packed": True, "size": 2 * MiB},
    "compressed, narrow refcounts": {"cluster_bits": 12, "packed": True, "refcount_order": 0},
    "with snapshots": {"cluster_bits": 12, "snapshots": 2, "packed": True},
    "subclusters over a base": {"cluster_bits": 14, "extended_l2": True, "base": 300 * KiB},
    "version 2": {"cluster_bits": 12, "version": 2, "snapshots": 1},
    "data file": {"cluster_bits": 12, "data_file": True},
}


def holey(**kind: Any) -> Disk:
    """A disk that was written all over, of which half was given up since."""
    disk = make_disk(count=40, **kind)
    chain = disk.open(writable=True)
    step = max(chain.cluster_size * 3, 4096)
    for offset in range(0, chain.size - step, 2 * step):
        chain.discard(offset=offset, length=step)
    chain.images[0].disk.close()  # type: ignore[attr-defined]
    return disk


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_shorter_and_the_disk_the_same(kind: str) -> None:
    disk = holey(**KINDS[kind])
    before, size = disk.view(), disk.storage.size()
    done = compact_image(disk.layers()[0]).done
    assert disk.view() == before
    assert disk.check().verdict is Verdict.CLEAN
    assert done.after == disk.storage.size() <= size == done.before
    disk.scribble(5)
    assert disk.check().verdict is Verdict.CLEAN


@pytest.mark.parametrize("kind", ["clusters of 512 bytes", "clusters of 64 KiB", "with snapshots"])
def test_what_is_left_beside_the_data_is_about_a_second_set_of_tables(kind: str) -> None:
    disk = holey(**KINDS[kind])
    done = compact_image(disk.layers()[0]).done
    cluster = load_qcow2_metadata(disk.storage).cluster_size
    assert done.rounds
    free = done.after // cluster - used_clusters(disk)
    assert free * 4 <= done.after // cluster


def used_clusters(disk: Disk) -> int:
    """Host clusters that anything refers to, by their refcounts."""
    metadata = load_qcow2_metadata(disk.storage)
    header, size = metadata.header, metadata.cluster_size
    table = disk.storage.pread(
        header.refcount_table_clusters * size, offset=header.refcount_table_offset
    )
    used = 0
    for at in range(0, len(table), 8):
        block = int.from_bytes(table[at : at + 8], "big")
        if block:
            raw = disk.storage.pread(size, offset=block)
            used += sum(any(raw[index : index + 2]) for index in range(0, size, 2))
    return used


def test_a_second_run_has_nothing_to_gain() -> None:
    disk = holey(cluster_bits=12)
    compact_image(disk.layers()[0])
    raw = disk.storage.pread(disk.storage.size(), offset=0)
    again = compact_image(disk.layers()[0])
    assert again.render().endswith("nothing to gain")
    assert disk.storage.pread(disk.storage.size(), offset=0) == raw


def test_bitmaps_stay_where_they_are() -> None:
    bits = BitmapSpec(name="b", bits=b"\xff" * 16)
    built = build_qcow2(size=MiB, bitmaps=[bits], clusters=dict.fromkeys(range(64), b"x"))
    disk = Disk(storage=MemoryStorage(built.to_bytes()))
    before = load_qcow2_metadata(disk.storage).bitmaps
    compact_image(disk.layers()[0])
    assert load_qcow2_metadata(disk.storage).bitmaps == before
    assert disk.check().verdict is Verdict.CLEAN


def test_what_is_broken_is_repaired_first() -> None:
    built = build_qcow2(clusters={0: b"data", 1: b"more"})
    built.data[built.places["refcount_block"] + 1] = 0
    disk = Disk(storage=MemoryStorage(built.to_bytes()))
    with pytest.raises(RequestError, match=r"has to be repaired first \(check -r all\): "):
        compact_image(disk.layers()[0])
    assert disk.storage.pread(disk.storage.size(), offset=0) == built.to_bytes()


def test_a_corrupt_image_is_not_touched() -> None:
    disk = make_disk()
    disk.storage.pwrite([(2).to_bytes(8, "big")], offset=72)
    with pytest.raises(CorruptMetadata, match="has to be repaired"):
        compact_image(disk.layers()[0])


def test_other_formats_have_no_holes_to_fill() -> None:
    layer = Layer(storage=MemoryStorage(bytes(512)), metadata=RawMetadata(virtual_size=512))
    with pytest.raises(UnsupportedFeature, match="raw images cannot be, qcow2 images can"):
        compact_image(layer)
