"""A qcow2 file as one layer of guest address space, read-only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qcowkit.budget import Budget
from qcowkit.codecs.qcow2.entries import EntryRules
from qcowkit.codecs.qcow2.runs import ContiguousRuns
from qcowkit.engine.holes import load_host_data, mark_holes
from qcowkit.engine.options import DEFAULT_OPTIONS, OpenOptions
from qcowkit.engine.qcow2.bitmap_bits import find_bitmap, load_bits
from qcowkit.engine.qcow2.cache_sizes import (
    DEFAULT_L2_MAXIMUM,
    full_l2_bytes,
    plan_cache_sizes,
)
from qcowkit.engine.qcow2.clusters import ClusterReader
from qcowkit.engine.qcow2.crypt import open_cipher
from qcowkit.engine.qcow2.mapping import Mapping
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.refcounts import holds_unwritten_clusters
from qcowkit.engine.qcow2.runs import RunMapping, usable_runs
from qcowkit.engine.qcow2.tables import L2Tables, load_l1
from qcowkit.engine.ranges import check_range
from qcowkit.errors import RequestError
from qcowkit.extents.bits import GranuleBits
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import Extent, ExtentTable, Flag, Hit
from qcowkit.image.plain import read_encrypted, read_plain
from qcowkit.storage.protocol import Storage
from qcowkit.storage.withheld import WithheldStorage
from qcowkit.units import INT64_MAX, align_up


class Qcow2Image:
    """The active disk of a qcow2 file, or one of its snapshots (`snapshot`: id or name).

    secret: the passphrase where the content is encrypted. owner: the image whose files and key are
    used, and which closes them. Raises RequestError for an unknown snapshot, and for a passphrase
    that is missing or wrong. reads_runs: whether the record of contiguous runs may be believed."""

    reads_runs = True

    def __init__(
        self,
        metadata: Qcow2Metadata,
        storage: Storage,
        *,
        data_storage: Storage | None,
        budget: Budget,
        snapshot: str | None = None,
        options: OpenOptions = DEFAULT_OPTIONS,
        secret: bytes | None = None,
        owner: Qcow2Image | None = None,
    ) -> None:
        if metadata.header.capsule:
            data_storage = WithheldStorage(
                storage, what="a capsule", reason="guest data were left out when it was made"
            )
        if metadata.data_file and data_storage is None:
            raise RequestError(f"{storage.name}: the external data file is not open")
        self.metadata = metadata
        self.storage = storage
        self.data_storage = data_storage or storage
        self.cluster_size = metadata.geometry.cluster_size
        # A writer changes the tables; a snapshot's are not those that the runs are of.
        runs = None
        if self.reads_runs and snapshot is None:
            runs = usable_runs(metadata, data_size=self.data_storage.size())
        self.mapping = _open_mapping(metadata, storage, budget, snapshot, options, runs)
        self.size = self.mapping.size
        self._budget, self._options, self._owner = budget, options, owner
        self._is_snapshot = snapshot is not None
        if metadata.header.capsule:
            # Its key material was left out too, and there is nothing to decrypt.
            self.cipher = None
        elif owner is None:
            self.cipher = open_cipher(metadata, storage, secret=secret, budget=budget)
        else:
            self.cipher = owner.cipher
        self.clusters = ClusterReader(
            # Compressed data are never in another file, and in a capsule nowhere.
            self.data_storage if metadata.header.capsule else storage,
            kind=metadata.compression_type,
            cluster_size=self.cluster_size,
        )
        self._host_data: RangeSet | None = None
        # A hole of the host reads as zeros, which decrypt to anything, or in a capsule were not.
        self._asked_host = self.cipher is not None or metadata.header.capsule

    def snapshot(self, id_or_name: str) -> Qcow2Image:
        """A snapshot as a read-only image over the files of this one, which has to stay open, and
        the snapshot there, as long as it is used. Raises RequestError where there is none."""
        return Qcow2Image(
            self.metadata,
            self.storage,
            data_storage=None if self.data_storage is self.storage else self.data_storage,
            budget=self._budget,
            snapshot=id_or_name,
            options=self._options,
            owner=self,
        )

    def bitmap(self, name: str) -> GranuleBits:
        """What a persistent bitmap says of the disk. Raises RequestError where there is none, or an
        inconsistent one, CorruptMetadata and BudgetExceeded."""
        if self._is_snapshot:
            raise RequestError(f"bitmap {name!r} is of the current disk, not of a snapshot")
        metadata = self.metadata
        return load_bits(
            self.storage,
            find_bitmap(metadata.bitmaps, name),
            geometry=metadata.geometry,
            size=self.size,
            budget=self._budget,
        )

    def extents(self, *, start: int, length: int, limit: int | None = None) -> ExtentTable:
        """See `Image.extents`."""
        check_range(start=start, length=length, size=self.size)
        table = self.mapping.extents(start=start, length=length, limit=limit)
        if not self._asked_host:
            self._host_data = self._ask_host()
            self._asked_host = True
        if self.cipher is not None:
            return _mark_encrypted(table)
        return table if self._host_data is None else mark_holes(table, self._host_data)

    def lookup(self, offset: int) -> tuple[Hit, int, int]:
        """See `Image.lookup`."""
        kind, host, run = self.mapping.lookup(offset)
        if kind == Hit.DATA and self.cipher is not None:
            # Whoever asks reads at the host offset; what lies there is not for them.
            return Hit.OTHER, -1, run
        return kind, host, run

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
        if self.cipher is not None:
            read_encrypted(
                self.data_storage, runs, buffer, self.cipher, base=base, cluster_size=size
            )
            return
        read_plain(self.data_storage, runs, buffer, base=base, cluster_size=size)

    def clean(self) -> None:
        """Drop cached tables that were not used since the last time."""
        self.mapping.tables.cache.clean()

    def close(self) -> None:
        if self._owner is not None:
            return
        if self.cipher is not None:
            self.cipher.wipe()
        self.storage.close()
        if self.data_storage is not self.storage:
            self.data_storage.close()


def _mark_encrypted(table: ExtentTable) -> ExtentTable:
    """Compressed clusters are never encrypted; everything else that has a place is."""
    place = (table.host >= 0) & ((table.flags & np.uint16(Flag.COMPRESSED)) == 0)
    return ExtentTable(
        start=table.start,
        length=table.length,
        flags=np.where(place, table.flags | np.uint16(Flag.ENCRYPTED), table.flags),
        layer=table.layer,
        host=table.host,
        stored=table.stored,
    )


def _open_mapping(
    metadata: Qcow2Metadata,
    storage: Storage,
    budget: Budget,
    snapshot: str | None,
    options: OpenOptions,
    runs: ContiguousRuns | None,
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
    if options.cache_size is None and options.l2_cache_size is None:
        # Whoever names a size means it; otherwise the budget bounds the default.
        most = min(budget.table_cache, DEFAULT_L2_MAXIMUM)
        options = replace(options, l2_cache_size=most)
    sizes = plan_cache_sizes(geometry, virtual_size=size, options=options)
    tables = L2Tables(
        storage,
        l1=l1,
        geometry=geometry,
        slice_size=sizes.l2_entry_bytes,
        cache_bytes=sizes.l2_bytes,
        whole=sizes.l2_bytes >= full_l2_bytes(geometry, virtual_size=size),
    )
    if runs is not None:
        return RunMapping(tables=tables, rules=rules, size=size, runs=runs)
    return Mapping(tables=tables, rules=rules, size=size)
