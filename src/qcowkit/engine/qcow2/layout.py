"""Where the tables of a new image lie: a closed form of its sizes. Pure.

Order of the file: header, refcount table, refcount blocks, L1, LUKS header, L2 tables, data.
create, convert and measure share it. What a plan reserves and the content does not need stays a
hole that is counted as free."""

from __future__ import annotations

from dataclasses import dataclass

from qcowkit.codecs.qcow2.geometry import MAX_REFCOUNT_TABLE_BYTES, Geometry
from qcowkit.errors import RequestError
from qcowkit.units import align_up, ceil_div


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Host offsets in bytes, counts in clusters unless named otherwise."""

    geometry: Geometry
    guest_clusters: int
    refcount_table_clusters: int
    refcount_blocks: int
    l1_entries: int
    l2_tables: int
    data_clusters: int
    crypto_clusters: int = 0

    @property
    def refcount_table_offset(self) -> int:
        return self.geometry.cluster_size

    @property
    def refcount_block_offset(self) -> int:
        return self._after(self.refcount_table_offset, self.refcount_table_clusters)

    @property
    def l1_offset(self) -> int:
        return self._after(self.refcount_block_offset, self.refcount_blocks)

    @property
    def l1_clusters(self) -> int:
        return ceil_div(self.l1_entries * 8, self.geometry.cluster_size)

    @property
    def crypto_offset(self) -> int:
        return self._after(self.l1_offset, self.l1_clusters)

    @property
    def l2_offset(self) -> int:
        return self._after(self.crypto_offset, self.crypto_clusters)

    @property
    def data_offset(self) -> int:
        return self._after(self.l2_offset, self.l2_tables)

    @property
    def end(self) -> int:
        """The file's size when everything reserved is used."""
        return self._after(self.data_offset, self.data_clusters)

    def _after(self, offset: int, clusters: int) -> int:
        return offset + clusters * self.geometry.cluster_size


def plan_layout(
    geometry: Geometry, *, size: int, l2_tables: int, data_clusters: int, crypto_clusters: int = 0
) -> Layout:
    """The layout for at most that many L2 tables and data clusters.

    Raises RequestError when the refcount table would be larger than readers accept."""
    l1_entries = geometry.l1_entries(size)
    fixed = 1 + ceil_div(l1_entries * 8, geometry.cluster_size) + l2_tables + data_clusters
    fixed += crypto_clusters
    blocks, table = refcount_clusters(geometry, fixed)
    if table * geometry.cluster_size > max(MAX_REFCOUNT_TABLE_BYTES, geometry.cluster_size):
        raise RequestError(
            f"an image of {fixed} clusters needs a refcount table of "
            f"{table * geometry.cluster_size} bytes, at most {MAX_REFCOUNT_TABLE_BYTES} are "
            "allowed: choose larger clusters"
        )
    return Layout(
        geometry=geometry,
        guest_clusters=geometry.clusters(size),
        refcount_table_clusters=table,
        refcount_blocks=blocks,
        l1_entries=l1_entries,
        l2_tables=l2_tables,
        data_clusters=data_clusters,
        crypto_clusters=crypto_clusters,
    )


def refcount_clusters(geometry: Geometry, others: int) -> tuple[int, int]:
    """(refcount blocks, clusters of the refcount table) that count `others` clusters and
    themselves: the smallest fixed point."""
    per_block = geometry.refcounts_per_block
    per_table = geometry.cluster_size // 8
    blocks, table = 0, 0
    while True:
        more_blocks = ceil_div(others + blocks + table, per_block)
        more_table = ceil_div(more_blocks, per_table)
        if (more_blocks, more_table) == (blocks, table):
            return blocks, table
        blocks, table = more_blocks, more_table


def l2_bytes(geometry: Geometry, size: int) -> int:
    """Bytes of all L2 tables of a fully mapped disk, in whole clusters."""
    return align_up(geometry.clusters(size) * geometry.l2_entry_size, geometry.cluster_size)
