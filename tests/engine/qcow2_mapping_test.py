"""Guest ranges to extents: windows, gaps, caches and bounds, against an entry-by-entry oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.entries import COPIED, EntryRules
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.engine.qcow2.mapping import WINDOW_ENTRIES, Mapping
from qcowkit.engine.qcow2.tables import L2Tables, load_l1, native_words, read_words
from qcowkit.errors import CorruptMetadata
from qcowkit.extents.table import ExtentTable, Flag
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.recording import RecordingStorage
from qcowkit.units import KiB, MiB, TiB

SIZE = 512
PER_TABLE = 64
COVERAGE = SIZE * PER_TABLE


def mapping(
    storage: Any, l1: list[int], *, geometry: Geometry | None = None, cache: int = 1 << 20
) -> Mapping:
    geometry = geometry or Geometry(cluster_bits=9)
    return Mapping(
        tables=L2Tables(
            storage,
            l1=np.array(l1, np.uint64),
            geometry=geometry,
            slice_size=geometry.cluster_size,
            cache_bytes=cache,
        ),
        rules=EntryRules(
            geometry=geometry, version=3, external_data=False, file_size=storage.size()
        ),
        size=len(l1) * geometry.l2_coverage,
    )


# What each of ten L1 entries leads to: no table, or one of three tables of 64 words.
hosts = st.integers(0, 40).map(lambda index: index * SIZE)
words = st.one_of(st.just(0), st.just(1), hosts, hosts.map(lambda host: host | COPIED))


@st.composite
def sparse_words(draw: Any) -> list[int]:
    chosen = draw(st.lists(st.tuples(st.integers(0, 63), words), max_size=6))
    table = [0] * PER_TABLE
    for index, word in chosen:
        table[index] = word
    return table


@st.composite
def images(draw: Any) -> tuple[Mapping, list[int]]:
    """A mapping, and the entry of every guest cluster. Tables may be shared or out of order."""
    tables = [draw(sparse_words()) for _ in range(3)]
    l1 = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3]), min_size=1, max_size=12))
    raw = bytes(SIZE) + b"".join(np.array(table, ">u8").tobytes() for table in tables)
    storage = MemoryStorage(raw)
    storage.truncate(64 * SIZE)
    entries = [
        word for which in l1 for word in ([0] * PER_TABLE if not which else tables[which - 1])
    ]
    found = mapping(storage, [which * SIZE | (COPIED if which else 0) for which in l1])
    return found, entries


def check_against(table: ExtentTable, entries: list[int], start: int, stop: int) -> None:
    table.check()
    assert (table.begin, table.end) == (start, stop)
    for row in table:
        for at in range(row.start // SIZE, (row.start + row.length - 1) // SIZE + 1):
            entry = entries[at]
            host = entry & ~COPIED & ~1
            assert bool(row.flags & Flag.ZERO) == bool(entry & 1)
            assert bool(row.flags & Flag.DATA) == bool(host and not entry & 1)
            moved = host + row.start - at * SIZE if at * SIZE < row.start else host
            expected = moved - max(0, at * SIZE - row.start) if host else -1
            assert row.host == expected


@settings(max_examples=200, deadline=None)
@given(image=images(), more=st.data())
def test_a_range_maps_as_its_entries_say(image: Any, more: Any) -> None:
    found, entries = image
    start = more.draw(st.integers(0, found.size - 1))
    stop = more.draw(st.integers(start + 1, found.size))
    check_against(found.extents(start=start, length=stop - start), entries, start, stop)


@settings(max_examples=200, deadline=None)
@given(image=images(), limit=st.sampled_from([1, 2, 63, 64, 65, 128, 1000]), more=st.data())
def test_limited_windows_advance_and_cover_the_range(image: Any, limit: int, more: Any) -> None:
    found, entries = image
    position = more.draw(st.integers(0, found.size - 1))
    while position < found.size:
        table = found.extents(start=position, length=found.size - position, limit=limit)
        assert position < table.end <= found.size
        assert len(table) <= 2 * limit + 2
        check_against(table, entries, position, table.end)
        position = table.end


def test_an_empty_range_has_no_rows() -> None:
    assert len(mapping(MemoryStorage(bytes(SIZE)), [0]).extents(start=0, length=0)) == 0


def test_a_bad_entry_is_named_by_table_and_index() -> None:
    raw = bytearray(4 * SIZE)
    raw[2 * SIZE + 17 * 8 : 2 * SIZE + 18 * 8] = (0x4000000000000000 >> 1).to_bytes(8, "big")
    for l1 in ([SIZE, 2 * SIZE, 0], [2 * SIZE]):
        found = mapping(MemoryStorage(raw), l1)
        with pytest.raises(
            CorruptMetadata, match="L2 table at host offset 0x400, entry 17: reserved bits"
        ):
            found.extents(start=0, length=found.size)


def test_a_bad_entry_outside_the_range_does_not_matter() -> None:
    raw = bytearray(4 * SIZE)
    raw[SIZE + 17 * 8 : SIZE + 18 * 8] = b"\xff" * 8
    found = mapping(MemoryStorage(raw), [SIZE])
    assert len(found.extents(start=18 * SIZE, length=SIZE)) == 1
    with pytest.raises(CorruptMetadata, match="entry 17"):
        found.extents(start=17 * SIZE, length=1)


def test_a_sparse_disk_of_64_tib_is_mapped_by_its_l1_alone() -> None:
    geometry = Geometry(cluster_bits=16)
    storage = RecordingStorage(MemoryStorage(bytes(256 * KiB)))
    entries = 64 * TiB // geometry.l2_coverage
    l1 = [0] * entries
    l1[entries // 2] = l1[-1] = 128 * KiB
    found = mapping(storage, l1, geometry=geometry)
    table = found.extents(start=0, length=64 * TiB)
    table.check()
    assert (table.begin, table.end) == (0, 64 * TiB)
    assert not table.flags.any()
    assert sum(call.length for call in storage.of("pread")) <= 2 * 64 * KiB
    assert found.extents(start=5, length=64 * TiB - 5, limit=1).end > TiB


def test_one_table_for_all_entries_is_decoded_by_windows() -> None:
    """A fan-in: the file is tiny, the disk is not. A window stays a window."""
    storage = RecordingStorage(MemoryStorage(bytes(4 * SIZE)))
    found = mapping(storage, [SIZE] * 100_000)
    table = found.extents(start=0, length=found.size, limit=1 << 12)
    assert table.end == (1 << 12) * SIZE
    assert sum(call.length for call in storage.of("pread")) == 64 * SIZE


@pytest.mark.parametrize("bits", [16, 21])
def test_subclusters_count_against_the_limit(bits: int) -> None:
    geometry = Geometry(cluster_bits=bits, extended_l2=True)
    size = geometry.cluster_size
    pairs = np.empty((geometry.l2_entries, 2), ">u8")
    pairs[:, 0], pairs[:, 1] = size, 0x5555_5555
    storage = MemoryStorage(bytes(2 * size) + pairs.tobytes())
    found = mapping(storage, [2 * size] * 3, geometry=geometry)
    table = found.extents(start=0, length=found.size, limit=1 << 12)
    assert (1 << 12) - 64 <= len(table) <= 1 << 12
    assert table.end == 128 * size


def test_a_window_without_a_limit_is_bounded_too() -> None:
    geometry = Geometry(cluster_bits=12)
    storage = RecordingStorage(MemoryStorage(bytes(16 * KiB)))
    found = mapping(storage, [4 * KiB] * 1024, geometry=geometry)
    found.extents(start=0, length=found.size)
    assert max(call.length for call in storage.of("pread")) <= WINDOW_ENTRIES * 8


def test_a_table_that_the_file_cuts_reads_as_zeros() -> None:
    raw = bytes(SIZE) + (SIZE | COPIED).to_bytes(8, "big")
    for l1 in ([SIZE], [SIZE, SIZE]):
        found = mapping(MemoryStorage(raw), l1)
        table = found.extents(start=0, length=found.size)
        rows = [(row.start, row.host) for row in table if row.flags & Flag.DATA]
        assert rows == [(index * COVERAGE, SIZE) for index in range(len(l1))]


def test_small_reads_are_answered_from_the_cache() -> None:
    storage = RecordingStorage(MemoryStorage(bytes(64 * SIZE)))
    found = mapping(storage, [SIZE, 2 * SIZE])
    for _ in range(3):
        for start in range(0, found.size, 4096):
            found.extents(start=start, length=4096)
    assert len(storage.of("pread")) == 2


def test_words_are_native_after_reading() -> None:
    assert native_words(bytes(range(8)))[0] == 0x0001020304050607


def test_a_table_that_ends_early_is_refused_with_both_lengths() -> None:
    with pytest.raises(
        CorruptMetadata, match="L1 table at host offset 0x200: the file ends after 512 of 1024"
    ):
        read_words(MemoryStorage(bytes(KiB)), offset=SIZE, count=128, structure="L1 table")


def test_an_l1_table_of_no_entries_is_not_looked_for() -> None:
    geometry = Geometry(cluster_bits=16)
    found = load_l1(MemoryStorage(), offset=MiB, count=0, geometry=geometry, file_size=0)
    assert len(found) == 0
