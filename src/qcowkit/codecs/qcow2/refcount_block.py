"""Refcount blocks of every width as arrays. Pure.

Source: the qcow2 specification, "Host cluster management". Widths below 8 bits fill each byte from
its least significant bits; wider ones are big-endian."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcowkit.errors import RequestError

RESERVED_TABLE_BITS = 0x1FF
_WIDE = {3: "u1", 4: ">u2", 5: ">u4", 6: ">u8"}


def decode_refcounts(raw: bytes | bytearray | memoryview, order: int) -> npt.NDArray[np.uint64]:
    """Counts of one or more blocks, shape (len(raw) * 8 >> order,), uint64."""
    if order >= 3:
        return np.frombuffer(raw, dtype=_WIDE[order]).astype(np.uint64)
    return _narrow_bits(raw, order).astype(np.uint64)


def view_refcounts(raw: bytes | bytearray | memoryview, order: int) -> npt.NDArray[Any]:
    """The same counts in the narrowest type, big-endian where they are so on disk: no copy is made
    for widths of 8 bits and more."""
    return np.frombuffer(raw, dtype=_WIDE[order]) if order >= 3 else _narrow_bits(raw, order)


def count_used(raw: bytes | bytearray | memoryview, order: int) -> int:
    """How many counts are not zero."""
    if order >= 3:
        return int(np.count_nonzero(np.frombuffer(raw, dtype=_WIDE[order])))
    return int(np.count_nonzero(_narrow_bits(raw, order)))


def encode_refcounts(counts: npt.NDArray[Any], order: int) -> bytes:
    """The block's bytes. counts: shape (n,), n a multiple of 8 for widths below 8 bits.

    Raises RequestError for a count that does not fit."""
    bits = 1 << order
    if len(counts) and bits < 64 and int(counts.max()) >> bits:
        raise RequestError(f"refcount {int(counts.max())} does not fit in {bits} bits")
    if order >= 3:
        return counts.astype(_WIDE[order]).tobytes()
    per_byte = 8 // bits
    rows = counts.astype(np.uint8).reshape(-1, per_byte)
    shifts = (np.arange(per_byte) * bits).astype(np.uint8)
    packed = np.bitwise_or.reduce(rows << shifts, axis=1)
    return bytes(packed.astype(np.uint8))


def _narrow_bits(raw: bytes | bytearray | memoryview, order: int) -> npt.NDArray[np.uint8]:
    bits = 1 << order
    values = np.frombuffer(raw, dtype=np.uint8)
    shifts = (np.arange(8 // bits) * bits).astype(np.uint8)
    return ((values[:, None] >> shifts) & np.uint8((1 << bits) - 1)).ravel()
