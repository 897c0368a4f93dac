"""Rebase: another backing file under the same disk.

What the new chain would show otherwise than the old one is copied into the overlay and durable
before its header names the new base (reliability reference, section 4.3). Tables come first: where
both chains lead to the same bytes of the same file nothing is read."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from qcowkit.budget import TRUSTED, Budget
from qcowkit.codecs.qcow2.extensions import KNOWN_FORMATS, Extensions, encode_name
from qcowkit.codecs.qcow2.header import MAX_BACKING_NAME, Autoclear
from qcowkit.codecs.qcow2.identity import BackingIdentity, Identity
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.executor import ProgressReport, ignore_progress
from qcowkit.engine.options import DEFAULT_OPTIONS, OpenOptions, Secrets
from qcowkit.engine.qcow2.first_cluster import check_room, rewrite_first_cluster
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.errors import CorruptMetadata, RequestError, UnsupportedFeature
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import Layer, close_layers, open_layers
from qcowkit.image.metadata import Metadata, guid_of
from qcowkit.image.qcow2_write import WritableQcow2Image
from qcowkit.image.registry import build_chain, build_writable
from qcowkit.operations.rebase_copy import RebaseCopy
from qcowkit.storage.protocol import Storage
from qcowkit.units import format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBase:
    """The backing file as the header is to name it; name None for none. format: declared."""

    name: str | None
    format: str | None = None

    def check(self) -> None:
        """Raises RequestError for what no header can say."""
        if self.name is None:
            if self.format is not None:
                raise RequestError("a format of the backing file needs a backing file")
            return
        encode_name(self.name, what="backing file name", limit=MAX_BACKING_NAME)
        if self.format is None:
            raise RequestError(f"the format of the backing file {self.name!r} is missing")
        if self.format not in KNOWN_FORMATS:
            raise RequestError(f"{self.format!r} is not the name of a known format")


@dataclass(frozen=True, slots=True, kw_only=True)
class RebaseOptions:
    """compress: what is copied is stored compressed, where whole clusters are."""

    compress: bool = False
    threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebased:
    """What was done, in bytes: copied as data, made zero, and read to be compared."""

    base: str | None
    copied: int = 0
    zeroed: int = 0
    compared: int = 0

    def render(self) -> list[str]:
        """The lines to print."""
        base = "none" if self.base is None else self.base
        size, zeros, read = map(format_size, (self.copied, self.zeroed, self.compared))
        return [
            f"{read} compared, {size} of data and {zeros} of zeros copied",
            f"the backing file is now: {base}",
        ]


def rebase_image(
    path: str | os.PathLike[str],
    base: NewBase,
    *,
    format: str | None = None,
    gate: ReferenceGate,
    budget: Budget = TRUSTED,
    opening: OpenOptions = DEFAULT_OPTIONS,
    options: RebaseOptions | None = None,
    progress: ProgressReport = ignore_progress,
    cancel: threading.Event | None = None,
) -> Rebased:
    """Put the image at `path` over another backing file; its disk shows the same afterwards.

    base: its name starts at the image's directory. The user names it: it may lie anywhere, and what
    it names itself is for the gate. Raises RequestError before anything is written, and as
    `rebase_layers`."""
    base.check()
    with ExitStack() as stack:
        old = open_layers(
            path, format=format, gate=gate, budget=budget, writable=True, locking=opening.locking
        )
        stack.callback(close_layers, old)
        new: tuple[Layer, ...] = ()
        if base.name is not None:
            beside = _beside(path, base.name)
            _refuse_loop(beside, base, old, gate=gate, budget=budget)
            new = open_layers(
                beside, format=base.format, gate=gate, budget=budget, locking=opening.locking
            )
            stack.callback(close_layers, new)
        return rebase_layers(
            old,
            new,
            base,
            budget=budget,
            opening=opening,
            options=options,
            progress=progress,
            cancel=cancel,
        )


def rename_base(
    path: str | os.PathLike[str],
    base: NewBase,
    *,
    format: str | None = None,
    budget: Budget = TRUSTED,
    opening: OpenOptions = DEFAULT_OPTIONS,
) -> Rebased:
    """Rewrite the name and format of the backing file and nothing else. Neither the old nor the new
    one is opened: where their content differs the disk does.

    Raises RequestError, and what opening and `rewrite_first_cluster` raise."""
    base.check()
    if base.name is not None and _beside(path, base.name) == os.path.realpath(path):
        raise RequestError(f"{base.name}: an image cannot be its own backing file")
    layers = open_layers(
        path,
        format=format,
        gate=ReferenceGate.deny_all(),
        budget=budget,
        writable=True,
        follow_backing=False,
        follow_data=False,
        locking=opening.locking,
    )
    try:
        _check_image(layers[0], base)
        write_base(layers[0].storage, base)
    finally:
        close_layers(layers)
    return Rebased(base=base.name)


def write_base(storage: Storage, base: NewBase, below: Metadata | None = None) -> Qcow2Metadata:
    """Name another backing file in the header of an image that nobody else has open; durable on
    return.

    below: what the new base is, None where nobody has looked. A crash leaves the old name or the
    new one. Raises as `rewrite_first_cluster`."""
    metadata = load_qcow2_metadata(storage)
    extensions, name = _naming(metadata, base, below)
    # Whatever others promised about the disk, they did not expect another base under it.
    autoclear = metadata.header.autoclear_features & sum(Autoclear)
    return rewrite_first_cluster(
        storage,
        metadata,
        barriers=Barriers(storage),
        header=replace(metadata.header, autoclear_features=autoclear),
        extensions=extensions,
        backing_name=name,
    )


def _naming(
    metadata: Qcow2Metadata, base: NewBase, below: Metadata | None
) -> tuple[Extensions, bytes | None]:
    """Extensions and backing name of an image over its new base."""
    identity = _identity_above(metadata, base, below)
    extensions = replace(metadata.extensions, backing_format=base.format, identity=identity)
    if base.name is None:
        return extensions, None
    return extensions, encode_name(base.name, what="backing file name", limit=MAX_BACKING_NAME)


def _identity_above(
    metadata: Qcow2Metadata, base: NewBase, below: Metadata | None
) -> Identity | None:
    """What the image says of itself and of the disk below it from now on."""
    if metadata.guid is None:
        return None
    guid = None if below is None else guid_of(below)
    if guid is None or below is None:
        # Under an unchanged name the old record would hold on.
        return Identity.of(metadata.guid)
    backing = BackingIdentity(guid=guid, length=below.virtual_size)
    return Identity.of(metadata.guid, backing=backing, backing_name=base.name)


def rebase_layers(
    old: tuple[Layer, ...],
    new: tuple[Layer, ...],
    base: NewBase,
    *,
    budget: Budget = TRUSTED,
    opening: OpenOptions = DEFAULT_OPTIONS,
    options: RebaseOptions | None = None,
    progress: ProgressReport = ignore_progress,
    cancel: threading.Event | None = None,
) -> Rebased:
    """Copy what the new chain would show otherwise, then name the new base.

    old: the chain of the image, top first, the top open for writing. new: that of the new base,
    empty for none. All are closed at the end. Raises RequestError where it cannot be done, and
    Cancelled, StorageError and CorruptMetadata: the disk shows the same then, over the old base or
    the new."""
    options = options or RebaseOptions()
    with ExitStack() as stack:
        stack.callback(close_layers, (*old, *new))
        _check_image(old[0], base)
        _check_safe(old)
        if options.compress:
            _check_compression(old[0])
        below_top = new[0].metadata if new else None
        _check_room(old[0], base, below_top)
        image = build_writable(old[0], budget=budget, options=opening)
        assert isinstance(image, WritableQcow2Image), "checked before"
        stack.callback(image.close)
        below = _disk_of(old[1:], stack, budget=budget, opening=opening)
        other = _disk_of(new, stack, budget=budget, opening=opening)
        work = RebaseCopy(
            Chain([image, *(below.images if below else ())], layers=old, top=image),
            below,
            other,
            compress=options.compress,
            threads=options.threads,
            progress=progress,
            cancel=cancel,
        )
        try:
            work.run()
        finally:
            # Its refcounts are right then, whatever comes; the file stays open, and held.
            image.disk.close()
        write_base(old[0].storage, base, below_top)
    return Rebased(base=base.name, copied=work.copied, zeroed=work.zeroed, compared=work.compared)


def _disk_of(
    layers: tuple[Layer, ...], stack: ExitStack, *, budget: Budget, opening: OpenOptions
) -> Chain | None:
    """The read-only disk below the overlay, which `stack` closes; None for no layers."""
    if not layers:
        return None
    below = {depth - 1: one for depth, one in opening.secrets.by_depth.items() if depth}
    secrets = Secrets(by_depth=below, other=opening.secrets.other)
    disk = build_chain(layers, budget=budget, options=replace(opening, secrets=secrets))
    stack.callback(disk.close)
    return disk


def _beside(path: str | os.PathLike[str], name: str) -> str:
    """A backing name, as seen from the directory of the image that is to hold it."""
    return os.path.realpath(Path(os.path.abspath(os.fsdecode(path))).parent / name)


def _refuse_loop(
    path: str, base: NewBase, old: tuple[Layer, ...], *, gate: ReferenceGate, budget: Budget
) -> None:
    """Raise RequestError where the new chain would lead back to the image itself."""
    layers = open_layers(path, format=base.format, gate=gate, budget=budget, locking="off")
    try:
        taken = {_identity(old[0].storage), _identity(old[0].data_storage)} - {None}
        for layer in layers:
            if {_identity(layer.storage), _identity(layer.data_storage)} & taken:
                raise RequestError(
                    f"{base.name}: its chain leads to the image itself, which would be a loop"
                )
    finally:
        close_layers(layers)


def _identity(storage: Storage | None) -> object:
    return getattr(storage, "identity", None)


def _check_image(layer: Layer, base: NewBase) -> None:
    """Whether the header may name another base."""
    metadata = layer.metadata
    if not isinstance(metadata, Qcow2Metadata):
        raise UnsupportedFeature(
            "rebase", reason=f"{metadata.format} images keep their base, qcow2 images change it"
        )
    if metadata.corrupt:
        raise CorruptMetadata(
            "header field incompatible_features",
            host_offset=72,
            reason="the corrupt bit is set: the image has to be repaired (check -r all) before "
            "anything is written",
        )
    if base.name is not None and metadata.data_file_raw:
        raise RequestError(
            f"{_name(layer)}: its data file is a raw disk by itself, which has no backing file"
        )


def _check_safe(old: tuple[Layer, ...]) -> None:
    """What would change unseen, or be read as what it is not."""
    metadata = old[0].metadata
    if isinstance(metadata, Qcow2Metadata) and metadata.snapshots:
        raise RequestError(
            f"{_name(old[0])}: has {len(metadata.snapshots)} internal snapshots, which show the "
            "base too and would change with it: delete them first"
        )
    for layer in old[1:]:
        if layer.format_probed:
            raise RequestError(
                f"{_name(layer)}: a backing file without a declared format is not copied from: "
                "declare it first (rebase -u -b with the same name and -F)"
            )


def _check_room(layer: Layer, base: NewBase, below: Metadata | None) -> None:
    """Whether the name will fit, before anything is copied."""
    metadata = layer.metadata
    assert isinstance(metadata, Qcow2Metadata), "checked before"
    extensions, name = _naming(metadata, base, below)
    check_room(layer.storage, metadata, extensions=extensions, backing_name=name)


def _check_compression(layer: Layer) -> None:
    metadata = layer.metadata
    assert isinstance(metadata, Qcow2Metadata), "checked before"
    if metadata.data_file:
        raise RequestError(f"{_name(layer)}: an external data file holds no compressed clusters")
    if metadata.encrypted is not None:
        raise RequestError(f"{_name(layer)}: what is encrypted cannot be compressed")


def _name(layer: Layer) -> str:
    return layer.storage.name if layer.path is None else str(layer.path)
