"""L2 entries of one geometry said again in another: other clusters, with subclusters or without,
with or without zero clusters. Pure.

Every cluster is taken apart into 32 parts that are allocated, zero or neither; the new entries are
put together from these. What cannot be said by an entry is named, for the caller to write anew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.entries import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    READS_ZERO,
    Uint64Array,
)
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.extents.table import Int64Array

BoolArray = npt.NDArray[np.bool_]

_PARTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RecodeRules:
    """What decides how entries are said anew.

    has_zeros: the target has zero clusters, as version 3 has. has_base: a backing file shows
    through what is not allocated. external: data lie in another file, at guest offsets.
    same_packed: compressed clusters may stay what they are."""

    old: Geometry
    new: Geometry
    has_zeros: bool = True
    has_base: bool = False
    external: bool = False
    same_packed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Recoded:
    """New entries and bitmaps (None without subclusters), shape (n,), COPIED only where external.

    rewrite: ascending indices of those whose content has to be written anew; they are 0. packed:
    shape as rewrite, which of these hold compressed data."""

    entries: Uint64Array
    bitmaps: Uint64Array | None
    rewrite: Int64Array
    packed: BoolArray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """Clusters of the new size, shape (n,): host offset, whether it is one, and of each of the 32
    parts, shape (n, 32), whether it is allocated or zero. packed: compressed data, whole or in
    part. mixed: a part is neither wholly the one nor wholly the other."""

    host: Int64Array
    present: BoolArray
    allocated: BoolArray
    zero: BoolArray
    packed: BoolArray
    mixed: BoolArray


def recode(entries: Uint64Array, bitmaps: Uint64Array | None, *, rules: RecodeRules) -> Recoded:
    """The entries of the same guest range in the new geometry.

    entries, bitmaps: native uint64, sound by `find_fault`, of whole clusters of both geometries."""
    old = _take_apart(entries, bitmaps, rules)
    ratio = rules.old.cluster_bits - rules.new.cluster_bits
    parts = old
    if ratio > 0:
        parts = _divide(old, 1 << ratio, rules.new.cluster_size)
    elif ratio < 0:
        parts = _join(old, 1 << -ratio, rules)
    keeps = parts.packed & (ratio == 0) & rules.same_packed
    anew = parts.packed & ~keeps
    build = _build_extended if rules.new.has_subclusters else _build_plain
    words, masks, missing = build(parts, rules)
    words[keeps] = entries[keeps] if ratio == 0 else 0
    missing = (missing & ~parts.packed) | anew
    words[missing] = 0
    if masks is not None:
        masks[missing | parts.packed] = 0
    rewrite = np.flatnonzero(missing)
    return Recoded(entries=words, bitmaps=masks, rewrite=rewrite, packed=anew[rewrite])


def _take_apart(entries: Uint64Array, bitmaps: Uint64Array | None, rules: RecodeRules) -> _Parts:
    words = entries.view(np.int64)
    packed: BoolArray = (words & np.int64(COMPRESSED)) != 0
    host = np.where(packed, 0, words & np.int64(OFFSET_MASK))
    present = host != 0
    if rules.external:
        present |= words < 0
    present &= ~packed
    shape = (len(entries), _PARTS)
    if bitmaps is None:
        reads_zero = ((words & READS_ZERO) != 0) & ~packed
        zero = np.broadcast_to(reads_zero[:, None], shape)
        allocated = np.broadcast_to((present & ~reads_zero)[:, None], shape)
    else:
        raw = bitmaps.astype("<u8").view(np.uint8).reshape(-1, 8)
        bits = np.unpackbits(raw, axis=1, bitorder="little").astype(np.bool_)
        allocated, zero = bits[:, :_PARTS], bits[:, _PARTS:]
    return _Parts(
        host=host,
        present=present,
        allocated=allocated,
        zero=zero,
        packed=packed,
        mixed=np.zeros(len(entries), dtype=np.bool_),
    )


def _divide(old: _Parts, count: int, size: int) -> _Parts:
    """Each cluster as `count` of `size` bytes, side by side where it lies."""
    owner = np.repeat(np.arange(len(old.host)), count)
    number = np.tile(np.arange(count), len(old.host))
    index = (number[:, None] * _PARTS + np.arange(_PARTS)) // count
    present = old.present[owner]
    return _Parts(
        host=np.where(present, old.host[owner] + number * size, 0),
        present=present,
        allocated=old.allocated[owner[:, None], index],
        zero=old.zero[owner[:, None], index],
        packed=old.packed[owner],
        mixed=np.zeros(len(owner), dtype=np.bool_),
    )


def _join(old: _Parts, count: int, rules: RecodeRules) -> _Parts:
    """`count` clusters as one; it has a host only where all of them lie side by side, aligned."""
    size = rules.old.cluster_size
    begin = old.host.reshape(-1, count) - np.arange(count) * size
    first = begin[:, 0]
    present = old.present.reshape(-1, count).all(axis=1) & (begin == first[:, None]).all(axis=1)
    present &= first % rules.new.cluster_size == 0
    if not rules.external:
        present &= first > 0
    allocated = old.allocated.reshape(-1, _PARTS, count)
    zero = old.zero.reshape(-1, _PARTS, count)
    any_allocated: BoolArray = np.logical_or.reduce(allocated, axis=2)
    all_allocated: BoolArray = np.logical_and.reduce(allocated, axis=2)
    any_zero: BoolArray = np.logical_or.reduce(zero, axis=2)
    all_zero: BoolArray = np.logical_and.reduce(zero, axis=2)
    packed: BoolArray = np.logical_or.reduce(old.packed.reshape(-1, count), axis=1)
    uneven = any_zero & ~all_zero
    if not rules.has_base:
        # Zero or nothing: without a base both read as zeros.
        all_zero |= any_zero & ~any_allocated
        uneven &= any_allocated
    mixed: BoolArray = np.logical_or.reduce((any_allocated & ~all_allocated) | uneven, axis=1)
    return _Parts(
        host=np.where(present, first, 0),
        present=present,
        allocated=all_allocated,
        zero=all_zero,
        packed=packed,
        # Data that do not lie together have to be brought together.
        mixed=mixed | (np.logical_or.reduce(any_allocated, axis=1) & ~present),
    )


def _build_plain(parts: _Parts, rules: RecodeRules) -> tuple[Uint64Array, None, BoolArray]:
    """(entries, None, which of them cannot be said)."""
    data = parts.allocated.all(axis=1)
    nothing = ~parts.allocated.any(axis=1)
    zeros = parts.zero.all(axis=1)
    if not rules.has_base:
        # A host cluster that holds nothing keeps its place as zeros.
        zeros |= nothing & (parts.present | parts.zero.any(axis=1))
    empty = nothing & ~parts.zero.any(axis=1) & ~zeros
    missing = parts.mixed | ~(data | zeros | empty)
    words = _with_host(parts, rules)
    words[empty] = 0
    if rules.has_zeros:
        words[zeros] |= np.uint64(READS_ZERO)
    else:
        words[zeros] = 0
        missing |= zeros & rules.has_base
    return words, None, missing


def _build_extended(
    parts: _Parts, rules: RecodeRules
) -> tuple[Uint64Array, Uint64Array, BoolArray]:
    """(entries, bitmaps, which of them cannot be said)."""
    weights = np.uint64(1) << np.arange(_PARTS, dtype=np.uint64)
    allocated = (parts.allocated * weights).sum(axis=1, dtype=np.uint64)
    zero = (parts.zero * weights).sum(axis=1, dtype=np.uint64)
    assert int(allocated.max(initial=0)) <= ALL_ALLOCATED
    return _with_host(parts, rules), allocated | zero << np.uint64(_PARTS), parts.mixed.copy()


def _with_host(parts: _Parts, rules: RecodeRules) -> Uint64Array:
    words = parts.host.astype(np.uint64)
    if rules.external:
        words[parts.present] |= np.uint64(COPIED)
    return words
