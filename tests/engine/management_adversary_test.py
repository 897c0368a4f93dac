"""What an adversary has found in the changes of whole images: commit, amend, compact, capsules."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.operations.capsule import make_capsule
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import BitmapSpec, build_qcow2
from qcowkit.units import KiB, MiB
from tests.amending import Disk

pytestmark = pytest.mark.pinned("its kinds of images are its own")

SECRET = b"of the guest, 16"


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
