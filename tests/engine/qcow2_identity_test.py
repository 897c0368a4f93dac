"""The identity of an image in its file: what changes, and what stays."""

from __future__ import annotations

from uuid import UUID

import pytest

from qcowkit.codecs.qcow2.extensions import Extension
from qcowkit.codecs.qcow2.identity import IDENTITY_TYPE, BackingIdentity, Identity
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.qcow2.identity import rename_backing, set_identity
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.errors import RequestError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import build_qcow2

pytestmark = pytest.mark.pinned("builds the first clusters that it is about")

OWN, BELOW = UUID(int=1), UUID(int=3)
BACKING = BackingIdentity(guid=BELOW, length=4096)
UNKNOWN = Extension(type=0x12345678, data=b"kept as it is")


def image(identity: Identity | None = None, **spec: object) -> tuple[MemoryStorage, Qcow2Metadata]:
    own = () if identity is None else (Extension(type=IDENTITY_TYPE, data=identity.encode()),)
    spec = {"cluster_bits": 12, "unknown": (UNKNOWN, *own), **spec}
    storage = MemoryStorage(build_qcow2(**spec).to_bytes())
    return storage, load_qcow2_metadata(storage)


def overlay(name: str = "base.qcow2") -> tuple[MemoryStorage, Qcow2Metadata]:
    identity = Identity.of(OWN, backing=BACKING, backing_name=name)
    return image(identity, backing_name=name, backing_format="qcow2")


def test_an_image_that_says_nothing_has_no_guid() -> None:
    _, metadata = image()
    assert metadata.guid is None
    assert metadata.backing_identity is None


def test_what_is_recorded_under_the_name_in_the_header_is_known() -> None:
    _, metadata = overlay()
    assert metadata.guid == OWN
    assert metadata.backing_identity == BACKING


def test_what_is_recorded_under_another_name_is_not_believed() -> None:
    identity = Identity.of(OWN, backing=BACKING, backing_name="base.qcow2")
    _, metadata = image(identity, backing_name="another.qcow2")
    assert metadata.guid == OWN
    assert metadata.backing_identity is None


def test_an_identity_is_set_and_all_else_stays() -> None:
    storage, metadata = image(backing_name="base.qcow2", backing_format="qcow2")
    after = set_identity(
        storage,
        metadata,
        guid=OWN,
        backing_guid=BELOW,
        backing_length=4096,
        barriers=Barriers(storage),
    )
    assert (after.guid, after.backing_identity) == (OWN, BACKING)
    assert after.backing_name == "base.qcow2"
    assert after.extensions.unknown == (UNKNOWN,)
    assert load_qcow2_metadata(storage) == after


def test_without_a_backing_file_none_is_recorded() -> None:
    storage, metadata = image()
    after = set_identity(
        storage, metadata, guid=OWN, backing_guid=BELOW, barriers=Barriers(storage)
    )
    assert after.extensions.identity == Identity.of(OWN)


def test_an_identity_is_taken_away() -> None:
    storage, metadata = overlay()
    after = set_identity(storage, metadata, guid=None, barriers=Barriers(storage))
    assert after.extensions.identity is None
    assert after.extensions.unknown == (UNKNOWN,)
    assert after.backing_name == "base.qcow2"


def test_a_renamed_backing_file_stays_the_recorded_disk() -> None:
    storage, metadata = overlay()
    after = rename_backing(
        storage, metadata, name="moved/base.vhd", format="vpc", barriers=Barriers(storage)
    )
    assert after.backing_name == "moved/base.vhd"
    assert after.extensions.backing_format == "vpc"
    assert (after.guid, after.backing_identity) == (OWN, BACKING)


def test_a_first_cluster_without_room_is_left_as_it_was() -> None:
    storage, metadata = image(cluster_bits=9, backing_name="b" * 300)
    before = storage.pread(storage.size(), offset=0)
    with pytest.raises(RequestError, match="the header needs"):
        set_identity(storage, metadata, guid=OWN, barriers=Barriers(storage))
    assert storage.pread(storage.size(), offset=0) == before
