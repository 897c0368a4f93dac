"""What changes an image as a whole, on images as they are made by default, of whatever kind that
is: `pytest --image-options`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import qcow

WRITES = (
    *("write -q -P 1 0 200k", "write -q -P 2 1M 300k", "write -q -z 64k 70k"),
    *("write -q -P 3 3M 64k", "discard -q 1100k 100k"),
)
OPTIONS = (
    "compat=1.1,cluster_size=64k,extended_l2=on",
    "compat=1.1,cluster_size=16k,extended_l2=on,refcount_bits=32",
    "extended_l2=off,cluster_size=4k",
    "cluster_size=2M",
    "compat=1.1,refcount_bits=64",
    "compat=1.1,compression_type=zstd",
    "compat=1.1,compression_type=zlib",
    "compat=1.1,lazy_refcounts=on",
    "size=8M",
)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow("create", "-q", "-f", "qcow2", path, "4M")
    qcow("io", "-d", "unmap", *(word for write in WRITES for word in ("-c", write)), path)
    return path


def content(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    qcow("convert", "-q", "-O", "raw", path, raw)
    return raw.read_bytes()


@pytest.mark.parametrize("options", OPTIONS)
def test_the_disk_stays_whatever_option_changes(disk: Path, options: str) -> None:
    before = content(disk)
    qcow("amend", "-q", "-o", options, disk)
    assert content(disk)[: len(before)] == before
    qcow("check", "-q", disk)
    qcow("io", "-c", "write -q -P 9 2M 1M", disk)
    qcow("check", "-q", disk)


def test_it_stays_when_version_2_is_what_it_becomes(disk: Path) -> None:
    before = content(disk)
    options = "compat=0.10,extended_l2=off,refcount_bits=16,compression_type=zlib"
    done = qcow("amend", "-q", "-o", options, disk, code=None)
    assert content(disk) == before
    assert not done.code or "excludes an external data file" in done.err
    qcow("check", "-q", disk)


def test_it_stays_when_the_file_gets_shorter(disk: Path) -> None:
    before, size = content(disk), disk.stat().st_size
    qcow("compact", "-q", disk)
    assert content(disk) == before
    assert disk.stat().st_size <= size
    qcow("check", "-q", disk)


def test_a_capsule_is_checked_like_the_image(disk: Path, tmp_path: Path) -> None:
    capsule = tmp_path / "disk.capsule"
    qcow("capsule", "-q", disk, capsule)
    found, expected = (
        qcow("check", "--output=json", path).json() | {"filename": ""} for path in (capsule, disk)
    )
    assert found == expected
