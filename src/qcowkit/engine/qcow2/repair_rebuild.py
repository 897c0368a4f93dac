"""Refcount structures made anew from the references alone, beside the old ones.

Blocks and table are written where nothing lies and nothing leads to, made durable, and switched to
by one write of 12 bytes. What was there before is free from then on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qcowkit.codecs.qcow2.geometry import MAX_REFCOUNT_TABLE_BYTES, Geometry
from qcowkit.codecs.qcow2.refcount_block import encode_refcounts
from qcowkit.engine.qcow2.counters import SATURATED, CountArray, Window
from qcowkit.engine.qcow2.counting import BATCH_BYTES, Counting
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.references import Survey
from qcowkit.engine.qcow2.repair_audit import REFCOUNT_NAMES, Audit
from qcowkit.engine.qcow2.repair_place import begin_of_room, check_room
from qcowkit.engine.qcow2.repair_run import RepairRun
from qcowkit.engine.repairs import ChangeKind, StrictLog
from qcowkit.errors import OperationError
from qcowkit.extents.table import Int64Array
from qcowkit.units import ceil_div

_NEW = "new refcounts"
_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Area:
    """Blocks one behind the other, then the table. first: the host cluster where they begin.

    blocks: ascending indices into the table; all others are absent. table_clusters: its length."""

    first: int
    blocks: Int64Array
    table_clusters: int

    @property
    def clusters(self) -> int:
        """Host clusters of all of it."""
        return len(self.blocks) + self.table_clusters


def plan_area(used: Int64Array, *, first: int, geometry: Geometry) -> Area:
    """The smallest area at `first` that counts the blocks `used`, ascending, and itself."""
    per_block, words = geometry.refcounts_per_block, geometry.cluster_size // 8
    blocks, table = used, 1
    while True:
        end = first + len(blocks) + table
        own = np.arange(first // per_block, ceil_div(end, per_block), dtype=np.int64)
        wanted = np.union1d(used, own)
        needed = ceil_div(int(wanted[-1]) + 1, words)
        if len(wanted) == len(blocks) and needed == table:
            return Area(first=first, blocks=wanted, table_clusters=table)
        blocks, table = wanted, needed


def rebuild_refcounts(
    run: RepairRun, metadata: Qcow2Metadata, audit: Audit, *, old: tuple[int, int] | None = None
) -> None:
    """Count everything anew and switch to it.

    old: (host offset, bytes) of one more structure that is still in use. Clusters without a
    reference become free, unless entries lead nowhere: then all of the file is kept for now. Raises
    OperationError, with nothing changed, where the structures have no place."""
    effort = run.effort()
    found = _what_to_count(run.survey(metadata, effort), metadata, audit, old)
    counting = _UsedBlocks(run, metadata, found, keep=audit.astray)
    counting.run()
    area = _place(run, metadata, audit, counting.used)
    effort.spend(area.clusters * metadata.cluster_size)
    claims = found.claims.plus(_NEW, first=area.first, count=area.clusters)
    everything = replace(found, claims=claims)
    _WriteBlocks(run, metadata, everything, keep=audit.astray, area=area).run()
    _write_table(run, metadata, area)
    run.wait("refcounts written")
    place = (area.first + len(area.blocks)) << metadata.geometry.cluster_bits
    writer = run.header_writer(metadata)
    writer.set_refcount_table(offset=place, clusters=area.table_clusters)
    run.wait("refcounts switched")
    blocks = len(area.blocks)
    run.changes.add(
        ChangeKind.REBUILD,
        f"table at host offset {place:#x}, {blocks} block{'s' * (blocks != 1)} in front of it: "
        + audit.rebuild[0],
    )


def _what_to_count(
    found: Survey, metadata: Qcow2Metadata, audit: Audit, old: tuple[int, int] | None
) -> Survey:
    """All but the old refcounts. Places behind the end of the file, to which entries lead, stay
    counted if the old table counted that far: they are not to be given to others."""
    geometry, header = metadata.geometry, metadata.header
    claims = found.claims.without(*REFCOUNT_NAMES)
    if old is not None:
        offset, length = old
        count = ceil_div(length, geometry.cluster_size)
        claims = claims.plus("old", first=offset >> geometry.cluster_bits, count=count)
    entries = (header.refcount_table_clusters << geometry.cluster_bits) // 8
    behind = np.unique(np.concatenate([_NONE, *audit.cut]))
    behind = behind[behind < entries * geometry.refcounts_per_block]
    if len(behind):
        claims = claims.plus("behind the end", first=behind, count=1)
    return replace(found, claims=claims, blocks=_NONE)


def _place(run: RepairRun, metadata: Qcow2Metadata, audit: Audit, used: Int64Array) -> Area:
    """An area where there is room for it."""
    geometry = metadata.geometry
    area = plan_area(used, first=begin_of_room(run, audit), geometry=geometry)
    check_room(run, audit, first=area.first, count=area.clusters)
    table_bytes = area.table_clusters * geometry.cluster_size
    if table_bytes > MAX_REFCOUNT_TABLE_BYTES:
        raise OperationError(
            f"the refcounts cannot be rebuilt: their table would have {table_bytes} bytes, "
            f"expected at most {MAX_REFCOUNT_TABLE_BYTES}"
        )
    return area


class _UsedBlocks(Counting):
    """Which blocks have something to count."""

    def __init__(
        self, run: RepairRun, metadata: Qcow2Metadata, found: Survey, *, keep: bool
    ) -> None:
        super().__init__(
            run.storage,
            metadata,
            found,
            log=StrictLog(),
            effort=run.effort(),
            window_clusters=run.window_clusters,
        )
        self._keep = keep
        self._used = [_NONE]
        self.end = max(self.end, found.claims.end)
        if keep:
            self.windows |= set(range(ceil_div(self.end, self.step)))

    @property
    def used(self) -> Int64Array:
        """Their indices, ascending."""
        return np.unique(np.concatenate(self._used))

    def see_window(self, window: Window, *, first: bool) -> None:
        """Note the blocks of a window."""
        low = window.base // self.geometry.refcounts_per_block
        self._used.append(low + np.flatnonzero(self.counts(window).any(axis=1)))

    def counts(self, window: Window) -> CountArray:
        """What will be stored, a row for each block; too narrow counts stop at their largest."""
        counts = window.computed
        if self._keep:
            # What entries that lead nowhere have lost may be anywhere.
            inside = max(0, min(window.size, self.file_clusters - window.base))
            np.maximum(counts[:inside], np.uint32(1), out=counts[:inside])
        most = np.uint32(min(self.geometry.refcount_max, SATURATED))
        np.minimum(counts, most, out=counts)
        per_block = self.geometry.refcounts_per_block
        missing = -window.size % per_block
        return (np.pad(counts, (0, missing)) if missing else counts).reshape(-1, per_block)


class _WriteBlocks(_UsedBlocks):
    """The same, and the blocks are written into their area."""

    def __init__(
        self,
        run: RepairRun,
        metadata: Qcow2Metadata,
        found: Survey,
        *,
        keep: bool,
        area: Area,
    ) -> None:
        super().__init__(run, metadata, found, keep=keep)
        self._run = run
        self._area = area

    def see_window(self, window: Window, *, first: bool) -> None:
        """Write the blocks of a window."""
        size, counts = self.geometry.cluster_size, self.counts(window)
        low = window.base // self.geometry.refcounts_per_block
        begin, end = np.searchsorted(self._area.blocks, [low, low + len(counts)]).tolist()
        used = low + np.flatnonzero(counts.any(axis=1))
        assert np.isin(used, self._area.blocks[begin:end]).all(), "a block was forgotten"
        most = max(1, BATCH_BYTES // size)
        for index in range(begin, end, most):
            chosen = counts[self._area.blocks[index : min(end, index + most)] - low]
            raw = encode_refcounts(chosen.ravel(), self.geometry.refcount_order)
            self._run.write(raw, offset=(self._area.first + index) * size)


def _write_table(run: RepairRun, metadata: Qcow2Metadata, area: Area) -> None:
    bits = metadata.geometry.cluster_bits
    words = np.zeros((area.table_clusters << bits) // 8, dtype=">u8")
    places = np.arange(area.first, area.first + len(area.blocks), dtype=np.int64)
    words[area.blocks] = places << bits
    run.write(words.tobytes(), offset=(area.first + len(area.blocks)) << bits)
