"""Internal snapshots of one image file: listed, taken, gone back to, deleted.

Nothing but the file is opened: a snapshot is about its own tables. Each change is wholly there or
not at all (docs/adr/0014)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qcowkit.codecs.qcow2.snapshots import SnapshotEntry
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.findings import Effort
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.engine.qcow2.snapshots import Snapshots
from qcowkit.errors import UnsupportedFeature
from qcowkit.image.lineage import Layer
from qcowkit.operations.amend import prepare_for_change
from qcowkit.operations.info import describe_snapshot, render_snapshots
from qcowkit.units import format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotList:
    """The snapshots of one image, in the order of its table."""

    filename: str
    entries: tuple[SnapshotEntry, ...]

    def as_json(self) -> list[dict[str, Any]]:
        """The objects of `info`, with the size of each disk in bytes."""
        return [{**describe_snapshot(one), "disk-size": one.disk_size} for one in self.entries]

    def render(self) -> Iterator[str]:
        """Lines to read, without line ends."""
        if not self.entries:
            yield f"{self.filename}: no snapshots"
            return
        yield from render_snapshots(self.as_json())


def list_snapshots(layer: Layer) -> SnapshotList:
    """The snapshots of an image that is open. Raises UnsupportedFeature for other formats."""
    return SnapshotList(filename=_name(layer), entries=_metadata(layer).snapshots)


def create_snapshot(layer: Layer, name: str, *, date_ns: int | None = None) -> SnapshotEntry:
    """Keep the disk as it is. date_ns: nanoseconds of Unix time, now if None.

    layer: open for writing. Raises RequestError where it cannot be taken, and as `Snapshots`."""
    _changes(layer).create(name, date_ns=date_ns)
    return load_qcow2_metadata(layer.storage).snapshots[-1]


def apply_snapshot(layer: Layer, id_or_name: str) -> tuple[SnapshotEntry, tuple[str, ...]]:
    """Make the disk what it was; the snapshot, and what there is to say, a line each.

    layer: open for writing. Raises as `create_snapshot`."""
    entry = _metadata(layer).find_snapshot(id_or_name)
    before = _metadata(layer).virtual_size
    _changes(layer).apply(entry)
    notes = []
    if entry.disk_size != before:
        old, new = format_size(before), format_size(entry.disk_size)
        notes.append(f"the disk has the size that it had then: {new}, it was {old}")
        if _metadata(layer).backing_name is not None and entry.disk_size > before:
            notes.append("where the snapshot has no data of its own the backing file shows")
    return entry, tuple(notes)


def delete_snapshot(layer: Layer, id_or_name: str) -> SnapshotEntry:
    """Give a snapshot up. layer: open for writing. Raises as `create_snapshot`."""
    entry = _metadata(layer).find_snapshot(id_or_name)
    _changes(layer).delete(entry)
    return entry


def _changes(layer: Layer) -> Snapshots:
    """The image made ready for a change: sound, and without promises that it would break."""
    _metadata(layer)
    storage, barriers = layer.storage, Barriers(layer.storage)
    prepare_for_change(layer, barriers)
    metadata = load_qcow2_metadata(storage)
    effort = Effort(stored=storage.allocated())
    return Snapshots(storage=storage, metadata=metadata, barriers=barriers, effort=effort)


def _metadata(layer: Layer) -> Qcow2Metadata:
    metadata = layer.metadata
    if not isinstance(metadata, Qcow2Metadata):
        raise UnsupportedFeature(
            "internal snapshots", reason=f"{metadata.format} images have none, qcow2 images do"
        )
    return metadata


def _name(layer: Layer) -> str:
    return layer.storage.name if layer.path is None else str(layer.path)
