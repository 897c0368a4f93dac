"""Commit: what goes into the base, what stays, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest

from qcowkit.errors import (
    Cancelled,
    CorruptMetadata,
    RequestError,
    StorageError,
    UnsupportedFeature,
)
from qcowkit.operations.commit import CommitOptions, Committed, commit_layers
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.testing.qcow2_builder import SnapshotSpec, Zero, build_qcow2
from qcowkit.units import KiB
from tests.chain_disks import (
    EXTENDED,
    OPENING,
    QCOW2,
    RAW,
    SMALL,
    TINY,
    VHD,
    Kind,
    content,
    decided,
    faults_of,
    layers_of,
    make_chain,
    open_disk,
)

pytestmark = pytest.mark.pinned("its kinds of images are its own")

LONG = 200 * KiB
CHAINS: dict[str, tuple[Kind, ...]] = {
    "qcow2 over raw": (QCOW2, RAW),
    "qcow2 over vhd": (QCOW2, VHD),
    "tiny over large clusters": (Kind(options=TINY), Kind(options={"cluster_size": 64 * KiB})),
    "large over tiny clusters": (Kind(options={"cluster_size": 64 * KiB}), Kind(options=TINY)),
    "subclusters": (Kind(options=EXTENDED), Kind(options=EXTENDED)),
    "subclusters over clusters over raw": (Kind(options=EXTENDED), QCOW2, RAW),
    "version 2": (Kind(options={"compat": "0.10", **SMALL}), Kind(options={"compat": "0.10"})),
    "lazy": (Kind(options={"lazy_refcounts": True, **SMALL}),) * 2,
    "longer top": (Kind(size=LONG, options=SMALL), QCOW2),
    "longer top over raw": (Kind(size=LONG, options=SMALL), RAW),
    "longer top over vhd": (Kind(size=LONG, options=SMALL), VHD),
    "longer top over a chain": (Kind(size=LONG, options=SMALL), QCOW2, replace(RAW, size=LONG)),
    "longer base": (QCOW2, replace(RAW, size=LONG)),
}
DEEP: dict[str, tuple[Kind, ...]] = {
    "three": (QCOW2, Kind(options=TINY), RAW),
    "short between": (Kind(size=LONG, options=SMALL), QCOW2, replace(RAW, size=LONG)),
    "short between, short base": (Kind(size=LONG, options=SMALL), QCOW2, RAW),
    "four": (QCOW2, Kind(options=EXTENDED), QCOW2, VHD),
}


def commit(
    files: CrashFiles, kinds: Sequence[Kind], *, depth: int = 1, empty: bool = True
) -> Committed:
    layers = layers_of(files, kinds, writable=(0, depth) if empty else (depth,))
    options = CommitOptions(empty=empty, threads=1)
    return commit_layers(layers, depth=depth, opening=OPENING, options=options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CHAINS)
def test_the_base_then_shows_what_the_overlay_showed(name: str, seed: int) -> None:
    kinds = CHAINS[name]
    files = make_chain(kinds, seed=seed)
    top, below = content(files, kinds), content(files, kinds, depth=1)
    done = commit(files, kinds)
    assert content(files, kinds) == top
    assert content(files, kinds, depth=1)[: len(top)] == top
    assert content(files, kinds, depth=1)[len(top) :] == below[len(top) :]
    assert decided(files, kinds) == 0
    assert faults_of(files, kinds) == []
    assert done.emptied
    assert (done.grown is not None) == (len(top) > len(below))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", DEEP)
def test_a_deeper_base_gets_what_all_layers_above_decide(name: str, seed: int) -> None:
    kinds = DEEP[name]
    depth = len(kinds) - 1
    files = make_chain(kinds, seed=seed)
    top = content(files, kinds)
    own = decided(files, kinds)
    commit(files, kinds, depth=depth, empty=False)
    assert content(files, kinds) == top
    assert content(files, kinds, depth=depth)[: len(top)] == top
    assert decided(files, kinds) == own
    assert faults_of(files, kinds) == []


def test_what_is_emptied_can_be_written_and_committed_again() -> None:
    kinds = CHAINS["subclusters"]
    files = make_chain(kinds)
    commit(files, kinds)
    with open_disk(files, kinds, writable=True) as disk:
        disk.write(b"again" * 100, offset=7000)
    top = content(files, kinds)
    done = commit(files, kinds)
    assert content(files, kinds, depth=1) == top
    assert 500 <= done.copied <= 2 * EXTENDED["cluster_size"]


def test_with_d_the_overlay_stays_as_it_is() -> None:
    kinds = CHAINS["qcow2 over raw"]
    files = make_chain(kinds)
    before, shown = files.live[0].to_bytes(), content(files, kinds)
    commit(files, kinds, empty=False)
    assert files.live[0].to_bytes() == before
    assert content(files, kinds, depth=1) == shown


def test_nothing_is_read_or_written_where_the_base_decides() -> None:
    kinds = CHAINS["qcow2 over raw"]
    files = make_chain(kinds, count=0)
    done = commit(files, kinds)
    assert (done.copied, done.zeroed) == (0, 0)
    assert [one for one in files.effects if one.file == 1] == []


def test_zeros_are_committed_without_data() -> None:
    kinds = CHAINS["qcow2 over raw"]
    files = make_chain(kinds, count=0)
    with open_disk(files, kinds, writable=True) as disk:
        disk.write_zeroes(offset=0, length=64 * KiB)
    done = commit(files, kinds)
    assert (done.copied, done.zeroed) == (0, 64 * KiB)


@pytest.mark.parametrize("name", ["qcow2 over raw", "tiny over large clusters", "subclusters"])
def test_the_space_of_the_overlay_is_given_back(name: str) -> None:
    kinds = CHAINS[name]
    files, empty = make_chain(kinds, count=40), make_chain(kinds, count=0)
    commit(files, kinds)
    assert files.open().size() <= empty.open().size() + 4 * kinds[0].options["cluster_size"]


def test_an_image_without_a_base_is_refused() -> None:
    files = make_chain((RAW,))
    with pytest.raises(RequestError, match="has no backing file"):
        commit(files, (RAW,))


def test_internal_snapshots_of_the_overlay_are_refused_before_anything_is_written() -> None:
    kinds = CHAINS["qcow2 over raw"]
    files = make_chain(kinds)
    built = build_qcow2(
        size=128 * KiB,
        clusters={1: Zero()},
        snapshots=[SnapshotSpec(id="1", name="before")],
        backing_name="base",
        backing_format="raw",
    ).to_bytes()
    files.open().truncate(0)
    files.open().pwrite([built], offset=0)
    files.begin()
    with pytest.raises(RequestError, match="has 1 internal snapshots, which show the base too"):
        commit(files, kinds)
    assert files.effects == []


def test_an_overlay_that_cannot_be_emptied_is_refused_without_d() -> None:
    kinds = (VHD, RAW)
    files = make_chain(kinds, count=0)
    with pytest.raises(UnsupportedFeature, match="emptying a vpc image: only qcow2 images can be"):
        commit(files, kinds)


def test_a_base_without_a_declared_format_is_refused() -> None:
    kinds = CHAINS["qcow2 over raw"]
    files = make_chain(kinds)
    top, base = layers_of(files, kinds, writable=(0, 1))
    with pytest.raises(RequestError, match="declare its format"):
        commit_layers([top, replace(base, format_probed=True)])
    assert files.effects == []


def test_a_corrupt_overlay_is_refused() -> None:
    kinds = CHAINS["qcow2 over raw"]
    files = make_chain(kinds)
    files.open().pwrite([(2).to_bytes(8, "big")], offset=72)
    with pytest.raises(CorruptMetadata, match="the corrupt bit is set"):
        commit(files, kinds)


def test_what_was_cancelled_shows_the_same_and_is_completed_by_the_next_run() -> None:
    kinds = CHAINS["qcow2 over raw"]
    files = make_chain(kinds)
    top = content(files, kinds)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        commit_layers(layers_of(files, kinds, writable=(0, 1)), opening=OPENING, cancel=cancel)
    assert content(files, kinds) == top
    commit(files, kinds)
    assert content(files, kinds, depth=1) == top


def test_progress_ends_with_the_size_of_the_disk() -> None:
    kinds = CHAINS["longer base"]
    files = make_chain(kinds)
    seen: list[tuple[int, int]] = []
    commit_layers(
        layers_of(files, kinds, writable=(0, 1)),
        opening=OPENING,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert seen[-1] == (kinds[0].size, kinds[0].size)


def test_every_layer_is_closed_afterwards() -> None:
    files = make_chain((QCOW2, RAW))
    storages = [MemoryStorage(one.to_bytes()) for one in files.live]
    layers = [
        replace(layer, storage=storage)
        for layer, storage in zip(layers_of(files, (QCOW2, RAW)), storages, strict=True)
    ]
    commit_layers(layers, opening=OPENING)
    for storage in storages:
        with pytest.raises(StorageError, match="Bad file descriptor"):
            storage.pread(1, offset=0)
