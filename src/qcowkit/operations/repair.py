"""Repair one image, or say what a repair would change. Of one file only, which nobody else uses.

A dry run carries the repair out on a storage that only exists in memory, so that it cannot promise
anything else than what a repair does. The data have the schema of `qemu-img check -r`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qcowkit.engine.barriers import Barriers
from qcowkit.engine.findings import FindingLog
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.repair import Repaired, repair_qcow2
from qcowkit.engine.repairs import ChangeGroup, ChangeLog, RepairMode
from qcowkit.errors import RequestError, UnsupportedFeature
from qcowkit.operations.check import CheckResult, describe_qcow2, image_name
from qcowkit.storage.overlay import OverlayStorage

if TYPE_CHECKING:
    import threading

    from qcowkit.engine.executor import ProgressReport
    from qcowkit.image.lineage import Layer
    from qcowkit.storage.protocol import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairPlan:
    """What a repair would do. before: what a check finds now. after: what it would find then.

    changes: what would be written, by kinds."""

    mode: RepairMode
    before: CheckResult
    after: CheckResult
    changes: tuple[ChangeGroup, ...]

    def as_json(self) -> dict[str, Any]:
        """What a check finds now, with three keys of ours: the mode, the counts of changes, and
        what would be left."""
        planned = {group.kind.name.lower(): group.count for group in self.changes}
        left = {"corruptions": self.after.corruptions, "leaks": self.after.leaks}
        return self.before.as_json() | {
            "repair": self.mode.value,
            "planned-changes": planned,
            "would-remain": left,
        }

    def render(self) -> Iterator[str]:
        """Lines to read, without line ends."""
        yield f"{self.before.filename}: dry run, nothing is written; {_summary(self.before)}"
        yield from _render_changes(self.changes, self.after, "nothing would be changed")


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairResult:
    """What a repair did. before: what a check found then. after: what it finds now, with the
    numbers of what was repaired. changes: what was written, by kinds."""

    mode: RepairMode
    before: CheckResult
    after: CheckResult
    changes: tuple[ChangeGroup, ...]

    def as_json(self) -> dict[str, Any]:
        """The object of `qemu-img check -r --output=json`."""
        return self.after.as_json()

    def render(self) -> Iterator[str]:
        """Lines to read, without line ends."""
        yield f"{self.before.filename}: {_summary(self.before)}"
        yield from _render_changes(self.changes, self.after, "nothing was changed")


def plan_repair(
    layer: Layer,
    *,
    mode: RepairMode,
    progress: ProgressReport | None = None,
    cancel: threading.Event | None = None,
) -> RepairPlan:
    """Try a repair on `layer`, which is only read. Raises as `repair_image` does, and StorageError
    where the changes need more memory than a dry run takes."""
    changes = ChangeLog()
    storage = OverlayStorage(layer.storage)
    repaired = _repair(layer, storage, mode, changes, progress, cancel)
    return RepairPlan(
        mode=mode,
        before=_before(layer, repaired),
        after=_after(layer, repaired),
        changes=changes.groups,
    )


def repair_image(
    layer: Layer,
    *,
    mode: RepairMode,
    progress: ProgressReport | None = None,
    cancel: threading.Event | None = None,
    barriers: Barriers | None = None,
) -> RepairResult:
    """Repair the file of `layer`, which was opened for writing; its backing chain and data file are
    not looked at. What is found to be sound is not written.

    Data are never made unreachable: entries that lead nowhere stay, and are told by the check that
    ends the repair. Raises UnsupportedFeature for other formats than qcow2, OperationError, with
    the file as it was, where a repair cannot be, and StorageError or Cancelled at any moment: then
    it may be begun again. Reliability reference, section 4.3; seeds S003-11, S003-20."""
    if not layer.storage.caps.writable:
        raise RequestError(f"{layer.storage.name}: opened for reading, expected for writing")
    changes = ChangeLog()
    repaired = _repair(layer, layer.storage, mode, changes, progress, cancel, barriers)
    return RepairResult(
        mode=mode,
        before=_before(layer, repaired),
        after=_after(layer, repaired),
        changes=changes.groups,
    )


def _repair(
    layer: Layer,
    storage: Storage,
    mode: RepairMode,
    changes: ChangeLog,
    progress: ProgressReport | None,
    cancel: threading.Event | None,
    barriers: Barriers | None = None,
) -> Repaired:
    if not isinstance(layer.metadata, Qcow2Metadata):
        name = layer.metadata.format
        raise UnsupportedFeature("repair", reason=f"{name} images can be checked only")
    return repair_qcow2(
        storage, mode=mode, changes=changes, barriers=barriers, progress=progress, cancel=cancel
    )


def _before(layer: Layer, repaired: Repaired) -> CheckResult:
    """The first check; a damaged snapshot table, with which no check opens the image, is a
    corruption more."""
    found = repaired.before
    result = describe_qcow2(image_name(layer), found.metadata, found.log, found.statistics)
    if repaired.damage is None:
        return result
    log = FindingLog()
    for reason in repaired.damage.reasons:
        log.corruption(
            "snapshot table",
            host_offset=found.metadata.header.snapshots_offset,
            reason=reason,
        )
    return replace(
        result,
        corruptions=result.corruptions + len(repaired.damage.reasons),
        findings=(*log.kept, *result.findings),
    )


def _after(layer: Layer, repaired: Repaired) -> CheckResult:
    found = repaired.after
    result = describe_qcow2(image_name(layer), repaired.metadata, found.log, found.statistics)
    notes = result.notes
    if result.leaks and (found.lost or found.spare):
        notes += ("leaks are kept: entries lead nowhere, and these clusters may be what they lost",)
    return replace(
        result,
        corruptions_fixed=repaired.corruptions_fixed,
        leaks_fixed=repaired.leaks_fixed,
        notes=notes,
    )


def _summary(result: CheckResult) -> str:
    parts = [
        f"{count:,} {word}{'' if count == 1 else 's'}"
        for count, word in ((result.corruptions, "corruption"), (result.leaks, "leak"))
        if count
    ]
    return f"found {' and '.join(parts) or 'nothing wrong'}"


def _render_changes(
    changes: tuple[ChangeGroup, ...], after: CheckResult, nothing: str
) -> Iterator[str]:
    yield ""
    if not changes:
        yield nothing
    for group in changes:
        yield from group.render()
    yield ""
    yield from after.render(title="afterwards")
