"""The sizes that follow from cluster_bits, extended L2 and the refcount order. Pure.

Source: the qcow2 specification, sections "Header", "L1 and L2 tables" and "Extended L2 entries"."""

from __future__ import annotations

from dataclasses import dataclass

from qcowkit.units import ceil_div

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MIN_EXTENDED_CLUSTER_BITS = 14
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Immutable sizes of one image. Sizes in bytes, `*_entries` and `*_count` count."""

    cluster_bits: int
    refcount_order: int = 4
    extended_l2: bool = False

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def has_subclusters(self) -> bool:
        """The one predicate for extended L2 entries."""
        return self.extended_l2

    @property
    def l2_entry_size(self) -> int:
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table, which fills one cluster."""
        return self.cluster_size // self.l2_entry_size

    @property
    def l2_coverage(self) -> int:
        """Guest bytes below one L1 entry."""
        return self.l2_entries << self.cluster_bits

    @property
    def subcluster_count(self) -> int:
        return 32 if self.extended_l2 else 1

    @property
    def subcluster_size(self) -> int:
        return self.cluster_size // self.subcluster_count

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def refcount_max(self) -> int:
        return (1 << self.refcount_bits) - 1

    @property
    def refcounts_per_block(self) -> int:
        """Host clusters counted by one refcount block."""
        return self.cluster_size * 8 // self.refcount_bits

    @property
    def compressed_offset_bits(self) -> int:
        """x of the specification: where the sector count of a compressed descriptor begins."""
        return 62 - (self.cluster_bits - 8)

    def clusters(self, size: int) -> int:
        """Guest clusters of a disk of `size` bytes."""
        return ceil_div(size, self.cluster_size)

    def l1_entries(self, size: int) -> int:
        """L1 entries that a disk of `size` bytes needs."""
        return ceil_div(size, self.l2_coverage)

    def l1_index(self, offset: int) -> int:
        return offset // self.l2_coverage

    def l2_index(self, offset: int) -> int:
        return (offset >> self.cluster_bits) % self.l2_entries

    def subcluster_index(self, offset: int) -> int:
        """The subcluster within its cluster that holds guest `offset`."""
        return (offset % self.cluster_size) // self.subcluster_size
