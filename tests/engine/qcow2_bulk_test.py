"""Bulk writing of qcow2 images: what was placed is read back, and every cluster is counted once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.compression import make_compressor
from qcowkit.codecs.qcow2.entries import ALL_ALLOCATED, COPIED
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.codecs.qcow2.refcount_block import decode_refcounts
from qcowkit.engine.findings import Effort, FindingLog
from qcowkit.engine.preallocate import preallocate
from qcowkit.engine.qcow2.bulk import Qcow2BulkWriter
from qcowkit.engine.qcow2.l2_writer import L2Writer
from qcowkit.engine.qcow2.layout import Layout, plan_layout
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.engine.qcow2.recount import recount
from qcowkit.engine.qcow2.refcount_writer import RefcountWriter
from qcowkit.engine.qcow2.refcounts import (
    holds_unwritten_clusters,
    iter_blocks,
    load_refcount_table,
)
from qcowkit.engine.qcow2.spec import Qcow2Spec
from qcowkit.engine.transfer import Blob, Chunk, UnitState
from qcowkit.extents.zeros import zero_units
from qcowkit.image.chain import Chain
from qcowkit.image.metadata import RawMetadata
from qcowkit.image.qcow2 import Qcow2Image
from qcowkit.image.raw import RawImage
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.recording import RecordingStorage
from qcowkit.units import KiB, MiB


@st.composite
def specs(draw: Any) -> Qcow2Spec:
    extended = draw(st.booleans())
    bits = draw(st.integers(14 if extended else 9, 21))
    backing = draw(st.booleans())
    data = not backing and draw(st.booleans())
    allocated = draw(st.booleans()) and (extended or not backing)
    return Qcow2Spec(
        size=draw(st.integers(0, 5 << min(bits, 17) >> 9)) * 512,
        geometry=Geometry(
            cluster_bits=bits, refcount_order=draw(st.integers(0, 6)), extended_l2=extended
        ),
        compression_type=draw(st.sampled_from(["zlib", "zstd"])),
        preallocation="metadata" if allocated else "off",
        backing_name="base" if backing else None,
        backing_format="raw" if backing else None,
        data_file="data" if data else None,
        data_file_raw=data and draw(st.booleans()),
    )


class Filled:
    """An image in memory, filled by chunks of whole clusters with the given states."""

    def __init__(self, spec: Qcow2Spec, *, compress: bool = False) -> None:
        self.spec = spec
        self.storage = MemoryStorage()
        self.data = MemoryStorage() if spec.data_file else None
        geometry = spec.geometry
        clusters = geometry.clusters(spec.size)
        layout = plan_layout(
            geometry,
            size=spec.size,
            l2_tables=geometry.l1_entries(spec.size),
            data_clusters=0 if spec.data_file else clusters,
        )
        self.writer = Qcow2BulkWriter(self.storage, spec, layout, data_storage=self.data)
        self.compress = make_compressor(spec.compression_type, None) if compress else None

    def place(self, start: int, data: bytes, states: np.ndarray[Any, Any]) -> None:
        size = self.spec.geometry.cluster_size
        padded = np.zeros(-(-len(data) // size) * size, np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        blobs: list[Blob | None] = []
        per_cluster = self.spec.geometry.subcluster_count
        if self.compress is not None:
            for index in range(len(padded) // size):
                own = states[index * per_cluster : (index + 1) * per_cluster]
                blob = self.compress(padded[index * size : (index + 1) * size].data)
                small = len(blob) < size and bool((own == UnitState.DATA).any())
                blobs.append(Blob(blob) if small else None)
        chunk = Chunk(
            start=start, length=len(data), states=states, view=padded.data, blobs=tuple(blobs)
        )
        # Writes may run in any order.
        for write in reversed(self.writer.place(chunk)):
            write.run()

    def finish(self) -> None:
        self.writer.finish()
        if self.data is not None:
            self.data.truncate(self.spec.size)

    def read(self, base: bytes = b"") -> bytes:
        metadata = load_qcow2_metadata(self.storage, budget=TRUSTED)
        image = Qcow2Image(metadata, self.storage, data_storage=self.data, budget=TRUSTED)
        images: list[Any] = [image]
        if self.spec.backing_name:
            images.append(RawImage(RawMetadata(virtual_size=len(base)), MemoryStorage(base)))
        chain = Chain(images)
        assert chain.size == self.spec.size
        return chain.read(offset=0, length=chain.size)

    def verify(self) -> None:
        """Refcounts are what the tables refer to: neither leaks nor corruptions."""
        metadata = load_qcow2_metadata(self.storage, budget=TRUSTED)
        log = FindingLog()
        recount(self.storage, metadata, log=log, effort=Effort(stored=self.storage.size()))
        assert [str(one) for one in log.kept] == []


@settings(max_examples=150, deadline=None)
@given(spec=specs(), more=st.data())
def test_what_was_placed_is_read_back_and_counted(spec: Qcow2Spec, more: Any) -> None:
    geometry = spec.geometry
    may_compress = not spec.preallocated and spec.data_file is None
    filled = Filled(spec, compress=may_compress and more.draw(st.booleans()))
    size, grain = geometry.cluster_size, geometry.subcluster_size
    base = bytes(index % 251 + 1 for index in range(997)) * (spec.size // 997 + 1)
    base = base[: spec.size]
    want = bytearray(base if spec.backing_name else bytes(spec.size))
    for start in range(0, spec.size, size):
        stop = min(start + size, spec.size)
        kind = more.draw(st.sampled_from(["none", "zeros", "data", "mixed", "noise"]))
        if kind == "none":
            continue
        if kind == "zeros":
            if filled.writer.explicit_zeros:
                filled.writer.place_zeros(start, stop - start)
            want[start:stop] = bytes(stop - start)
            continue
        seed = start // size + 1
        data = np.full(stop - start, seed, np.uint8)
        if kind == "noise":
            data = np.random.default_rng(seed).integers(1, 255, stop - start, dtype=np.uint8)
        if kind == "mixed":
            data[: len(data) // 3 // 512 * 512] = 0
        states = np.full(-(-len(data) // grain), UnitState.DATA, np.uint8)
        states[zero_units(data, grain)] = UnitState.ZERO
        if kind == "mixed" and spec.backing_name and len(states) > 2:
            states[-1] = UnitState.ABSENT
            kept = (len(states) - 1) * grain
            data[kept:] = np.frombuffer(base[start + kept : stop], np.uint8)
        filled.place(start, data.tobytes(), states)
        want[start:stop] = data.tobytes()
    filled.finish()
    assert filled.read(base) == want
    filled.verify()
    if spec.data_file_raw:
        assert filled.data is not None
        assert filled.data.to_bytes() == want


def test_a_range_for_the_host_is_mapped_in_one_piece() -> None:
    geometry = Geometry(cluster_bits=9)
    spec = Qcow2Spec(size=100 * KiB, geometry=geometry)
    filled = Filled(spec)
    storage, host = filled.writer.place_direct(512, 80 * KiB)
    storage.pwrite([b"h" * 80 * KiB], offset=host)
    filled.finish()
    assert filled.read() == bytes(512) + b"h" * 80 * KiB + bytes(20 * KiB - 512)
    filled.verify()


def test_a_new_image_without_data_has_no_data_clusters() -> None:
    spec = Qcow2Spec(size=MiB, geometry=Geometry(cluster_bits=12))
    storage = MemoryStorage()
    layout = plan_layout(spec.geometry, size=MiB, l2_tables=0, data_clusters=0)
    Qcow2BulkWriter(storage, spec, layout).finish()
    assert storage.size() == 4 * 4 * KiB


def test_the_header_is_written_last() -> None:
    storage = RecordingStorage(MemoryStorage())
    spec = Qcow2Spec(size=MiB)
    layout = plan_layout(spec.geometry, size=MiB, l2_tables=1, data_clusters=16)
    writer = Qcow2BulkWriter(storage, spec, layout)
    chunk = Chunk(
        start=0,
        length=64 * KiB,
        states=np.full(1, UnitState.DATA, np.uint8),
        view=memoryview(bytearray(64 * KiB)),
    )
    for write in writer.place(chunk):
        write.run()
    writer.finish()
    assert storage.calls[-1].offset == 0
    assert all(call.offset for call in storage.calls[:-1] if call.operation == "pwrite")


def test_large_preallocations_are_counted_by_steps() -> None:
    spec = Qcow2Spec(size=64 * MiB, geometry=Geometry(cluster_bits=9), preallocation="metadata")
    filled = Filled(spec)
    filled.finish()
    filled.verify()
    assert not filled.writer._refcounts._blocks


@pytest.mark.parametrize(
    ("mode", "operations"),
    [("off", []), ("metadata", []), ("falloc", ["allocate"]), ("full", ["pwrite"] * 2)],
)
def test_a_data_area_gets_its_space(mode: str, operations: list[str]) -> None:
    storage = RecordingStorage(MemoryStorage())
    preallocate(storage, offset=4096, length=MiB + 1, mode=mode)
    assert [call.operation for call in storage.calls] == operations
    assert sum(call.length for call in storage.calls) == (MiB + 1 if operations else 0)


# Refcounts.


@st.composite
def counted(draw: Any) -> tuple[Layout, list[tuple[int, int]]]:
    geometry = Geometry(cluster_bits=9, refcount_order=draw(st.integers(2, 6)))
    layout = plan_layout(geometry, size=MiB, l2_tables=9, data_clusters=3000)
    runs, cursor = [], layout.data_offset // 512
    for length in draw(st.lists(st.integers(1, 700), max_size=6)):
        skip = draw(st.integers(-1, 900))
        first = max(layout.data_offset // 512, cursor + skip)
        runs.append((first, length))
        cursor = first + length
    return layout, runs


@settings(max_examples=100, deadline=None)
@given(case=counted(), eager=st.booleans())
def test_refcounts_are_those_of_a_plain_count(case: Any, eager: bool) -> None:
    layout, runs = case
    storage = MemoryStorage()
    writer = RefcountWriter(storage, layout)
    end = max([layout.data_offset // 512, *(first + length for first, length in runs)])
    end = min(end, layout.refcount_blocks * layout.geometry.refcounts_per_block)
    runs = [(first, min(length, end - first)) for first, length in runs if first < end]
    for first, length in runs:
        writer.add_run(first, length)
        if eager:
            writer.release_before(first)
    writer.add_run(0, layout.data_offset // 512)
    writer.finish(end)
    counts = Counter(range(layout.data_offset // 512))
    for first, length in runs:
        counts.update(range(first, first + length))
    table = np.frombuffer(
        storage.pread(layout.refcount_table_clusters * 512, offset=layout.refcount_table_offset),
        ">u8",
    )
    found: list[int] = []
    for offset in table[table != 0].tolist():
        raw = storage.pread(512, offset=offset).ljust(512, b"\0")
        found += decode_refcounts(raw, layout.geometry.refcount_order).tolist()
    assert found == [counts[index] for index in range(len(found))]
    assert len(found) >= end


def test_finished_blocks_leave_memory() -> None:
    geometry = Geometry(cluster_bits=9)
    layout = plan_layout(geometry, size=MiB, l2_tables=1, data_clusters=256 * 100)
    writer = RefcountWriter(MemoryStorage(), layout)
    first = layout.data_offset // 512
    for cluster in range(first, first + 256 * 90, 64):
        writer.add_run(cluster, 64)
        writer.release_before(cluster)
        assert len(writer._blocks) <= 3


# L2 tables.


def l2_words(storage: MemoryStorage, layout: Layout) -> dict[int, list[int]]:
    raw = storage.pread(layout.l1_entries * 8, offset=layout.l1_offset)
    l1 = np.frombuffer(raw, ">u8").tolist()
    size = layout.geometry.cluster_size
    return {
        index: np.frombuffer(storage.pread(size, offset=entry & ~COPIED), ">u8").tolist()
        for index, entry in enumerate(l1)
        if entry
    }


def test_tables_get_clusters_in_the_order_of_their_first_entry() -> None:
    geometry = Geometry(cluster_bits=9)
    layout = plan_layout(geometry, size=10 * 32 * KiB, l2_tables=10, data_clusters=9)
    storage = MemoryStorage()
    writer = L2Writer(storage, layout, fill=None)
    writer.put(62, np.array([7, 0, 8, 9], np.uint64), None)
    writer.put(70, np.zeros(64 * 5, np.uint64), None)
    writer.put(64 * 9, np.array([5], np.uint64), None)
    writer.finish(all_tables=False)
    tables = l2_words(storage, layout)
    assert sorted(tables) == [0, 1, 9]
    assert writer.tables == 3
    assert (tables[0][62:], tables[1][:3], tables[9][:2]) == ([7, 0], [8, 9, 0], [5, 0])


@pytest.mark.parametrize("extended", [False, True])
def test_what_nothing_was_put_for_is_filled(extended: bool) -> None:
    geometry = Geometry(cluster_bits=14, extended_l2=extended)
    clusters = geometry.l2_entries * 2 + 3
    layout = plan_layout(geometry, size=clusters * 16 * KiB, l2_tables=3, data_clusters=clusters)
    asked: list[tuple[int, int]] = []

    def fill(first: int, count: int) -> Any:
        asked.append((first, count))
        bitmaps = np.full(count, 3, np.uint64) if extended else None
        return np.arange(first, first + count, dtype=np.uint64) + np.uint64(1), bitmaps

    storage = MemoryStorage()
    writer = L2Writer(storage, layout, fill=fill)
    at = geometry.l2_entries
    put = np.array([0, 77], np.uint64)
    writer.put(at, put, np.array([ALL_ALLOCATED, 0], np.uint64) if extended else None)
    writer.finish(all_tables=True)
    assert asked == [(0, at), (at, at), (2 * at, 3)]
    words = l2_words(storage, layout)[1]
    if extended:
        # A bitmap alone keeps the host cluster that was there.
        assert words[:6] == [at + 1, ALL_ALLOCATED, 77, 0, at + 3, 3]
    else:
        assert words[:3] == [at + 1, 77, at + 3]
    assert l2_words(storage, layout)[2][(6 if extended else 3) :] == [0] * (
        2048 - (6 if extended else 3)
    )


# Stored refcounts.


class Sparse(MemoryStorage):
    """Memory that claims to have allocated nothing, as a file full of holes does."""

    def allocated(self) -> int:
        return 0


def test_unwritten_clusters_are_known_by_the_refcounts() -> None:
    spec = Qcow2Spec(size=MiB, geometry=Geometry(cluster_bits=12), preallocation="metadata")
    filled = Filled(spec)
    filled.finish()
    metadata = load_qcow2_metadata(filled.storage, budget=TRUSTED)
    assert not holds_unwritten_clusters(filled.storage, metadata)
    assert holds_unwritten_clusters(Sparse(filled.storage.to_bytes()), metadata)


def test_a_million_names_of_one_refcount_block_are_not_followed() -> None:
    """A fan-in: the file has a few clusters, its refcount table names one block over and over."""
    spec = Qcow2Spec(size=MiB, geometry=Geometry(cluster_bits=16, refcount_order=6))
    filled = Filled(spec)
    filled.finish()
    raw = bytearray(filled.storage.to_bytes())
    metadata = load_qcow2_metadata(filled.storage, budget=TRUSTED)
    block = len(raw)
    table = metadata.header.refcount_table_offset
    raw[table : table + 64 * KiB] = block.to_bytes(8, "big") * (8 * KiB)
    raw += bytes(64 * KiB)
    storage = RecordingStorage(Sparse(raw))
    assert not holds_unwritten_clusters(storage, metadata)
    assert sum(call.length for call in storage.of("pread")) <= 2 * 64 * KiB


def test_blocks_that_cannot_be_are_left_out() -> None:
    storage = MemoryStorage(bytes(8 * KiB))
    table = np.array([0, 4 * KiB, 100, 1 << 20, 4 * KiB], np.uint64)
    assert [index for index, _ in iter_blocks(storage, table, cluster_size=4 * KiB)] == [1, 4]


def test_a_refcount_table_that_the_file_cuts_ends_in_zeros() -> None:
    spec = Qcow2Spec(size=MiB, geometry=Geometry(cluster_bits=12))
    filled = Filled(spec)
    filled.finish()
    metadata = load_qcow2_metadata(filled.storage, budget=TRUSTED)
    filled.storage.truncate(4 * KiB + 16)
    words = load_refcount_table(filled.storage, metadata)
    assert len(words) == 512
    assert (words[0] != 0, words[2:].any()) == (True, False)
