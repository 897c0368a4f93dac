"""The recount itself: windows, weights, and a bounded cost."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.engine import findings
from qcowkit.engine.findings import Effort, FindingLog, Severity
from qcowkit.engine.qcow2.claims import ClaimsBuilder
from qcowkit.engine.qcow2.counters import SATURATED, Window
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.engine.qcow2.recount import Statistics, recount
from qcowkit.errors import OperationError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.qcow2_builder import (
    BuiltImage,
    Cluster,
    Compressed,
    SnapshotSpec,
    Zero,
    build_qcow2,
)
from qcowkit.testing.recording import RecordingStorage
from qcowkit.units import GiB, MiB

# Refcounts of one block of 512 bytes.
SMALL_WINDOW = 256


def count(
    storage: Storage, *, window_clusters: int = 1 << 24, stored: int = GiB
) -> tuple[Statistics, FindingLog]:
    log = FindingLog(limit=10**6)
    metadata = load_qcow2_metadata(storage, for_check=True)
    effort = Effort(stored=stored)
    found = recount(storage, metadata, log=log, effort=effort, window_clusters=window_clusters)
    return found, log


def spread(clusters: int, *, size: int = 8 * MiB, **changes: Any) -> BuiltImage:
    """An image of 512-byte clusters that needs several small windows."""
    chosen: dict[int, Cluster] = {index * 3: b"plain" for index in range(clusters)}
    chosen |= {1: Zero(payload=b"z"), 4: Zero(), 7: Compressed(payload=bytes(900))}
    return build_qcow2(cluster_bits=9, size=size, clusters=chosen, **changes)


@pytest.mark.parametrize("snapshots", [0, 2])
def test_small_windows_find_what_one_window_finds(snapshots: int) -> None:
    image = spread(1500, snapshots=[SnapshotSpec(id=str(number)) for number in range(snapshots)])
    generator = np.random.default_rng(1)
    block = image.places["refcount_block"]
    for place in generator.integers(0, len(image.data) // 512, 40).tolist():
        image.patch(block + 2 * place, int(generator.integers(0, 4)), width=2)
    for place in generator.integers(0, 60, 20).tolist():
        image.patch(image.places["l2"] + 8 * place, int(generator.integers(0, 4000)) << 9)
    storage = MemoryStorage(image.to_bytes())
    whole, whole_log = count(storage)
    parts, parts_log = count(storage, window_clusters=SMALL_WINDOW)
    assert len(image.data) // 512 > 4 * SMALL_WINDOW
    assert whole_log.count(Severity.CORRUPTION) > 20
    assert sorted(map(str, parts_log.kept)) == sorted(map(str, whole_log.kept))
    assert parts == whole


def test_the_last_window_reads_only_the_tables_that_refer_to_it() -> None:
    storage = RecordingStorage(MemoryStorage(spread(4000).to_bytes()))
    count(storage)
    once = sum(call.length for call in storage.of("pread"))
    storage.calls.clear()
    _, log = count(storage, window_clusters=SMALL_WINDOW)
    assert not log.kept
    assert sum(call.length for call in storage.of("pread")) < 3 * once


def test_an_l2_table_of_many_snapshots_is_read_once() -> None:
    snapshots = [SnapshotSpec(id=str(number)) for number in range(300)]
    image = build_qcow2(
        size=MiB, clusters={0: b"x", 5: Compressed(payload=b"y")}, snapshots=snapshots
    )
    storage = RecordingStorage(MemoryStorage(image.to_bytes()))
    found, log = count(storage)
    assert not log.kept
    assert found.allocated == 2
    place = image.places["l2"]
    reads = [c for c in storage.of("pread") if c.offset <= place < c.offset + c.length]
    assert len(reads) == 1


@pytest.mark.pinned(
    "host offsets of the plain layout", "extended_l2", "refcount_bits=64", "cluster_size=512"
)
def test_a_shared_table_counts_its_clusters_once_for_each_snapshot() -> None:
    image = build_qcow2(
        size=MiB, clusters={0: b"x"}, snapshots=[SnapshotSpec(id=str(n)) for n in range(9)]
    )
    host = image.places["l2"] + (1 << 12)
    image.patch(image.places["refcount_block"] + 2 * (host >> 12), 11, width=2)
    _, log = count(MemoryStorage(image.to_bytes()))
    assert [str(finding) for finding in log.kept] == [
        f"cluster at host offset {host:#x}: refcount is 11, expected 10 from its references"
    ]


def fan_in_bomb() -> bytes:
    """All 64-bit words of a large L1 table lead to one L2 table, whose entries lead to one
    cluster; many snapshots have the same L1 table."""
    image = build_qcow2(
        cluster_bits=9,
        size=512 * MiB,
        clusters={0: b"x"},
        snapshots=[SnapshotSpec(id=str(number)) for number in range(64)],
    )
    l1, l2 = image.places["l1"], image.places["l2"]
    table = struct.pack(">Q", l2)
    image.patch(l1, table * (512 * MiB // (64 * 512)))
    word = image.data[l2 : l2 + 8]
    image.patch(l2, bytes(word) * 64)
    return image.to_bytes()


def test_a_fan_in_bomb_is_counted_without_decoding_it_again() -> None:
    storage = RecordingStorage(MemoryStorage(fan_in_bomb()))
    found, log = count(storage)
    assert log.count(Severity.CORRUPTION) > 0
    assert found.allocated == 64
    assert sum(call.length for call in storage.of("pread")) < 4 * storage.size()


def test_work_out_of_proportion_to_the_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "FREE_WORK", 64 << 10)
    storage = MemoryStorage(fan_in_bomb())
    with pytest.raises(OperationError, match=r"too complex to check: its tables ask for more than"):
        count(storage, stored=0)


def test_a_file_of_holes_is_not_read_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sparse(MemoryStorage):
        """Claims to be far larger than what it holds."""

        def size(self) -> int:
            return 1 << 55

        def pread(self, length: int, *, offset: int) -> bytes:
            return super().pread(length, offset=offset).ljust(length, b"\0")

    image = build_qcow2(cluster_bits=16, size=1 << 50)
    words = [(1 << 54) + (index << 16) for index in range(1 << 16)]
    image.patch(image.places["l1"], struct.pack(">65536Q", *words))
    monkeypatch.setattr(findings, "FREE_WORK", 16 * MiB)
    with pytest.raises(OperationError, match=r"too complex to check"):
        count(Sparse(image.to_bytes()), stored=len(image.data))


def window_with(index: Sequence[int], weights: Sequence[int] | None, *, packed: bool) -> Window:
    window = Window(100, 10, np.zeros(10, dtype=np.uint16))
    values = None if weights is None else np.array(weights, dtype=np.int64)
    window.add(np.array(index, dtype=np.int64), values, packed=packed)
    return window


def test_counts_stop_at_the_largest_value() -> None:
    window = window_with([101, 101, 103], [SATURATED, 1, 5], packed=False)
    assert window.computed.tolist() == [0, SATURATED, 0, 5, 0, 0, 0, 0, 0, 0]
    window.add(np.array([101, 103]), None)
    assert window.computed.tolist() == [0, SATURATED, 0, 6, 0, 0, 0, 0, 0, 0]


@given(st.lists(st.tuples(st.integers(100, 109), st.integers(1, 2**33)), min_size=1, max_size=30))
def test_counts_are_exact_up_to_the_largest_value(pairs: list[tuple[int, int]]) -> None:
    window = window_with([pair[0] for pair in pairs], [pair[1] for pair in pairs], packed=True)
    expected = [0] * 10
    for cluster, weight in pairs:
        expected[cluster - 100] = min(expected[cluster - 100] + weight, SATURATED)
    assert window.computed.tolist() == expected
    assert window.packed is not None
    assert window.packed.tolist() == expected


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_claims_are_told_cluster_by_cluster(
    runs: list[tuple[int, int]], base: int, length: int
) -> None:
    builder = ClaimsBuilder(9)
    builder.add("always", offset=0, length=1)
    expected = [(0, "always")] if base == 0 and length else []
    for number, (first, size) in enumerate(runs):
        builder.add(str(number), offset=first * 512, length=size * 512)
        inside = range(max(first, base), min(first + size, base + length))
        expected += [(cluster, str(number)) for cluster in inside]
    claims = builder.build()
    found = [
        (cluster, claims.names[owner])
        for clusters, owners in claims.clusters(base, base + length)
        for cluster, owner in zip(clusters.tolist(), owners.tolist(), strict=True)
    ]
    assert found == expected
