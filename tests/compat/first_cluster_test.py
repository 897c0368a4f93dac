"""The first cluster between two barriers, where a power cut may leave it, and qemu beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcowkit.codecs.qcow2.extensions import encode_first_cluster
from qcowkit.engine.qcow2.first_cluster import plan_first_cluster
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.storage.memory import MemoryStorage
from tests.command import qcow
from tests.peers import run_peer

pytestmark = [
    pytest.mark.peer("qemu-img"),
    pytest.mark.pinned("its first clusters have several sectors"),
]

# Long names of two files.
OLD, NEW = "./" * 300 + "old.raw", "./" * 280 + "new.raw"
STEPS = 5


@pytest.mark.parametrize("done", range(STEPS + 1))
def test_qemu_reads_what_we_read_after_every_step(tmp_path: Path, done: int) -> None:
    path = tmp_path / "disk.qcow2"
    for name in ("old.raw", "new.raw"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    run_peer("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", OLD, "-F", "raw", path, "1M")
    raw = bytearray(path.read_bytes())
    metadata = load_qcow2_metadata(MemoryStorage(bytes(raw)))
    size = metadata.cluster_size
    new = encode_first_cluster(metadata.header, metadata.extensions, NEW)
    steps = plan_first_cluster(bytes(raw[:size]), new)
    assert len(steps) == STEPS
    for step in steps[:done]:
        raw[step.offset : step.offset + len(step.data)] = step.data
    path.write_bytes(raw)
    ours = load_qcow2_metadata(MemoryStorage(bytes(raw)))
    theirs = json.loads(run_peer("qemu-img", "info", "--output=json", path))
    assert theirs["backing-filename"] == ours.backing_name == (OLD if done < 2 else NEW)
    assert theirs["backing-filename-format"] == ours.extensions.backing_format == "raw"
    run_peer("qemu-img", "check", "-q", path)
    # Whatever was left, both can go on from there.
    run_peer("qemu-img", "rebase", "-q", "-u", "-b", "old.raw", "-F", "raw", path)
    qcow("rebase", "-q", "-u", "-b", "", path)
    qcow("check", "-q", path)
