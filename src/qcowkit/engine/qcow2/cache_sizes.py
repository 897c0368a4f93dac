"""How large the caches of L2 slices and refcount blocks may become. Pure, numpy-free.

Source: qemu's documentation of the qcow2 caches. The L2 cache takes as much as the disk can use,
the refcount cache what is left: every lookup needs L2 entries, only allocations need refcounts."""

from __future__ import annotations

from dataclasses import dataclass

from qcowkit.codecs.qcow2.geometry import MIN_CLUSTER_BITS, Geometry
from qcowkit.engine.options import OpenOptions
from qcowkit.errors import RequestError
from qcowkit.units import KiB, MiB, align_up, is_power_of_two

DEFAULT_L2_MAXIMUM = 32 * MiB
# Slices of a cache that does not cover the disk: small ones cost less to load and to drop.
DEFAULT_SLICE = 4 * KiB
MIN_ENTRY_BYTES = 1 << MIN_CLUSTER_BITS
# Copy-on-write may look at two slices at once.
MIN_L2_ENTRIES = 2
MIN_REFCOUNT_BLOCKS = 4
# qemu counts entries in 32-bit integers with a sign.
MAX_ENTRIES = (1 << 31) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSizes:
    """Bytes: `l2_bytes` is a multiple of `l2_entry_bytes`, which is the size of one slice of an L2
    table; `refcount_bytes` is a multiple of the cluster size. Limits, not allocations."""

    l2_bytes: int
    l2_entry_bytes: int
    refcount_bytes: int

    @property
    def l2_entry_count(self) -> int:
        """Slices that the L2 cache holds."""
        return self.l2_bytes // self.l2_entry_bytes


def plan_cache_sizes(geometry: Geometry, *, virtual_size: int, options: OpenOptions) -> CacheSizes:
    """The sizes for a disk of `virtual_size` bytes; to be planned again when it is resized.

    Raises RequestError for options that contradict one another or are out of their ranges."""
    needed = full_l2_bytes(geometry, virtual_size=virtual_size)
    check_sizes(options)
    l2_bytes, refcount_bytes = _split(geometry, needed=needed, options=options)
    entry_bytes = _entry_bytes(geometry, covered=l2_bytes >= needed, options=options)
    l2_count = max(l2_bytes // entry_bytes, MIN_L2_ENTRIES)
    refcount_count = max(refcount_bytes // geometry.cluster_size, MIN_REFCOUNT_BLOCKS)
    _check_count("L2 cache", l2_count)
    _check_count("refcount cache", refcount_count)
    return CacheSizes(
        l2_bytes=l2_count * entry_bytes,
        l2_entry_bytes=entry_bytes,
        refcount_bytes=refcount_count * geometry.cluster_size,
    )


def check_sizes(options: OpenOptions) -> None:
    """Whether the three sizes agree; no image is needed to tell. Raises RequestError."""
    whole, l2, refcounts = options.cache_size, options.l2_cache_size, options.refcount_cache_size
    named = (("cache-size", whole), ("l2-cache-size", l2), ("refcount-cache-size", refcounts))
    for name, size in named:
        if size is not None and size < 0:
            raise RequestError(f"{name} is {size}, expected a number of bytes")
    if whole is None:
        return
    if l2 is not None and refcounts is not None:
        raise RequestError(
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
        )
    for name, size in named[1:]:
        if size is not None and size > whole:
            raise RequestError(f"{name} is {size}, which exceeds the cache-size of {whole}")


def full_l2_bytes(geometry: Geometry, *, virtual_size: int) -> int:
    """Bytes of the L2 entries of the whole disk, in whole clusters."""
    entries = geometry.clusters(virtual_size)
    return align_up(entries * geometry.l2_entry_size, geometry.cluster_size)


def l2_coverage(geometry: Geometry, *, l2_bytes: int) -> int:
    """Guest bytes whose L2 entries take `l2_bytes` of cache."""
    return l2_bytes // geometry.l2_entry_size * geometry.cluster_size


def refcount_coverage(geometry: Geometry, *, refcount_bytes: int) -> int:
    """Host bytes whose refcounts take `refcount_bytes` of cache."""
    return refcount_bytes * 8 // geometry.refcount_bits * geometry.cluster_size


def _split(geometry: Geometry, *, needed: int, options: OpenOptions) -> tuple[int, int]:
    """Bytes of the L2 cache and of the refcount cache, before the least sizes are applied."""
    given = options.l2_cache_size
    l2 = min(needed, DEFAULT_L2_MAXIMUM if given is None else given)
    refcounts = options.refcount_cache_size or 0
    whole = options.cache_size
    if whole is None:
        return l2, refcounts
    if given is not None:
        return l2, whole - l2
    if options.refcount_cache_size is not None:
        return whole - refcounts, refcounts
    least = MIN_REFCOUNT_BLOCKS * geometry.cluster_size
    refcounts = whole - needed if whole >= needed + least else min(whole, least)
    return whole - refcounts, refcounts


def _entry_bytes(geometry: Geometry, *, covered: bool, options: OpenOptions) -> int:
    size = options.l2_cache_entry_size
    if size is None:
        return geometry.cluster_size if covered else min(geometry.cluster_size, DEFAULT_SLICE)
    if not (MIN_ENTRY_BYTES <= size <= geometry.cluster_size and is_power_of_two(size)):
        raise RequestError(
            f"l2-cache-entry-size is {size}, expected a power of two between {MIN_ENTRY_BYTES} "
            f"and the cluster size {geometry.cluster_size}"
        )
    return size


def _check_count(what: str, count: int) -> None:
    if count > MAX_ENTRIES:
        raise RequestError(f"{what}: {count} entries, expected at most {MAX_ENTRIES}")
