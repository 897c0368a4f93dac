"""Commit: what an overlay holds goes into a layer below it, and then the overlay is emptied.

Only what the layers above the base decide is copied. The base shows its new content through nobody
but its own name: whoever reads the top sees the same at every moment, since the top decides these
ranges until the base is durable (reliability reference, section 4.3)."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from qcowkit.budget import TRUSTED, Budget
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.executor import (
    ProgressReport,
    ignore_progress,
)
from qcowkit.engine.findings import Effort
from qcowkit.engine.options import DEFAULT_OPTIONS, OpenOptions, Secrets
from qcowkit.engine.qcow2.compaction import compact
from qcowkit.engine.qcow2.emptying import Emptier
from qcowkit.engine.qcow2.header_writer import HeaderWriter
from qcowkit.engine.qcow2.identity import set_identity
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.engine.qcow2.recovery import recover_for_writing
from qcowkit.errors import CorruptMetadata, OperationError, RequestError, UnsupportedFeature
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import Layer, close_layers, open_layers
from qcowkit.image.registry import build_chain, build_image
from qcowkit.operations.commit_copy import CommitCopy
from qcowkit.units import format_size

# How much more than a check a round of compaction may do.
_COMPACTING = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitOptions:
    """empty: the overlay is emptied at the end. rate: bytes a second at most, None for no limit."""

    empty: bool = True
    rate: int | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What was done, in bytes: copied as data, and made zero. base: the name of the layer that has
    it now. grown: the sizes of its disk before and after, where they differ."""

    base: str
    copied: int
    zeroed: int
    emptied: bool
    grown: tuple[int, int] | None = None

    def render(self) -> list[str]:
        """The lines to print."""
        size, zeros = format_size(self.copied), format_size(self.zeroed)
        lines = [f"{self.base}: {size} of data and {zeros} of zeros committed"]
        if self.grown is not None:
            old, new = map(format_size, self.grown)
            lines.append(f"{self.base}: grown from {old} to {new}")
        lines.append(
            "the overlay is empty now" if self.emptied else "the overlay was left as it is"
        )
        return lines


def commit_image(
    path: str | os.PathLike[str],
    *,
    base: str | None = None,
    format: str | None = None,
    gate: ReferenceGate,
    budget: Budget = TRUSTED,
    opening: OpenOptions = DEFAULT_OPTIONS,
    options: CommitOptions | None = None,
    progress: ProgressReport = ignore_progress,
    cancel: threading.Event | None = None,
) -> Committed:
    """Commit the image at `path` into its backing file, or into the deeper layer `base`, which
    leaves the overlay as it is.

    base: a name in the chain, or the path of one of its files. Raises as `commit_layers`, and what
    opening raises; every file of the chain is held until the end."""
    options = options or CommitOptions()
    depth = 1
    if base is not None:
        options = replace(options, empty=False)
        depth = _find_depth(path, base, format=format, gate=gate, budget=budget)
    layers = open_layers(
        path,
        format=format,
        gate=gate,
        budget=budget,
        writable=options.empty,
        writable_below=(depth,),
        locking=opening.locking,
    )
    if base is not None and not (depth < len(layers) and _is_named(base, layers[depth])):
        # Somebody has rebased a layer before it was held.
        close_layers(layers)
        raise RequestError(f"{base}: is no longer where it was in the chain of {os.fsdecode(path)}")
    return commit_layers(
        layers,
        depth=depth,
        budget=budget,
        opening=opening,
        options=options,
        progress=progress,
        cancel=cancel,
    )


def commit_layers(
    layers: Sequence[Layer],
    *,
    depth: int = 1,
    budget: Budget = TRUSTED,
    opening: OpenOptions = DEFAULT_OPTIONS,
    options: CommitOptions | None = None,
    progress: ProgressReport = ignore_progress,
    cancel: threading.Event | None = None,
) -> Committed:
    """Commit what the layers above `depth` decide, and close all layers.

    layers: top first; the one at `depth` is open for writing, the top too where it is emptied.
    Raises RequestError where it cannot be done, before anything is written; Cancelled, StorageError
    and CorruptMetadata, after which the same call completes what was begun. The disk that the top
    shows is the same in all of these."""
    options = options or CommitOptions()
    with ExitStack() as stack:
        stack.callback(close_layers, layers)
        _check(layers, depth, options)
        if options.empty:
            layers = (_made_sound(layers[0]), *layers[1:])
        base = build_chain(
            layers[depth:],
            budget=budget,
            writable=True,
            options=replace(opening, secrets=_secrets_below(opening.secrets, depth)),
        )
        with base:
            above = _above(layers[:depth], budget=budget, opening=opening)
            stack.callback(above.close)
            work = CommitCopy(
                above,
                base,
                rate=options.rate,
                threads=options.threads,
                progress=progress,
                cancel=cancel,
            )
            before = base.size
            work.grow()
            work.run()
        # Durable, and closed without an error: only then the overlay may let go of it.
        if options.empty:
            _empty(layers[0])
            _note_length(layers[0], base.size)
        return Committed(
            base=_name(layers[depth]),
            copied=work.copied,
            zeroed=work.zeroed,
            emptied=options.empty,
            grown=(before, base.size) if base.size != before else None,
        )


def _above(layers: Sequence[Layer], *, budget: Budget, opening: OpenOptions) -> Chain:
    """The layers above the base, as a disk that says which bytes they decide."""
    return Chain(
        [
            build_image(layer, budget=budget, options=opening, depth=depth)
            for depth, layer in enumerate(layers)
        ]
    )


def _find_depth(
    path: str | os.PathLike[str],
    base: str,
    *,
    format: str | None,
    gate: ReferenceGate,
    budget: Budget,
) -> int:
    """Where in the chain a file is. Takes no locks: the layers are opened again."""
    layers = open_layers(path, format=format, gate=gate, budget=budget, locking="off")
    try:
        for depth, layer in enumerate(layers[1:], 1):
            if _is_named(base, layer):
                return depth
    finally:
        close_layers(layers)
    raise RequestError(f"{base}: is not in the backing chain of {os.fsdecode(path)}")


def _is_named(name: str, layer: Layer) -> bool:
    """Whether a name of the command line means this layer, as its chain does or by its path."""
    if layer.reference is not None and name in layer.reference.names:
        return True
    return layer.path is not None and os.path.realpath(name) == os.path.realpath(layer.path)


def _check(layers: Sequence[Layer], depth: int, options: CommitOptions) -> None:
    """Refuse what cannot be done, before anything is opened for writing."""
    top = layers[0]
    if depth >= len(layers):
        raise RequestError(f"{_name(top)}: has no backing file that it could be committed into")
    for layer in layers[depth:]:
        if layer.format_probed:
            raise RequestError(
                f"{_name(layer)}: a backing file without a declared format is only read; declare "
                "its format (rebase -u -F) to commit into it"
            )
    if isinstance(top.metadata, Qcow2Metadata) and top.metadata.snapshots:
        raise RequestError(
            f"{_name(top)}: has {len(top.metadata.snapshots)} internal snapshots, which show the "
            "base too, so that what is committed would show in them: delete them first"
        )
    if options.empty and not isinstance(top.metadata, Qcow2Metadata):
        raise UnsupportedFeature(
            f"emptying a {top.metadata.format} image",
            reason="only qcow2 images can be emptied; -d leaves the overlay as it is",
        )


def _made_sound(layer: Layer) -> Layer:
    """The overlay ready for being emptied."""
    metadata, barriers = layer.metadata, Barriers(layer.storage)
    assert isinstance(metadata, Qcow2Metadata), "checked before"
    if metadata.corrupt:
        raise CorruptMetadata(
            "header field incompatible_features",
            host_offset=72,
            reason="the corrupt bit is set: the image has to be repaired (check -r all) before "
            "anything is written",
        )
    return replace(layer, metadata=recover_for_writing(layer.storage, metadata, barriers=barriers))


def _empty(layer: Layer) -> None:
    storage, barriers = layer.storage, Barriers(layer.storage)
    metadata = layer.metadata
    assert isinstance(metadata, Qcow2Metadata), "checked before"
    header = HeaderWriter(storage, metadata.header)
    if header.has_unknown_autoclear:
        header.clear_unknown_autoclear()
        barriers.pending = True
        barriers.wait("autoclear bits before the first change")
        metadata = load_qcow2_metadata(storage)
    Emptier(
        storage=storage,
        metadata=metadata,
        barriers=barriers,
        effort=Effort(stored=storage.allocated()),
        data=layer.data_storage,
    ).run()
    # The new tables lie behind what was given up. There are no data, so no key is needed.
    try:
        compact(
            storage,
            barriers=barriers,
            make_effort=lambda: Effort(stored=storage.allocated(), factor=_COMPACTING),
        )
    except RequestError as error:
        raise OperationError(f"the overlay is empty, but its file is as long: {error}") from error


def _note_length(layer: Layer, size: int) -> None:
    """The base may be longer than the overlay has recorded."""
    metadata = load_qcow2_metadata(layer.storage)
    below, guid = metadata.backing_identity, metadata.guid
    if below is None or below.length == size:
        return
    set_identity(
        layer.storage,
        metadata,
        guid=guid,
        backing_guid=below.guid,
        backing_length=size,
        barriers=Barriers(layer.storage),
    )


def _secrets_below(secrets: Secrets, depth: int) -> Secrets:
    """The same passphrases as a chain that begins at `depth` counts its layers."""
    below = {at - depth: one for at, one in secrets.by_depth.items() if at >= depth}
    return Secrets(by_depth=below, other=secrets.other)


def _name(layer: Layer) -> str:
    return layer.storage.name if layer.path is None else str(layer.path)
