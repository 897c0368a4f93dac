"""Which units of a buffer are all zero. Pure.

Data is dismissed by a few words of each unit; only what looks empty is read in full, where a
reduction over 64-bit words runs at memory speed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcowkit.units import is_power_of_two

_WORD = 8
# Words read before a unit is read in full, in 64ths of the unit: the first word of a file system
# block is often zero, the ends and the middle of it less so.
_SAMPLES = (63, 32, 16)
# Bytes of scattered units gathered for one reduction: stays in the second-level cache.
_GATHER = 1 << 19
# Reading this many units in place costs less than gathering one of them.
_DENSE = 4


def zero_units(buffer: npt.NDArray[np.uint8], unit: int) -> npt.NDArray[np.bool_]:
    """True for each unit that holds nothing but zeros.

    buffer: contiguous, shape (length,). unit: bytes, a power of two of at least 512. The result
    has ceil(length / unit) elements; the last unit may be shorter."""
    assert unit >= 512, f"unit {unit}"
    assert is_power_of_two(unit), f"unit {unit}"
    whole = len(buffer) // unit
    result = np.empty(-(-len(buffer) // unit), dtype=np.bool_)
    if whole < len(result):
        result[-1] = not buffer[whole * unit :].view(np.bool_).any()
    if whole:
        words = buffer[: whole * unit].view(np.uint64).reshape(whole, unit // _WORD)
        _test_whole_units(words, result[:whole])
    return result


def _test_whole_units(words: npt.NDArray[np.uint64], result: npt.NDArray[np.bool_]) -> None:
    """Fill `result` (n,) for `words` (n, words of a unit)."""
    np.equal(words[:, 0], 0, out=result)
    candidates = np.flatnonzero(result)
    step = words.shape[1] // 64
    for sample in _SAMPLES:
        if not len(candidates):
            return
        passed = words[candidates, sample * step] == 0
        if not passed.all():
            result[candidates[~passed]] = False
            candidates = candidates[passed]
    if not len(candidates):
        return
    first, last = int(candidates[0]), int(candidates[-1]) + 1
    if last - first <= len(candidates) * _DENSE:
        result[first:last] = np.bitwise_or.reduce(words[first:last], axis=1) == 0
        return
    batch = max(1, _GATHER // (words.shape[1] * _WORD))
    for index in range(0, len(candidates), batch):
        chosen = candidates[index : index + batch]
        # One unit alone is a view; several are gathered.
        block = words[chosen] if len(chosen) > 1 else words[chosen[0] : chosen[0] + 1]
        result[chosen] = np.bitwise_or.reduce(block, axis=1) == 0
