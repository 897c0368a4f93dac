"""Tables of persistent bitmaps as arrays. Pure.

Source: the qcow2 specification, "Bitmap table"; row 36 of docs/formats/qcow2.md. For a few entries
`bitmaps.decode_bitmap_table` does without numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.entries import OFFSET_MASK, Uint64Array
from qcowkit.extents.table import Int64Array

TABLE_RESERVED = 0xFF00_0000_0000_01FE
ALL_ONES = 1

BoolArray = npt.NDArray[np.bool_]


def bitmap_offsets(words: Uint64Array) -> Int64Array:
    """Host offsets of the clusters of bits, 0 where an entry has none; shape as `words`."""
    return (words & np.uint64(OFFSET_MASK)).view(np.int64)


def bitmap_entry_faults(words: Uint64Array, *, cluster_size: int) -> dict[str, BoolArray]:
    """Masks of the entries that break a rule of row 36, by the rule's words; none when all keep it.

    words: native uint64, shape (n,)."""
    offsets = bitmap_offsets(words)
    faults = {
        "reserved bits are set, expected 0": (words & np.uint64(TABLE_RESERVED)) != 0,
        "has an offset and the all-ones bit, expected one of them": (offsets != 0)
        & ((words & np.uint64(ALL_ONES)) != 0),
        f"offset is not a multiple of the cluster size {cluster_size:#x}": offsets % cluster_size
        != 0,
    }
    return {reason: mask for reason, mask in faults.items() if mask.any()}
