"""Images that the benchmarks need and no tool makes quickly: written table by table."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
_COPIED = 1 << 63
_ENTRIES = CLUSTER // 8
_COUNTS = CLUSTER // 2


def make_fragmented(path: Path, extents: int = 1_000_000) -> None:
    """A qcow2 of `extents` data clusters of 64 KiB, none beside another in the guest or the file.

    Every second guest cluster is allocated, and neighbours trade places in the file. The data are
    holes: the file takes about 10 bytes of host space an extent. `qemu-img check` calls it clean."""
    guest = 2 * extents
    l2_tables = -(-guest // _ENTRIES)
    l1_clusters = -(-l2_tables * 8 // CLUSTER)
    first_l2 = 1 + l1_clusters
    first_data = first_l2 + l2_tables
    end, tables, blocks = _refcount_space(first_data + extents)
    host = first_data + (np.arange(extents, dtype=np.uint64) ^ np.uint64(1))
    if extents % 2:
        host[-1] = first_data + extents - 1
    entries = np.zeros(l2_tables * _ENTRIES, dtype=">u8")
    entries[:guest:2] = host << np.uint64(CLUSTER_BITS) | np.uint64(_COPIED)
    l1 = np.arange(first_l2, first_data, dtype=np.uint64) << np.uint64(CLUSTER_BITS)
    first_table = first_data + extents
    counts = np.zeros(blocks * _COUNTS, dtype=">u2")
    counts[:end] = 1
    table = np.arange(first_table + tables, end, dtype=np.uint64) << np.uint64(CLUSTER_BITS)
    with path.open("wb") as file:
        file.truncate(end * CLUSTER)
        file.write(_header(guest * CLUSTER, l2_tables, CLUSTER, first_table * CLUSTER, tables))
        for offset, words in (
            (1, (l1 | np.uint64(_COPIED)).astype(">u8")),
            (first_l2, entries),
            (first_table, table.astype(">u8")),
            (first_table + tables, counts),
        ):
            file.seek(offset * CLUSTER)
            file.write(words.tobytes())


def _refcount_space(used: int) -> tuple[int, int, int]:
    """(clusters in all, of the refcount table, of its blocks) behind `used` other clusters."""
    tables = blocks = 1
    while True:
        end = used + tables + blocks
        needed = -(-end // _COUNTS)
        needed_tables = -(-needed * 8 // CLUSTER)
        if (needed_tables, needed) == (tables, blocks):
            return end, tables, blocks
        tables, blocks = needed_tables, needed


def _header(size: int, l1_size: int, l1: int, table: int, table_clusters: int) -> bytes:
    """A version 3 header without extensions."""
    fixed = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, CLUSTER_BITS, size, 0, l1_size, l1,
                        table, table_clusters, 0, 0)
    return fixed + struct.pack(">QQQIIQ", 0, 0, 0, 4, 112, 0)
