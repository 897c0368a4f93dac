"""Compressed clusters: one cluster in, one blob out, and back. Pure.

Deflate is written with a 12-bit window, which every reader accepts, and read with 15, since
writers exist whose matches reach further. Source: the specification, "Compressed clusters"."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from typing import Final, cast

import zstandard
from isal import igzip_lib, isal_zlib
from zlib_ng import zlib_ng

from qcowkit.errors import RequestError
from qcowkit.units import MiB

ZLIB: Final = "zlib"
ZSTD: Final = "zstd"
COMPRESSION_TYPES: Final = (ZLIB, ZSTD)
WRITE_WINDOW_BITS = 12
READ_WINDOW_BITS = 15
MAX_ZSTD_WINDOW = 8 * MiB
DEFAULT_ZSTD_LEVEL = 1

Bytes = bytes | bytearray | memoryview
Compressor = Callable[[Bytes], bytes]

# Not zlib.error; the stub declares an instance where there is a class.
_INFLATE_ERROR = cast("type[Exception]", isal_zlib.error)

# Contexts of the zstd library must not be shared by threads; each thread keeps its own.
_local = threading.local()


class BadCluster(Exception):
    """Internal: the bytes do not decode to one cluster; the engine adds the place."""


def make_compressor(kind: str, level: int | None) -> Compressor:
    """A thread-safe function from one cluster to its compressed bytes.

    kind: "zlib" or "zstd". level: None for the fastest sound choice; 1 to 9 for zlib, 1 to 22 for
    zstd. Raises RequestError for anything else."""
    if kind == ZLIB:
        return _deflate(level)
    if kind != ZSTD:
        raise RequestError(
            f"compression type {kind!r} is not one of {', '.join(COMPRESSION_TYPES)}"
        )
    if level is not None and not 1 <= level <= 22:
        raise RequestError(f"compression_level {level} is not in 1..22 for zstd")
    chosen = level or DEFAULT_ZSTD_LEVEL

    def compress(data: Bytes) -> bytes:
        contexts = _local.__dict__.setdefault("compressors", {})
        context = contexts.get(chosen)
        if context is None:
            context = contexts[chosen] = zstandard.ZstdCompressor(
                level=chosen, write_content_size=False, write_checksum=False
            )
        result: bytes = context.compress(data)
        return result

    return compress


def _deflate(level: int | None) -> Compressor:
    if level is not None and not 1 <= level <= 9:
        raise RequestError(f"compression_level {level} is not in 1..9 for zlib")
    if level is None or level == 1:
        return _isal_deflate
    library = zlib if level == 9 else zlib_ng

    def compress(data: Bytes) -> bytes:
        stream = library.compressobj(level, library.DEFLATED, -WRITE_WINDOW_BITS, 9)
        return bytes(stream.compress(data) + stream.flush())

    return compress


def _isal_deflate(data: Bytes) -> bytes:
    return igzip_lib.compress(data, 1, igzip_lib.COMP_DEFLATE, 0, WRITE_WINDOW_BITS)


def decompress(kind: str, data: Bytes, *, size: int) -> bytes:
    """Exactly `size` bytes of one cluster; what follows them in `data` is padding or a neighbour's.

    Raises BadCluster when the data is not of the kind or ends before `size` bytes."""
    out = _inflate(data, size) if kind == ZLIB else _unzstd(data, size)
    if len(out) != size:
        raise BadCluster(f"compressed cluster holds {len(out)} bytes, expected {size}")
    return out


def _inflate(data: Bytes, size: int) -> bytes:
    try:
        return isal_zlib.decompressobj(-READ_WINDOW_BITS).decompress(data, size)
    except _INFLATE_ERROR as error:
        raise BadCluster(f"not a deflate stream: {error}") from error


def _unzstd(data: Bytes, size: int) -> bytes:
    context = _local.__dict__.get("decompressor")
    if context is None:
        context = _local.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    try:
        # A size that the frame declares is what the library would allocate, whatever our limit.
        if zstandard.frame_content_size(data) <= size:
            out: bytes = context.decompress(data, max_output_size=size, allow_extra_data=True)
            if len(out) == size:
                return out
    except zstandard.ZstdError:
        # More than a cluster in the frame, or damage: the incremental decoder tells which.
        pass
    return _unzstd_frames(data, size)


def _unzstd_frames(data: Bytes, size: int) -> bytes:
    """Several frames, one behind the other, until the cluster is full."""
    decoder = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    out = bytearray()
    try:
        with decoder.stream_reader(data, read_across_frames=True) as reader:
            # A frame of no bytes yields nothing but does end, so this loop always advances.
            while len(out) < size:
                piece = reader.read(size - len(out))
                if not piece:
                    break
                out += piece
    except zstandard.ZstdError as error:
        raise BadCluster(f"not a zstd stream: {error}") from error
    return bytes(out)
