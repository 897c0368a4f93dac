"""L1 and L2 words as they should be: what a repair may put right without guessing. Pure.

An entry that leads nowhere, to a place that is unaligned or behind the end of the file, has lost
its data; it is never changed, since what it says may help to find them. Only one that reads as
zeros or as the backing file anyway can go without its place. Rows 37 to 40 of
docs/formats/qcow2.md."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.entries import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    MAX_HOST_OFFSET,
    OFFSET_MASK,
    READS_ZERO,
    EntryRules,
    Uint64Array,
)
from qcowkit.extents.table import Int64Array

BoolArray = npt.NDArray[np.bool_]
_ALL_BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """Entries by what can be done about them; masks of shape (n,), each entry in one at most.

    host: host offsets, of all. sound, packed: plain and compressed ones that lead to a place.
    spare: places that are nowhere and hold no data. lost: data whose place is nowhere."""

    host: Int64Array
    sound: BoolArray
    packed: BoolArray
    spare: BoolArray
    lost: BoolArray


def sort_entries(entries: Uint64Array, bitmaps: Uint64Array | None, *, rules: EntryRules) -> Sorted:
    """entries, bitmaps: native uint64, shape (n,), as of `split_words`."""
    words = entries.view(np.int64)
    compressed = (words & np.int64(COMPRESSED)) != 0
    host = words & np.int64(OFFSET_MASK)
    end = MAX_HOST_OFFSET if rules.external_data else rules.file_size
    astray = (host & np.int64(rules.geometry.cluster_size - 1)) != 0
    astray |= host >= end
    if bitmaps is None:
        # In version 2 bit 0 is no zero flag: nobody knows what such an entry means.
        empty = (words & READS_ZERO) != 0 if rules.version >= 3 else np.zeros(len(words), bool)
        homeless = np.zeros(len(words), dtype=np.bool_)
    else:
        empty = (bitmaps & np.uint64(ALL_ALLOCATED)) == 0
        homeless = (host == 0) & ~empty
        if rules.external_data:
            homeless &= words >= 0
    packed_host, outside = _packed_places(words, rules)
    host = np.where(compressed, packed_host, host)
    return Sorted(
        host=host,
        sound=~compressed & ~astray & ~homeless,
        packed=compressed & ~outside,
        spare=~compressed & astray & empty,
        lost=np.where(compressed, outside, (astray & ~empty) | homeless),
    )


def _packed_places(words: Int64Array, rules: EntryRules) -> tuple[Int64Array, BoolArray]:
    """(host offsets, which lie outside) if the words were compressed descriptors."""
    bits = rules.geometry.compressed_offset_bits
    host = words & np.int64((1 << bits) - 1)
    if rules.external_data:
        return host, np.ones(len(words), dtype=np.bool_)
    sectors = (words >> np.int64(bits)) & np.int64((1 << (62 - bits)) - 1)
    length = (sectors + 1) * 512 - host % 512
    end = rules.file_size
    return host, (host >= min(end, MAX_HOST_OFFSET)) | (host + length > end + 511)


def mend_entries(
    entries: Uint64Array, bitmaps: Uint64Array | None, *, rules: EntryRules
) -> Uint64Array:
    """The entries with reserved bits clear, no COPIED on compressed data, and without places that
    are nowhere and hold no data. Bitmaps stay as they are. COPIED of plain ones is not judged."""
    found = sort_entries(entries, bitmaps, rules=rules)
    mended = entries.copy()
    reserved = L2_RESERVED if bitmaps is None else L2_RESERVED | READS_ZERO
    mended[found.sound] &= np.uint64(~reserved & _ALL_BITS)
    packed = found.packed if bitmaps is None else found.packed & (bitmaps == 0)
    mended[packed] &= np.uint64(~COPIED & _ALL_BITS)
    mended[found.spare] = READS_ZERO if bitmaps is None else 0
    return mended


def mend_l1(words: Uint64Array, *, cluster_size: int, file_size: int) -> Uint64Array:
    """L1 entries with reserved bits clear where they lead to a table, or to none."""
    offsets = (words & np.uint64(OFFSET_MASK)).view(np.int64)
    sound = ((offsets & np.int64(cluster_size - 1)) == 0) & (offsets < max(file_size, 1))
    return np.where(sound, words & np.uint64(~L1_RESERVED & _ALL_BITS), words)
