"""Which disk an image is, and which one lies below it: said by options, changed in place.

docs/adr/0018. Finding a file by its GUID is in `backing_index`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from qcowkit.budget import TRUSTED, Budget
from qcowkit.codecs.qcow2.identity import BackingIdentity, parse_guid
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.qcow2.identity import set_identity
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.errors import CorruptMetadata, UnsupportedFeature
from qcowkit.image.lineage import Layer, close_layers, open_layers
from qcowkit.image.metadata import guid_of
from qcowkit.references import ReferenceKind

if TYPE_CHECKING:
    from qcowkit.image.gate import ReferenceGate
    from qcowkit.image.metadata import Metadata

# What options say in place of a GUID.
NEW_GUID, NO_GUID = "auto", "none"


def choose_guid(text: str) -> UUID | None:
    """A GUID as options name it: itself, `auto` for a random one, `none`. Raises RequestError."""
    if text == NO_GUID:
        return None
    return uuid4() if text == NEW_GUID else parse_guid(text)


def amend_identity(
    layer: Layer,
    guid: UUID | None,
    *,
    gate: ReferenceGate,
    budget: Budget = TRUSTED,
    barriers: Barriers | None = None,
) -> Qcow2Metadata:
    """Give the image another GUID and record which disk its backing file is now; durable on return.

    layer: a qcow2 image that is open for writing. guid: None takes the record away. Returns the
    metadata as they are now. Raises UnsupportedFeature for other formats, what opening the backing
    file raises, and as `set_identity`."""
    require_identity(layer.metadata)
    # As they are by now: other options may have been changed since the file was opened.
    metadata, backing = load_qcow2_metadata(layer.storage, budget=budget), None
    if guid is not None:
        backing = load_backing_identity(layer, gate=gate, budget=budget)
    return set_identity(
        layer.storage,
        metadata,
        guid=guid,
        backing_guid=None if backing is None else backing.guid,
        backing_length=0 if backing is None else backing.length,
        barriers=barriers or Barriers(layer.storage),
    )


def require_identity(metadata: Metadata) -> None:
    """Raise UnsupportedFeature for formats other than qcow2, CorruptMetadata for an image that
    only a repair may write."""
    if not isinstance(metadata, Qcow2Metadata):
        reason = f"{metadata.format} images have no place for another one, qcow2 images do"
        raise UnsupportedFeature("identity", reason=reason)
    refuse_corrupt(metadata)


def refuse_corrupt(metadata: Qcow2Metadata) -> None:
    """Raise CorruptMetadata for an image that only a repair may write."""
    if metadata.corrupt:
        raise CorruptMetadata(
            "header field incompatible_features",
            host_offset=72,
            reason="the corrupt bit is set: the image has to be repaired (check -r all) before "
            "anything is written",
        )


def load_backing_identity(
    layer: Layer, *, gate: ReferenceGate, budget: Budget = TRUSTED
) -> BackingIdentity | None:
    """Which disk the backing file of an image is now; None without a backing file, and where that
    does not say. Raises what opening it raises."""
    for reference in layer.metadata.references:
        if reference.kind is ReferenceKind.BACKING:
            directory = Path() if layer.path is None else layer.path.parent
            storage = gate.admit(reference, directory=directory)
            (below,) = open_layers(
                storage,
                format=reference.format,
                gate=gate,
                budget=budget,
                follow_backing=False,
                follow_data=False,
            )
            close_layers([below])
            guid = guid_of(below.metadata)
            size = below.metadata.virtual_size
            return None if guid is None else BackingIdentity(guid=guid, length=size)
    return None
