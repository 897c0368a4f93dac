"""Guest ranges that lie in the file in one piece: found, recorded, mapped without L2 tables.

Seeds 002-15 to -18. The L2 tables stay and say the same: whoever writes drops the record (its
autoclear bit) before the first change, and goes on with them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np

from qcowkit.codecs.qcow2.entries import ALL_ALLOCATED, READS_ZERO, EntryRules, Uint64Array
from qcowkit.codecs.qcow2.extensions import Extensions
from qcowkit.codecs.qcow2.header import Autoclear, Header
from qcowkit.codecs.qcow2.runs import (
    MAX_RUNS,
    OTHER_BYTES,
    RUN_BYTES,
    ContiguousRuns,
    Run,
    check_runs_fit,
)
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.qcow2.first_cluster import rewrite_first_cluster
from qcowkit.engine.qcow2.l2_audit import Links
from qcowkit.engine.qcow2.mapping import Mapping
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.references import TableSet
from qcowkit.engine.qcow2.tables import L2Tables, load_l1
from qcowkit.extents.algebra import coalesce
from qcowkit.extents.table import ExtentTable, Flag, Hit, Int64Array, concatenate, single
from qcowkit.storage.protocol import Storage

# Shorter pieces are not worth an entry of the record: their L2 table is read in one go.
MIN_CLUSTERS = 64
_OWN = int(Flag.DATA | Flag.PRESENT | Flag.COPIED)
_WINDOW = 1 << 17


class RunMapping(Mapping):
    """A mapping that asks its runs first; for readers."""

    def __init__(
        self, *, tables: L2Tables, rules: EntryRules, size: int, runs: ContiguousRuns
    ) -> None:
        """runs: found to fit the disk and the file."""
        super().__init__(tables=tables, rules=rules, size=size)
        self.runs = runs

    def lookup(self, offset: int) -> tuple[Hit, int, int]:
        """See `Mapping.lookup`; a run goes on to its own end."""
        run = self.runs.find(offset)
        if run is None:
            return super().lookup(offset)
        inside = offset - run.start
        return Hit.DATA, run.host + inside, min(run.start + run.length, self.size) - offset

    def extents(self, *, start: int, length: int, limit: int | None = None) -> ExtentTable:
        """See `Mapping.extents`."""
        stop = start + length
        parts: list[ExtentTable] = []
        position, rows = start, 0
        while position < stop and (limit is None or rows < limit):
            run = self.runs.find(position)
            if run is not None:
                end = min(stop, run.start + run.length)
                host = run.host + position - run.start
                table = single(position, end - position, _OWN, host=host)
            else:
                end = min(stop, self.runs.next_start(position, stop))
                left = None if limit is None else limit - rows
                table = super().extents(start=position, length=end - position, limit=left)
            parts.append(table)
            position, rows = table.end, rows + len(table)
            if position < end:
                break
        return concatenate(parts)


def usable_runs(metadata: Qcow2Metadata, *, data_size: int) -> ContiguousRuns | None:
    """The runs of an image where they hold and can be true. data_size: bytes of the file that has
    the guest's data."""
    runs = metadata.extensions.runs
    if runs is None or not metadata.header.autoclear_features & Autoclear.CONTIGUOUS_RUNS:
        return None
    size = metadata.geometry.cluster_size
    fits = runs.fits(
        cluster_size=size,
        disk_size=metadata.geometry.clusters(metadata.virtual_size) * size,
        file_size=-(-data_size // size) * size,
    )
    return runs if fits else None


def plain_mapping(storage: Storage, metadata: Qcow2Metadata) -> Mapping:
    """What the L2 tables of the active disk say, one table in memory at a time."""
    geometry, header, file_size = metadata.geometry, metadata.header, storage.size()
    count = geometry.l1_entries(metadata.virtual_size)
    l1 = load_l1(
        storage,
        offset=header.l1_table_offset,
        count=count,
        geometry=geometry,
        file_size=file_size,
    )
    rules = EntryRules(
        geometry=geometry,
        version=header.version,
        external_data=metadata.data_file,
        file_size=file_size,
    )
    size = geometry.cluster_size
    tables = L2Tables(storage, l1=l1, geometry=geometry, slice_size=size, cache_bytes=2 * size)
    return Mapping(tables=tables, rules=rules, size=metadata.virtual_size)


def find_runs(mapping: Mapping, *, most: int = MAX_RUNS) -> ContiguousRuns | None:
    """The longest runs of a disk, `most` at the most; None where there is none. Reads every L2
    table once, in bounded memory. Raises CorruptMetadata and StorageError."""
    size = mapping.rules.geometry.cluster_size
    longest: list[tuple[int, Run]] = []
    for run in _iter_runs(mapping):
        if run.length >= MIN_CLUSTERS * size:
            heapq.heappush(longest, (run.length, run))
            if len(longest) > most:
                heapq.heappop(longest)
    found = tuple(sorted(run for _, run in longest))
    return ContiguousRuns(runs=found) if found else None


def _iter_runs(mapping: Mapping) -> Iterator[Run]:
    """Pieces of whole clusters, neighbours joined across windows."""
    size, end = mapping.rules.geometry.cluster_size, mapping.size
    # The last cluster of the disk counts whole; of one with subclusters that is not known.
    disk_end = end if mapping.rules.geometry.has_subclusters else -(-end // size) * size
    position, last = 0, Run(0, 0, 0)
    while position < end:
        table = coalesce(mapping.extents(start=position, length=end - position, limit=_WINDOW))
        for start, stop, host in _whole_clusters(table, size, end=end, disk_end=disk_end):
            if start == last.start + last.length and host == last.host + last.length:
                last = last._replace(length=last.length + stop - start)
                continue
            yield last
            last = Run(start, stop - start, host)
        position = table.end
    yield last


def _whole_clusters(
    table: ExtentTable, size: int, *, end: int, disk_end: int
) -> Iterator[tuple[int, int, int]]:
    """(start, stop, host) of data that are this disk's own, cut to whole clusters; subclusters may
    begin and end a row within one, and a disk may end there."""
    mine = (table.flags == _OWN) & (table.layer == 0)
    start, host = table.start[mine], table.host[mine]
    stop = start + table.length[mine]
    stop = np.where(stop == end, disk_end, stop)
    skip = -start % size
    start, host, stop = start + skip, host + skip, stop - stop % size
    keep = start < stop
    yield from zip(start[keep].tolist(), stop[keep].tolist(), host[keep].tolist(), strict=True)


def runs_of_disk(storage: Storage, metadata: Qcow2Metadata) -> ContiguousRuns | None:
    """As many of the longest runs of the active disk as its first cluster has room for."""
    room = (metadata.cluster_size - OTHER_BYTES) // RUN_BYTES
    return find_runs(plain_mapping(storage, metadata), most=min(MAX_RUNS, room))


def with_runs(
    header: Header, extensions: Extensions, runs: ContiguousRuns | None
) -> tuple[Header, Extensions]:
    """What the first cluster says with these runs, or without any."""
    features = header.autoclear_features & ~Autoclear.CONTIGUOUS_RUNS
    if runs is not None:
        features |= Autoclear.CONTIGUOUS_RUNS
    return (
        replace(header, autoclear_features=int(features)),
        replace(extensions, runs=runs),
    )


def record_runs(
    storage: Storage, metadata: Qcow2Metadata, *, on: bool, barriers: Barriers
) -> Qcow2Metadata:
    """Find the runs of a disk and write them into its header, or take the record away; durable on
    return. An image without any run stays without a record. Nobody else has the image open.

    Raises RequestError where there can be none, CorruptMetadata and StorageError."""
    runs = None
    if on:
        check_runs_fit(version=metadata.header.version, cluster_size=metadata.cluster_size)
        runs = runs_of_disk(storage, metadata)
    header, extensions = with_runs(metadata.header, metadata.extensions, runs)
    return rewrite_first_cluster(
        storage, metadata, barriers=barriers, header=header, extensions=extensions
    )


class Told(Protocol):
    """Who hears of a run that the tables contradict."""

    def corruption(self, structure: str, *, reason: str) -> None: ...


class RunAudit:
    """Compares the runs of an image with its L2 tables, as a check walks over them."""

    def __init__(self, runs: ContiguousRuns, *, cluster_size: int, l2_entries: int) -> None:
        self._runs = runs
        self._size = cluster_size
        self._l2_entries = l2_entries
        self._seen = [0] * len(runs.runs)
        # How many of the runs are not what the tables say, once that was reported.
        self.wrong = 0

    def see(
        self, tables: TableSet, entries: Uint64Array, bitmaps: Uint64Array | None, links: Links
    ) -> None:
        """A batch of tables of the active disk."""
        table, index = np.divmod(links.where, self._l2_entries)
        guest = (tables.guest[table] * self._l2_entries + index) * self._size
        if bitmaps is None:
            sound = links.copied & ((entries[links.where] & np.uint64(READS_ZERO)) == 0)
        else:
            sound = links.copied & (bitmaps[links.where] == np.uint64(ALL_ALLOCATED))
        order = np.argsort(guest, kind="stable")
        guest, host, sound = guest[order], links.host[order], sound[order]
        for number, run in enumerate(self._runs.runs):
            low, high = np.searchsorted(guest, (run.start, run.start + run.length))
            at: Int64Array = guest[low:high] - run.start + run.host
            self._seen[number] += int(np.count_nonzero((host[low:high] == at) & sound[low:high]))

    def report(self, log: Told) -> None:
        """All tables were seen."""
        for run, seen in zip(self._runs.runs, self._seen, strict=True):
            expected = run.length // self._size
            if seen != expected:
                self.wrong += 1
                log.corruption(
                    "contiguous runs extension",
                    reason=f"the run at guest offset {run.start:#x} is that of the L2 tables in "
                    f"{seen} of {expected} clusters",
                )
