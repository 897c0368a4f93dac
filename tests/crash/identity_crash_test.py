"""Power cuts while an identity is set or a backing file gets another name: old or new, no third."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from qcowkit.codecs.qcow2.extensions import Extension, Extensions
from qcowkit.codecs.qcow2.identity import IDENTITY_TYPE, BackingIdentity, Identity
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.events import QCOW2_FIRST_CLUSTER_BARRIERS
from qcowkit.engine.qcow2.first_cluster import SKIP_TYPE
from qcowkit.engine.qcow2.identity import rename_backing, set_identity
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.errors import QcowkitError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.crash_states import iter_crash_states, split_epochs
from qcowkit.testing.crash_storage import Content, CrashFiles
from qcowkit.testing.mutation import without_barrier
from qcowkit.testing.qcow2_builder import build_qcow2

pytestmark = pytest.mark.pinned("builds the first clusters that it is about")

OWN, OTHER, BELOW = UUID(int=1), UUID(int=2), UUID(int=3)
BACKING = BackingIdentity(guid=BELOW, length=4096)
NAME, MOVED = "b" * 420, "m" * 500
RECORDED = Identity.of(OWN, backing=BACKING, backing_name=NAME)
Change = Callable[[Any, Qcow2Metadata], Qcow2Metadata]


def image(identity: Identity | None) -> bytes:
    own = () if identity is None else (Extension(type=IDENTITY_TYPE, data=identity.encode()),)
    return build_qcow2(
        cluster_bits=13, backing_name=NAME, backing_format="qcow2", unknown=own
    ).to_bytes()


def record(storage: Any, metadata: Qcow2Metadata) -> Qcow2Metadata:
    return set_identity(
        storage,
        metadata,
        guid=OTHER,
        backing_guid=BELOW,
        backing_length=8192,
        barriers=Barriers(storage),
    )


def forget(storage: Any, metadata: Qcow2Metadata) -> Qcow2Metadata:
    return set_identity(storage, metadata, guid=None, barriers=Barriers(storage))


def repair(storage: Any, metadata: Qcow2Metadata) -> Qcow2Metadata:
    return rename_backing(storage, metadata, name=MOVED, format="vpc", barriers=Barriers(storage))


CHANGES: dict[str, tuple[Identity | None, Change]] = {
    "set": (None, record),
    "changed": (RECORDED, record),
    "taken away": (RECORDED, forget),
    "renamed": (RECORDED, repair),
}


def reading(metadata: Qcow2Metadata) -> tuple[Extensions, str | None, BackingIdentity | None]:
    """What a reader learns; `skip` stands for what a cut between two steps leaves."""
    extensions = metadata.extensions
    known = Extensions(
        backing_format=extensions.backing_format,
        identity=extensions.identity,
        unknown=tuple(one for one in extensions.unknown if one.type != SKIP_TYPE),
    )
    return known, metadata.backing_name, metadata.backing_identity


def faults(what: str, *, budget: int, seed: int = 1) -> list[str]:
    """What is wrong in any state that a power cut may leave."""
    identity, change = CHANGES[what]
    files = CrashFiles([Content.of(image(identity))])
    storage = files.open()
    metadata = load_qcow2_metadata(storage)
    before = reading(metadata)
    after = reading(change(storage, metadata))
    assert before != after
    found = []
    for state in iter_crash_states(files, seed=seed, budget=budget):
        left = MemoryStorage(state.contents[0].to_bytes())
        try:
            metadata = load_qcow2_metadata(left)
            if reading(metadata) not in (before, after):
                found.append(f"{state.label}: neither old nor new")
            elif reading(change(left, metadata)) != after:
                found.append(f"{state.label}: not to be changed again")
        except QcowkitError as error:
            found.append(f"{state.label}: {error}")
    return found


@pytest.mark.parametrize("what", CHANGES)
def test_a_power_cut_leaves_the_old_identity_or_the_new(what: str) -> None:
    assert faults(what, budget=150) == []


@pytest.mark.soak
@pytest.mark.parametrize("what", CHANGES)
def test_many_power_cuts_leave_the_old_identity_or_the_new(what: str) -> None:
    for seed in range(5):
        assert faults(what, budget=2000, seed=seed) == []


@pytest.mark.parametrize("what", CHANGES)
def test_a_new_identity_is_durable_when_it_is_said_to_be(what: str) -> None:
    identity, change = CHANGES[what]
    files = CrashFiles([Content.of(image(identity))])
    storage = files.open()
    after = change(storage, load_qcow2_metadata(storage))
    durable = load_qcow2_metadata(MemoryStorage(split_epochs(files)[-1].bases[0].to_bytes()))
    assert reading(durable) == reading(after)


def test_barriers_that_are_left_out_are_missed() -> None:
    missed = []
    for barrier in QCOW2_FIRST_CLUSTER_BARRIERS[1:-1]:
        with without_barrier(barrier):
            missed += [barrier for what in CHANGES if faults(what, budget=120)]
    assert set(missed) == set(QCOW2_FIRST_CLUSTER_BARRIERS[1:-1])
