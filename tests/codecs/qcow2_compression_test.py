"""Compressed clusters: what is written, what is read, and what is refused."""

from __future__ import annotations

import contextlib
import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.compression import (
    ZLIB,
    ZSTD,
    BadCluster,
    decompress,
    make_compressor,
)
from qcowkit.errors import RequestError
from qcowkit.units import GiB, KiB, MiB

SIZE = 64 * KiB
KINDS = [(kind, level) for kind in (ZLIB, ZSTD) for level in (None, 1, 6, 9)] + [(ZSTD, 22)]


def text(size: int = SIZE, seed: int = 1) -> bytes:
    """Words: short and long repeats at all distances."""
    source = random.Random(seed)
    words = [source.randbytes(source.randint(2, 40)) for _ in range(200)]
    out = bytearray()
    while len(out) < size:
        out += source.choice(words)
    return bytes(out[:size])


def frame(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


@pytest.mark.parametrize(("kind", "level"), KINDS)
@pytest.mark.parametrize("size", [512, SIZE, 2 * MiB])
def test_a_cluster_comes_back(kind: str, level: int | None, size: int) -> None:
    data = text(size)
    blob = make_compressor(kind, level)(memoryview(data))
    assert decompress(kind, blob, size=size) == data


@pytest.mark.parametrize("level", [None, 1, 2, 5, 9])
def test_deflate_is_written_for_readers_with_a_window_of_12_bits(level: int | None) -> None:
    for data in (text(MiB), bytes(MiB), random.Random(2).randbytes(3000) * 30):
        blob = make_compressor(ZLIB, level)(data)
        assert zlib.decompressobj(-12).decompress(blob) == data


def test_matches_beyond_the_window_of_12_bits_are_read() -> None:
    far = random.Random(3).randbytes(30_000)
    data = (far + far + far)[:SIZE]
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    blob = stream.compress(data) + stream.flush()
    with pytest.raises(zlib.error):
        zlib.decompressobj(-12).decompress(blob)
    assert decompress(ZLIB, blob, size=SIZE) == data


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
@given(junk=st.binary(max_size=600))
def test_what_follows_the_stream_is_not_looked_at(kind: str, junk: bytes) -> None:
    data = text(4 * KiB)
    blob = make_compressor(kind, None)(data)
    assert decompress(kind, blob + junk, size=4 * KiB) == data


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
def test_a_stream_that_ends_early_is_refused(kind: str) -> None:
    blob = make_compressor(kind, None)(text())
    for cut in (0, 1, len(blob) // 2):
        with pytest.raises(BadCluster):
            decompress(kind, blob[:cut], size=SIZE)


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
@given(data=st.binary(max_size=200))
def test_any_bytes_are_one_cluster_or_refused(kind: str, data: bytes) -> None:
    with contextlib.suppress(BadCluster):
        assert len(decompress(kind, data, size=512)) == 512


def test_a_short_cluster_is_refused_with_both_lengths() -> None:
    blob = make_compressor(ZLIB, None)(bytes(1024))
    with pytest.raises(BadCluster, match="compressed cluster holds 1024 bytes, expected 4096"):
        decompress(ZLIB, blob, size=4096)


@pytest.mark.parametrize("known", [False, True])
def test_several_zstd_frames_make_one_cluster(known: bool) -> None:
    data = text(3 * 4 * KiB)
    parts = [data[at : at + 4 * KiB] for at in range(0, len(data), 4 * KiB)]
    blob = b"".join(frame(part, write_content_size=known) for part in parts)
    assert decompress(ZSTD, blob, size=len(data)) == data
    assert decompress(ZSTD, blob + b"\x28junk", size=len(data)) == data


def test_empty_and_skippable_frames_are_passed_over() -> None:
    data = text(4 * KiB)
    skip = struct.pack("<II", 0x184D2A50, 9) + b"ignored.."
    blob = skip + frame(b"") * 50 + skip + frame(data[:1000]) + frame(b"") + frame(data[1000:])
    assert decompress(ZSTD, blob, size=4 * KiB) == data
    with pytest.raises(BadCluster, match="holds 0 bytes"):
        decompress(ZSTD, (skip + frame(b"")) * 50, size=4 * KiB)


@pytest.mark.parametrize("known", [False, True])
def test_a_frame_larger_than_the_cluster_is_cut_there(known: bool) -> None:
    blob = frame(b"z" * 8 * MiB, write_content_size=known)
    assert decompress(ZSTD, blob, size=SIZE) == b"z" * SIZE


@pytest.mark.parametrize("claimed", [SIZE + 1, GiB, 1 << 50, (1 << 64) - 3])
def test_a_size_that_a_frame_claims_is_not_allocated(claimed: int) -> None:
    head = struct.pack("<IBBQ", 0xFD2FB528, 0xC0, 0, claimed)
    with pytest.raises(BadCluster):
        decompress(ZSTD, head + bytes(100), size=SIZE)


def test_a_deflate_bomb_is_cut_at_the_cluster() -> None:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    blob = stream.compress(bytes(64 * MiB)) + stream.flush()
    assert decompress(ZLIB, blob, size=SIZE) == bytes(SIZE)


@pytest.mark.parametrize(("log", "sound"), [(23, True), (24, False)])
def test_a_zstd_window_above_8_mib_is_refused(log: int, sound: bool) -> None:
    data = random.Random(4).randbytes(SIZE)
    parameters = zstandard.ZstdCompressionParameters(window_log=log, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    blob = stream.compress(data) + stream.flush()
    if sound:
        assert decompress(ZSTD, blob, size=SIZE) == data
    else:
        with pytest.raises(BadCluster, match="not a zstd stream"):
            decompress(ZSTD, blob, size=SIZE)


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
def test_threads_do_not_disturb_one_another(kind: str) -> None:
    compress = make_compressor(kind, 3)

    def there_and_back(seed: int) -> bool:
        data = text(16 * KiB, seed)
        return decompress(kind, compress(data), size=16 * KiB) == data

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(there_and_back, range(200)))


@pytest.mark.parametrize(
    ("kind", "level", "message"),
    [
        (ZLIB, 0, "compression_level 0 is not in 1..9 for zlib"),
        (ZLIB, 10, "compression_level 10 is not in 1..9 for zlib"),
        (ZSTD, 0, "compression_level 0 is not in 1..22 for zstd"),
        (ZSTD, 23, "compression_level 23 is not in 1..22 for zstd"),
        ("lzo", None, "compression type 'lzo' is not one of zlib, zstd"),
    ],
)
def test_what_no_compressor_can_be_is_refused(kind: str, level: int | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_compressor(kind, level)
