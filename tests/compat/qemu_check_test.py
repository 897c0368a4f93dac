"""Our check beside that of qemu-img: the same JSON, key by key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from qcowkit.testing.qcow2_builder import ImageSpec, build_qcow2
from qcowkit.units import GiB
from tests.command import qcow
from tests.peers import run_peer

PEERS: dict[str, tuple[str, Sequence[str]]] = {
    "plain": ("", ("write 0 1M", "write 5M 64k", "write -z 1M 128k", "discard 64k 64k")),
    "small clusters": ("cluster_size=512", ("write 0 100k", "write 1M 3k", "write 50k 1k")),
    "extended": ("extended_l2=on", ("write 2k 2k", "write 1M 70k", "write -z 1M 4k")),
    "compressed": ("", ("write -c 0 64k", "write -c 64k 64k", "write 300k 64k")),
    "wide refcounts": ("refcount_bits=64,cluster_size=4k", ("write 0 3M",)),
    "narrow refcounts": ("refcount_bits=1,cluster_size=4k", ("write 0 3M", "write -z 0 8k")),
    "old": ("compat=0.10", ("write 0 1M", "write 7M 64k")),
}


@pytest.mark.pinned("snapshots and compressed clusters", "refcount_bits=1", "data_file")
@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize(("options", "commands"), PEERS.values(), ids=PEERS)
@pytest.mark.parametrize("snapshot", [False, True])
def test_the_json_equals_that_of_qemu_img(
    tmp_path: Path, options: str, commands: Sequence[str], snapshot: bool
) -> None:
    path = tmp_path / "disk.qcow2"
    flags = ["-o", options] if options else []
    run_peer("qemu-img", "create", "-q", "-f", "qcow2", *flags, path, "16M")
    steps = [part for command in commands for part in ("-c", command)]
    run_peer("qemu-io", *steps, path)
    if snapshot and "refcount_bits=1" not in options:
        run_peer("qemu-img", "snapshot", "-c", "first", path)
        run_peer("qemu-io", "-c", "write 200k 64k", "-c", "write 10M 64k", path)
    theirs = json.loads(run_peer("qemu-img", "check", "--output=json", path))
    assert qcow("check", "--output=json", path).json() == theirs


@pytest.mark.pinned("counts of 2 and more", "refcount_bits=1")
@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("value", [0, 2])
def test_damaged_refcounts_are_counted_as_by_qemu_img(tmp_path: Path, value: int) -> None:
    image = build_qcow2(
        ImageSpec(size=GiB, cluster_bits=16, clusters=dict.fromkeys(range(0, 9000, 100), b"x"))
    )
    for index in range(10, 60, 5):
        image.patch(image.places["refcount_block"] + index * 2, value, width=2)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image.to_bytes())
    theirs = json.loads(run_peer("qemu-img", "check", "--output=json", path, status=2))
    assert qcow("check", "--output=json", path, code=2).json() == theirs
