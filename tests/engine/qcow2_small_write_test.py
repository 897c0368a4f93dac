"""The short way of small writes does to the file what the long way would."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qcowkit.engine.options import OpenOptions
from qcowkit.testing.qcow2_builder import Cluster, Data, SnapshotSpec, Zero
from qcowkit.units import KiB
from tests.engine.qcow2_rig import Rig

pytestmark = pytest.mark.pinned("kinds of its own")

GUEST = random.Random(1).randbytes(64 * KiB)
BASE = random.Random(2).randbytes(100 * KiB)
TIGHT = OpenOptions(l2_cache_size=512, l2_cache_entry_size=512, refcount_cache_size=0)
SMALL: dict[str, Any] = {"cluster_bits": 9, "size": 128 * KiB}
WIDE: dict[str, Any] = {"cluster_bits": 14, "extended_l2": True, "size": 512 * KiB}


def some(size: int, *, wide: bool = False) -> dict[int, Cluster]:
    clusters: dict[int, Cluster] = {
        0: GUEST[:size],
        1: Zero(),
        2: Zero(payload=GUEST[:size]),
        5: GUEST[:size],
    }
    if wide:
        clusters[3] = Data(payload=GUEST[:size], bitmap=0x0F0F)
    return clusters


KINDS: dict[str, dict[str, Any]] = {
    "plain": SMALL,
    "4 KiB, clusters of all states": {"size": 128 * KiB, "clusters": some(4 * KiB)},
    "version 2": {**SMALL, "version": 2},
    "narrow counts": {**SMALL, "refcount_order": 0},
    "wide counts": {**SMALL, "refcount_order": 6},
    "base": {"size": 128 * KiB, "below": BASE},
    "snapshot": {**SMALL, "clusters": some(512), "snapshots": [SnapshotSpec(id="1")]},
    "least caches": {**SMALL, "options": TIGHT},
    "lazy": {**SMALL, "lazy_refcounts": True},
    "data file": {**SMALL, "data_file_name": "data"},
    "subclusters": {**WIDE, "clusters": some(16 * KiB, wide=True)},
    "subclusters, base": {**WIDE, "below": BASE, "clusters": some(16 * KiB, wide=True)},
    "subclusters, least caches": {**WIDE, "below": BASE, "options": TIGHT},
}


class Fork:
    """The same guest at two images, of which one has no short way."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.short, self.long = Rig(**spec, watch=False), Rig(**spec, watch=False)
        self.taken = 0
        inner = self.short.image.disk._small

        def count(data: memoryview, offset: int) -> bool:
            done = inner(data, offset)
            self.taken += done
            return done

        self.short.image.disk._small = count
        self.long.image.disk._small = lambda data, offset: False

    def step(self, noise: random.Random) -> None:
        """One request, to both."""
        size = self.short.chain.size
        offset = noise.randrange(size)
        length = min(noise.choice((1, 100, 512, 700, 4096)), size - offset)
        if noise.random() < 0.4:
            offset -= offset % 512
        kind = noise.random()
        data = noise.randbytes(length)
        for rig in (self.short, self.long):
            if kind < 0.85:
                rig.chain.write(data, offset=offset)
            elif kind < 0.9:
                rig.chain.discard(offset=offset, length=min(length * 8, size - offset))
            elif kind < 0.95:
                rig.chain.flush()
            else:
                rig.image.disk.clean()

    def compare(self) -> None:
        for rig in (self.short, self.long):
            rig.image.disk.close()
        assert self.short.memory.to_bytes() == self.long.memory.to_bytes()
        size = self.short.chain.size
        assert self.short.read(0, size) == self.long.read(0, size)
        self.short.assert_clean()


@pytest.mark.parametrize("name", KINDS)
def test_the_short_way_leads_to_the_same_file(name: str) -> None:
    for seed in range(4):
        fork = Fork(KINDS[name])
        noise = random.Random(seed)
        for _ in range(150):
            fork.step(noise)
        fork.compare()
        assert fork.taken > 10


def test_the_short_way_is_not_taken_over_metadata() -> None:
    """An entry that came to lead to a table made since is for the long way to refuse."""
    rig = Rig(**SMALL)
    rig.chain.write(b"x", offset=0)
    host = rig.host(0)
    rig.state.guard.note("active-l2", first=host >> 9)
    assert not rig.image.disk._small(memoryview(b"y"), 0)


def test_whoever_watches_sees_the_steps_of_small_writes_too() -> None:
    rig = Rig(**SMALL)
    rig.chain.write(b"x", offset=0)
    rig.forget()
    rig.chain.write(b"x", offset=512)
    assert "cluster_alloc" in rig.events


def test_the_first_change_is_prepared_and_goes_the_long_way() -> None:
    rig = Rig(**SMALL)
    assert not rig.image.disk._ready
    rig.chain.write(b"x", offset=0)
    assert rig.image.disk._ready
