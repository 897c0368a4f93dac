"""Internal snapshots: taken, gone back to, and deleted, each by one switch of all metadata.

A snapshot keeps the L2 tables as they were; the guest's disk goes on with copies of them. So no
table that a snapshot refers to is ever written again (docs/adr/0014)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qcowkit.codecs.qcow2.entries import OFFSET_MASK, Uint64Array
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.codecs.qcow2.header import MAX_SNAPSHOTS, Header
from qcowkit.codecs.qcow2.snapshots import SnapshotEntry
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.findings import Effort
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.reform import Change, Reform, Tree
from qcowkit.engine.qcow2.tables import load_l1
from qcowkit.errors import RequestError, UnsupportedFeature
from qcowkit.storage.protocol import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshots:
    """Changes of the snapshots of one image, which is open for writing and to nobody else.

    Each method returns the header that is in use afterwards, and raises RequestError where it
    cannot be done, CorruptMetadata and StorageError; the image is then as it was before."""

    storage: Storage
    metadata: Qcow2Metadata
    barriers: Barriers
    effort: Effort

    def create(self, name: str, *, date_ns: int | None = None) -> Header:
        """Keep the disk as it is now under a name. date_ns: nanoseconds of Unix time."""
        known = self.metadata.snapshots
        self._check_possible()
        if any(one.name == name for one in known):
            raise RequestError(f"there is a snapshot {name!r} already")
        if not name:
            raise RequestError("the name of a snapshot is empty")
        if len(known) >= MAX_SNAPSHOTS:
            raise RequestError(f"the image has {MAX_SNAPSHOTS} snapshots, the most there can be")
        seconds, nanoseconds = divmod(time.time_ns() if date_ns is None else date_ns, 10**9)
        l1 = self._active_l1()
        needed = self._geometry.l1_entries(self.metadata.virtual_size)
        active = Tree.of(l1[:needed])
        entry = SnapshotEntry(
            id=next_id(known),
            name=name,
            l1_offset=-1,
            l1_entries=len(l1),
            date_sec=seconds,
            date_nsec=nanoseconds,
            disk_size=self.metadata.header.size,
        )
        # The VM state, if there is any, goes with the snapshot.
        return self._run(
            Change(
                active=active,
                size=self.metadata.header.size,
                added=(active,),
                snapshots=(*known, entry),
                kept_l1=l1 & np.uint64(OFFSET_MASK),
            )
        )

    def apply(self, entry: SnapshotEntry) -> Header:
        """Make the disk, and its size, what they were when the snapshot was taken."""
        self._check_possible()
        if self.metadata.bitmaps:
            raise RequestError(
                "the image has persistent bitmaps, which would not tell what changes by going back "
                "to a snapshot: remove them first"
            )
        target = self._snapshot_l1(entry)
        size = entry.disk_size
        needed = self._geometry.l1_entries(size)
        padded = np.pad(target, (0, max(0, needed - len(target))))
        tree = Tree.of(padded)
        return self._run(
            Change(
                active=tree,
                size=size,
                added=(tree,),
                dropped=(Tree.of(self._active_l1()),),
                snapshots=self.metadata.snapshots,
            )
        )

    def delete(self, entry: SnapshotEntry) -> Header:
        """Give up a snapshot, and every cluster that only it refers to."""
        self._check_possible()
        left = tuple(one for one in self.metadata.snapshots if one.id != entry.id)
        active = Tree.of(self._active_l1())
        return self._run(
            Change(
                active=active,
                size=self.metadata.header.size,
                added=(active,),
                dropped=(active, Tree.of(self._snapshot_l1(entry))),
                given_up=((entry.l1_offset, entry.l1_bytes),),
                snapshots=left,
            )
        )

    @property
    def _geometry(self) -> Geometry:
        return self.metadata.geometry

    def _check_possible(self) -> None:
        metadata = self.metadata
        if metadata.data_file:
            raise UnsupportedFeature(
                "internal snapshots",
                reason="an image with an external data file cannot have any",
            )
        if metadata.dirty or metadata.corrupt:
            raise RequestError("the image has to be repaired first (check -r all)")

    def _run(self, change: Change) -> Header:
        reform = Reform(self.storage, self.metadata, barriers=self.barriers, effort=self.effort)
        header = reform.run(change)
        size = self.metadata.cluster_size
        for first, count in reform.freed:
            # Nothing durable refers to them, and nobody else has them open.
            self.storage.discard(offset=first * size, length=count * size)
        return header

    def _active_l1(self) -> Uint64Array:
        header = self.metadata.header
        return self._load(header.l1_table_offset, header.l1_size)

    def _snapshot_l1(self, entry: SnapshotEntry) -> Uint64Array:
        return self._load(entry.l1_offset, entry.l1_entries)

    def _load(self, offset: int, count: int) -> Uint64Array:
        return load_l1(
            self.storage,
            offset=offset,
            count=count,
            geometry=self._geometry,
            file_size=self.storage.size(),
        )


def next_id(entries: Sequence[SnapshotEntry]) -> str:
    """One more than the highest id that is a number."""
    numbers = [int(one.id) for one in entries if one.id.isascii() and one.id.isdecimal()]
    return str(max(numbers, default=0) + 1)


def renamed(entry: SnapshotEntry, name: str) -> SnapshotEntry:
    """The same snapshot under another name."""
    return replace(entry, name=name)
