"""Check one image: does what it stores add up? Read-only, and of one file only.

qcow2: refcounts against references, and every table entry against the specification. VHD: footers,
places of blocks, sector bitmaps. The data have the schema of `qemu-img check --output=json`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcowkit.budget import TRUSTED, Budget
from qcowkit.engine.findings import Effort, Finding, FindingLog, Severity
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.engine.qcow2.recount import Statistics, recount
from qcowkit.engine.qcow2.repair_snapshots import load_for_repair
from qcowkit.engine.vhd.audit import audit_vhd
from qcowkit.engine.vhd.metadata import VhdMetadata
from qcowkit.errors import UnsupportedFeature
from qcowkit.image.lineage import Layer, lock_storage
from qcowkit.image.metadata import Metadata, canonical_format, load_metadata
from qcowkit.image.probe import probe_format
from qcowkit.storage.file import FileStorage
from qcowkit.units import format_size

if TYPE_CHECKING:
    import threading

    from qcowkit.engine.executor import ProgressReport
    from qcowkit.storage.locking import LockMode
    from qcowkit.storage.protocol import Storage


class Verdict(Enum):
    """The outcome in a word. FAILED: something could not be checked, whatever else was found."""

    CLEAN = "clean"
    LEAKS = "leaks"
    CORRUPT = "corrupt"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What a check found. Clusters are counted of the active disk; of a VHD they are its blocks.

    image_end_offset: bytes of the file up to the last one in use. *_fixed: what a repair before
    the check has put right. findings: errors, corruptions and leaks, the first thousand of each.
    notes: what explains them, one line each."""

    filename: str
    format: str
    check_errors: int = 0
    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The gravest of what was found."""
        if self.check_errors:
            return Verdict.FAILED
        if self.corruptions:
            return Verdict.CORRUPT
        return Verdict.LEAKS if self.leaks else Verdict.CLEAN

    def as_json(self) -> dict[str, Any]:
        """The object of `qemu-img check --output=json`: numbers that are 0 are left out."""
        optional = {
            "image-end-offset": self.image_end_offset,
            "corruptions": self.corruptions,
            "leaks": self.leaks,
            "corruptions-fixed": self.corruptions_fixed,
            "leaks-fixed": self.leaks_fixed,
            "total-clusters": self.total_clusters,
            "allocated-clusters": self.allocated_clusters,
            "fragmented-clusters": self.fragmented_clusters,
            "compressed-clusters": self.compressed_clusters,
        }
        always = {
            "filename": self.filename,
            "format": self.format,
            "check-errors": self.check_errors,
        }
        return always | {name: value for name, value in optional.items() if value}

    def render(self, *, title: str | None = None) -> Iterator[str]:
        """Lines to read, without line ends: the verdict, what was found, statistics.

        title: what the first line begins with, the name of the image if None."""
        yield f"{title or self.filename}: {_SENTENCES[self.verdict]}"
        for severity, count in (
            (Severity.ERROR, self.check_errors),
            (Severity.CORRUPTION, self.corruptions),
            (Severity.LEAK, self.leaks),
        ):
            if count:
                yield ""
                yield f"{count:,} {severity.value}{'' if count == 1 else 's'}"
                kept = [finding for finding in self.findings if finding.severity is severity]
                yield from (f"  {finding}" for finding in kept)
                if count > len(kept):
                    yield f"  and {count - len(kept):,} more"
        if self.findings:
            yield ""
        yield from (f"note       {note}" for note in self.notes)
        yield from self._render_statistics()

    def _render_statistics(self) -> Iterator[str]:
        unit = "blocks" if self.format == "vpc" else "clusters"
        if self.total_clusters:
            share = _percent(self.allocated_clusters, self.total_clusters)
            line = f"{self.allocated_clusters:,} of {self.total_clusters:,} allocated ({share})"
            if self.allocated_clusters:
                line += (
                    f", {_percent(self.fragmented_clusters, self.allocated_clusters)} fragmented"
                )
            if self.compressed_clusters:
                line += (
                    f", {_percent(self.compressed_clusters, self.allocated_clusters)} compressed"
                )
            yield f"{unit:9}  {line}"
        end = self.image_end_offset
        yield f"image end  {format_size(end)} ({end} bytes)"


_SENTENCES = {
    Verdict.CLEAN: "clean, nothing to repair",
    Verdict.LEAKS: "leaks only: space is lost, no data are at risk",
    Verdict.CORRUPT: "corrupt: data are damaged, or will be by further writing",
    Verdict.FAILED: "the check is incomplete: not everything could be read",
}


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %"


def open_for_check(
    source: str | os.PathLike[str] | Storage,
    *,
    format: str | None = None,
    budget: Budget = TRUSTED,
    writable: bool = False,
    for_repair: bool = False,
    locking: LockMode = "auto",
    force_share: bool = False,
) -> Layer:
    """The image file alone; nothing that it names is opened. The caller closes its storage.

    A missing refcount table is let through, since a check reports it. format: probed if None.
    writable: to be repaired. for_repair: let a snapshot table through that only a repair of
    everything can read. locking, force_share: as for `open_layers`. Raises any QcowkitError;
    nothing stays open, and `source` is taken over if it is a storage."""
    storage = (
        FileStorage.open(source, writable=writable)
        if isinstance(source, (str, os.PathLike))
        else source
    )
    try:
        lock = lock_storage(storage, writable=writable, locking=locking, force_share=force_share)
        found = probe_format(storage) if format is None else canonical_format(format)
        metadata: Metadata
        if found == "qcow2":
            metadata = (
                load_for_repair(storage, budget=budget)[0]
                if for_repair
                else load_qcow2_metadata(storage, budget=budget, for_check=True)
            )
        else:
            metadata = load_metadata(storage, found, budget=budget)
    except BaseException:
        storage.close()
        raise
    return Layer(
        storage=storage,
        metadata=metadata,
        path=Path(storage.path) if isinstance(storage, FileStorage) else None,
        format_probed=format is None,
        warnings=metadata.warnings,
        lock=lock,
    )


def check_image(
    layer: Layer,
    *,
    progress: ProgressReport | None = None,
    cancel: threading.Event | None = None,
) -> CheckResult:
    """Check one layer; its backing chain and its data file are not looked at.

    progress: called with bytes of tables (qcow2) or of blocks (VHD). cancel: set it to stop.
    Nothing is written. Raises UnsupportedFeature for a raw disk, OperationError where the image is
    too complex for its size, StorageError and CorruptMetadata for what no check can do without,
    and Cancelled. Reliability reference, rows 20 and 36 to 42; specification, "Refcounts"."""
    storage, metadata, filename = layer.storage, layer.metadata, image_name(layer)
    effort = Effort(stored=storage.allocated(), progress=progress, cancel=cancel)
    log = FindingLog()
    if isinstance(metadata, Qcow2Metadata):
        statistics = recount(storage, metadata, log=log, effort=effort)
        return describe_qcow2(filename, metadata, log, statistics)
    if isinstance(metadata, VhdMetadata):
        return _check_vhd(storage, metadata, filename, log, effort)
    raise UnsupportedFeature("check", reason="a raw disk has no metadata that could be checked")


def image_name(layer: Layer) -> str:
    """What messages call the image of a layer."""
    return layer.storage.name if layer.path is None else str(layer.path)


def describe_qcow2(
    filename: str, metadata: Qcow2Metadata, log: FindingLog, statistics: Statistics
) -> CheckResult:
    """The result of a recount."""
    notes = []
    if metadata.dirty:
        notes.append("the dirty bit is set: refcounts may be stale, which a repair puts right")
    if metadata.corrupt:
        notes.append("the corrupt bit is set: no one may write the image before a repair")
    return CheckResult(
        filename=filename,
        format=metadata.format,
        check_errors=log.count(Severity.ERROR),
        corruptions=log.count(Severity.CORRUPTION),
        leaks=log.count(Severity.LEAK),
        image_end_offset=statistics.image_end,
        total_clusters=statistics.total,
        allocated_clusters=statistics.allocated,
        fragmented_clusters=statistics.fragmented,
        compressed_clusters=statistics.compressed,
        findings=log.kept,
        notes=tuple(notes),
    )


def _check_vhd(
    storage: Storage, metadata: VhdMetadata, filename: str, log: FindingLog, effort: Effort
) -> CheckResult:
    statistics = audit_vhd(storage, metadata, log=log, effort=effort)
    return CheckResult(
        filename=filename,
        format=metadata.format,
        check_errors=log.count(Severity.ERROR),
        corruptions=log.count(Severity.CORRUPTION),
        leaks=log.count(Severity.LEAK),
        image_end_offset=statistics.file_end,
        total_clusters=statistics.total,
        allocated_clusters=statistics.allocated,
        fragmented_clusters=statistics.fragmented,
        findings=log.kept,
    )
