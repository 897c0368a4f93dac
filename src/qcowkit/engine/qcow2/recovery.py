"""An image that was left dirty, made sound before it is written again.

With a record of dirty tables (docs/adr/0013) only these are looked at, and refcounts are only ever
raised: clusters that have lost their last reference stay counted until a check gives them back.
Without a record, or where anything is not as a writer leaves it, everything is repaired."""

from __future__ import annotations

from dataclasses import replace

from qcowkit.codecs.qcow2.dirty_tables import DirtyTables
from qcowkit.codecs.qcow2.header import Autoclear
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.qcow2.allocator import Allocator
from qcowkit.engine.qcow2.header_writer import HeaderWriter
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.overlap import OverlapGuard
from qcowkit.engine.qcow2.recovery_plan import FullRepairNeeded, RecoveryPlan, load_recovery_plan
from qcowkit.engine.qcow2.refcount_store import RefcountStore
from qcowkit.engine.qcow2.refcounts import load_refcount_table
from qcowkit.engine.qcow2.repair import repair_for_writing
from qcowkit.engine.qcow2.tables import native_words
from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.storage.protocol import Storage
from qcowkit.units import MiB, ceil_div

# Refcount blocks in memory: those of a crash lie together mostly.
_CACHE_BYTES = 4 * MiB


def recover_for_writing(
    storage: Storage, metadata: Qcow2Metadata, *, barriers: Barriers | None = None
) -> Qcow2Metadata:
    """Make a dirty image sound; others are returned as they are, untouched. The metadata as they
    are then.

    Part of opening: takes no lock and opens nothing. Raises StorageError, and what
    `repair_for_writing` raises."""
    if not metadata.dirty:
        return metadata
    barriers = barriers or Barriers(storage)
    record = valid_record(metadata)
    if record is not None:
        try:
            return recover_recorded(storage, metadata, record, barriers=barriers)
        except (FullRepairNeeded, CorruptMetadata, RequestError):
            # Counts that were raised before are right in any case; the full repair says what is
            # wrong, and mends what can be.
            pass
    return repair_for_writing(storage, metadata, barriers=barriers)


def valid_record(metadata: Qcow2Metadata) -> DirtyTables | None:
    """The record of a dirty image that can be relied upon; None if there is none."""
    holds = metadata.header.autoclear_features & Autoclear.DIRTY_TABLES
    return metadata.extensions.dirty_tables if metadata.dirty and holds else None


def recover_recorded(
    storage: Storage, metadata: Qcow2Metadata, record: DirtyTables, *, barriers: Barriers
) -> Qcow2Metadata:
    """Count what the recorded tables refer to, and clear the dirty bit.

    Raises FullRepairNeeded, CorruptMetadata and RequestError where that is not enough, and
    StorageError; at any moment it may be begun again, or everything be repaired."""
    return _Recovery(storage, metadata, record, barriers).run()


class _Recovery:
    def __init__(
        self, storage: Storage, metadata: Qcow2Metadata, record: DirtyTables, barriers: Barriers
    ) -> None:
        self._storage = storage
        self._metadata = metadata
        self._record = record
        self._barriers = barriers
        self._header = HeaderWriter(storage, metadata.header, keeps_record=True)
        table = load_refcount_table(storage, metadata)
        self._refcounts = RefcountStore(
            storage,
            geometry=metadata.geometry,
            table=native_words(table.astype(">u8").tobytes()),
            place=metadata.header.refcount_table_offset,
            cache_bytes=_CACHE_BYTES,
        )

    def run(self) -> Qcow2Metadata:
        refcounts, barriers = self._refcounts, self._barriers
        plan = load_recovery_plan(self._storage, self._metadata, self._record, refcounts=refcounts)
        allocator = self._make_blocks(plan)
        refcounts.raise_to(plan.clusters, plan.counts)
        for place, word in plan.words:
            self._storage.pwrite([word.to_bytes(8, "big")], offset=place)
            barriers.pending = True
        barriers.pending |= refcounts.store_blocks()
        barriers.wait("recovery: refcounts written")
        self._store_table(allocator)
        # Not waited for: what is written next needs nothing of it, and a cut before it is durable
        # only lets the same be done again.
        self._header.set_dirty(on=False)
        return replace(self._metadata, header=self._header.header)

    def _make_blocks(self, plan: RecoveryPlan) -> Allocator:
        """Refcount blocks for clusters that none describes, behind all that is in use."""
        refcounts, size = self._refcounts, self._metadata.cluster_size
        names = frozenset[str]()
        device = self._storage.caps.block_device
        end = max(plan.end, 0 if device else ceil_div(self._storage.size(), size))
        # Where nothing lies nothing has to be guarded.
        allocator = Allocator(
            refcounts,
            OverlapGuard(names, cluster_bits=self._metadata.geometry.cluster_bits),
            file_clusters=end,
        )
        wanted = sorted(set((plan.clusters // refcounts.per_block).tolist()), reverse=True)
        for index in wanted:
            if refcounts.has_block(index):
                continue
            if device:
                raise FullRepairNeeded("a refcount block is missing, and a device cannot grow")
            # The highest first: the one that is made describes what follows it, or itself.
            cluster = allocator.allocate_run(1)
            if refcounts.has_block(index):
                allocator.free(cluster, 1, punch=False)
            else:
                refcounts.add_block(index, cluster=cluster, used=(cluster, 0))
        return allocator

    def _store_table(self, allocator: Allocator) -> None:
        """New entries of the refcount table, or all of a longer one."""
        refcounts, barriers = self._refcounts, self._barriers
        if not refcounts.staged:
            return
        refcounts.store_table()
        barriers.pending = True
        barriers.wait("recovery: refcount table written")
        if refcounts.moved:
            self._header.set_refcount_table(offset=refcounts.place, clusters=refcounts.clusters)
            barriers.pending = True
            refcounts.table_switched()
            barriers.wait("recovery: refcount table switched")
        # The old table, and what was not needed after all.
        allocator.release()
        barriers.pending |= refcounts.store_blocks()
