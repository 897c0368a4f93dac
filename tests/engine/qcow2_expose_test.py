"""Growing over a backing file that shall show: what is seen where, and after a power cut."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qcowkit.errors import RequestError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.crash_states import iter_crash_states
from qcowkit.testing.crash_storage import Content, CrashFiles
from qcowkit.units import KiB
from tests.engine.qcow2_rig import Rig

BASE = random.Random(1).randbytes(160 * KiB)
OWN = random.Random(2).randbytes(64 * KiB)


def rig(*, size: int = 96 * KiB, below: bytes | None = BASE, **spec: Any) -> Rig:
    return Rig(size=size, below=below, backing_name="base", backing_format="raw", **spec)


def padded(data: bytes, size: int) -> bytes:
    return data[:size].ljust(size, b"\0")


def test_what_is_added_shows_the_base_and_zeros_behind_it() -> None:
    disk = rig(size=32 * KiB)
    disk.chain.resize(256 * KiB, expose=True)
    assert disk.read(0, 256 * KiB) == padded(BASE, 256 * KiB)
    disk.chain.flush()
    disk.assert_clean()


@pytest.mark.parametrize("cut", [512, 3 * KiB, 63 * KiB])
def test_what_was_cut_off_within_a_cluster_does_not_come_back(cut: int) -> None:
    disk = rig(size=64 * KiB)
    disk.chain.write(OWN, offset=0)
    disk.chain.resize(64 * KiB - cut, shrink=True)
    disk.chain.resize(128 * KiB, expose=True)
    own = OWN[: 64 * KiB - cut]
    assert disk.read(0, 128 * KiB) == own + BASE[len(own) : 128 * KiB]
    disk.chain.flush()
    disk.assert_clean()


def test_a_cluster_of_the_base_alone_is_not_copied() -> None:
    disk = rig(size=33 * KiB)
    disk.chain.resize(64 * KiB, expose=True)
    disk.chain.flush()
    assert disk.data.of("pwrite") == disk.file.of("pwrite")
    assert disk.read(0, 64 * KiB) == BASE[: 64 * KiB]
    assert all(row.host < 0 for row in disk.image.extents(start=0, length=64 * KiB))


def test_without_being_asked_the_base_stays_hidden() -> None:
    disk = rig(size=32 * KiB)
    disk.chain.resize(128 * KiB)
    assert disk.read(0, 128 * KiB) == BASE[: 32 * KiB] + bytes(96 * KiB)


def test_zeros_that_a_longer_disk_had_give_way() -> None:
    disk = rig(size=32 * KiB)
    disk.chain.resize(128 * KiB)
    disk.chain.resize(32 * KiB, shrink=True)
    disk.chain.resize(128 * KiB, expose=True)
    assert disk.read(0, 128 * KiB) == BASE[: 128 * KiB]
    disk.chain.flush()
    disk.assert_clean()


@pytest.mark.parametrize(
    ("below", "size", "found"),
    [
        (None, 128 * KiB, "no backing file"),
        (BASE, 96 * KiB, "a disk of 98304 bytes"),
        (BASE, 32 * KiB, "a disk of 98304 bytes"),
    ],
)
def test_there_must_be_something_to_show(below: bytes | None, size: int, found: str) -> None:
    disk = rig(below=below)
    before = disk.memory.to_bytes()
    with pytest.raises(RequestError) as caught:
        disk.chain.resize(size, shrink=True, expose=True)
    assert str(caught.value) == (
        f"only what is added over a backing file can show it, found {found} and the new size {size}"
    )
    assert disk.memory.to_bytes() == before


@pytest.mark.parametrize("cut", [0, 3 * KiB])
def test_a_power_cut_leaves_the_old_size_or_what_was_to_be_shown(cut: int) -> None:
    """What a shrink left in the last cluster is never seen."""
    old, new = 64 * KiB - cut, 160 * KiB
    made = rig(size=64 * KiB)
    made.chain.write(OWN, offset=0)
    made.chain.resize(old, shrink=True)
    made.chain.flush()
    files = CrashFiles([Content.of(made.memory.to_bytes())])
    grown = rig(storage=files.open())
    grown.chain.resize(new, expose=True)
    count = 0
    for state in iter_crash_states(files, seed=1, budget=200):
        left = rig(storage=MemoryStorage(state.contents[0].to_bytes()))
        shown = left.read(0, left.chain.size)
        assert shown == padded(OWN[:old] + BASE[old:], left.chain.size), state.label
        assert left.chain.size in (old, new), state.label
        count += 1
    assert count >= 2
