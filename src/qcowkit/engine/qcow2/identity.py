"""The identity of an image that exists: set, changed, taken away (docs/adr/0018)."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

from qcowkit.codecs.qcow2.header import Autoclear, Header
from qcowkit.codecs.qcow2.identity import BackingIdentity, Identity
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.qcow2.first_cluster import rewrite_first_cluster
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.storage.protocol import Storage


def set_identity(
    storage: Storage,
    metadata: Qcow2Metadata,
    *,
    guid: UUID | None,
    backing_guid: UUID | None = None,
    backing_length: int = 0,
    barriers: Barriers,
) -> Qcow2Metadata:
    """Say which disk this is and which one lies below it; durable on return.

    guid: None takes the identity away. backing_guid: of the backing file that the header names,
    None where none is known; backing_length: its guest bytes. Returns the metadata as they are
    now. Raises as `rewrite_first_cluster`; a crash leaves the old identity or the new one."""
    identity = None
    if guid is not None:
        backing = None
        if backing_guid is not None:
            backing = BackingIdentity(guid=backing_guid, length=backing_length)
        identity = Identity.of(guid, backing=backing, backing_name=metadata.backing_name)
    extensions = replace(metadata.extensions, identity=identity)
    return rewrite_first_cluster(
        storage, metadata, barriers=barriers, header=_header(metadata), extensions=extensions
    )


def rename_backing(
    storage: Storage, metadata: Qcow2Metadata, *, name: str, format: str, barriers: Barriers
) -> Qcow2Metadata:
    """Another name for the same backing file, whose recorded identity holds under it from now on.

    format: of the backing file, as the header declares it. Durable on return; raises as
    `rewrite_first_cluster`."""
    extensions = replace(metadata.extensions, backing_format=format)
    if metadata.guid is not None:
        backing = metadata.backing_identity
        identity = Identity.of(metadata.guid, backing=backing, backing_name=name)
        extensions = replace(extensions, identity=identity)
    return rewrite_first_cluster(
        storage,
        metadata,
        barriers=barriers,
        header=_header(metadata),
        extensions=extensions,
        backing_name=name.encode("utf-8", "surrogateescape"),
    )


def _header(metadata: Qcow2Metadata) -> Header:
    """Without the promises of others: what they are about nobody knows. Ours speak of guest data
    and tables, which stay."""
    header = metadata.header
    return replace(header, autoclear_features=header.autoclear_features & sum(Autoclear))
