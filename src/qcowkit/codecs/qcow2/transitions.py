"""How L2 entries change: writing, zeroing, discarding. Pure; arrays are changed in place.

Sources: the qcow2 specification, "Extended L2 entries"; qemu's documentation of zero clusters and
discards. docs/formats/qcow2.md has the table of states. As everywhere, no module outside of codecs
looks at the bits of an L2 word."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.entries import (
    ALL_ALLOCATED,
    ALL_ZERO,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    READS_ZERO,
    Uint64Array,
    compressed_extent,
)
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.extents.table import Int64Array

BoolArray = npt.NDArray[np.bool_]

_COPIED = np.uint64(COPIED)
_COMPRESSED = np.uint64(COMPRESSED)
_READS_ZERO = np.uint64(READS_ZERO)
_OFFSET = np.uint64(OFFSET_MASK)
_ALL_ALLOCATED = np.uint64(ALL_ALLOCATED)
_ALL_ZERO = np.uint64(ALL_ZERO)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPlan:
    """What must be written when a part of one cluster is.

    keep: the host cluster stays, in place. begin, end: bytes within the cluster that must be
    there afterwards; the guest's own lie within them, what is beside them is copied. bitmap: the
    subcluster bitmap afterwards, 0 without extended L2 entries."""

    keep: bool
    begin: int
    end: int
    bitmap: int = 0


def plan_copy(
    entry: int, bitmap: int, *, begin: int, end: int, geometry: Geometry, external: bool = False
) -> CopyPlan:
    """The copy-on-write region of writing bytes [begin, end) of the cluster of `entry`.

    A new host cluster takes along all allocated data; without subclusters that is the whole
    cluster, also where the old one reads as zeros. Subclusters beside the region keep their state.
    external: the host offset is in a data file, where 0 is one like any other."""
    keep = keeps_host(entry, external=external)
    if not geometry.has_subclusters:
        if keep and not entry & READS_ZERO:
            return CopyPlan(keep=True, begin=begin, end=end)
        return CopyPlan(keep=keep, begin=0, end=geometry.cluster_size)
    size = geometry.subcluster_size
    first, last = begin // size, (end - 1) // size
    allocated = bitmap & ALL_ALLOCATED
    if keep:
        begin = begin if allocated >> first & 1 else first * size
        end = end if allocated >> last & 1 else (last + 1) * size
    else:
        if entry & COMPRESSED:
            first, last = 0, geometry.subcluster_count - 1
        elif allocated:
            first = min(first, (allocated & -allocated).bit_length() - 1)
            last = max(last, allocated.bit_length() - 1)
        begin, end = first * size, (last + 1) * size
    span = subcluster_span(first, last)
    return CopyPlan(keep=keep, begin=begin, end=end, bitmap=(bitmap | span) & ~(span << 32))


def subcluster_span(first: int, last: int) -> int:
    """The allocation bits of subclusters first to last."""
    return (1 << (last + 1)) - (1 << first)


def keeps_host(entry: int, *, external: bool = False) -> bool:
    """Whether data may be written where the entry points: a cluster that is its own."""
    own = entry & (COPIED | COMPRESSED) == COPIED
    return own and (external or entry & OFFSET_MASK != 0)


def data_entry(host: int) -> int:
    """The entry of a plain data cluster that nothing else refers to."""
    return host | COPIED


def host_of(entry: int) -> int:
    """The host offset of an entry that is not compressed, 0 for none."""
    return entry & OFFSET_MASK


def is_compressed(entry: int) -> bool:
    """Whether the entry is a compressed descriptor."""
    return bool(entry & COMPRESSED)


def is_allocated(entry: int, *, external: bool = False) -> bool:
    """Whether the entry refers to anything in a file."""
    return bool(entry & (OFFSET_MASK | COMPRESSED | (COPIED if external else 0)))


def in_place(
    entries: Uint64Array, bitmaps: Uint64Array | None, *, external: bool = False
) -> BoolArray:
    """Clusters of which every byte may be overwritten where it lies. Shape as `entries`."""
    mask = kept(entries, external=external)
    if bitmaps is None:
        mask &= (entries & _READS_ZERO) == 0
    else:
        mask &= (bitmaps & _ALL_ALLOCATED) == _ALL_ALLOCATED
    return mask


def kept(entries: Uint64Array, *, external: bool = False) -> BoolArray:
    """Clusters that may be written where they lie, whatever their subclusters are."""
    mask: BoolArray = (entries & (_COPIED | _COMPRESSED)) == _COPIED
    if not external:
        mask &= (entries & _OFFSET) != 0
    return mask


def hosts_of(entries: Uint64Array) -> Int64Array:
    """Host offsets of entries that are not compressed, 0 for none; int64, same shape."""
    hosts: Int64Array = (entries & _OFFSET).view(np.int64)
    return hosts


def compressed(entries: Uint64Array) -> BoolArray:
    """Which entries are compressed descriptors."""
    mask: BoolArray = (entries & _COMPRESSED) != 0
    return mask


def compressed_clusters(entry: int, *, geometry: Geometry) -> tuple[int, int]:
    """(first, count) of the host clusters that a compressed descriptor touches."""
    host, length = compressed_extent(entry, geometry=geometry)
    first = host >> geometry.cluster_bits
    return first, ((host + length - 1) >> geometry.cluster_bits) + 1 - first


def mark_copied(entries: Uint64Array, where: Int64Array, copied: BoolArray) -> None:
    """Set or clear COPIED of the entries at the indices `where`, as `copied` says; both (n,)."""
    entries[where] = np.where(copied, entries[where] | _COPIED, entries[where] & ~_COPIED)


def link_data(
    entries: Uint64Array, bitmaps: Uint64Array | None, *, host: int, cluster_size: int
) -> None:
    """Point the entries at a run of host clusters, of which all is data."""
    entries[:] = (np.arange(len(entries), dtype=np.uint64) * np.uint64(cluster_size)) + np.uint64(
        host | COPIED
    )
    if bitmaps is not None:
        bitmaps[:] = _ALL_ALLOCATED


def preallocate(
    entries: Uint64Array, bitmaps: Uint64Array | None, *, host: int, cluster_size: int
) -> None:
    """Point entries that refer to nothing at a run of host clusters. Without subclusters they are
    data then; with them the bitmaps stay, so that what lies below shows on."""
    before = None if bitmaps is None else bitmaps.copy()
    link_data(entries, bitmaps, host=host, cluster_size=cluster_size)
    if bitmaps is not None and before is not None:
        bitmaps[:] = before


@dataclass(frozen=True, slots=True, kw_only=True)
class EraseRules:
    """What decides how clusters are erased besides their state.

    version: of the image. external: data lie in another file. has_base: a backing file shows
    through what is not allocated. zeroes: the guest asked for zeros; otherwise it discards.
    unmap: zeros need not keep their space.
    keep: discarded clusters keep their space as well (discard-no-unref). full: entries become
    empty, as when shrinking."""

    version: int
    has_base: bool
    external: bool = False
    zeroes: bool = False
    unmap: bool = False
    keep: bool = False
    full: bool = False

    @property
    def possible(self) -> bool:
        """Version 2 has no zero clusters: over a base nothing can be erased there."""
        return self.full or self.version >= 3 or not self.has_base

    @property
    def _gives_up(self) -> bool:
        """Whether plain clusters lose their space."""
        if self.full or self.version < 3:
            return True
        return (not self.zeroes or self.unmap) and not self.keep

    @property
    def _empties(self) -> bool:
        return self.full or self.version < 3


def erase(
    entries: Uint64Array, bitmaps: Uint64Array | None, rules: EraseRules
) -> tuple[Uint64Array, BoolArray]:
    """Change whole clusters as the table of states says.

    Returns the old words of entries that lost what they referred to, and a mask, shape as
    `entries`, of plain clusters that keep their space but lost their content."""
    assert rules.possible
    packed = compressed(entries)
    refers = _OFFSET | _COPIED if rules.external else _OFFSET
    plain = ~packed & ((entries & refers) != 0)
    gone = packed | plain if rules._gives_up else packed
    held = plain & ~gone
    old = entries[gone].copy()
    if rules._empties:
        entries[gone] = 0
        entries[~gone & ~held] = 0
        if bitmaps is not None:
            bitmaps[:] = 0
        return old, held
    changed = np.ones(len(entries), dtype=np.bool_)
    if not rules.zeroes and not rules.has_base:
        # What is not there reads as zeros already, and a discard need not say so.
        changed = gone | held
    if bitmaps is None:
        entries[changed & ~held] = _READS_ZERO
        entries[held] |= _READS_ZERO
    else:
        entries[gone | (changed & ~held)] = 0
        bitmaps[changed] = _ALL_ZERO
    return old, held


def erase_subclusters(bitmap: int, *, first: int, last: int) -> int:
    """The bitmap once subclusters first to last read as zeros; their space stays."""
    span = subcluster_span(first, last)
    return bitmap & ~span | span << 32


def put_entries(
    words: array[int], *, first: int, entries: Uint64Array, bitmaps: Uint64Array | None
) -> None:
    """Replace the entries of a slice from entry `first` on, each together with its bitmap.

    It is one step of the interpreter: who reads the slice without a lock never finds an entry with
    the bitmap of another time."""
    columns = [entries] if bitmaps is None else [entries, bitmaps]
    at = first * len(columns)
    words[at : at + entries.size * len(columns)] = array("Q", np.stack(columns, axis=1).tobytes())


def put_entry(words: array[int], index: int, *, entry: int, bitmap: int | None) -> None:
    """The same for one entry; bitmap: None without subclusters."""
    if bitmap is None:
        words[index] = entry
    else:
        words[2 * index : 2 * index + 2] = array("Q", (entry, bitmap))


def slice_columns(
    words: array[int], *, geometry: Geometry
) -> tuple[Uint64Array, Uint64Array | None]:
    """Entries and bitmaps (None without subclusters) of native words, as views that change them."""
    view = np.frombuffer(words, dtype=np.uint64)
    return (view[::2], view[1::2]) if geometry.has_subclusters else (view, None)
