"""The record of dirty L2 tables is nobody else's business: qemu's tools read, write, repair and
rewrite images that have one, and what they leave is right for us."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from qcowkit.image.chain import Chain
from qcowkit.operations.check import Verdict
from qcowkit.testing.crash_storage import Content, CrashFiles
from qcowkit.units import KiB
from tests.lazy_disks import (
    COVERAGE,
    RecordKind,
    check,
    closed,
    content,
    crash,
    lazy_kind,
    metadata_of,
    recorded,
    recover,
    use_again,
)
from tests.peers import peer, run_peer

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

KINDS = [
    lazy_kind("1 KiB"),
    lazy_kind("64 bits", options={"refcount_bits": 64}),
    lazy_kind("64 KiB", options={"cluster_size": 64 * KiB}),
    lazy_kind("subclusters", options={"cluster_size": 16 * KiB, "extended_l2": True}),
]
FULL_REPAIR = "repair: header bits cleared"


def write(chain: Chain) -> None:
    for table in (1, 2, 5):
        chain.write(bytes([table]) * 3 * KiB, offset=table * COVERAGE + 512)
    chain.flush()
    chain.discard(offset=2 * COVERAGE, length=64 * KiB)


def saved(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def same_disk(kind: RecordKind, image: Path, wanted: bytes, folder: Path) -> None:
    """Both of us read `wanted` from the image."""
    assert content(kind, image.read_bytes()) == wanted
    plain = saved(folder / "wanted.raw", wanted)
    run_peer("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, plain)


def record_bytes(raw: bytes) -> bytes:
    record = metadata_of(raw).extensions.dirty_tables
    assert record is not None
    return record.encode()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.name))
def test_an_image_that_was_closed_is_clean_for_qemu(kind: RecordKind, tmp_path: Path) -> None:
    raw = closed(kind, write)
    image = saved(tmp_path / "disk.qcow2", raw)
    run_peer("qemu-img", "check", image)
    info = json.loads(run_peer("qemu-img", "info", "--output=json", image))
    assert info["format-specific"]["data"]["lazy-refcounts"] is True
    assert not info["dirty-flag"]
    assert image.read_bytes() == raw


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.name))
def test_a_dirty_image_is_read_by_qemu_as_it_is(kind: RecordKind, tmp_path: Path) -> None:
    raw = crash(kind, write)
    image = saved(tmp_path / "disk.qcow2", raw)
    same_disk(kind, image, content(kind, raw), tmp_path)
    assert image.read_bytes() == raw


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.name))
def test_what_we_recover_qemu_finds_sound(kind: RecordKind, tmp_path: Path) -> None:
    raw = crash(kind, write)
    after, seen = recover(raw)
    assert FULL_REPAIR not in seen
    image = saved(tmp_path / "disk.qcow2", after)
    found = json.loads(run_peer("qemu-img", "check", "--output=json", image, status=0))
    assert found.get("corruptions", 0) == 0
    same_disk(kind, image, content(kind, raw), tmp_path)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.name))
def test_qemu_repairs_a_dirty_image(kind: RecordKind, tmp_path: Path) -> None:
    raw = crash(kind, write)
    image = saved(tmp_path / "disk.qcow2", raw)
    run_peer("qemu-img", "check", "-r", "all", image)
    run_peer("qemu-img", "check", image)
    repaired = image.read_bytes()
    assert not metadata_of(repaired).dirty
    assert recorded(repaired) is None
    assert check(repaired).verdict is Verdict.CLEAN
    same_disk(kind, image, content(kind, raw), tmp_path)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.name))
def test_a_writer_that_does_not_know_the_record_ends_it(kind: RecordKind, tmp_path: Path) -> None:
    raw = crash(kind, write)
    image = saved(tmp_path / "disk.qcow2", raw)
    run_peer("qemu-io", "-f", "qcow2", "-c", "write -P 7 400k 4k", image)
    written = image.read_bytes()
    assert metadata_of(written).header.autoclear_features == 0
    # The extension stays, and says nothing any more.
    assert record_bytes(written) == record_bytes(raw)
    again = use_again(kind, written, lambda chain: chain.write(b"n" * KiB, offset=7 * COVERAGE))
    assert recorded(again) is not None
    after, seen = recover(again)
    assert FULL_REPAIR not in seen
    assert check(after).verdict in (Verdict.CLEAN, Verdict.LEAKS)


def test_a_crash_of_a_writer_that_does_not_know_the_record_needs_a_full_repair(
    tmp_path: Path,
) -> None:
    kind = KINDS[0]
    raw = crash(kind, write)
    image = saved(tmp_path / "disk.qcow2", raw)
    words = ["-f", "qcow2", "-c", "write -P 7 900k 40k", "-c", "flush", "-c", "abort", image]
    done = subprocess.run([peer("qemu-io"), *map(str, words)], capture_output=True, check=False)
    assert done.returncode != 0
    left = image.read_bytes()
    assert metadata_of(left).dirty
    assert recorded(left) is None
    after, seen = recover(left)
    assert FULL_REPAIR in seen
    assert check(after).verdict is Verdict.CLEAN
    assert content(kind, after)[900 * KiB : 940 * KiB] == b"\7" * 40 * KiB


@pytest.mark.parametrize(
    "command",
    [
        ("amend", "-o", "lazy_refcounts=off"),
        ("rebase", "-u", "-F", "raw", "-b", "base.raw"),
        ("resize", None, "4M"),
        ("snapshot", "-c", "one"),
        ("bitmap", "--add", "--disable", None, "bits"),
    ],
    ids=lambda command: str(command[0]),
)
def test_a_header_that_qemu_has_rewritten_is_as_good_as_ours(
    command: tuple[str | None, ...], tmp_path: Path
) -> None:
    """The record may lie elsewhere then; its bytes are the same."""
    kind = lazy_kind(options={"cluster_size": 4 * KiB})
    (tmp_path / "base.raw").write_bytes(bytes(kind.size))
    raw = closed(kind, write)
    image = saved(tmp_path / "disk.qcow2", raw)
    words = [image if word is None else word for word in command]
    run_peer("qemu-img", *words, *([] if None in command else [image]))
    left = image.read_bytes()
    assert record_bytes(left) == record_bytes(raw)
    assert recorded(left) is None
    if command[0] == "amend":
        return
    files = CrashFiles([Content.of(left)])
    based = lazy_kind(backing=kind.size if command[0] == "rebase" else 0)
    crash(based, lambda chain: chain.write(b"n" * KiB, offset=900 * KiB), files=files)
    assert recorded(files.live[0].to_bytes()) == [0]
    after, seen = recover(files.live[0].to_bytes())
    assert FULL_REPAIR not in seen
    run_peer("qemu-img", "check", "-r", "leaks", saved(image, after))
    run_peer("qemu-img", "check", image)
