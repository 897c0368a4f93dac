"""The walk down a backing chain: which files, in which order. No image opens another, this does.

Names are followed only through the gate; loops and depth are refused before any metadata of the
offending file is read. Reliability reference, section 2, rows 45 and 53."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.vhd.metadata import VhdMetadata
from qcowkit.errors import (
    CorruptMetadata,
    ReferenceDenied,
    RequestError,
    StorageError,
    UnknownFormat,
)
from qcowkit.image.metadata import Metadata, canonical_format, guid_of, load_guid, load_metadata
from qcowkit.image.probe import find_formats, probe_format
from qcowkit.references import Reference, ReferenceKind
from qcowkit.storage.file import FileStorage
from qcowkit.storage.locking import FileLock, LockMode, Role, acquire

if TYPE_CHECKING:
    from uuid import UUID

    from qcowkit.budget import Budget
    from qcowkit.image.gate import ReferenceGate
    from qcowkit.storage.protocol import Storage

# The epoch of VHD, 2000-01-01 UTC, in seconds of Unix time.
_VHD_EPOCH = 946_684_800


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One open image file of a chain.

    path: None for storage that is no file. data_storage: the external data file, where it was
    followed. reference: the name in the layer above by which this one was found, None at the top.
    format_probed: nobody declared the format. warnings: the metadata's and those of the walk.
    lock, data_lock: what the two storages hold where they are files, until they are closed."""

    storage: Storage
    metadata: Metadata
    data_storage: Storage | None = None
    path: Path | None = None
    reference: Reference | None = None
    format_probed: bool = False
    warnings: tuple[str, ...] = ()
    lock: FileLock | None = None
    data_lock: FileLock | None = None


class Resolver(Protocol):
    """Who knows where disks are; `operations.backing_index` has one. Never trusted."""

    def find(self, guid: UUID) -> Sequence[Path]:
        """Files that may be this disk, the likeliest first."""


def open_layers(
    source: str | os.PathLike[str] | Storage,
    *,
    format: str | None = None,
    gate: ReferenceGate,
    budget: Budget,
    writable: bool = False,
    writable_below: Collection[int] = (),
    follow_backing: bool = True,
    follow_data: bool = True,
    directory: Path | None = None,
    locking: LockMode = "auto",
    force_share: bool = False,
    resolver: Resolver | None = None,
) -> tuple[Layer, ...]:
    """Open the image and what it names, top first; `close_layers` closes them.

    source: a path, or a storage that this call takes over, also when it fails. format: of the top;
    probed if None. writable: the top and its data file. writable_below: depths of layers below that
    are changed too, all others are only read. directory: where the names of a top without a path
    begin. locking: auto goes on where the host takes no locks, on refuses, off takes none.
    force_share: read what others write. resolver: asked where a recorded disk is not under its
    name; only what the gate admits, and what is that disk, is opened on its word. Raises any
    QcowkitError, ImageBusy where a file is in use; nothing stays open then."""
    storage: Storage
    if isinstance(source, (str, os.PathLike)):
        storage = FileStorage.open(source, writable=writable)
    else:
        storage = source
    path = Path(storage.path) if isinstance(storage, FileStorage) else None
    walk = _Walk(
        gate=gate,
        budget=budget,
        follow_data=follow_data,
        top_directory=directory,
        locking=locking,
        force_share=force_share,
        writable_below=writable_below,
        resolver=resolver,
    )
    with ExitStack() as stack:
        walk.stack = stack
        walk.descend(storage, path, format=format, writable=writable, follow_backing=follow_backing)
        stack.pop_all()
    return tuple(walk.layers)


def lock_storage(
    storage: Storage, *, writable: bool, locking: LockMode, force_share: bool
) -> FileLock | None:
    """Hold the file under a storage for reading or writing; None where there is no file.

    Raises ImageBusy, StorageError, and RequestError for a writer that would share: two writers
    ruin any image. The storage stays open."""
    if writable and force_share:
        raise RequestError(f"{storage.name}: force-share is for reading, found writing")
    if not isinstance(storage, FileStorage):
        return None
    role = Role.WRITER if writable else Role.SHARED if force_share else Role.READER
    return acquire(storage, role, name=storage.name, mode=locking)


def close_layers(layers: Iterable[Layer]) -> None:
    """Close all files of the layers, also behind one that fails; the last failure is raised."""
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.storage.close)
            if layer.data_storage is not None:
                stack.callback(layer.data_storage.close)


@dataclass(slots=True, kw_only=True)
class _Walk:
    gate: ReferenceGate
    budget: Budget
    follow_data: bool
    top_directory: Path | None
    locking: LockMode
    force_share: bool
    writable_below: Collection[int] = ()
    resolver: Resolver | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    seen: dict[object, str] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    # What is to be said of files that the resolver found, by their identity.
    moved: dict[object, str] = field(default_factory=dict)

    def descend(
        self,
        storage: Storage,
        path: Path | None,
        *,
        format: str | None,
        writable: bool,
        follow_backing: bool,
    ) -> None:
        """Append the layer of `storage` and all that it stands on."""
        self._hold(storage)
        layer = self._load(storage, path, format=format, reference=None, writable=writable)
        while follow_backing and (reference := _backing(layer.metadata)) is not None:
            depth = len(self.layers) + 1
            self.budget.spend("backing chain layers", value=depth, limit=self.budget.depth)
            changed = len(self.layers) in self.writable_below
            below, reference = self._admit(layer, reference, writable=changed)
            self._hold(below, reference)
            above = layer.metadata
            layer = self._load(
                below,
                Path(below.path),
                format=reference.format,
                reference=reference,
                writable=changed,
            )
            if reference.kind is ReferenceKind.PARENT:
                self._match_parent(above, layer, reference)
            else:
                writing = writable or bool(self.writable_below)
                self._match_backing(above, layer, reference, writing=writing)

    def _admit(
        self, above: Layer, reference: Reference, *, writable: bool
    ) -> tuple[FileStorage, Reference]:
        """The file under the name that `above` has, or the disk that it has recorded, with the name
        by which that was found."""
        directory = self._directory(above, reference)
        guid = _recorded_guid(above.metadata)
        try:
            storage = self.gate.admit(reference, directory=directory, writable=writable)
        except (ReferenceDenied, StorageError):
            found = self._resolve(guid, reference, directory, writable=writable)
            if found is None:
                raise
            return found
        if self.resolver is None or guid is None or _is_disk(storage, guid):
            return storage, reference
        found = self._resolve(guid, reference, directory, writable=writable)
        if found is None:
            return storage, reference
        storage.close()
        return found

    def _resolve(
        self, guid: UUID | None, reference: Reference, directory: Path, *, writable: bool
    ) -> tuple[FileStorage, Reference] | None:
        """Seed 002-12: what the resolver says is a name like any other, for the gate to judge."""
        if self.resolver is None or guid is None:
            return None
        for path in self.resolver.find(guid):
            other = replace(reference, names=(os.fspath(path),))
            with contextlib.suppress(ReferenceDenied, StorageError):
                storage = self.gate.admit(other, directory=directory, writable=writable)
                if _is_disk(storage, guid):
                    self.moved[storage.identity] = (
                        f"{_label(reference)}: {path} is the recorded disk and was opened instead"
                    )
                    return storage, other
                storage.close()
        return None

    def _hold(self, storage: Storage, reference: Reference | None = None) -> None:
        """Close it if the walk fails; refuse a file that is in the chain already."""
        self.stack.callback(storage.close)
        identity = storage.identity if isinstance(storage, FileStorage) else id(storage)
        if identity in self.seen and reference is not None:
            raise CorruptMetadata(
                _label(reference),
                reason=f"the same file as {self.seen[identity]}: a backing chain must not loop",
            )
        self.seen[identity] = "the top image" if reference is None else _label(reference)

    def _load(
        self,
        storage: Storage,
        path: Path | None,
        *,
        format: str | None,
        reference: Reference | None,
        writable: bool = False,
    ) -> Layer:
        warnings = []
        # Before anything is read: what is read must not be changing.
        lock = self._lock(storage, writable=writable)
        if format is not None and reference is not None:
            _check_declared(storage, reference)
        found = probe_format(storage) if format is None else format
        if format is None and reference is not None:
            warnings.append(f"{_label(reference)} has no declared format; {found} was probed")
        if isinstance(storage, FileStorage) and storage.identity in self.moved:
            warnings.append(self.moved[storage.identity])
        metadata = load_metadata(storage, found, budget=self.budget)
        layer = Layer(
            storage=storage,
            metadata=metadata,
            path=path,
            reference=reference,
            format_probed=format is None,
            warnings=(*metadata.warnings, *warnings),
            lock=lock,
        )
        layer = self._with_data(layer, writable=writable)
        self.layers.append(layer)
        return layer

    def _with_data(self, layer: Layer, *, writable: bool) -> Layer:
        for reference in layer.metadata.references:
            if self.follow_data and reference.kind is ReferenceKind.DATA:
                directory = self._directory(layer, reference)
                data = self.gate.admit(reference, directory=directory, writable=writable)
                self._hold(data, reference)
                lock = self._lock(data, writable=writable)
                return replace(layer, data_storage=data, data_lock=lock)
        return layer

    def _lock(self, storage: Storage, *, writable: bool) -> FileLock | None:
        return lock_storage(
            storage, writable=writable, locking=self.locking, force_share=self.force_share
        )

    def _directory(self, layer: Layer, reference: Reference) -> Path:
        if layer.path is not None:
            return layer.path.parent
        if self.top_directory is None:
            raise RequestError(
                f"{_label(reference)}: {layer.storage.name} lies in no directory that it could be "
                "looked up from"
            )
        return self.top_directory

    def _match_parent(self, child: Metadata, layer: Layer, reference: Reference) -> None:
        """Row 53: a VHD parent is the one that its child was made from."""
        parent = layer.metadata
        if not isinstance(child, VhdMetadata) or not isinstance(parent, VhdMetadata):
            raise CorruptMetadata(
                _label(reference), reason=f"the format is {parent.format}, expected vpc"
            )
        if parent.unique_id != child.parent_id:
            raise CorruptMetadata(
                _label(reference),
                reason=f"unique id is {parent.unique_id}, expected {child.parent_id}",
            )
        # Writers differ: some keep the time of the parent's file, some that of its footer.
        known = parent.footer.timestamp == child.parent_timestamp
        text = _timestamp_warning(layer.storage, child.parent_timestamp, _label(reference))
        if text and not known:
            self.layers[-1] = replace(layer, warnings=(*layer.warnings, text))

    def _match_backing(
        self, overlay: Metadata, layer: Layer, reference: Reference, *, writing: bool
    ) -> None:
        """Seed 002-10: a backing file is the disk that was recorded, where one was."""
        expected = overlay.backing_identity if isinstance(overlay, Qcow2Metadata) else None
        if expected is None:
            return
        found, size = guid_of(layer.metadata), layer.metadata.virtual_size
        text = None
        if found != expected.guid:
            name, told = _label(reference), "none" if found is None else found
            text = f"{name}: the GUID is {told}, expected {expected.guid} as recorded"
            if writing:
                # Whatever is copied on write would make the mixture of two disks permanent.
                raise RequestError(
                    f"{text}: nothing is written above another disk; find-backing looks for the "
                    "right one, rebase -u or amend -o guid take this one"
                )
        elif size != expected.length:
            text = f"{_label(reference)} has {size} bytes, {expected.length} when it was recorded"
        if text is not None:
            self.layers[-1] = replace(layer, warnings=(*layer.warnings, text))


def _backing(metadata: Metadata) -> Reference | None:
    kinds = (ReferenceKind.BACKING, ReferenceKind.PARENT)
    return next((one for one in metadata.references if one.kind in kinds), None)


def _recorded_guid(metadata: Metadata) -> UUID | None:
    """Which disk the file below has to be, where the image says so."""
    if isinstance(metadata, VhdMetadata):
        return metadata.parent_id
    recorded = metadata.backing_identity if isinstance(metadata, Qcow2Metadata) else None
    return None if recorded is None else recorded.guid


def _is_disk(storage: Storage, guid: UUID) -> bool:
    try:
        return load_guid(storage) == guid
    except StorageError:
        return False


def _label(reference: Reference) -> str:
    return f"{reference.kind.value} {reference.names[0]!r}"


def _check_declared(storage: Storage, reference: Reference) -> None:
    """Refuse content that contradicts the declared format; whatever is declared raw stays raw."""
    declared = canonical_format(reference.format or "raw")
    found = find_formats(storage)
    # No magic at all may be an image with a damaged start: that is for its loader to judge.
    if declared != "raw" and found and declared not in found:
        raise UnknownFormat(
            f"{_label(reference)}: the content is {' and '.join(found)}, "
            f"expected {declared} as declared"
        )


def _timestamp_warning(storage: Storage, expected: int, label: str) -> str | None:
    """The child keeps the parent's modification time, which copying a file often changes."""
    if not isinstance(storage, FileStorage) or expected == 0:
        return None
    found = storage.modified() - _VHD_EPOCH
    if found == expected:
        return None
    return f"{label} was modified {found} s after 2000-01-01, expected {expected}"
