"""An image that is open for writing: its tables, its allocator, and the order of its changes."""

from __future__ import annotations

import contextlib
import threading
from array import array
from dataclasses import dataclass, replace

import numpy as np

from qcowkit.codecs.qcow2.entries import (
    COPIED,
    OFFSET_MASK,
    BadEntry,
    Uint64Array,
    find_fault,
)
from qcowkit.codecs.qcow2.header import Incompatible
from qcowkit.codecs.qcow2.transitions import (
    compressed,
    compressed_clusters,
    hosts_of,
    slice_columns,
)
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.crypt import DataCipher
from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.allocator import NEVER, Allocator, Grant
from qcowkit.engine.qcow2.cache_sizes import full_l2_bytes, plan_cache_sizes
from qcowkit.engine.qcow2.dirty_record import DirtyRecord
from qcowkit.engine.qcow2.header_writer import HeaderWriter
from qcowkit.engine.qcow2.mapping import Mapping
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.overlap import OverlapGuard
from qcowkit.engine.qcow2.refcount_store import RefcountStore
from qcowkit.engine.qcow2.tables import encode_words, load_l1, native_words
from qcowkit.errors import CorruptMetadata, QcowkitError, RequestError, StorageError
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, align_down, ceil_div

# Slices that are known to be sound, some MiB of numbers at most.
_MOST_JUDGED = 1 << 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """What a writer is made of. data: where guest clusters lie, `storage` itself mostly. cipher: of
    guest data that are encrypted."""

    storage: Storage
    data: Storage
    metadata: Qcow2Metadata
    mapping: Mapping
    cipher: DataCipher | None = None


class WriteState:
    """Everything a writer changes. The caller holds `lock` around each call.

    releases: how often clusters were given back for another use; whoever reads without the lock
    looks before and after (docs/adr/0010). broken: why nothing may be changed any more."""

    def __init__(
        self,
        places: Places,
        *,
        table: array[int],
        guard: OverlapGuard,
        barriers: Barriers,
        options: OpenOptions,
    ) -> None:
        """table: the refcount table as native words."""
        storage, metadata = places.storage, places.metadata
        self.storage = storage
        self.data = places.data
        self.metadata = metadata
        self.mapping = places.mapping
        self.cipher = places.cipher
        self.tables = places.mapping.tables
        self.geometry = metadata.geometry
        self.external = metadata.data_file
        self.options = options
        self.lock = threading.RLock()
        self.barriers = barriers
        self.guard = guard
        self.lazy = _choose_lazy(metadata, options)
        self._record = self._find_record()
        self.header = HeaderWriter(storage, metadata.header, keeps_record=self._record is not None)
        sizes = plan_cache_sizes(self.geometry, virtual_size=metadata.virtual_size, options=options)
        self.refcounts = RefcountStore(
            storage,
            geometry=self.geometry,
            table=table,
            place=metadata.header.refcount_table_offset,
            cache_bytes=sizes.refcount_bytes,
        )
        clusters = ceil_div(storage.size(), self.geometry.cluster_size)
        self.allocator = Allocator(
            self.refcounts, guard, file_clusters=NEVER if storage.caps.block_device else clusters
        )
        self.releases = 0
        self.broken: QcowkitError | None = None
        # Slices whose entries were judged before they were first used for writing.
        self.judged: set[int] = set()
        # Slices whose table is this disk's own, as far as that was found out.
        self.owned: set[int] = set()
        # An error that is not about this image's own tables.
        self.foreign: QcowkitError | None = None
        self._dirty_l1: set[int] = set()
        self._moved_l1: tuple[int, int] | None = None

    def _find_record(self) -> DirtyRecord | None:
        """The record of dirty L2 tables, if the image has one and can use it."""
        found = self.metadata.extensions.dirty_tables
        if not self.lazy or found is None or self.metadata.dirty:
            # What has changed in a dirty image before now is not known here.
            return None
        return DirtyRecord(self.storage, found)

    # Tables

    def ensure_table(self, index: int) -> None:
        """The L2 table of an L1 entry is there and nobody else's. Raises StorageError,
        CorruptMetadata and RequestError."""
        entry = int(self.tables.l1[index])
        old = entry & OFFSET_MASK
        if old and entry & COPIED:
            return
        size = self.geometry.cluster_size
        self.barriers.observe("l2_alloc_allocate")
        grant = self.allocator.allocate(1)
        host = grant.first * size
        try:
            self._fill_table(old, grant, host)
        except BaseException:
            self.allocator.free(grant.first, 1, punch=False)
            raise
        self.guard.note("active-l2", first=grant.first)
        self._dirty_l1.add(index)
        self.tables.l1[index] = np.uint64(host | COPIED)
        if not old:
            self._know_zeros(index)
        # Last: whatever ends this call before may leak the old table, and never gives it away.
        if old:
            self.allocator.free(old // size, 1, punch=self.options.pass_discard_other)

    def _know_zeros(self, index: int) -> None:
        """A new table without entries needs neither to be read nor to be judged; one of many slices
        would fill the cache with what may never be used."""
        if self.tables.slices_per_table == 1:
            self._note_judged(index)
            self.tables.cache.add(index, native_words(bytes(self.tables.slice_size)))

    def _fill_table(self, old: int, grant: Grant, host: int) -> None:
        """A new L2 table starts as a copy of the one that was shared, or with zeros."""
        size = self.geometry.cluster_size
        self.barriers.pending = True
        if old:
            self.barriers.observe("l2_alloc_cow_read")
            raw = self.storage.pread(size, offset=old).ljust(size, b"\0")
            self.barriers.observe("l2_alloc_write")
            self.storage.pwrite([raw], offset=host)
        elif not grant.zero:
            self.barriers.observe("l2_alloc_write")
            self.storage.pwrite([bytes(size)], offset=host)
        else:
            self.cover(host + size)

    def cover(self, end: int) -> None:
        """The file reaches to host offset `end`, before anything leads to what it is to hold: the
        host may be full when that is written. Raises StorageError."""
        if not self.storage.caps.block_device and self.storage.size() < end:
            self.barriers.pending = True
            self.storage.truncate(end)

    def slice(self, number: int) -> array[int]:
        """The words of a slice that is going to be used for writing, judged once."""
        words = self.tables.slice(number)
        if number not in self.judged:
            self._judge(number, words)
            self._note_judged(number)
        return words

    def _note_judged(self, number: int) -> None:
        if len(self.judged) >= _MOST_JUDGED:
            # Only time is lost: whatever is used again is judged again.
            self.judged.clear()
            self.owned.clear()
        self.judged.add(number)

    def edit(self, number: int, *, first: int, last: int) -> array[int]:
        """The words of a slice, of which entries [first, last) change."""
        size = self.geometry.l2_entry_size
        self.barriers.observe("l2_update")
        return self.tables.cache.edit(
            number, offset=self.tables.place(number), first=first * size, last=last * size
        )

    def _judge(self, number: int, words: array[int]) -> None:
        """Row 43 for what the image brought along: no entry may lead to metadata."""
        self.refresh_rules()
        entries, bitmaps = slice_columns(words, geometry=self.geometry)
        fault = find_fault(
            np.ascontiguousarray(entries),
            None if bitmaps is None else np.ascontiguousarray(bitmaps),
            self.mapping.rules,
        )
        if fault is not None:
            raise self._bad_entry(number, fault)
        hosts = hosts_of(entries)
        if self.external:
            self._judge_places(number, hosts)
            return
        packed = compressed(entries)
        plain = hosts[~packed]
        self.guard.check_many(plain[plain > 0] >> self.geometry.cluster_bits)
        for entry in entries[packed].tolist():
            first, count = compressed_clusters(entry, geometry=self.geometry)
            self.guard.check(first=first, count=count)

    def _judge_places(self, number: int, hosts: Int64Array) -> None:
        """Row 13: in a data file guest and host offsets are the same."""
        first = number * self.tables.slice_entries
        guest = (np.arange(len(hosts), dtype=np.int64) + first) * self.geometry.cluster_size
        wrong = np.flatnonzero((hosts != 0) & (hosts != guest))
        if len(wrong):
            index = int(wrong[0])
            reason = (
                f"data file offset {int(hosts[index]):#x}, expected the guest offset "
                f"{int(guest[index]):#x}"
            )
            raise self._bad_entry(number, BadEntry(index, reason))

    def _bad_entry(self, number: int, fault: BadEntry) -> CorruptMetadata:
        table, part = divmod(number, self.tables.slices_per_table)
        return CorruptMetadata(
            "L2 table",
            host_offset=int(self.tables.l1[table]) & OFFSET_MASK,
            index=part * self.tables.slice_entries + fault.index,
            reason=fault.reason,
        )

    def reads_zero_beyond(self, offset: int) -> bool:
        """Whether the data file has nothing yet at and behind `offset`, and so reads as zeros."""
        return not self.data.caps.block_device and offset >= self.data.size()

    def refresh_rules(self) -> None:
        """The file grows as it is written, which decides what entries may say."""
        size = self.storage.size()
        if size > self.mapping.rules.file_size:
            self.mapping.rules = replace(self.mapping.rules, file_size=size)

    def move_l1(self, *, entries: int) -> None:
        """A longer L1 table behind everything; the old one goes once the header has switched."""
        size = self.geometry.cluster_size
        count = max(1, ceil_div(entries * 8, size))
        self.barriers.observe("l1_grow_alloc_table")
        # Behind the entries of the disk there may be those of a VM state.
        stored = self.load_stored_l1(self.l1_entries_stored)
        first = self.allocator.allocate_run(count)
        self.guard.note("active-l1", first=first, count=count)
        table = np.zeros(entries, dtype=np.uint64)
        table[: len(stored)] = stored
        table[: len(self.tables.l1)] = self.tables.l1
        old = self._moved_l1 or (
            self.header.header.l1_table_offset,
            self.header.header.l1_size,
        )
        self._moved_l1 = first * size, entries
        self.tables.l1 = table
        clusters = ceil_div(old[1] * 8, size)
        if clusters:
            # Last: whatever ends this call before may leak the old table, and never gives it away.
            self.allocator.free(old[0] // size, clusters, punch=self.options.pass_discard_other)

    @property
    def l1_entries_stored(self) -> int:
        """Entries of the L1 table in the file, or of the one that is to replace it."""
        return self._moved_l1[1] if self._moved_l1 else self.header.header.l1_size

    def load_stored_l1(self, entries: int) -> Uint64Array:
        """The first entries of the L1 table as the file has them: the disk may use fewer."""
        if self._moved_l1 is not None:
            return np.zeros(entries, dtype=np.uint64)
        return load_l1(
            self.storage,
            offset=self.header.header.l1_table_offset,
            count=entries,
            geometry=self.geometry,
            file_size=self.storage.size(),
        ).copy()

    def forget_slices(self, numbers: range) -> None:
        """The tables of these slices are gone."""
        self.tables.cache.drop(numbers)
        self.judged.difference_update(numbers)
        self.owned.difference_update(numbers)

    def resize_caches(self) -> None:
        """Fit the caches to the size of the disk."""
        sizes = plan_cache_sizes(
            self.geometry, virtual_size=self.mapping.size, options=self.options
        )
        needed = full_l2_bytes(self.geometry, virtual_size=self.mapping.size)
        self.tables.cache.set_limit(sizes.l2_bytes, whole=sizes.l2_bytes >= needed)
        self.refcounts.blocks.set_limit(sizes.refcount_bytes, whole=False)

    def drop_empty_blocks(self) -> None:
        """Refcount blocks at the end that count nothing but themselves are of no use."""
        self.allocator.forget_window()
        dropped = self.refcounts.drop_empty_tail()
        if not dropped:
            return
        try:
            self.refcounts.store_table()
            self.barriers.pending = True
            self.barriers.wait("refcount table before its blocks go")
        except StorageError:
            # The table in the file may lead to them still, so they are not free.
            self.refcounts.take_back_drop(dropped)
            raise
        for _, word in dropped:
            self.guard.forget(first=word >> self.geometry.cluster_bits, count=1)

    def drop_table(self, index: int) -> None:
        """An L1 entry leads to nothing any more; what its table referred to is the caller's to
        free, as the table itself is."""
        per_table = self.tables.slices_per_table
        self._dirty_l1.add(index)
        self.tables.l1[index] = 0
        # Then its slices: a reader that loads one now finds that there is no table.
        self.forget_slices(range(index * per_table, (index + 1) * per_table))

    # Order

    @property
    def staged(self) -> bool:
        """Whether changes wait to be written."""
        return self.tables.cache.dirty or bool(self._dirty_l1) or self._moved_l1 is not None

    def settle(self) -> None:
        """Between the steps of an operation: write back what no longer fits."""
        if self.tables.cache.crowded:
            self.commit()

    def flush(self) -> None:
        """Everything that was acknowledged is durable afterwards."""
        self.commit()
        self.barriers.observe("flush_to_disk")
        self.barriers.wait("flush")

    def commit(self) -> None:
        """Write what has changed, phase by phase (docs/adr/0011). Raises StorageError; what could
        not be written is written by the next call."""
        self.barriers.check()
        if self.lazy:
            self._promise_repair()
        if not self.lazy or self.refcounts.moved:
            # A table that has moved must be found, lazy or not: its old place will be used again.
            self.store_refcounts()
        self._store_l2()
        self._store_l1()
        self._release()

    def _promise_repair(self) -> None:
        """Lazy refcounts: whoever opens the image after a crash has to count anew, what the record
        of dirty tables names or everything."""
        counts = self.refcounts
        if self._is_dirty:
            self._record_tables()
            return
        if not (self.allocator.pending or counts.blocks.dirty or counts.staged):
            return
        tables = self._changed_tables()
        recorded = self._record is not None and self._record.covers(tables)
        if self._record is not None and recorded:
            self._record.start(tables)
        # Either may be durable without the other: no table has changed yet.
        self.header.set_dirty(on=True, recorded=recorded)
        self.barriers.pending = True
        self.barriers.wait("dirty bit before unaccounted clusters")

    def _changed_tables(self) -> set[int]:
        """The L1 entries that are about to change on disk, themselves or in their tables."""
        per_table = self.tables.slices_per_table
        changed = {number // per_table for number in self.tables.cache.dirty_keys()}
        return changed | self._dirty_l1

    def _record_tables(self) -> None:
        """No table changes durably before the record of a dirty image names it: the caller waits.

        Where the record has no bit for it, the repair after a crash has to look at everything."""
        if self._record is None or not self.header.recorded:
            return
        tables = self._changed_tables()
        if self._record.covers(tables):
            self.barriers.pending |= self._record.add(tables)
        else:
            self.header.drop_record()
            self.barriers.pending = True

    @property
    def _is_dirty(self) -> bool:
        return bool(self.header.header.incompatible_features & Incompatible.DIRTY)

    def store_refcounts(self) -> None:
        """Write counts and the refcount table, each durable before what needs it."""
        self.allocator.apply_raised()
        self.barriers.observe("refblock_update")
        if self.refcounts.store_blocks():
            self.barriers.pending = True
        if self.tables.cache.dirty or self._dirty_l1 or self._moved_l1 or self.refcounts.staged:
            # Data and refcounts: neither needs the other, all that follows needs both.
            self.barriers.wait("data and refcounts before tables")
        if not self.refcounts.staged:
            return
        self.barriers.observe("reftable_update")
        self.refcounts.store_table()
        self.barriers.pending = True
        self.barriers.wait("refcount table before mapping")
        if self.refcounts.moved:
            place, clusters = self.refcounts.place, self.refcounts.clusters
            self.header.set_refcount_table(offset=place, clusters=clusters)
            self.barriers.pending = True
            self.refcounts.table_switched()
            self.barriers.wait("refcount table switch before mapping")

    def _store_l2(self) -> None:
        if self.lazy and (self.tables.cache.dirty or self._dirty_l1 or self._moved_l1):
            # New L2 tables and the record of dirty ones are among it.
            self.barriers.wait("data before tables")
        if self.tables.cache.dirty:
            # An L1 entry may be durable before them: a new table is in the file already, as zeros
            # or as a copy of the one that was shared.
            self.tables.cache.store(self.tables.place)
            self.barriers.pending = True

    def _store_l1(self) -> None:
        """Whole sectors of entries, or all of a table that has moved."""
        if self._moved_l1 is not None:
            offset, entries = self._moved_l1
            self.storage.pwrite([self._l1_bytes(0, entries * 8)], offset=offset)
            self.barriers.pending = True
            self.barriers.observe("l1_grow_write_table")
            self.barriers.wait("L1 table before its switch")
            self.barriers.observe("l1_grow_activate_table")
            self.header.set_l1(offset=offset, entries=entries)
            self.barriers.pending = True
            self._moved_l1 = None
            self._dirty_l1.clear()
        if not self._dirty_l1:
            return
        self.barriers.observe("l1_update")
        header = self.header.header
        for begin in sorted({align_down(index * 8, SECTOR) for index in self._dirty_l1}):
            # Entries of a VM state, behind those of the disk, stay as they are.
            end = min(begin + SECTOR, header.l1_size * 8, len(self.tables.l1) * 8)
            self.storage.pwrite([self._l1_bytes(begin, end)], offset=header.l1_table_offset + begin)
            self.barriers.pending = True
        self._dirty_l1.clear()

    def _l1_bytes(self, begin: int, end: int) -> bytes:
        part = array("Q", self.tables.l1[begin // 8 : end // 8].tobytes())
        return encode_words(part, 0, end - begin)

    def release(self) -> None:
        """Give back what nothing durable refers to any more; all of it is durable afterwards."""
        self._release()
        # With lazy refcounts as well: what is counted here is no part of a promise.
        self.store_refcounts()
        self.barriers.wait("flush")

    def adopt(self, metadata: Qcow2Metadata) -> None:
        """The first cluster was written anew, while the image was not dirty: what it says now."""
        self.metadata = metadata
        self.header.header = metadata.header
        self._record = self._find_record()

    def _release(self) -> None:
        """Nothing durable refers to the clusters in quarantine any more."""
        if not self.allocator.quarantined:
            return
        self.barriers.wait("mapping before releasing clusters")
        self.allocator.apply_raised()
        # First the count, then the clusters: who reads without the lock must notice.
        self.releases += 1
        released = self.allocator.release()
        if not self.lazy and self.refcounts.store_blocks():
            self.barriers.pending = True
        size = self.geometry.cluster_size
        for first, count, punch in released:
            if punch:
                self.barriers.observe("cluster_free")
                self.storage.discard(offset=first * size, length=count * size)
                self.barriers.pending = True

    def close(self) -> None:
        """Make everything durable and say that refcounts are right. The storages stay open."""
        self.flush()
        if self._is_dirty:
            self._settle_refcounts()

    def _settle_refcounts(self) -> None:
        """End of lazy refcounts: count all there is to count, then take the promise back."""
        self.store_refcounts()
        self.barriers.wait("refcounts before the dirty bit is cleared")
        self.header.set_dirty(on=False)
        self.barriers.pending = True
        self.barriers.wait("dirty bit cleared")

    # Failure

    def begin(self) -> None:
        """Before a change: whether one is possible at all, and what must be said before."""
        if self.broken is not None:
            raise self.broken
        self.barriers.check()
        if self.header.has_unknown_autoclear:
            self.header.clear_unknown_autoclear()
            self.barriers.pending = True
            self.barriers.wait("autoclear bits before the first change")

    def fail(self, error: CorruptMetadata) -> None:
        """The image contradicts itself: nobody shall write it before a repair (row 10)."""
        if error is self.foreign or self.broken is not None:
            return
        self.broken = error
        if self.header.header.version >= 3:
            # The error is raised in any case; a host that fails too adds nothing to it.
            with contextlib.suppress(StorageError):
                self.header.set_incompatible(Incompatible.CORRUPT, on=True)
                self.storage.flush()


def _choose_lazy(metadata: Qcow2Metadata, options: OpenOptions) -> bool:
    """Whether refcounts are put off. Raises RequestError where the header has no dirty bit."""
    wanted = options.lazy_refcounts
    if wanted and metadata.header.version < 3:
        raise RequestError("lazy-refcounts=on needs compat=1.1, found compat=0.10")
    return metadata.lazy_refcounts if wanted is None else wanted
