"""Compressed clusters: any bytes are one cluster of guest data, or refused."""

from __future__ import annotations

from qcowkit.codecs.qcow2.compression import make_compressor
from qcowkit.engine.qcow2.clusters import ClusterReader
from qcowkit.storage.memory import MemoryStorage

_KINDS = ("zlib", "zstd")


def target(data: bytes) -> None:
    """data: kind and cluster bits (1 byte), then the compressed bytes."""
    if not data:
        return
    size = 1 << 9 + data[0] // 2 % 13
    reader = ClusterReader(storage=MemoryStorage(data), kind=_KINDS[data[0] & 1], cluster_size=size)
    assert len(reader.decode(data[1:], host=1)) == size, "not one cluster"


def seeds() -> list[bytes]:
    """Text, noise and zeros of both kinds."""
    pages = (b"text " * 200, bytes(range(256)) * 4, bytes(1024))
    return [
        bytes([kind + 2]) + make_compressor(name, None)(page.ljust(1024, b".")[:1024])
        for kind, name in enumerate(_KINDS)
        for page in pages
    ]
