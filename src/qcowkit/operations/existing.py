"""Convert into a qcow2 or VHD image that exists (`-n`): what of it stays as it is.

The image is made anew with the options of the old one and takes its place when it is complete, so
that a failure leaves the old one whole. What cannot be carried over is refused by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from qcowkit.budget import TRUSTED
from qcowkit.engine.luks.metadata import LuksMetadata
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.vhd.metadata import VhdMetadata
from qcowkit.errors import RequestError
from qcowkit.extents.table import Flag
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import Layer, close_layers, open_layers
from qcowkit.image.metadata import Metadata
from qcowkit.image.registry import build_image
from qcowkit.operations.create import BaseDisk, CreateOptions, OptionValue, refuse_overlap
from qcowkit.storage.file import FileStorage
from qcowkit.storage.locking import Role, acquire
from qcowkit.storage.protocol import Storage


@contextmanager
def hold_existing(
    path: str | os.PathLike[str], format: str, *, read: Iterable[Storage]
) -> Iterator[None]:
    """Let nobody else use the target, from before its options are read until it is replaced.

    read: what the conversion reads. Raises ImageBusy for a target that is in use, RequestError for
    one that is read, StorageError."""
    # Our own reader would look like a stranger's.
    refuse_overlap(path, CreateOptions.of(format, {}), read=read)
    with FileStorage.open(path) as target:
        acquire(target, Role.CREATOR, name=target.name)
        yield


def existing_options(
    path: str | os.PathLike[str], format: str, *, source_size: int
) -> CreateOptions:
    """The options under which the image at `path` was made, for its successor. `hold_existing`
    guards it.

    Raises RequestError when the source is larger, when the image holds data beyond the source's
    end, or when it has something that a new image would lose."""
    layers = open_layers(
        path,
        format=format,
        gate=ReferenceGate.deny_all(),
        budget=TRUSTED,
        follow_backing=False,
        follow_data=False,
        locking="off",
    )
    try:
        return _options(layers[0], os.fsdecode(path), source_size)
    finally:
        close_layers(layers)


def _options(layer: Layer, name: str, source_size: int) -> CreateOptions:
    metadata = layer.metadata
    if metadata.virtual_size < source_size:
        raise RequestError(
            f"{name}: the target has {metadata.virtual_size} bytes, the source {source_size}: "
            "it does not fit"
        )
    for what in _losses(metadata):
        raise RequestError(f"{name}: -n would lose {what} of the target")
    _check_tail(layer, name, source_size)
    if isinstance(metadata, Qcow2Metadata):
        options = CreateOptions.of("qcow2", _qcow2_values(metadata))
        backing = metadata.backing_identity
        base = None if backing is None else BaseDisk(size=backing.length, guid=backing.guid)
        return replace(options, base=base)
    assert isinstance(metadata, VhdMetadata), "raw targets are written in place"
    return CreateOptions.of("vpc", {"size": metadata.virtual_size, "subformat": metadata.subformat})


def _losses(metadata: Metadata) -> list[str]:
    """What a new image would not have, in the words of the message."""
    if isinstance(metadata, VhdMetadata):
        return ["the parent"] if metadata.subformat == "differencing" else []
    if isinstance(metadata, LuksMetadata):
        return ["the key slots"]
    assert isinstance(metadata, Qcow2Metadata), "raw targets are written in place"
    losses = {
        "the snapshots": bool(metadata.snapshots),
        "the bitmaps": bool(metadata.bitmaps),
        "the encryption": metadata.encrypted is not None,
        "the external data file": metadata.data_file,
        "unknown header extensions": bool(metadata.extensions.unknown),
        "the corrupt bit": metadata.corrupt,
    }
    return [what for what, found in losses.items() if found]


def _check_tail(layer: Layer, name: str, source_size: int) -> None:
    """What the source does not reach must hold nothing of the target's own."""
    metadata = layer.metadata
    if isinstance(metadata, Qcow2Metadata) and metadata.backing_name is not None:
        rest = source_size % metadata.geometry.cluster_size
        if rest and source_size < metadata.virtual_size:
            raise RequestError(
                f"{name}: the source ends within a cluster, {rest} bytes from its start; the rest "
                "of that cluster in the backing file would be lost"
            )
    image = build_image(layer, budget=TRUSTED)
    start = source_size
    while start < image.size:
        table = image.extents(start=start, length=image.size - start, limit=1 << 17)
        own = (table.flags & Flag.DATA) != 0
        if own.any():
            at = int(table.start[own.argmax()])
            raise RequestError(
                f"{name}: the target holds data at offset {at}, beyond the source's {source_size} "
                "bytes"
            )
        start = table.end


def _qcow2_values(metadata: Qcow2Metadata) -> dict[str, OptionValue]:
    geometry = metadata.geometry
    values: dict[str, OptionValue | None] = {
        "size": metadata.virtual_size,
        "cluster_size": geometry.cluster_size,
        "refcount_bits": geometry.refcount_bits,
        "extended_l2": geometry.extended_l2,
        "compat": "0.10" if metadata.header.version == 2 else "1.1",
        "compression_type": metadata.compression_type,
        "lazy_refcounts": metadata.lazy_refcounts,
        "backing_file": metadata.backing_name,
        "backing_fmt": metadata.extensions.backing_format,
        "guid": None if metadata.guid is None else str(metadata.guid),
    }
    return {key: value for key, value in values.items() if value is not None}
