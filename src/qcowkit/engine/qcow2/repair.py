"""Repair of one qcow2 file, offline and alone: refcounts, COPIED flags, entries, header bits.

Every moment leaves an image that is no worse than before, and the next repair goes on from there:
counts are raised before flags say that clusters are shared, and lowered before flags say that they
are not; what is new is durable before the header names it; the bits that warn of damage go last.
Reliability reference, sections 3.1, 3.3 and 4.3; qcow2 reference, "Check and repair"."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcowkit.codecs.qcow2.header import Incompatible
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.findings import Severity
from qcowkit.engine.qcow2.counters import WINDOW
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.engine.qcow2.repair_audit import Audit
from qcowkit.engine.qcow2.repair_counts import lower_counts, raise_counts
from qcowkit.engine.qcow2.repair_rebuild import rebuild_refcounts
from qcowkit.engine.qcow2.repair_run import RepairRun
from qcowkit.engine.qcow2.repair_snapshots import SnapshotDamage, load_for_repair, rewrite_snapshots
from qcowkit.engine.qcow2.repair_tables import correct_flags, mend_tables
from qcowkit.engine.repairs import ChangeKind, ChangeLog, RepairMode, Steps
from qcowkit.errors import CorruptMetadata, OperationError

if TYPE_CHECKING:
    from qcowkit.engine.executor import ProgressReport
    from qcowkit.storage.protocol import Storage

# Walks over the tables of a usual repair, for progress.
_WALKS = 6
_MENDING = (ChangeKind.SNAPSHOTS, ChangeKind.RAISED, ChangeKind.ENTRY, ChangeKind.COPIED)
_WARNINGS = Incompatible.DIRTY | Incompatible.CORRUPT


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """before, after: what the first and the last check found. damage: of the snapshot table, which
    no check finds. metadata: as they are now.

    *_fixed: what was put right, counted as qemu does: flags are wrong or right only beside the
    counts as they are when these have been repaired."""

    before: Audit
    after: Audit
    damage: SnapshotDamage | None
    metadata: Qcow2Metadata
    corruptions_fixed: int
    leaks_fixed: int


def repair_qcow2(
    storage: Storage,
    *,
    mode: RepairMode,
    changes: ChangeLog | None = None,
    barriers: Barriers | None = None,
    progress: ProgressReport | None = None,
    cancel: threading.Event | None = None,
    window_clusters: int = WINDOW,
) -> Repaired:
    """Repair a file that nobody else uses; with nothing to repair nothing is written.

    Raises OperationError, with nothing written, where not everything can be read, where LEAKS
    would need new refcount structures, and where new tables have no place; StorageError and
    Cancelled at any time: the repair may then be begun again."""
    run = RepairRun(
        storage,
        barriers=barriers or Barriers(storage),
        changes=ChangeLog() if changes is None else changes,
        steps=Steps(progress, count=_WALKS),
        cancel=cancel,
        window_clusters=window_clusters,
    )
    if mode is RepairMode.LEAKS:
        metadata, damage = load_qcow2_metadata(storage, for_check=True), None
    else:
        metadata, damage = load_for_repair(storage)
    repaired = _Repair(run, mode).run(metadata, damage)
    run.steps.finish()
    return repaired


def repair_for_writing(
    storage: Storage, metadata: Qcow2Metadata, *, barriers: Barriers | None = None
) -> Qcow2Metadata:
    """Make a dirty image sound before it is written; others are returned as they are.

    Part of opening: takes no lock and opens nothing. Raises CorruptMetadata where something is left
    that is corrupt, and what `repair_qcow2` raises."""
    if not metadata.dirty:
        return metadata
    repaired = repair_qcow2(storage, mode=RepairMode.ALL, barriers=barriers)
    found = repaired.after.log
    wrong = [one for one in found.kept if one.severity is not Severity.LEAK]
    if wrong:
        count = found.count(Severity.CORRUPTION) + found.count(Severity.ERROR)
        reason = f"the dirty bit is set, and a repair leaves {count} faults, expected none before "
        raise CorruptMetadata("image", reason=f"{reason}writing; the first: {wrong[0]}")
    return repaired.metadata


class _Repair:
    """The steps in their order."""

    def __init__(self, run: RepairRun, mode: RepairMode) -> None:
        self._run = run
        self._mode = mode
        self._corruptions = 0
        self._rebuilt = False

    def run(self, metadata: Qcow2Metadata, damage: SnapshotDamage | None) -> Repaired:
        """All steps that are needed."""
        run = self._run
        before = audit = run.audit(metadata)
        if audit.bad_runs and self._mode is RepairMode.ALL:
            # Before its first write a repair drops the record anyway: what it says no longer holds.
            run.header_writer(metadata)
            run.wait("contiguous runs dropped")
            self._corruptions += audit.bad_runs
            metadata = load_qcow2_metadata(run.storage, for_check=True)
            audit = run.audit(metadata)
        if audit.rebuild and self._mode is RepairMode.LEAKS:
            raise OperationError(
                "the refcount structures must be rebuilt, which only a repair of all does: "
                + audit.rebuild[0]
            )
        if damage is not None:
            metadata = rewrite_snapshots(run, metadata, damage, audit)
            audit = run.audit(metadata)
        if audit.rebuild:
            rebuild_refcounts(run, metadata, audit)
            self._corruptions += max(1, audit.raised + audit.found.bad_blocks)
            self._rebuilt = True
            metadata = load_qcow2_metadata(run.storage, for_check=True)
            audit = run.audit(metadata)
        if not audit.clean:
            self._repair_in_place(metadata, audit)
        run.wait("all tables written")
        if run.changes:
            metadata = load_qcow2_metadata(run.storage, for_check=True)
        after = run.audit(metadata, last=True) if run.changes else before
        self._clear_bits(metadata, after)
        if run.changes:
            metadata = load_qcow2_metadata(run.storage, for_check=True)
        changed = run.changes.count
        return Repaired(
            before=before,
            after=after,
            damage=damage,
            metadata=metadata,
            corruptions_fixed=self._corruptions + sum(map(changed, _MENDING)),
            leaks_fixed=self._count_leaks(before, after),
        )

    def _count_leaks(self, before: Audit, after: Audit) -> int:
        """Those that were given back; a rebuild does so without lowering anything."""
        if not self._rebuilt:
            return self._run.changes.count(ChangeKind.LOWERED)
        return max(0, before.log.count(Severity.LEAK) - after.log.count(Severity.LEAK))

    def _repair_in_place(self, metadata: Qcow2Metadata, audit: Audit) -> None:
        """Counts and entries. Leaks stay while entries lead nowhere: the clusters may be theirs."""
        run, everything = self._run, self._mode is RepairMode.ALL
        corrupt = audit.log.count(Severity.CORRUPTION) > 0
        # Places without data stay where their table cannot be written.
        stuck = not everything or len(audit.shared_tables) > 0
        keep = audit.lost > 0 or (audit.spare > 0 and stuck)
        if everything and audit.raised:
            raise_counts(run, metadata)
            run.wait("counts raised")
        if everything and corrupt:
            mend_tables(run, metadata, audit)
        if corrupt:
            correct_flags(run, metadata, audit, leaks=keep)
        run.wait("entries written")
        if audit.lowered and not keep:
            lower_counts(run, metadata)
            run.wait("counts lowered")
            correct_flags(run, metadata, audit, leaks=False)

    def _clear_bits(self, metadata: Qcow2Metadata, after: Audit) -> None:
        """The bits that keep others from writing, once nothing is left that they warn of."""
        bits = metadata.header.incompatible_features & _WARNINGS
        wrong = after.log.count(Severity.CORRUPTION) + after.log.count(Severity.ERROR)
        if not bits or wrong:
            return
        self._run.header_writer(metadata).set_incompatible(_WARNINGS, on=False)
        self._run.wait("header bits cleared")
        for bit in Incompatible:
            if bits & bit:
                name = bit.name or ""
                self._run.changes.add(ChangeKind.BITS, f"header: the {name.lower()} bit")
