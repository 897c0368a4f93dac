"""A backing file that was moved: found by its GUID, and named anew in the header.

docs/adr/0018. Every hint is opened through the reference gate, so that nothing is found that the
image may not name, and counts only where the GUID is there now."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from qcowkit.budget import UNTRUSTED, Budget
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.qcow2.identity import rename_backing
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.vhd.metadata import VhdMetadata
from qcowkit.errors import OperationError, QcowkitError, UnsupportedFeature
from qcowkit.image.lineage import Layer
from qcowkit.image.metadata import Metadata, guid_of, load_metadata
from qcowkit.image.probe import probe_format
from qcowkit.operations.identity import refuse_corrupt
from qcowkit.references import Reference, ReferenceKind
from qcowkit.storage.file import FileStorage
from qcowkit.units import format_size

if TYPE_CHECKING:
    from qcowkit.image.gate import ReferenceGate
    from qcowkit.operations.backing_index import BackingIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A file that is the disk. size: guest bytes."""

    path: Path
    format: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackingSearch:
    """What was looked for and what was found. guid: of the backing file. name: in the header.

    in_place: that name leads to the disk. found: other files that are it, too. repaired: the name
    that the header has instead now."""

    image: str
    guid: UUID
    name: str
    in_place: bool
    found: tuple[FoundFile, ...]
    repaired: str | None = None

    def as_json(self) -> dict[str, Any]:
        """An object for scripts."""
        return {
            "filename": self.image,
            "backing-filename": self.name if self.repaired is None else self.repaired,
            "backing-guid": str(self.guid),
            "in-place": self.in_place or self.repaired is not None,
            "repaired": self.repaired is not None,
            "found": [
                {"filename": str(one.path), "format": one.format, "virtual-size": one.size}
                for one in self.found
            ],
        }

    def render(self) -> Iterator[str]:
        """Lines to print."""
        if self.in_place:
            yield f"{self.image}: {self.name} is the disk {self.guid}"
        elif not self.found:
            yield f"{self.image}: the disk {self.guid} was not found"
        for one in self.found:
            size = format_size(one.size)
            yield f"{self.image}: found the disk {self.guid}: {one.path} ({one.format}, {size})"
        if self.repaired is not None:
            yield f"{self.image}: the backing file is {self.repaired} now"


def find_backing(
    layer: Layer, index: BackingIndex, *, gate: ReferenceGate, budget: Budget = UNTRUSTED
) -> BackingSearch:
    """Look for the file that an open image stands on, where the header says and where the index
    does. Nothing is changed.

    Raises OperationError for an image that does not record which disk that is, and StorageError
    where the index fails."""
    reference, guid = _wanted(layer)
    directory = Path() if layer.path is None else layer.path.parent
    seen = {_identity(layer.storage)}
    named = [replace(reference, names=(name,)) for name in reference.names]
    in_place = any(list(_iter_disks(named, guid, directory, seen, gate=gate, budget=budget)))
    hints = [replace(reference, names=(str(path),), format=None) for path in index.find(guid)]
    found = tuple(_iter_disks(hints, guid, directory, seen, gate=gate, budget=budget))
    return BackingSearch(
        image=_name(layer),
        guid=guid,
        name=reference.names[0],
        in_place=in_place,
        found=found,
    )


def repair_backing(
    layer: Layer, search: BackingSearch, *, barriers: Barriers | None = None
) -> BackingSearch:
    """Write the place of the disk that was found into the header; durable on return.

    layer: a qcow2 image that is open for writing. A file below the image's own directory is named
    relative to it. Nothing is done where the name is right. Raises UnsupportedFeature for other
    formats, OperationError unless exactly one file was found, and as `rename_backing`."""
    metadata = _repairable(layer.metadata)
    if search.in_place:
        return search
    if len(search.found) != 1:
        names = ", ".join(str(one.path) for one in search.found) or "none"
        raise OperationError(
            f"{search.image}: the files that are the disk {search.guid}: {names}; expected exactly "
            "one to name as the backing file"
        )
    (one,) = search.found
    name = _name_from(one.path, layer.path)
    rename_backing(
        layer.storage,
        metadata,
        name=name,
        format=one.format,
        barriers=barriers or Barriers(layer.storage),
    )
    return replace(search, repaired=name)


def _wanted(layer: Layer) -> tuple[Reference, UUID]:
    """The name of the file below, and which disk it has to be."""
    metadata, guid = layer.metadata, None
    if isinstance(metadata, VhdMetadata):
        guid = metadata.parent_id
    elif isinstance(metadata, Qcow2Metadata) and metadata.backing_identity is not None:
        guid = metadata.backing_identity.guid
    for reference in metadata.references:
        if reference.kind is not ReferenceKind.DATA and guid is not None:
            return reference, guid
    raise OperationError(
        f"{_name(layer)}: no GUID of a backing file is recorded for the name that the header has"
    )


def _iter_disks(
    references: Iterable[Reference],
    guid: UUID,
    directory: Path,
    seen: set[object],
    *,
    gate: ReferenceGate,
    budget: Budget,
) -> Iterator[FoundFile]:
    """Those of the files that may be named, can be opened and are the disk, each file once."""
    for reference in references:
        try:
            with gate.admit(reference, directory=directory) as storage:
                identity = storage.identity
                metadata = load_metadata(storage, probe_format(storage), budget=budget)
        except QcowkitError:
            # Gone, replaced, not ours to read, never an image: the hint was wrong.
            continue
        if guid_of(metadata) == guid and identity not in seen:
            seen.add(identity)
            yield FoundFile(
                path=Path(storage.path), format=metadata.format, size=metadata.virtual_size
            )


def _repairable(metadata: Metadata) -> Qcow2Metadata:
    if not isinstance(metadata, Qcow2Metadata):
        raise UnsupportedFeature(
            "repair of the backing file name",
            reason=f"that of {metadata.format} images is not changed, only that of qcow2 images",
        )
    refuse_corrupt(metadata)
    return metadata


def _name_from(path: Path, image: Path | None) -> str:
    """A file as the header of an image names it: relative where it lies below the image."""
    target = os.path.realpath(path)
    if image is None:
        return target
    directory = os.path.realpath(image.parent)
    if os.path.commonpath([directory, target]) != directory:
        return target
    name = os.path.relpath(target, directory)
    # What has a colon before its first slash would be taken for a protocol.
    return f"./{name}" if ":" in name.partition("/")[0] else name


def _identity(storage: object) -> object:
    return storage.identity if isinstance(storage, FileStorage) else id(storage)


def _name(layer: Layer) -> str:
    return layer.storage.name if layer.path is None else str(layer.path)
