"""Refcounts of metadata that are written but not yet in use: all of them counted from what they
refer to, and the COPIED flags that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.entries import COPIED, Uint64Array, split_words
from qcowkit.codecs.qcow2.geometry import MAX_REFCOUNT_TABLE_BYTES
from qcowkit.codecs.qcow2.refcount_block import encode_refcounts
from qcowkit.codecs.qcow2.transitions import mark_copied
from qcowkit.engine.findings import Effort
from qcowkit.engine.qcow2.counters import Window
from qcowkit.engine.qcow2.counting import Counting, find_runs
from qcowkit.engine.qcow2.l2_audit import ignore_faults
from qcowkit.engine.qcow2.layout import refcount_clusters
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.references import Survey, survey
from qcowkit.engine.qcow2.room import Room
from qcowkit.engine.repairs import StrictLog
from qcowkit.errors import RequestError
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage

_OLD_NAMES = ("refcount table", "refcount block")
_NONE = np.zeros(0, dtype=np.int64)
# Runs of free clusters that are remembered; more of them take too much memory.
_MOST_RUNS = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    """Where the refcount table lies, in bytes, and how long it is, in clusters.

    end: one past the last host cluster that is used. free: (first, count) of host clusters below
    it that nothing refers to."""

    table_offset: int
    table_clusters: int
    end: int
    free: list[tuple[int, int]]


def renew_refcounts(
    storage: Storage, metadata: Qcow2Metadata, l1: Uint64Array, *, room: Room, effort: Effort
) -> Renewed:
    """Write refcounts of the metadata, and COPIED into the active tables.

    metadata: as they will be; the refcount table in them is looked at by nobody. l1: the entries of
    the active L1 table, which is at its place and is written once more. room: where refcounts may
    lie; its `end` is behind all that is used. Raises RequestError where a count does not fit, what
    `room` raises, StorageError."""
    geometry = metadata.geometry
    size = geometry.cluster_size
    # As many as there will be if all of them lie behind everything, and so enough.
    _, clusters = refcount_clusters(geometry, room.end)
    if clusters * size > max(MAX_REFCOUNT_TABLE_BYTES, size):
        raise RequestError(
            f"the image would need a refcount table of {clusters * size} bytes, above the "
            f"{MAX_REFCOUNT_TABLE_BYTES} that readers accept"
        )
    table, blocks = room.take(clusters), list[int]()
    while len(blocks) * geometry.refcounts_per_block < room.end:
        blocks.append(room.take(1))
    effort.spend(room.end)
    # An empty table for the walk, which has to find one.
    header = replace(metadata.header, refcount_table_offset=table * size, refcount_table_clusters=1)
    storage.pwrite([bytes(size)], offset=table * size)
    _reach(storage, room.end * size)
    found = survey(storage, replace(metadata, header=header), log=StrictLog(), effort=effort)
    places = np.array(blocks, dtype=np.int64)
    claims = found.claims.without(*_OLD_NAMES).plus(
        "new refcount table", first=table, count=clusters
    )
    claims = claims.plus("new refcount blocks", first=places, count=1)
    found = replace(found, claims=claims, blocks=_NONE)
    renewal = _Renewal(storage, metadata, found, places=places, end=room.end, effort=effort)
    renewal.run()
    words = np.zeros(clusters * size // 8, dtype=">u8")
    words[: len(places)] = places << geometry.cluster_bits
    storage.pwrite([words.tobytes()], offset=table * size)
    renewal.mark_tables(l1)
    return Renewed(
        table_offset=table * size, table_clusters=clusters, end=room.end, free=renewal.free
    )


def _reach(storage: Storage, end: int) -> None:
    if not storage.caps.block_device and storage.size() < end:
        storage.truncate(end)


class _Renewal(Counting):
    """Writes the blocks of each window when it is counted."""

    def __init__(
        self,
        storage: Storage,
        metadata: Qcow2Metadata,
        found: Survey,
        *,
        places: Int64Array,
        end: int,
        effort: Effort,
    ) -> None:
        """places: host clusters of all refcount blocks."""
        super().__init__(storage, metadata, found, log=StrictLog(), effort=effort)
        self.end = end
        self.windows = set(range(-(-end // self.step)))
        self.free: list[tuple[int, int]] = []
        self._places = places
        # One bit a cluster: those with exactly one reference.
        self._single: npt.NDArray[np.bool_] = np.zeros(end, dtype=np.bool_)

    def see_window(self, window: Window, *, first: bool) -> None:
        """Blocks of a window, one write."""
        counts = window.computed
        highest = int(counts.max(initial=0))
        if highest > self.geometry.refcount_max:
            raise RequestError(
                f"a cluster would be referred to {highest} times, and refcounts of "
                f"{self.geometry.refcount_bits} bits end at {self.geometry.refcount_max}: wider "
                "ones can be had by amend -o refcount_bits"
            )
        self._single[window.base : window.base + window.size] = counts == 1
        self._note_free(window)
        per_block = self.geometry.refcounts_per_block
        missing = -window.size % per_block
        raw = encode_refcounts(np.pad(counts, (0, missing)), self.geometry.refcount_order)
        view, size = memoryview(raw), self.geometry.cluster_size
        low = window.base // per_block
        places = self._places[low : low + len(raw) // size] << self.bits
        for index, count in find_runs(places, size):
            part = view[index * size : (index + count) * size]
            self.storage.pwrite([part], offset=int(places[index]))

    def _note_free(self, window: Window) -> None:
        free = (window.computed == 0).astype(np.int8)
        edges = np.flatnonzero(np.diff(free, prepend=0, append=0))
        room = _MOST_RUNS - len(self.free)
        self.free += [
            (window.base + int(low), int(high - low))
            for low, high in zip(edges[::2][:room], edges[1::2][:room], strict=True)
        ]

    def mark_tables(self, l1: Uint64Array) -> None:
        """COPIED where a reference is the only one: of active tables, and in them."""
        links = self.found.links
        single = self._single[links.offset >> self.bits]
        words = l1.copy()
        words[links.index] |= np.where(single, np.uint64(COPIED), np.uint64(0))
        place = self.metadata.header.l1_table_offset
        if len(words):
            self.storage.pwrite([words.astype(">u8").tobytes()], offset=place)
        if self.rules.external_data:
            # There COPIED says only that a cluster is there.
            return
        for batch in self.batches(np.flatnonzero(self.found.tables.guest >= 0)):
            self._mark(self.found.tables.offset[batch])

    def _mark(self, offsets: Int64Array) -> None:
        size = self.geometry.cluster_size
        words = self.reader.load_tables(offsets)
        entries, bitmaps = split_words(words, geometry=self.geometry)
        tables = self.found.tables.take(np.searchsorted(self.found.tables.offset, offsets))
        links = self._find_links(tables, entries, bitmaps, ignore_faults)
        step = self.geometry.l2_entry_size // 8
        mark_copied(words[::step], links.where, self._single[links.host >> self.bits])
        raw = memoryview(words.astype(">u8").tobytes())
        for begin, count in find_runs(offsets, size):
            part = raw[begin * size : (begin + count) * size]
            self.storage.pwrite([part], offset=int(offsets[begin]))
