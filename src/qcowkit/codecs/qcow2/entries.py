"""L1 and L2 words: what they say, one at a time and a table at a time. Pure.

Source: the qcow2 specification, sections "L1 and L2 tables" and "Extended L2 entries". No other
module indexes the bits of an L2 word."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.errors import CorruptMetadata
from qcowkit.extents.table import NO_HOST, ExtentTable, Flag, Hit, Int64Array

Uint64Array = npt.NDArray[np.uint64]
StateArray = npt.NDArray[np.uint8]

COPIED = 1 << 63
COMPRESSED = 1 << 62
READS_ZERO = 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE
ALL_ALLOCATED = 0xFFFF_FFFF
ALL_ZERO = 0xFFFF_FFFF << 32
MAX_HOST_OFFSET = 1 << 56


class SubclusterState(IntEnum):
    """The one enumeration of what a cluster, or a subcluster, is. Without extended L2 entries a
    cluster is its own only subcluster."""

    UNALLOCATED_PLAIN = 0
    UNALLOCATED_ALLOC = 1
    ZERO_PLAIN = 2
    ZERO_ALLOC = 3
    NORMAL = 4
    COMPRESSED = 5


_STATE_FLAGS = np.array(
    [
        Flag.NONE,
        Flag.NONE,
        Flag.ZERO | Flag.PRESENT,
        Flag.ZERO | Flag.PRESENT,
        Flag.DATA | Flag.PRESENT,
        Flag.DATA | Flag.PRESENT | Flag.COMPRESSED,
    ],
    dtype=np.uint16,
)
_HAS_HOST = np.array([False, True, False, True, True, True])


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryRules:
    """What else decides the meaning of an entry. `file_size`: bytes of the image file."""

    geometry: Geometry
    version: int
    external_data: bool
    file_size: int
    cluster_size: int = field(init=False)

    def __post_init__(self) -> None:
        # A lookup has no time to ask the geometry.
        object.__setattr__(self, "cluster_size", self.geometry.cluster_size)


def l1_host(entry: int) -> int:
    """The host offset of the L2 table, 0 for none."""
    return entry & OFFSET_MASK


def check_l1(entries: Uint64Array, *, geometry: Geometry, host_offset: int, file_size: int) -> None:
    """Refuse reserved bits, unaligned tables and tables outside the file (rows 20 and 37).

    entries: shape (n,), native uint64. Raises CorruptMetadata with the first bad index."""
    words = entries.view(np.int64)
    reserved = (words & np.int64(L1_RESERVED)) != 0
    if reserved.any():
        index = int(reserved.argmax())
        found = int(entries[index]) & L1_RESERVED
        raise CorruptMetadata(
            "L1 table",
            host_offset=host_offset,
            index=index,
            reason=f"reserved bits {found:#x} are set, expected 0",
        )
    offsets = words & np.int64(OFFSET_MASK)
    unaligned = (offsets & np.int64(geometry.cluster_size - 1)) != 0
    if unaligned.any():
        index = int(unaligned.argmax())
        raise CorruptMetadata(
            "L1 table",
            host_offset=host_offset,
            index=index,
            reason=f"L2 table offset {int(offsets[index]):#x} is not a multiple of the cluster "
            f"size {geometry.cluster_size:#x}",
        )
    outside = offsets >= max(file_size, 1)
    if outside.any():
        index = int(outside.argmax())
        raise CorruptMetadata(
            "L1 table",
            host_offset=host_offset,
            index=index,
            reason=f"L2 table offset {int(offsets[index]):#x} is beyond the end of the file at "
            f"{file_size:#x}",
        )


def compressed_extent(entry: int, *, geometry: Geometry) -> tuple[int, int]:
    """(host offset, bytes) of a compressed descriptor; the bytes reach to the end of its last
    512-byte sector."""
    bits = geometry.compressed_offset_bits
    host = entry & ((1 << bits) - 1)
    sectors = (entry >> bits) & ((1 << (62 - bits)) - 1)
    return host, (sectors + 1) * 512 - host % 512


def encode_compressed(host: int, length: int, *, geometry: Geometry) -> int:
    """The descriptor of `length` compressed bytes at `host`."""
    sectors = (host + length - 1) // 512 - host // 512
    return COMPRESSED | sectors << geometry.compressed_offset_bits | host


def classify(entry: int, bitmap: int, subcluster: int, *, rules: EntryRules) -> SubclusterState:
    """The scalar twin of `map_entries`: the state of one subcluster (0 without extended L2).

    Raises ValueError with the reason for an entry that the specification does not allow."""
    reason = entry_fault(entry, bitmap, rules=rules)
    if reason is not None:
        raise ValueError(reason)
    if entry & COMPRESSED:
        return SubclusterState.COMPRESSED
    has_host = _entry_has_host(entry, bitmap, rules)
    if rules.geometry.has_subclusters:
        zero, allocated = bitmap >> (subcluster + 32) & 1, bitmap >> subcluster & 1
    else:
        zero, allocated = entry & READS_ZERO, has_host
    if zero:
        return SubclusterState.ZERO_ALLOC if has_host else SubclusterState.ZERO_PLAIN
    if allocated:
        return SubclusterState.NORMAL
    return SubclusterState.UNALLOCATED_ALLOC if has_host else SubclusterState.UNALLOCATED_PLAIN


_NONE, _DATA, _ZERO, _OTHER = Hit.NONE, Hit.DATA, Hit.ZERO, Hit.OTHER
_FLAGS = (1 << 64) - 1 - OFFSET_MASK


def classify_cluster(entry: int, *, offset: int, rules: EntryRules) -> tuple[Hit, int, int]:
    """(kind, host offset, bytes to the end of the cluster) of guest `offset`, by its entry."""
    size = rules.cluster_size
    inside = offset & (size - 1)
    host = entry & OFFSET_MASK
    if host & (size - 1):
        return _OTHER, -1, size - inside
    flags = entry & _FLAGS
    if flags == COPIED:
        if host or rules.external_data:
            return _DATA, host + inside, size - inside
        return _NONE, -1, size - inside
    if not flags:
        return (_DATA, host + inside, size - inside) if host else (_NONE, -1, size - inside)
    if flags & ~COPIED == READS_ZERO and rules.version >= 3:
        return _ZERO, -1, size - inside
    return _OTHER, -1, size - inside


def classify_subcluster(
    entry: int, bitmap: int, *, offset: int, rules: EntryRules
) -> tuple[Hit, int, int]:
    """The same with subclusters: the run ends where their state changes."""
    geometry = rules.geometry
    size, unit = geometry.cluster_size, geometry.subcluster_size
    inside = offset & (size - 1)
    host = entry & OFFSET_MASK
    allocated, zero = bitmap & ALL_ALLOCATED, bitmap >> 32
    has_host = host != 0 or (rules.external_data and entry & COPIED != 0)
    # Bit 0 is reserved here, and ignored.
    sound = not entry & (_FLAGS & ~COPIED & ~READS_ZERO) and not host & (size - 1)
    if not sound or allocated & zero or (allocated and not has_host):
        return _OTHER, -1, size - inside
    first = inside // unit
    if allocated >> first & 1:
        same, kind = allocated, _DATA
    elif zero >> first & 1:
        same, kind = zero, _ZERO
    else:
        same, kind = ~(allocated | zero) & ALL_ALLOCATED, _NONE
    same >>= first
    # Counts the ones from the lowest bit on.
    count = (~same & (same + 1)).bit_length() - 1
    run = (first + count) * unit - inside
    return kind, host + inside if kind is _DATA else -1, run


def _entry_has_host(entry: int, bitmap: int, rules: EntryRules) -> bool:
    # With an external data file, offset 0 is a cluster when COPIED is set.
    return bool(entry & OFFSET_MASK) or (rules.external_data and bool(entry & COPIED))


def entry_fault(entry: int, bitmap: int, *, rules: EntryRules) -> str | None:
    """Why the entry breaks the specification, or None (rows 38 to 40)."""
    geometry = rules.geometry
    if entry & COMPRESSED:
        return _compressed_fault(entry, bitmap, rules)
    # Bit 0 is reserved with extended L2: ignored on read, reported by check.
    reserved = entry & L2_RESERVED
    if reserved:
        return f"reserved bits {reserved:#x} are set, expected 0"
    host = entry & OFFSET_MASK
    if host % geometry.cluster_size:
        size = geometry.cluster_size
        return f"data cluster offset {host:#x} is not a multiple of the cluster size {size:#x}"
    if geometry.has_subclusters:
        allocated, zero = bitmap & ALL_ALLOCATED, bitmap >> 32
        if allocated & zero:
            return f"subclusters {allocated & zero:#x} are both allocated and zero"
        if allocated and not _entry_has_host(entry, bitmap, rules):
            return f"subclusters {allocated:#x} are allocated without a host cluster"
    elif entry & READS_ZERO and rules.version < 3:
        return "the zero flag is set in a version 2 image"
    return None


def _compressed_fault(entry: int, bitmap: int, rules: EntryRules) -> str | None:
    if rules.external_data:
        return "a compressed cluster in an image with an external data file"
    if entry & COPIED:
        return "COPIED is set on a compressed cluster"
    if bitmap:
        return f"subcluster bitmap of a compressed cluster is {bitmap:#x}, expected 0"
    host, length = compressed_extent(entry, geometry=rules.geometry)
    # The last sector may be cut by the end of the file, the data may not begin behind it.
    if host >= min(rules.file_size, MAX_HOST_OFFSET) or host + length > rules.file_size + 511:
        end = rules.file_size
        return f"compressed data at {host:#x} reaches beyond the end of the file at {end:#x}"
    return None


def split_words(
    raw: npt.NDArray[Any], *, geometry: Geometry
) -> tuple[Uint64Array, Uint64Array | None]:
    """Native words of an L2 table as (entries, bitmaps or None), each of shape (n,)."""
    if not geometry.has_subclusters:
        return raw, None
    pairs = raw.reshape(-1, 2)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def map_entries(
    entries: Uint64Array,
    bitmaps: Uint64Array | None,
    starts: Int64Array,
    *,
    rules: EntryRules,
) -> ExtentTable:
    """Decode L2 entries into extents, neighbours of one state merged.

    entries, bitmaps: native uint64, shape (n,). starts: int64 guest offsets of the clusters,
    ascending; rows merge only where the guest is contiguous too. The table may have gaps where
    `starts` has. Raises BadEntry with the index of the first entry that breaks the rules."""
    faulty = find_fault(entries, bitmaps, rules)
    if faulty is not None:
        raise faulty
    words = entries.view(np.int64)
    compressed = (words & np.int64(COMPRESSED)) != 0
    host = words & np.int64(OFFSET_MASK)
    has_host = host != 0
    if rules.external_data:
        has_host |= words < 0
    host[~has_host] = NO_HOST
    if bitmaps is None:
        zero = (words & 1).astype(bool)
        state = _states(has_host, zero, has_host)
        state[compressed] = SubclusterState.COMPRESSED
        return _rows(state, host, words, starts, None, rules)
    return _map_extended(words, bitmaps, starts, host, has_host, compressed, rules)


class BadEntry(Exception):
    """Internal: entry `index` is malformed; the engine adds the place."""

    def __init__(self, index: int, reason: str) -> None:
        self.index = index
        self.reason = reason
        super().__init__(reason)


def find_fault(
    entries: Uint64Array, bitmaps: Uint64Array | None, rules: EntryRules
) -> BadEntry | None:
    """The first entry that breaks a rule, or None. Shapes as for `map_entries`.

    Cheap vector tests first; the scalar twin then words the reason."""
    words = entries.view(np.int64)
    compressed = (words & np.int64(COMPRESSED)) != 0
    cluster_mask = rules.geometry.cluster_size - 1
    bad = (words & np.int64(L2_RESERVED | (OFFSET_MASK & cluster_mask))) != 0
    if bitmaps is None and rules.version < 3:
        bad |= (words & 1) != 0
    if bitmaps is not None:
        allocated = bitmaps & np.uint64(ALL_ALLOCATED)
        bad |= (allocated & (bitmaps >> np.uint64(32))) != 0
        hostless = (words & np.int64(OFFSET_MASK)) == 0
        if rules.external_data:
            hostless &= words >= 0
        bad |= hostless & (allocated != 0)
    if compressed.any():
        suspect = compressed & _compressed_suspect(entries, bitmaps, rules)
        bad = np.where(compressed, suspect, bad)
    if not bad.any():
        return None
    index = int(bad.argmax())
    bitmap = int(bitmaps[index]) if bitmaps is not None else 0
    reason = entry_fault(int(entries[index]), bitmap, rules=rules)
    assert reason is not None, "vector and scalar checks disagree"
    return BadEntry(index, reason)


def _compressed_suspect(
    entries: Uint64Array, bitmaps: Uint64Array | None, rules: EntryRules
) -> npt.NDArray[np.bool_]:
    host, length = _compressed_columns(entries, rules.geometry)
    bad = (host >= min(rules.file_size, MAX_HOST_OFFSET)) | (host + length > rules.file_size + 511)
    bad |= entries.view(np.int64) < 0
    if bitmaps is not None:
        bad |= bitmaps != 0
    if rules.external_data:
        bad |= True
    return bad


def _compressed_columns(entries: Uint64Array, geometry: Geometry) -> tuple[Int64Array, Int64Array]:
    bits = geometry.compressed_offset_bits
    words = entries.view(np.int64)
    host = words & np.int64((1 << bits) - 1)
    sectors = (words >> np.int64(bits)) & np.int64((1 << (62 - bits)) - 1)
    return host, (sectors + 1) * 512 - host % 512


def _states(
    has_host: npt.NDArray[np.bool_], zero: npt.NDArray[np.bool_], allocated: npt.NDArray[np.bool_]
) -> StateArray:
    """zero -> ZERO_*, allocated -> NORMAL, else UNALLOCATED_*: arithmetic on the enumeration."""
    state = has_host.astype(np.uint8)
    state[zero] += 2
    state[allocated & ~zero] = SubclusterState.NORMAL
    return state


def _rows(
    state: StateArray,
    host: Int64Array,
    words: Int64Array,
    starts: Int64Array,
    lengths: Int64Array | None,
    rules: EntryRules,
) -> ExtentTable:
    """Merge neighbours: same state, same COPIED, guest and host contiguous; not compressed."""
    unit = rules.geometry.cluster_size
    step = lengths[:-1] if lengths is not None else unit
    with_host = _HAS_HOST[state]
    compressed = state == SubclusterState.COMPRESSED
    cut = np.empty(len(state), dtype=bool)
    cut[:1] = True
    np.not_equal(state[1:], state[:-1], out=cut[1:])
    cut[1:] |= starts[1:] != starts[:-1] + step
    cut[1:] |= with_host[1:] & (host[1:] != host[:-1] + step)
    # COPIED belongs to entries with a host cluster; elsewhere the bit has no meaning.
    cut[1:] |= with_host[1:] & ((words[1:] < 0) != (words[:-1] < 0))
    cut |= compressed
    first = np.flatnonzero(cut)
    last = np.append(first, len(state))[1:] - 1
    ends = starts[last] + (lengths[last] if lengths is not None else unit)
    row_state = state[first]
    flags = _STATE_FLAGS[row_state]
    copied = with_host[first] & (words[first] < 0)
    flags[copied] |= np.uint16(Flag.COPIED)
    row_host = np.where(with_host[first], host[first], np.int64(NO_HOST))
    stored = np.zeros(len(first), dtype=np.int64)
    squeezed = compressed[first]
    if squeezed.any():
        where = first[squeezed]
        row_host[squeezed], stored[squeezed] = _compressed_columns(
            words[where].view(np.uint64), rules.geometry
        )
    return ExtentTable(
        start=starts[first],
        length=ends - starts[first],
        flags=flags,
        layer=np.zeros(len(first), dtype=np.int32),
        host=row_host,
        stored=stored,
    )


def _map_extended(
    words: Int64Array,
    bitmaps: Uint64Array,
    starts: Int64Array,
    host: Int64Array,
    has_host: npt.NDArray[np.bool_],
    compressed: npt.NDArray[np.bool_],
    rules: EntryRules,
) -> ExtentTable:
    """Entries whose subclusters are all alike stay one row; only mixed ones are spread out."""
    geometry = rules.geometry
    mixed = (bitmaps != 0) & (bitmaps != ALL_ALLOCATED) & (bitmaps != np.uint64(ALL_ZERO))
    counts = np.where(mixed, geometry.subcluster_count, 1)
    owner = np.repeat(np.arange(len(words)), counts)
    first = np.cumsum(counts) - counts
    sub = np.arange(len(owner)) - first[owner]
    delta = sub * geometry.subcluster_size
    bits = np.unpackbits(
        bitmaps.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little"
    ).astype(bool)
    allocated, zero = bits[owner, sub], bits[owner, sub + 32]
    state = _states(has_host[owner], zero, allocated)
    state[compressed[owner]] = SubclusterState.COMPRESSED
    sizes = np.array([geometry.cluster_size, geometry.subcluster_size], dtype=np.int64)
    lengths = sizes[mixed[owner].astype(np.intp)]
    row_host = host[owner]
    row_host = np.where(row_host >= 0, row_host + delta, row_host)
    return _rows(state, row_host, words[owner], starts[owner] + delta, lengths, rules)
