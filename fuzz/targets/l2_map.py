"""L2 entries: the vector path maps what the scalar path allows, and nothing else."""

from __future__ import annotations

import contextlib

import numpy as np

from qcowkit.codecs.qcow2.entries import (
    BadEntry,
    EntryRules,
    check_l1,
    entry_fault,
    map_entries,
    split_words,
)
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.errors import CorruptMetadata


def target(data: bytes) -> None:
    """data: cluster bits, what rules hold (2 bytes), then the words of a table,
    at least one entry."""
    if len(data) < 18:
        return
    extended = bool(data[1] & 1)
    bits = 14 + data[0] % 8 if extended else 9 + data[0] % 13
    geometry = Geometry(cluster_bits=bits, extended_l2=extended)
    rules = EntryRules(
        geometry=geometry,
        version=2 if data[1] & 2 and not extended else 3,
        external_data=bool(data[1] & 4),
        file_size=1 << 40 if data[1] & 8 else 1 << 20,
    )
    raw = data[2 : 2 + (len(data) - 2) // 16 * 16]
    words = np.frombuffer(raw, dtype=">u8").astype(np.uint64)
    with contextlib.suppress(CorruptMetadata):
        check_l1(words, geometry=geometry, host_offset=0, file_size=rules.file_size)
    entries, bitmaps = split_words(words, geometry=geometry)
    faults = [
        entry_fault(entry, bitmap, rules=rules)
        for entry, bitmap in zip(
            entries.tolist(),
            [0] * len(entries) if bitmaps is None else bitmaps.tolist(),
            strict=True,
        )
    ]
    starts = np.arange(len(entries), dtype=np.int64) << bits
    blamed = None
    try:
        map_entries(entries, bitmaps, starts, rules=rules).check()
    except BadEntry as error:
        blamed = error.index
    first = next((index for index, fault in enumerate(faults) if fault is not None), None)
    assert blamed == first, f"entry {blamed} is blamed for {first}"


def seeds() -> list[bytes]:
    """Every state, plain and with subclusters."""
    words = (0, 1 << 63 | 0x10000, 0x20001, 1, 1 << 62 | 0x30003, 0xFFFF_FFFF)
    plain = b"".join(word.to_bytes(8, "big") for word in words)
    return [bytes([3, 8]) + plain, bytes([2, 9]) + plain, bytes([7, 12]) + plain]
