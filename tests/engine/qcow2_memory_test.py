"""What a writer keeps in memory of a disk of any size, and how little of its tables it reads."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowkit.engine.options import OpenOptions
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.qcow2_write import WritableQcow2Image
from qcowkit.image.registry import open_chain
from qcowkit.operations.create import CreateOptions, create_image
from qcowkit.units import GiB, KiB, MiB, TiB
from tests.engine.qcow2_rig import Rig

pytestmark = pytest.mark.pinned("sizes of tables")

# One L2 table of the usual clusters.
COVERAGE = 512 * MiB
ROUNDS = 2
SMALL = OpenOptions(l2_cache_size=256 * KiB, l2_cache_entry_size=4 * KiB, refcount_cache_size=MiB)


@pytest.fixture(name="disk")
def _disk(tmp_path: Path) -> Iterator[Chain]:
    """A sparse disk of 1 TiB, whose tables would take 128 MiB."""
    path = tmp_path / "disk"
    options = CreateOptions(format="qcow2", values={"size": TiB})
    create_image(path, options, gate=ReferenceGate.deny_all())
    with open_chain(path, format="qcow2", writable=True, options=SMALL) as chain:
        yield chain


def cached(chain: Chain) -> int:
    """Bytes of tables in memory."""
    image = chain.images[0]
    assert isinstance(image, WritableQcow2Image)
    tables, blocks = image.disk.state.tables.cache, image.disk.state.refcounts.blocks
    return len(tables) * tables.entry_size + len(blocks) * blocks.entry_size


def test_writing_all_over_a_tebibyte_stays_within_the_cache_settings(disk: Chain) -> None:
    most = 256 * KiB + MiB
    tracemalloc.start()
    try:
        for step in range(ROUNDS):
            for offset in range(step * 64 * MiB, TiB, COVERAGE):
                disk.write(b"guest", offset=offset)
                assert cached(disk) <= most
        disk.flush()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Beside the tables: the L1 table, lists of what changes, one write of a whole cache.
    assert peak < 2 * most + MiB
    assert disk.read(offset=700 * GiB, length=6) == b"guest\0"


def test_reading_all_over_a_tebibyte_stays_within_the_cache_settings(disk: Chain) -> None:
    for offset in range(0, TiB, 4 * COVERAGE):
        disk.write(b"guest", offset=offset)
    disk.flush()
    tracemalloc.start()
    try:
        for offset in range(0, TiB, COVERAGE):
            expected = b"guest" if not offset % (4 * COVERAGE) else bytes(5)
            assert disk.read(offset=offset, length=5) == expected
            assert cached(disk) <= 256 * KiB + MiB
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MiB


# Slices.


@pytest.mark.parametrize(
    ("size", "read"), [(None, 2 * MiB), (4 * KiB, 4 * KiB), (512, 512), (64 * KiB, 64 * KiB)]
)
def test_of_a_table_no_more_is_read_than_one_slice(size: int | None, read: int) -> None:
    """S003-13."""
    rig = Rig(
        cluster_bits=21,
        size=4 * GiB,
        clusters={700: b"x"},
        options=OpenOptions(l2_cache_entry_size=size),
    )
    rig.forget()
    rig.chain.write(b"y", offset=700 * 2 * MiB)
    lengths = [call.length for call in rig.file.of("pread") if call.length > 1]
    assert lengths == [read]
    assert rig.read(700 * 2 * MiB, 1) == b"y"


def test_of_a_changed_table_no_more_is_written_than_its_sectors() -> None:
    """S003-13: a slice of 4 KiB changes in one place of 512 bytes."""
    rig = Rig(cluster_bits=21, size=4 * GiB, options=OpenOptions(l2_cache_entry_size=4 * KiB))
    rig.chain.write(b"x", offset=0)
    rig.chain.flush()
    rig.forget()
    rig.chain.write(b"y", offset=2 * MiB)
    rig.chain.flush()
    table = int(rig.state.tables.l1[0]) & ((1 << 56) - 1)
    changed = [call for call in rig.file.of("pwrite") if table <= call.offset < table + 2 * MiB]
    assert [call.length for call in changed] == [512]


def test_two_slices_are_kept_however_small_the_cache_is() -> None:
    """S003-13: copying looks at two at once."""
    rig = Rig(size=GiB, options=OpenOptions(l2_cache_size=0, l2_cache_entry_size=512))
    assert rig.state.tables.cache.capacity == 2
    rig.chain.write(bytes(range(256)) * 8192, offset=700 * MiB + 1)
    rig.chain.flush()
    assert rig.read(700 * MiB + 1, 2 * MiB) == bytes(range(256)) * 8192
    rig.assert_clean()


def test_caches_follow_the_size_of_the_disk() -> None:
    rig = Rig(size=MiB)
    before = rig.state.tables.cache.capacity
    rig.chain.resize(8 * GiB)
    assert rig.state.tables.cache.capacity > before
    rig.chain.resize(MiB, shrink=True)
    assert rig.state.tables.cache.capacity == before


def test_what_is_known_of_slices_is_forgotten_before_it_takes_much_memory(
    disk: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcowkit.engine.qcow2.state._MOST_JUDGED", 5)
    image = disk.images[0]
    assert isinstance(image, WritableQcow2Image)
    state = image.disk.state
    for offset in (*range(0, TiB, 32 * GiB), *range(GiB, TiB, 32 * GiB)):
        disk.write(b"guest", offset=offset)
        assert len(state.judged) <= 5
        assert state.owned <= state.judged
    assert disk.read(offset=64 * GiB, length=6) == b"guest\0"
