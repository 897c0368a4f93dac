"""Chains of layers as one disk: against bytes composed by hand."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.compression import make_compressor
from qcowkit.engine.holes import MAX_PIECES, load_host_data, mark_holes
from qcowkit.engine.qcow2 import clusters as clusters_module
from qcowkit.engine.qcow2.clusters import ClusterReader
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.engine.ranges import check_range
from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import Extent, Flag, make_table
from qcowkit.image.chain import WINDOW_ENTRIES, Chain, data_rows
from qcowkit.image.metadata import RawMetadata
from qcowkit.image.plain import map_flat, read_plain
from qcowkit.image.qcow2 import Qcow2Image
from qcowkit.image.raw import RawImage
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import Compressed, Data, Zero, build_qcow2
from qcowkit.testing.recording import RecordingStorage
from qcowkit.units import KiB, MiB

COMPRESS = make_compressor("zlib", None)


def raw_image(data: bytes) -> RawImage:
    return RawImage(RawMetadata(virtual_size=len(data)), MemoryStorage(data))


def qcow2_image(**spec: Any) -> Qcow2Image:
    storage = MemoryStorage(build_qcow2(**spec).to_bytes())
    metadata = load_qcow2_metadata(storage, budget=TRUSTED)
    return Qcow2Image(metadata, storage, data_storage=None, budget=TRUSTED)


@st.composite
def layers(draw: Any, *, seed: int) -> tuple[Any, dict[int, bytes], int]:
    """An image of any size, and what each 512 guest bytes of it hold; a missing key shows more."""
    if draw(st.integers(0, 4)) == 0:
        data = draw(st.binary(min_size=0, max_size=8)) * 512
        return (
            raw_image(data),
            {at: data[at : at + 512] for at in range(0, len(data), 512)},
            len(data),
        )
    extended = draw(st.booleans())
    bits = 14 if extended else draw(st.integers(9, 12))
    cluster, part = 1 << bits, 512
    size = draw(st.integers(0, 4 * cluster // 512)) * 512
    facts: dict[int, bytes] = {}
    spec: dict[int, Any] = {}
    for index in range(-(-size // cluster)):
        kind = draw(st.sampled_from(["none", "data", "zero", "packed"]))
        payload = bytes([seed * 40 + index + 1]) * cluster
        bitmap = draw(st.sampled_from([0xFFFF_FFFF, 0x0000_0001, 0x8000_00F0]))
        if kind == "none":
            continue
        if kind == "data":
            bitmap = bitmap | 0x0000_0F00 << 32 if extended and bitmap != 0xFFFF_FFFF else bitmap
            spec[index] = Data(payload=payload, bitmap=bitmap)
        elif kind == "zero":
            spec[index] = Zero(payload=payload if draw(st.booleans()) else None)
        else:
            spec[index] = Compressed(payload=COMPRESS(payload))
        for at in range(index * cluster, min(size, (index + 1) * cluster), part):
            sub = (at - index * cluster) * 32 // cluster
            zero = kind == "zero" or (kind == "data" and extended and bitmap >> 32 >> sub & 1)
            hidden = kind == "data" and extended and not bitmap >> sub & 1 and not zero
            if not hidden:
                facts[at] = bytes(part) if zero else payload[:part]
    image = qcow2_image(
        version=3, size=size, cluster_bits=bits, extended_l2=extended, clusters=spec
    )
    return image, facts, size


@st.composite
def chains(draw: Any) -> tuple[Chain, bytes]:
    """A chain, and its content: top first, and nothing from beyond the end of a layer between."""
    parts = [draw(layers(seed=seed)) for seed in range(draw(st.integers(1, 4)))]
    images = [image for image, _, _ in parts]
    out = bytearray(images[0].size)
    for at in range(0, images[0].size, 512):
        for _, facts, size in parts:
            if at >= size:
                break
            if at in facts:
                out[at : at + 512] = facts[at]
                break
    return Chain(images), bytes(out)


@settings(max_examples=200, deadline=None)
@given(case=chains(), more=st.data())
def test_a_chain_reads_as_its_layers_stacked_by_hand(case: Any, more: Any) -> None:
    chain, want = case
    assert chain.read(offset=0, length=chain.size) == want
    start = more.draw(st.integers(0, chain.size))
    length = more.draw(st.integers(0, chain.size - start))
    assert chain.read(offset=start, length=length) == want[start : start + length]


@settings(max_examples=150, deadline=None)
@given(case=chains(), limit=st.sampled_from([1, 2, 5, 64, 1000]), more=st.data())
def test_limited_extents_advance_and_say_what_is_read(case: Any, limit: int, more: Any) -> None:
    chain, want = case
    position = more.draw(st.integers(0, chain.size))
    while position < chain.size:
        table = chain.extents(start=position, length=chain.size - position, limit=limit)
        table.check()
        assert position == table.begin < table.end <= chain.size
        for row in table:
            if not row.flags & Flag.DATA:
                assert want[row.start : row.start + row.length] == bytes(row.length)
        buffer = bytearray(b"\xcc" * (table.end - table.begin))
        chain.read_table(table, memoryview(buffer))
        assert buffer == want[table.begin : table.end]
        position = table.end


@settings(max_examples=100, deadline=None)
@given(case=chains(), bits=st.integers(0, 16), more=st.data())
def test_windows_end_at_multiples_of_the_alignment(case: Any, bits: int, more: Any) -> None:
    chain, _ = case
    start = more.draw(st.integers(0, chain.size))
    length = more.draw(st.integers(0, chain.size - start))
    position = start
    for table in chain.iter_extents(start=start, length=length, align=1 << bits):
        assert table.begin == position
        position = table.end
        assert position == start + length or position % (1 << bits) == 0
    assert position == start + length


def test_windows_are_aligned_even_where_tables_are_longer() -> None:
    clusters = {index: bytes([1]) * 512 for index in range(0, 8192, 2)}
    chain = Chain([qcow2_image(cluster_bits=9, size=4 * MiB, clusters=clusters)] * 64)
    for align, ends in ((MiB, [2 * MiB, 4 * MiB]), (4 * MiB, [4 * MiB])):
        assert [table.end for table in chain.iter_extents(align=align)] == ends


def test_a_deep_chain_takes_shorter_windows() -> None:
    seen: list[int | None] = []

    class Watched(RawImage):
        def extents(self, *, start: int, length: int, limit: int | None = None) -> Any:
            seen.append(limit)
            return super().extents(start=start, length=length, limit=limit)

    one = Watched(RawMetadata(virtual_size=512), MemoryStorage(bytes(512)))
    list(Chain([one]).iter_extents())
    list(Chain([one] * 16).iter_extents())
    assert seen == [WINDOW_ENTRIES, WINDOW_ENTRIES // 16]


def test_a_base_beyond_a_short_middle_layer_does_not_show() -> None:
    empty = {"version": 3, "cluster_bits": 9}
    top, middle = qcow2_image(size=2048, **empty), qcow2_image(size=1024, **empty)
    chain = Chain([top, middle, raw_image(b"b" * 2048)])
    assert chain.read(offset=0, length=2048) == b"b" * 1024 + bytes(1024)
    rows = [(row.start, row.length, row.layer, row.flags) for row in chain.extents()]
    assert rows == [(0, 1024, 2, Flag.DATA | Flag.PRESENT), (1024, 1024, 0, Flag.NONE)]


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 513), (513, 0), (0, -1)])
def test_a_range_that_leaves_the_disk_is_refused(offset: int, length: int) -> None:
    chain = Chain([raw_image(b"r" * 512)])
    with pytest.raises(RequestError, match="is outside the disk of 0x200 bytes"):
        chain.read(offset=offset, length=length)
    with pytest.raises(RequestError, match="outside"):
        chain.extents(start=offset, length=length)


def test_any_writable_buffer_can_be_read_into() -> None:
    chain = Chain([raw_image(bytes(range(256)) * 4)])
    array = np.zeros((2, 128), np.uint16)
    chain.read_into(array, offset=256)
    assert array.tobytes() == (bytes(range(256)) * 4)[256:768]
    words = np.zeros(3, np.uint64)
    chain.read_into(words.data, offset=1)
    assert words.tobytes() == bytes(range(1, 25))
    chain.read_into(bytearray(), offset=1024)


def test_long_reads_are_cut_into_windows() -> None:
    data = bytes(range(256)) * (20 * MiB // 256)
    assert Chain([raw_image(data)]).read(offset=5, length=len(data) - 6) == data[5:-1]


def test_a_chain_says_what_it_is_and_closes_all() -> None:
    images = [qcow2_image(cluster_bits=12), raw_image(b"")]
    with Chain(images) as chain:
        assert (chain.format, chain.cluster_size, chain.warnings) == ("qcow2", 4096, ())
    for image in images:
        with pytest.raises(Exception, match="EBADF"):
            image.data_storage.size()


# File objects.


def test_a_buffered_reader_works_over_a_disk() -> None:
    data = bytes(range(256)) * 100
    chain = Chain([raw_image(data)])
    with io.BufferedReader(chain.open_file(), 1000) as file:
        assert file.read(3) == data[:3]
        file.seek(-10, os.SEEK_END)
        assert file.read() == data[-10:]
        assert file.read(1) == b""
        file.seek(512)
        assert file.read1(5) == data[512:517]
    assert chain.size == len(data)


def test_a_text_wrapper_reads_lines_of_a_disk() -> None:
    chain = Chain([raw_image(b"one\ntwo\n".ljust(512, b"\0"))])
    with io.TextIOWrapper(io.BufferedReader(chain.open_file())) as file:
        assert [next(file), next(file)] == ["one\n", "two\n"]


def test_the_cursor_goes_anywhere_but_below_zero() -> None:
    file = Chain([raw_image(b"x" * 512)]).open_file()
    assert (file.seek(600), file.tell(), file.read(10)) == (600, 600, b"")
    assert file.seek(-100, os.SEEK_CUR) == 500
    assert file.read() == b"x" * 12
    assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
    with pytest.raises(RequestError, match="file position -1 is negative"):
        file.seek(-1)
    with pytest.raises(RequestError, match="whence 7 is not one of 0, 1, 2"):
        file.seek(0, 7)
    assert file.tell() == 512


def test_a_closed_file_object_is_closed_and_the_disk_is_not() -> None:
    chain = Chain([raw_image(b"x" * 512)])
    file = chain.open_file()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.readinto(bytearray(4))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="closed"):
        file.seek(0)
    assert chain.read(offset=0, length=1) == b"x"


# Compressed clusters.


def packed(count: int, *, bits: int = 12) -> dict[int, Any]:
    return {
        index: Compressed(payload=COMPRESS(bytes([index]) * (1 << bits))) for index in range(count)
    }


def counting_decoder(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    decoded: list[int] = []
    decompress = clusters_module.decompress

    def count(kind: str, data: Any, *, size: int) -> bytes:
        decoded.append(size)
        return decompress(kind, data, size=size)

    monkeypatch.setattr(clusters_module, "decompress", count)
    return decoded


def test_a_cluster_that_upper_layers_cut_to_pieces_is_decoded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or else one read of a few kilobytes would inflate megabytes, over and over."""
    top = qcow2_image(
        cluster_bits=9, size=16 * KiB, clusters=dict.fromkeys(range(0, 32, 2), b"t" * 512)
    )
    base = qcow2_image(cluster_bits=14, size=16 * KiB, clusters=packed(1, bits=14))
    decoded = counting_decoder(monkeypatch)
    assert Chain([top, base]).read(offset=0, length=16 * KiB) == (b"t" * 512 + bytes(512)) * 16
    assert len(decoded) == 1


def test_small_reads_of_one_cluster_decode_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain([qcow2_image(cluster_bits=16, size=128 * KiB, clusters=packed(2, bits=16))])
    decoded = counting_decoder(monkeypatch)
    for start in range(0, 64 * KiB, 4 * KiB):
        assert chain.read(offset=start, length=4 * KiB) == bytes(4 * KiB)
    assert len(decoded) == 1


@pytest.mark.pinned("clusters of 4 KiB", "extended_l2", "cluster_size=512")
def test_neighbours_in_the_file_share_a_read() -> None:
    image = qcow2_image(size=128 * KiB, clusters=packed(32))
    storage = RecordingStorage(image.storage)
    reader = ClusterReader(storage, kind="zlib", cluster_size=4 * KiB)
    buffer = bytearray(128 * KiB)
    rows = list(image.extents(start=0, length=128 * KiB))
    reader.read_into(rows, memoryview(buffer), base=0)
    assert buffer == b"".join(bytes([index]) * 4 * KiB for index in range(32))
    assert len(storage.of("pread")) == 1


@pytest.mark.pinned("clusters of 4 KiB", "extended_l2")
def test_a_damaged_cluster_is_named_by_its_place() -> None:
    image = qcow2_image(size=8 * KiB, clusters={0: Compressed(payload=b"\xff" * 100)})
    (row, _) = image.extents(start=0, length=8 * KiB)
    with pytest.raises(
        CorruptMetadata, match=f"zlib compressed cluster at host offset {row.host:#x}: not a"
    ):
        Chain([image]).read(offset=0, length=1)


# Plain runs and holes.


class Holes(MemoryStorage):
    """Memory with data only in the pieces that were named."""

    def __init__(self, data: bytes, pieces: Sequence[tuple[int, int]]) -> None:
        super().__init__(data)
        self.pieces = pieces

    def iter_data(self, *, offset: int, length: int) -> Any:
        for start, size in self.pieces:
            first, end = max(start, offset), min(start + size, offset + length)
            if first < end:
                yield first, end - first


@given(
    cuts=st.lists(st.integers(0, 64), max_size=10),
    start=st.integers(0, 64),
    length=st.integers(0, 64),
    limit=st.sampled_from([None, 1, 2]),
)
def test_holes_of_a_flat_file_are_present_zeros(
    cuts: list[int], start: int, length: int, limit: int | None
) -> None:
    edges = sorted(set(cuts))
    pieces = [(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=False)]
    length = min(length, 64 - start)
    table = map_flat(Holes(bytes(64), pieces), start=start, length=length, limit=limit)
    table.check()
    data = {at for first, size in pieces for at in range(first, first + size)}
    assert table.end <= start + length
    assert table.end == start + length or (limit is not None and len(table) >= limit) or not length
    for row in table:
        assert row.host == row.start
        for at in range(row.start, row.start + row.length):
            assert bool(row.flags & Flag.DATA) == (at in data)
            assert row.flags & Flag.PRESENT


@pytest.mark.pinned("clusters of 4 KiB", "extended_l2", "cluster_size=512")
def test_holes_under_data_extents_are_zero_as_well() -> None:
    image = qcow2_image(
        size=16 * KiB, clusters={0: b"a" * 4096, 1: b"b" * 4096, 3: Zero(payload=b"c" * 4096)}
    )
    table = image.extents(start=0, length=16 * KiB)
    host = int(table.host[0])
    holes = Holes(bytes(64 * KiB), [(host + 1024, 1024), (host + 8192, 4096)])
    data = load_host_data(holes)
    assert data is not None
    marked = mark_holes(table, data)
    marked.check()
    assert (marked.begin, marked.end) == (0, 16 * KiB)
    plain = [(row.start, row.length, bool(row.flags & Flag.ZERO)) for row in marked]
    assert plain == [
        (0, 1024, True),
        (1024, 1024, False),
        (2048, 6144, True),
        (8192, 4096, False),
        (12288, 4096, True),
    ]
    assert len(data_rows(marked)) == 1


def test_host_clusters_mapped_over_and_over_are_not_cut_at_every_hole() -> None:
    """A fan-in: a million rows of one host range with a thousand holes."""
    rows = 1 << 17
    length = 64 * KiB
    table = make_table(
        np.arange(rows, dtype=np.int64) * length, length, Flag.DATA | Flag.PRESENT, host=length
    )
    starts = np.arange(length, 2 * length, 1024, dtype=np.int64)
    data = RangeSet.of(starts, starts + 512)
    assert rows * len(starts) > MAX_PIECES
    assert mark_holes(table, data) is table
    few = mark_holes(table.take(slice(0, 2)), data)
    assert len(few) == 4 * len(starts)


def test_what_the_file_lacks_reads_as_zeros() -> None:
    buffer = bytearray(b"\xcc" * 1024)
    rows = [
        Extent(512, 512, Flag.DATA, 0, 100, 0),
        Extent(1024, 512, Flag.DATA, 0, 4096, 0),
    ]
    read_plain(MemoryStorage(b"s" * 200), rows, memoryview(buffer), base=512)
    assert buffer == b"s" * 100 + bytes(924)


def test_the_words_of_a_range_outside_the_disk() -> None:
    with pytest.raises(RequestError) as caught:
        check_range(start=512, length=1, size=512)
    assert str(caught.value) == "range 0x200 + 0x1 is outside the disk of 0x200 bytes"
