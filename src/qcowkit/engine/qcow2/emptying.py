"""An overlay made empty again: one switch to metadata that refer to no guest cluster."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcowkit.codecs.qcow2.header import Header
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.findings import Effort
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.reform import Change, Reform, Tree
from qcowkit.engine.qcow2.tables import load_l1
from qcowkit.errors import RequestError
from qcowkit.storage.protocol import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Emptier:
    """One image that is open for writing and to nobody else. data: its external data file."""

    storage: Storage
    metadata: Qcow2Metadata
    barriers: Barriers
    effort: Effort
    data: Storage | None = None

    def run(self) -> Header:
        """Let the whole disk show what lies below; the header that is in use then, durable.

        A crash leaves the disk full or empty. Snapshots, bitmaps and keys stay. Raises RequestError
        where the image has to be repaired first, CorruptMetadata and StorageError; the image is
        then as it was."""
        metadata = self.metadata
        if metadata.dirty or metadata.corrupt:
            raise RequestError("the image has to be repaired first (check -r all)")
        header = metadata.header
        l1 = load_l1(
            self.storage,
            offset=header.l1_table_offset,
            count=header.l1_size,
            geometry=metadata.geometry,
            file_size=self.storage.size(),
        )
        entries = max(1, metadata.geometry.l1_entries(metadata.virtual_size))
        empty = Tree(tables=np.zeros(entries, dtype=np.int64))
        change = Change(
            active=empty,
            size=header.size,
            # Clusters of a data file are counted nowhere, its L2 tables are.
            dropped=() if metadata.data_file else (Tree.of(l1),),
            given_up=self._tables(Tree.of(l1)) if metadata.data_file else (),
            snapshots=metadata.snapshots,
        )
        reform = Reform(self.storage, metadata, barriers=self.barriers, effort=self.effort)
        after = reform.run(change)
        self._give_back(reform.freed)
        return after

    def _tables(self, tree: Tree) -> tuple[tuple[int, int], ...]:
        size = self.metadata.cluster_size
        return tuple((offset, size) for offset in tree.tables.tolist() if offset)

    def _give_back(self, freed: list[tuple[int, int]]) -> None:
        """Nothing durable refers to what was freed, and nobody else has it open."""
        size = self.metadata.cluster_size
        for first, count in freed:
            self.storage.discard(offset=first * size, length=count * size)
        if self.data is not None and self.data.size():
            self.data.discard(offset=0, length=self.data.size())
