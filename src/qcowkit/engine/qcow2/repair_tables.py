"""L1 and L2 entries put right in place: reserved bits, places without data, COPIED flags.

Every entry is one word and changes by itself; entries and counts that must follow one another are
kept apart by barriers, which are the caller's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qcowkit.codecs.qcow2.entries import COPIED, EntryRules, Uint64Array, split_words
from qcowkit.engine.qcow2.counters import Window
from qcowkit.engine.qcow2.counting import Counting, IndexArray
from qcowkit.engine.qcow2.l2_audit import Links
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.references import TableSet
from qcowkit.engine.qcow2.repair_audit import Audit
from qcowkit.engine.qcow2.repair_entries import BoolArray, mend_entries, mend_l1
from qcowkit.engine.qcow2.repair_run import RepairRun
from qcowkit.engine.qcow2.tables import native_words
from qcowkit.engine.repairs import ChangeKind, StrictLog
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage

_L1 = "L1 table"


def load_words(storage: Storage, *, offset: int, count: int) -> Uint64Array:
    """Words of an L1 table, native; zeros behind the end of the file."""
    raw = storage.pread(count * 8, offset=offset).ljust(count * 8, b"\0")
    return np.frombuffer(native_words(raw), dtype=np.uint64)


class _TableWriter:
    """Writes changed tables, but for those that share their cluster with something else: what is
    written into them would change the other as well."""

    def __init__(self, run: RepairRun, audit: Audit, kind: ChangeKind) -> None:
        self._run = run
        self._audit = audit
        self._kind = kind

    def store_l1(self, name: str, offset: int, before: Uint64Array, after: Uint64Array) -> None:
        """An L1 table by the name of its claim."""
        if name not in self._audit.shared:
            self._store(name, offset, before, after, width=1)

    def store_l2(self, tables: TableSet, before: Uint64Array, after: Uint64Array) -> None:
        """A batch of L2 tables; words: of all of them, one behind the other."""
        each = len(before) // len(tables.offset)
        width = each // self._audit.geometry.l2_entries
        rows = before.reshape(-1, each), after.reshape(-1, each)
        changed = (rows[0] != rows[1]).any(axis=1)
        changed &= ~np.isin(tables.offset, self._audit.shared_tables)
        for index in np.flatnonzero(changed).tolist():
            offset = int(tables.offset[index])
            self._store("L2 table", offset, rows[0][index], rows[1][index], width=width)

    def _store(
        self, name: str, offset: int, before: Uint64Array, after: Uint64Array, *, width: int
    ) -> None:
        changed = np.flatnonzero(before != after)

        def make(number: int) -> str:
            index = int(changed[number])
            return (
                f"{name} at host offset {offset:#x}, entry {index // width}: "
                f"{int(before[index]):#x} -> {int(after[index]):#x}"
            )

        self._run.changes.add_many(self._kind, len(changed), make)
        self._run.write_words(before, after, offset=offset)


# Entries


def mend_tables(run: RepairRun, metadata: Qcow2Metadata, audit: Audit) -> None:
    """Mend the entries of all L1 and L2 tables, those of snapshots too; see `repair_entries`."""
    storage, effort = run.storage, run.effort()
    writer = _TableWriter(run, audit, ChangeKind.ENTRY)
    file_size = storage.size()
    for name, offset, count in _l1_tables(metadata):
        effort.spend(count * 8)
        words = load_words(storage, offset=offset, count=count)
        mended = mend_l1(words, cluster_size=metadata.cluster_size, file_size=file_size)
        writer.store_l1(name, offset, words, mended)
    rules = EntryRules(
        geometry=metadata.geometry,
        version=metadata.header.version,
        external_data=metadata.data_file,
        file_size=file_size,
    )
    found = run.survey(metadata, effort)
    walk = Counting(storage, metadata, found, log=StrictLog(), effort=effort)
    total = len(found.tables.offset)
    for batch in walk.batches(np.arange(total)):
        tables = found.tables.take(batch)
        words = walk.reader.load_tables(tables.offset)
        writer.store_l2(tables, words, _mend_words(words, rules))
        effort.report((int(batch[-1]) + 1) << walk.bits, total << walk.bits)


def _mend_words(words: Uint64Array, rules: EntryRules) -> Uint64Array:
    entries, bitmaps = split_words(words, geometry=rules.geometry)
    mended = mend_entries(entries, bitmaps, rules=rules)
    if bitmaps is None:
        return mended
    return np.stack([mended, bitmaps], axis=1).ravel()


def _l1_tables(metadata: Qcow2Metadata) -> Iterator[tuple[str, int, int]]:
    """(name of the claim, host offset, entries) of the active table and those of snapshots."""
    header = metadata.header
    yield _L1, header.l1_table_offset, header.l1_size
    for entry in metadata.snapshots:
        yield f"L1 table of snapshot {entry.id!r}", entry.l1_offset, entry.l1_entries


# COPIED flags


def correct_flags(run: RepairRun, metadata: Qcow2Metadata, audit: Audit, *, leaks: bool) -> None:
    """Make COPIED of the active tables agree with the refcounts, where these are right.

    leaks: also where a count is too high, because it stays so."""
    _Flags(run, metadata, audit, leaks=leaks).run()


class _Flags(Counting):
    """A counting that corrects flags once the counts of a window are complete."""

    def __init__(
        self, run: RepairRun, metadata: Qcow2Metadata, audit: Audit, *, leaks: bool
    ) -> None:
        effort = run.effort()
        super().__init__(
            run.storage,
            metadata,
            run.survey(metadata, effort),
            log=StrictLog(),
            effort=effort,
            window_clusters=run.window_clusters,
        )
        self._leaks = leaks
        self._writer = _TableWriter(run, audit, ChangeKind.COPIED)

    def see_window(self, window: Window, *, first: bool) -> None:
        """Correct what refers to the window."""
        self._correct_l1(window)
        if self.rules.external_data and not first:
            return
        width = self.geometry.l2_entry_size // 8
        for tables, words, links in self.iter_active(window, first=first):
            wrong = self._wrong_links(window, tables, links)
            if len(wrong):
                changed = words.copy()
                changed[links.where[wrong] * width] ^= np.uint64(COPIED)
                self._writer.store_l2(tables, words, changed)

    def _correct_l1(self, window: Window) -> None:
        links, header = self.found.links, self.metadata.header
        wrong = self._wrong_flags(window, links.offset >> self.bits, links.copied)
        if len(wrong):
            offset = header.l1_table_offset
            words = load_words(self.storage, offset=offset, count=header.l1_size)
            changed = words.copy()
            changed[links.index[wrong]] ^= np.uint64(COPIED)
            self._writer.store_l1(_L1, offset, words, changed)

    def _wrong_links(self, window: Window, tables: TableSet, links: Links) -> IndexArray:
        if self.rules.external_data:
            # The flag says that the cluster is there, where it must be: at its guest offset.
            placed = links.host == self.starts(tables)[links.where]
            return np.flatnonzero(placed & ~links.copied)
        return self._wrong_flags(window, links.host >> self.bits, links.copied)

    def _wrong_flags(self, window: Window, clusters: Int64Array, copied: BoolArray) -> IndexArray:
        mask = window.inside(clusters)
        index = np.arange(len(clusters)) if mask is None else np.flatnonzero(mask)
        stored = window.stored_of(clusters[index])
        computed = window.computed_of(clusters[index])
        right = stored == computed
        if self._leaks:
            right |= stored > computed
        chosen: IndexArray = index[right & ((stored == 1) != copied[index])]
        return chosen
