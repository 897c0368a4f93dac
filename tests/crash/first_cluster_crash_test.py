"""Power cuts while the first cluster changes: it reads wholly as it was or as it was to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from qcowkit.codecs.qcow2.extensions import Extension, Extensions
from qcowkit.codecs.qcow2.header import Compatible, Header
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.events import QCOW2_FIRST_CLUSTER_BARRIERS
from qcowkit.engine.qcow2.first_cluster import SKIP_TYPE, rewrite_first_cluster
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.errors import QcowkitError, StorageError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.crash_states import iter_crash_states, split_epochs
from qcowkit.testing.crash_storage import Content, CrashFiles
from qcowkit.testing.fault_loop import FaultyFiles, run_with_every_fault
from qcowkit.testing.mutation import without_barrier
from qcowkit.testing.qcow2_builder import build_qcow2

UNKNOWN = (Extension(type=0x12345678, data=b"u" * 900), Extension(type=0x12345679, data=b"v" * 9))
KINDS: dict[str, dict[str, Any]] = {
    "512": {"cluster_bits": 9, "backing_name": "old", "backing_format": "raw"},
    "without a name": {"cluster_bits": 16},
    "short": {"cluster_bits": 16, "backing_name": "old", "backing_format": "raw"},
    "long": {"cluster_bits": 13, "backing_name": "o" * 900, "backing_format": "qcow2"},
    "unknown": {"cluster_bits": 16, "backing_name": "o" * 300, "unknown": UNKNOWN},
    "version 2": {"cluster_bits": 12, "version": 2, "backing_name": "o" * 600},
}
NAMES: Mapping[str, bytes | None] = {
    "none": None,
    "short": b"new.qcow2",
    "long": b"n" * 950,
}
# Bytes that only what comes later may name.
MARK_AT = 1 << 22
Read = tuple[Header, Extensions, str | None]


def reading(metadata: Qcow2Metadata) -> Read:
    """What a reader learns, but for where it lies."""
    extensions = metadata.extensions
    unknown = tuple(one for one in extensions.unknown if one.type != SKIP_TYPE)
    header = replace(metadata.header, backing_file_offset=0)
    return header, replace(extensions, unknown=unknown), metadata.backing_name


def change(storage: Any, name: bytes | None) -> Qcow2Metadata:
    """Other values for a field, an extension and the name at once, behind data that they need."""
    metadata = load_qcow2_metadata(storage)
    barriers = Barriers(storage)
    storage.pwrite([b"needed"], offset=MARK_AT)
    barriers.pending = True
    header = metadata.header
    if header.version == 3:
        header = replace(header, compatible_features=int(Compatible.LAZY_REFCOUNTS))
    extensions = replace(metadata.extensions, backing_format="vpc" if name else None)
    return rewrite_first_cluster(
        storage,
        metadata,
        barriers=barriers,
        header=header,
        extensions=extensions,
        backing_name=name,
    )


def faults(kind: str, name: bytes | None, *, budget: int, seed: int = 1) -> tuple[list[str], int]:
    """What is wrong in any state that a power cut may leave, and how many states there were."""
    files = CrashFiles([Content.of(build_qcow2(**KINDS[kind]).to_bytes())])
    storage = files.open()
    before = reading(load_qcow2_metadata(storage))
    after = reading(change(storage, name))
    storage.flush()
    found, count = [], 0
    for state in iter_crash_states(files, seed=seed, budget=budget):
        count += 1
        left = MemoryStorage(state.contents[0].to_bytes())
        try:
            now = reading(load_qcow2_metadata(left))
            marked = left.pread(6, offset=MARK_AT) == b"needed"
            if now not in (before, after):
                found.append(f"{state.label}: neither old nor new")
            elif now == after and before != after and not marked:
                found.append(f"{state.label}: the new one names what is not there")
            # Whatever was left, the change can be made.
            elif reading(change(left, name)) != after:
                found.append(f"{state.label}: not to be changed again")
        except QcowkitError as error:
            found.append(f"{state.label}: {error}")
    return found, count


def cases() -> list[tuple[str, str]]:
    """A cluster of one sector has no room for a long name."""
    return [(kind, name) for kind in KINDS for name in NAMES if (kind, name) != ("512", "long")]


@pytest.mark.pinned("its kinds of images are its own")
@pytest.mark.parametrize(("kind", "name"), cases())
def test_a_power_cut_leaves_the_old_or_the_new(kind: str, name: str) -> None:
    found, count = faults(kind, NAMES[name], budget=150)
    assert found == []
    assert count >= 4


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "name"), cases())
def test_many_power_cuts_leave_the_old_or_the_new(kind: str, name: str) -> None:
    for seed in range(5):
        assert faults(kind, NAMES[name], budget=2000, seed=seed)[0] == []


@pytest.mark.pinned("its kinds of images are its own")
@pytest.mark.parametrize("barrier", QCOW2_FIRST_CLUSTER_BARRIERS[:-1])
def test_a_barrier_that_is_left_out_is_missed(barrier: str) -> None:
    found: list[str] = []
    for kind, name in cases():
        with without_barrier(barrier):
            found += faults(kind, NAMES[name], budget=120)[0]
    assert found != []


@pytest.mark.pinned("its kinds of images are its own")
def test_what_is_said_to_be_done_is_durable() -> None:
    files = CrashFiles([Content.of(build_qcow2(**KINDS["short"]).to_bytes())])
    change(files.open(), b"new.qcow2")
    durable = split_epochs(files)[-1].bases[0].to_bytes()
    assert load_qcow2_metadata(MemoryStorage(durable)).backing_name == "new.qcow2"


@pytest.mark.pinned("its kinds of images are its own")
@pytest.mark.parametrize(("kind", "name"), cases())
def test_whatever_call_fails_the_old_or_the_new_is_read(kind: str, name: str) -> None:
    made = CrashFiles([Content.of(build_qcow2(**KINDS[kind]).to_bytes())])
    before = reading(load_qcow2_metadata(made.open()))
    done = FaultyFiles.of(made)
    after = reading(change(done.open(), NAMES[name]))

    def operation(files: FaultyFiles) -> bool:
        try:
            change(files.open(), NAMES[name])
        except StorageError:
            return False
        return True

    def judge(files: FaultyFiles, succeeded: bool) -> list[str]:
        found = ["a failure was not reported"] if succeeded and before != after else []
        for keep in (True, False):
            left = files.crash(keep=keep)
            if reading(load_qcow2_metadata(left.open())) not in (before, after):
                found.append("neither old nor new")
            if reading(change(left.open(), NAMES[name])) != after:
                found.append("not to be changed again")
        return found

    report = run_with_every_fault(operation, lambda: made, judge)
    assert report.faults == (), str(report)
    assert report.cases > 4
