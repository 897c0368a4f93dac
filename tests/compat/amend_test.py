"""`qcow amend` beside qemu-img: its images are amended by us, ours by it, and both stay sound."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qcowkit.units import MiB
from tests.command import qcow
from tests.peers import run_peer

pytestmark = [
    pytest.mark.peer("qemu-img", "qemu-io"),
    pytest.mark.pinned("the matrix says every option"),
]

IMAGE = "disk.qcow2"
WRITES = (
    "write -P 1 100k 300k",
    "write -z 200k 70k",
    "write -P 2 2M 1M",
    "write -c -P 3 3584k 64k",
    "discard 2560k 128k",
)
CREATED = {
    "plain": "cluster_size=64k",
    "small": "cluster_size=512",
    "large": "cluster_size=2M",
    "extended": "cluster_size=32k,extended_l2=on",
    "old": "compat=0.10,cluster_size=4k",
    "narrow": "cluster_size=4k,refcount_bits=1",
    "wide": "cluster_size=4k,refcount_bits=64",
    "zstd": "compression_type=zstd",
    "lazy": "lazy_refcounts=on",
}
AMENDED = (
    "refcount_bits=32",
    "compat=1.1,refcount_bits=16",
    "compat=0.10",
    "extended_l2=off,cluster_size=4k,refcount_bits=16,compression_type=zlib,compat=0.10",
    "extended_l2=off,cluster_size=4k",
    "cluster_size=64k,extended_l2=on",
    "cluster_size=16k",
    "cluster_size=1M",
    "compression_type=zstd",
    "lazy_refcounts=on",
    "size=8M",
)
MADE = [
    *((created, False) for created in CREATED),
    *((created, True) for created in ("plain", "small", "extended", "old")),
]
# What both tools can do.
SHARED = ("refcount_bits=64", "compat=0.10", "compat=1.1", "lazy_refcounts=on", "size=6M")


def make(folder: Path, options: str, *, base: bool, snapshot: bool) -> Path:
    """A disk of 4 MiB that qemu has written."""
    path = folder / IMAGE
    words = []
    if base:
        (folder / "base.raw").write_bytes(b"base" * (3 * MiB // 4))
        words = ["-b", "base.raw", "-F", "raw"]
    run_peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *words, path, 4 * MiB)
    # The compressed cluster needs whole clusters; subclusters and large ones do without.
    usable = [one for one in WRITES if "-c" not in one or "2M" not in options]
    for number, write in enumerate(usable):
        run_peer("qemu-io", "-f", "qcow2", "-c", write, path)
        if snapshot and number == 1:
            run_peer("qemu-img", "snapshot", "-c", "then", path)
    return path


def described(path: Path) -> object:
    data = json.loads(run_peer("qemu-img", "info", "--output=json", path))
    return data["virtual-size"], data["cluster-size"], data["format-specific"]["data"]


@pytest.mark.parametrize("amended", AMENDED)
@pytest.mark.parametrize(("created", "base"), MADE)
def test_an_image_of_qemu_stays_the_disk_that_it_was(
    tmp_path: Path, created: str, amended: str, base: bool
) -> None:
    snapshot = created != "narrow" and not base
    path = make(tmp_path, CREATED[created], base=base, snapshot=snapshot)
    before = tmp_path / "before.qcow2"
    shutil.copy(path, before)
    done = qcow("amend", "-o", amended, path, code=None)
    if done.code:
        assert "excludes" in done.err
        assert path.read_bytes() == before.read_bytes()
        return
    run_peer("qemu-img", "check", "-q", path)
    run_peer("qemu-img", "compare", "-q", before, path)
    # qemu converts a snapshot as long as the disk is now.
    if snapshot and amended != "size=8M":
        for image in (before, path):
            disk = tmp_path / f"{image.stem}.raw"
            run_peer("qemu-img", "convert", "-l", "then", "-O", "raw", image, disk)
        assert (tmp_path / "before.raw").read_bytes() == (tmp_path / "disk.raw").read_bytes()
    run_peer("qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 2M", path)
    run_peer("qemu-img", "check", "-q", path)


@pytest.mark.parametrize("amended", SHARED)
# With large clusters qemu takes minutes for refcounts.
@pytest.mark.parametrize("created", [name for name in CREATED if name != "large"])
def test_what_both_can_change_is_the_same_afterwards(
    tmp_path: Path, created: str, amended: str
) -> None:
    path = make(tmp_path, CREATED[created], base=False, snapshot=False)
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    shutil.copy(path, ours)
    shutil.copy(path, theirs)
    code = qcow("amend", "-q", "-o", amended, ours, code=None).code
    run_peer("qemu-img", "amend", "-q", "-o", amended, theirs, status=code)
    assert described(ours) == described(theirs)
    run_peer("qemu-img", "compare", "-q", ours, theirs)


@pytest.mark.parametrize("amended", SHARED)
def test_qemu_amends_what_we_have_amended(tmp_path: Path, amended: str) -> None:
    path = make(tmp_path, "cluster_size=64k", base=False, snapshot=True)
    qcow("amend", "-q", "-o", "cluster_size=4k,refcount_bits=16", path)
    if amended.startswith("size"):
        run_peer("qemu-img", "snapshot", "-d", "then", path)
    run_peer("qemu-img", "amend", "-q", "-o", amended, path)
    run_peer("qemu-img", "check", "-q", path)
    qcow("check", "-q", path)
