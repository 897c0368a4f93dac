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


class BadCount(Exception):
    """Internal: the count of entry `index` would leave its range; the engine adds the place."""

    def __init__(self, index: int, *, found: int, delta: int) -> None:
        self.index = index
        self.found = found
        self.delta = delta
        super().__init__(f"refcount {found} of entry {index} cannot change by {delta}")


def add_to_refcounts(
    raw: bytearray, order: int, *, first: int, count: int, delta: int
) -> npt.NDArray[np.intp]:
    """Change entries [first, first + count) of a block in place by `delta`, which is 1 or -1.

    Returns the indices, in the block, of those that became 0. Raises BadCount for the first that
    would overflow or fall below 0; nothing is changed then."""
    if order < 3:
        return _add_narrow(raw, order, np.arange(first, first + count), delta)
    counts = np.frombuffer(raw, dtype=_WIDE[order])[first : first + count]
    limit = (1 << (1 << order)) - 1
    bad = counts == (limit if delta > 0 else 0)
    if bad.any():
        index = int(bad.argmax())
        raise BadCount(first + index, found=int(counts[index]), delta=delta)
    if delta > 0:
        counts += counts.dtype.type(1)
        return np.empty(0, dtype=np.intp)
    counts -= counts.dtype.type(1)
    return np.flatnonzero(counts == 0) + first


def add_to_scattered(
    raw: bytearray, order: int, *, entries: npt.NDArray[np.intp], delta: int
) -> npt.NDArray[np.intp]:
    """The same for entries by their indices, ascending; one that is there twice changes twice."""
    if order < 3:
        return _add_narrow(raw, order, entries, delta)
    counts = np.frombuffer(raw, dtype=_WIDE[order])
    index, times = np.unique(entries, return_counts=True)
    values = counts[index].astype(np.uint64)
    _check_range(index, values, times, delta, (1 << (1 << order)) - 1)
    steps = times.astype(np.uint64)
    values = values + steps if delta > 0 else values - steps
    counts[index] = values
    return _zeros(index, values)


def raise_refcounts(
    raw: bytearray, order: int, *, entries: npt.NDArray[np.intp], counts: npt.NDArray[np.uint64]
) -> None:
    """Bring entries of a block, ascending and distinct, up to `counts` where they are lower.

    The caller has seen that all counts fit."""
    if order >= 3:
        stored = np.frombuffer(raw, dtype=_WIDE[order])
        stored[entries] = np.maximum(stored[entries].astype(np.uint64), counts)
        return
    per_byte = 8 >> order
    begin, end = int(entries[0]) // per_byte, int(entries[-1]) // per_byte + 1
    values = _narrow_bits(raw[begin:end], order).astype(np.uint64)
    places = entries - begin * per_byte
    values[places] = np.maximum(values[places], counts)
    raw[begin:end] = encode_refcounts(values, order)


def _add_narrow(
    raw: bytearray, order: int, entries: npt.NDArray[np.intp], delta: int
) -> npt.NDArray[np.intp]:
    """Widths below a byte: only the bytes from the first entry to the last are unpacked."""
    per_byte = 8 >> order
    index, times = np.unique(entries, return_counts=True)
    begin, end = int(index[0]) // per_byte, int(index[-1]) // per_byte + 1
    counts = _narrow_bits(raw[begin:end], order)
    places = index - begin * per_byte
    values = counts[places].astype(np.uint64)
    _check_range(index, values, times, delta, (1 << (1 << order)) - 1)
    steps = times.astype(np.uint64)
    values = values + steps if delta > 0 else values - steps
    counts[places] = values
    raw[begin:end] = encode_refcounts(counts, order)
    return _zeros(index, values)


def _zeros(index: npt.NDArray[np.intp], values: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    chosen: npt.NDArray[np.intp] = index[values == 0]
    return chosen


def _check_range(
    index: npt.NDArray[np.intp],
    values: npt.NDArray[np.uint64],
    times: npt.NDArray[np.intp],
    delta: int,
    limit: int,
) -> None:
    steps = times.astype(np.uint64)
    bad = values > np.uint64(limit) - steps if delta > 0 else values < steps
    if bad.any():
        first = int(bad.argmax())
        raise BadCount(int(index[first]), found=int(values[first]), delta=delta * int(times[first]))


def read_count(raw: bytes | bytearray, order: int, index: int) -> int:
    """One entry of a block."""
    if order >= 3:
        width = 1 << (order - 3)
        return int.from_bytes(raw[index * width : (index + 1) * width], "big")
    bits = 1 << order
    return raw[index * bits // 8] >> (index * bits % 8) & ((1 << bits) - 1)


def find_free(raw: bytes | bytearray, order: int, *, first: int) -> tuple[int, int]:
    """(index, count) of the first run of zeros at or behind entry `first`; count 0 for none."""
    if order >= 3:
        counts = np.frombuffer(raw, dtype=_WIDE[order])[first:]
    else:
        per_byte = 8 >> order
        begin = first // per_byte
        counts = _narrow_bits(memoryview(raw)[begin:], order)[first - begin * per_byte :]
    free = counts == 0
    begin = int(free.argmax()) if len(free) else 0
    if not len(free) or not free[begin]:
        return 0, 0
    rest = free[begin:]
    length = int(rest.argmin())
    return first + begin, length if not rest[length] else len(rest)


def last_used(raw: bytes | bytearray, order: int) -> int:
    """The index of the last count that is not 0, -1 for none."""
    # Whole bytes first: most of a block is often empty.
    end = len(bytes(raw).rstrip(b"\0"))
    if not end:
        return -1
    if order >= 3:
        return (end - 1) // (1 << (order - 3))
    bits = 1 << order
    byte, entry = raw[end - 1], 8 // bits - 1
    while not byte >> (entry * bits) & ((1 << bits) - 1):
        entry -= 1
    return (end - 1) * (8 // bits) + entry
