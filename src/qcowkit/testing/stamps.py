"""Guest sectors that say who they are: the address they were written to, and by which value.

A sector of 512 bytes found where it does not belong, older than it may be, or mixed from two, is
recognised for what it is. Values count from 1; 0 stands for a sector of zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcowkit.units import SECTOR

FOREIGN = -1
_LANES = SECTOR // 8
_MAGIC = 0x5EC7 << 48
_ADDRESS = (1 << 48) - 1
_STEPS = np.arange(_LANES, dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15)

Bytes = bytes | bytearray | memoryview
Words = npt.NDArray[np.uint64]


def make_stamps(*, first: int, count: int, value: int) -> bytes:
    """`count` guest sectors from sector `first` on. Odd values look like noise, which does not
    compress; even ones repeat 16 bytes."""
    addresses = np.arange(first, first + count, dtype=np.uint64)
    values = np.full(count, value, dtype=np.uint64)
    return _fill(addresses, values).tobytes()


def read_stamps(content: Bytes, *, first: int = 0) -> npt.NDArray[np.int64]:
    """The value that each sector holds, FOREIGN for bytes that were never written there.

    content: whole guest sectors from sector `first` on."""
    words = np.frombuffer(content, dtype=np.uint64).reshape(-1, _LANES)
    found = np.zeros(len(words), dtype=np.int64)
    used = np.flatnonzero(words.any(axis=1))
    if len(used):
        rows = words[used]
        values = rows[:, 1]
        expected = _fill(used.astype(np.uint64) + np.uint64(first), values)
        sound = (rows == expected).all(axis=1) & (values != 0)
        found[used] = np.where(sound, values.view(np.int64), FOREIGN)
    return found


def describe_sector(sector: Bytes) -> str:
    """What a sector holds, in words; for messages."""
    words = np.frombuffer(sector, dtype=np.uint64)
    if not words.any():
        return "zeros"
    address, value = int(words[0]) & _ADDRESS, int(words[1])
    if int(words[0]) & ~_ADDRESS != _MAGIC:
        return f"bytes of no guest sector, {words[:2].tobytes().hex()}.."
    whole = _fill(words[:1] & np.uint64(_ADDRESS), words[1:2])[0]
    kind = "value" if bool((whole == words).all()) else "a part of value"
    return f"{kind} {value} of sector {address}"


def _fill(addresses: Words, values: Words) -> npt.NDArray[Any]:
    """Stamps as rows of words."""
    words = np.empty((len(addresses), _LANES), dtype=np.uint64)
    words[:, 0::2] = (addresses | np.uint64(_MAGIC))[:, None]
    words[:, 1::2] = values[:, None]
    noisy = np.flatnonzero(values & np.uint64(1))
    if len(noisy):
        seeds = (words[noisy, 0] << np.uint64(20)) ^ (values[noisy] * np.uint64(0xBF58_476D_1CE4))
        mixed = seeds[:, None] + _STEPS[None, 2:]
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(0x94D0_49BB_1331_11EB)
        mixed ^= mixed >> np.uint64(27)
        words[noisy, 2:] = mixed
    return words
