"""Which class stands for which format, and the one door through which disks are opened."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from qcowkit.budget import TRUSTED, Budget
from qcowkit.engine.luks.metadata import LuksMetadata
from qcowkit.engine.options import DEFAULT_OPTIONS, OpenOptions, Secrets
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.vhd.metadata import VhdMetadata
from qcowkit.errors import RequestError
from qcowkit.image.chain import Chain, no_snapshots
from qcowkit.image.cleaner import CacheCleaner
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import Layer, Resolver, close_layers, open_layers
from qcowkit.image.luks import LuksImage
from qcowkit.image.luks_write import WritableLuksImage
from qcowkit.image.protocol import Image, WritableImage
from qcowkit.image.qcow2 import Qcow2Image
from qcowkit.image.qcow2_write import WritableQcow2Image
from qcowkit.image.raw import RawImage
from qcowkit.image.raw_write import WritableRawImage
from qcowkit.image.vhd import VhdImage
from qcowkit.image.vhd_write import WritableVhdImage


def open_chain(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    gate: ReferenceGate | None = None,
    budget: Budget = TRUSTED,
    snapshot: str | None = None,
    follow_backing: bool = True,
    writable: bool = False,
    options: OpenOptions = DEFAULT_OPTIONS,
    secrets: bytes | Mapping[int, bytes] | None = None,
    resolver: Resolver | None = None,
) -> Chain:
    """Open a disk image, and what it refers to.

    path: the top image. format: raw, qcow2, vpc or luks; None probes the content. gate: which names
    inside images may be opened; by default none. snapshot: the id or name of an internal
    snapshot, whose disk is then opened in place of the active one. follow_backing: False opens the
    top image alone. writable: the top image may be changed; needs a format where the content looks
    raw. options: caches, locks, overlap checks. secrets: the passphrase of every encrypted layer,
    or one for each by its depth in the chain, 0 for the top. resolver: asked where a backing file
    is not the disk that was recorded; it widens nothing that the gate allows. Raises any
    QcowkitError, ImageBusy where another use of a file excludes this one; nothing stays open then.
    """
    if secrets is not None:
        options = replace(options, secrets=Secrets.of(secrets))
    layers = open_layers(
        path,
        format=format,
        gate=gate or ReferenceGate.deny_all(),
        budget=budget,
        follow_backing=follow_backing,
        writable=writable,
        locking=options.locking,
        force_share=options.force_share,
        resolver=resolver,
    )
    try:
        if writable:
            _check_writable(layers, snapshot=snapshot)
        return build_chain(
            layers, budget=budget, snapshot=snapshot, writable=writable, options=options
        )
    except BaseException:
        close_layers(layers)
        raise


def _check_writable(layers: Sequence[Layer], *, snapshot: str | None) -> None:
    """What must not be written through, whatever the file's permissions say."""
    top = layers[0]
    if snapshot is not None:
        raise RequestError(f"snapshot {snapshot!r}: a snapshot is read-only")
    if top.format_probed and top.metadata.format == "raw":
        raise RequestError(
            f"{top.storage.name}: the content looks raw, and what a guest writes could make it "
            "look like something else: name the format raw to write it"
        )
    for layer in layers[1:]:
        if layer.format_probed:
            raise RequestError(
                f"{layer.storage.name}: a backing file without a declared format is only read; "
                "declare its format to write above it"
            )


def build_chain(
    layers: Sequence[Layer],
    *,
    budget: Budget = TRUSTED,
    snapshot: str | None = None,
    writable: bool = False,
    options: OpenOptions = DEFAULT_OPTIONS,
) -> Chain:
    """The chain of layers that are open already. `snapshot`, `writable`: of the top layer."""
    top = layers[0]
    if snapshot is not None and not isinstance(top.metadata, Qcow2Metadata):
        raise no_snapshots(snapshot, top.metadata.format)
    below = [
        build_image(layer, budget=budget, options=options, depth=depth)
        for depth, layer in enumerate(layers[1:], 1)
    ]
    if writable:
        image = build_writable(top, budget=budget, options=options)
        cleaner = _start_cleaner([image, *below], options)
        return Chain([image, *below], layers=layers, top=image, cleaner=cleaner)
    first = build_image(top, budget=budget, snapshot=snapshot, options=options)
    return Chain([first, *below], layers=layers, cleaner=_start_cleaner([first, *below], options))


def _start_cleaner(images: Sequence[Image], options: OpenOptions) -> CacheCleaner | None:
    cached = [image for image in images if isinstance(image, Qcow2Image)]
    if not cached or not options.cache_clean_interval:
        return None
    cleaner = CacheCleaner(cached, interval=options.cache_clean_interval)
    cleaner.start()
    return cleaner


def build_image(
    layer: Layer,
    *,
    budget: Budget,
    snapshot: str | None = None,
    options: OpenOptions = DEFAULT_OPTIONS,
    depth: int = 0,
) -> Image:
    """The address space of one layer, read-only. depth: in its chain, for the passphrase."""
    metadata = layer.metadata
    if isinstance(metadata, Qcow2Metadata):
        return Qcow2Image(
            metadata,
            layer.storage,
            data_storage=layer.data_storage,
            budget=budget,
            snapshot=snapshot,
            options=options,
            secret=options.secrets.at(depth),
        )
    if isinstance(metadata, VhdMetadata):
        return VhdImage(metadata, layer.storage)
    if isinstance(metadata, LuksMetadata):
        secret = options.secrets.at(depth)
        return LuksImage(metadata, layer.storage, secret=secret, budget=budget)
    return RawImage(metadata, layer.storage)


def build_writable(layer: Layer, *, budget: Budget, options: OpenOptions) -> WritableImage:
    """The address space of a top layer whose storage is writable."""
    if isinstance(layer.metadata, Qcow2Metadata):
        return WritableQcow2Image(
            layer.metadata,
            layer.storage,
            data_storage=layer.data_storage,
            budget=budget,
            options=options,
            secret=options.secrets.at(0),
        )
    if isinstance(layer.metadata, VhdMetadata):
        return WritableVhdImage(layer.metadata, layer.storage)
    if isinstance(layer.metadata, LuksMetadata):
        secret = options.secrets.at(0)
        return WritableLuksImage(layer.metadata, layer.storage, secret=secret, budget=budget)
    return WritableRawImage(layer.metadata, layer.storage)
