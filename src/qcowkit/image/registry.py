"""Which class stands for which format, and the one door through which disks are opened."""

from __future__ import annotations

import os
from collections.abc import Sequence

from qcowkit.budget import TRUSTED, Budget
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.vhd.metadata import VhdMetadata
from qcowkit.errors import RequestError
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import Layer, close_layers, open_layers
from qcowkit.image.protocol import Image
from qcowkit.image.qcow2 import Qcow2Image
from qcowkit.image.raw import RawImage
from qcowkit.image.vhd import VhdImage


def open_chain(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    gate: ReferenceGate | None = None,
    budget: Budget = TRUSTED,
    snapshot: str | None = None,
    follow_backing: bool = True,
) -> Chain:
    """Open a disk image, and what it refers to, for reading.

    path: the top image. format: raw, qcow2 or vpc; None probes the content. gate: which names
    inside images may be opened; by default none. snapshot: the id or name of an internal
    snapshot, whose disk is then opened in place of the active one. follow_backing: False opens the
    top image alone. Raises any QcowkitError; nothing stays open then."""
    layers = open_layers(
        path,
        format=format,
        gate=gate or ReferenceGate.deny_all(),
        budget=budget,
        follow_backing=follow_backing,
    )
    try:
        return build_chain(layers, budget=budget, snapshot=snapshot)
    except BaseException:
        close_layers(layers)
        raise


def build_chain(
    layers: Sequence[Layer], *, budget: Budget = TRUSTED, snapshot: str | None = None
) -> Chain:
    """The chain of layers that are open already. `snapshot` belongs to the top layer."""
    if snapshot is not None and not isinstance(layers[0].metadata, Qcow2Metadata):
        raise RequestError(
            f"snapshot {snapshot!r}: {layers[0].metadata.format} images have no internal snapshots"
        )
    images = [
        build_image(layer, budget=budget, snapshot=snapshot if depth == 0 else None)
        for depth, layer in enumerate(layers)
    ]
    return Chain(images, layers=layers)


def build_image(layer: Layer, *, budget: Budget, snapshot: str | None = None) -> Image:
    """The address space of one layer."""
    metadata = layer.metadata
    if isinstance(metadata, Qcow2Metadata):
        return Qcow2Image(
            metadata,
            layer.storage,
            data_storage=layer.data_storage,
            budget=budget,
            snapshot=snapshot,
        )
    if isinstance(metadata, VhdMetadata):
        return VhdImage(metadata, layer.storage)
    return RawImage(metadata, layer.storage)
