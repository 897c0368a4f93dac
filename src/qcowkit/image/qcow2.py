"""A qcow2 file as one layer of guest address space, read-only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcowkit.budget import Budget
from qcowkit.codecs.qcow2.entries import EntryRules
from qcowkit.engine.holes import load_host_data, mark_holes
from qcowkit.engine.options import DEFAULT_OPTIONS, OpenOptions
from qcowkit.engine.qcow2.cache_sizes import plan_cache_sizes
from qcowkit.engine.qcow2.clusters import ClusterReader
from qcowkit.engine.qcow2.mapping import Mapping
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.refcounts import holds_unwritten_clusters
from qcowkit.engine.qcow2.tables import L2Tables, load_l1
from qcowkit.errors import RequestError, UnsupportedFeature
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import Extent, ExtentTable, Flag, Hit
from qcowkit.image.plain import check_range, read_plain
from qcowkit.storage.protocol import Storage
from qcowkit.units import INT64_MAX, align_up


class Qcow2Image:
    """The active disk of a qcow2 file, or one of its snapshots (`snapshot`: id or name).

    Raises UnsupportedFeature for encrypted content, RequestError for an unknown snapshot."""

    def __init__(
        self,
        metadata: Qcow2Metadata,
        storage: Storage,
        *,
        data_storage: Storage | None,
        budget: Budget,
        snapshot: str | None = None,
        options: OpenOptions = DEFAULT_OPTIONS,
    ) -> None:
        if metadata.encrypted:
            raise UnsupportedFeature(
                f"{metadata.encrypted} encryption",
                reason="the content is encrypted and cannot be read yet",
            )
        if metadata.data_file and data_storage is None:
            raise RequestError(f"{storage.name}: the external data file is not open")
        self.metadata = metadata
        self.storage = storage
        self.data_storage = data_storage or storage
        self.cluster_size = metadata.geometry.cluster_size
        self.mapping = _open_mapping(metadata, storage, budget, snapshot, options)
        self.size = self.mapping.size
        self.clusters = ClusterReader(
            storage, kind=metadata.compression_type, cluster_size=self.cluster_size
        )
        self._host_data: RangeSet | None = None
        self._asked_host = False

    def extents(self, *, start: int, length: int, limit: int | None = None) -> ExtentTable:
        """See `Image.extents`."""
        check_range(start=start, length=length, size=self.size)
        table = self.mapping.extents(start=start, length=length, limit=limit)
        if not self._asked_host:
            self._host_data = self._ask_host()
            self._asked_host = True
        return table if self._host_data is None else mark_holes(table, self._host_data)

    def lookup(self, offset: int) -> tuple[Hit, int, int]:
        """See `Image.lookup`."""
        return self.mapping.lookup(offset)

    def _ask_host(self) -> RangeSet | None:
        """Where the host has data, if this image was preallocated and so is worth asking for."""
        if not holds_unwritten_clusters(self.storage, self.metadata):
            return None
        found = load_host_data(self.data_storage)
        if found is None:
            return None
        # What lies beyond the end is no hole but lost, which reading it shall tell.
        end = align_up(self.data_storage.size(), self.cluster_size)
        return found.union(RangeSet.of([end], [INT64_MAX]))

    def read_runs(self, runs: Sequence[Extent], buffer: memoryview, *, base: int) -> None:
        """See `Image.read_runs`."""
        plain = [run for run in runs if not run.flags & Flag.COMPRESSED]
        if len(plain) == len(runs):
            self._read_plain(runs, buffer, base)
            return
        self._read_plain(plain, buffer, base)
        squeezed = [run for run in runs if run.flags & Flag.COMPRESSED]
        self.clusters.read_into(squeezed, buffer, base=base)

    def _read_plain(self, runs: Sequence[Extent], buffer: memoryview, base: int) -> None:
        size = self.cluster_size
        read_plain(self.data_storage, runs, buffer, base=base, cluster_size=size)

    def clean(self) -> None:
        """Drop cached tables that were not used since the last time."""
        self.mapping.tables.cache.clean()

    def close(self) -> None:
        self.storage.close()
        if self.data_storage is not self.storage:
            self.data_storage.close()


def _open_mapping(
    metadata: Qcow2Metadata,
    storage: Storage,
    budget: Budget,
    snapshot: str | None,
    options: OpenOptions,
) -> Mapping:
    geometry, header = metadata.geometry, metadata.header
    file_size = storage.size()
    offset, count, size = header.l1_table_offset, header.l1_size, metadata.virtual_size
    if snapshot is not None:
        entry = metadata.find_snapshot(snapshot)
        offset, count, size = entry.l1_offset, entry.l1_entries, entry.disk_size
    needed = geometry.l1_entries(size)
    # Entries beyond the disk address the VM state, which no guest read reaches.
    budget.spend("L1 table bytes", value=needed * 8, limit=budget.metadata_bytes)
    rules = EntryRules(
        geometry=geometry,
        version=header.version,
        external_data=metadata.data_file,
        file_size=file_size,
    )
    stored = min(count, needed)
    l1 = load_l1(storage, offset=offset, count=stored, geometry=geometry, file_size=file_size)
    # A snapshot of before its disk grew, and without a size of its own, has a shorter table.
    l1 = np.pad(l1, (0, needed - stored))
    sizes = plan_cache_sizes(geometry, virtual_size=size, options=options)
    tables = L2Tables(
        storage,
        l1=l1,
        geometry=geometry,
        slice_size=sizes.l2_entry_bytes,
        cache_bytes=min(sizes.l2_bytes, budget.table_cache),
    )
    return Mapping(tables=tables, rules=rules, size=size)
