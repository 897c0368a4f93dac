"""qemu-img and we, over every pair of qcow2 options: each reads, maps, checks and describes what
the other wrote. The full product runs with `-m soak`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from qcowkit.image.gate import ReferenceGate
from qcowkit.image.registry import open_chain
from tests.command import qcow
from tests.compat.matrix import (
    Case,
    Edit,
    all_cases,
    commands,
    covering_cases,
    plan_edits,
)
from tests.peers import run_peer

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

IMAGE = "disk.qcow2"
# Sizes on disk move while a file system settles; they are nobody's promise.
_UNSTEADY = ("actual-size",)


def case_name(case: Case) -> str:
    return case.name


every_pair = pytest.mark.parametrize("case", covering_cases(), ids=case_name)


def groups() -> Iterator[tuple[str, tuple[Case, ...]]]:
    """The full product in handy parts."""

    def key(case: Case) -> tuple[int, str]:
        return case.cluster_size, case.storage

    for (size, storage), cases in groupby(sorted(all_cases(), key=key), key=key):
        yield f"c{size}-{storage}", tuple(cases)


GROUPS = dict(groups())


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """qemu looks for a data file below its working directory, not below that of the image."""
    monkeypatch.chdir(tmp_path)


def prepare(case: Case) -> None:
    """What the case needs beside the image: noise to write, and a base of another length."""
    noise = random.Random(case.name)
    Path("noise.bin").write_bytes(noise.randbytes(128 << 10))
    if not case.based:
        return
    size = max(512, noise.choice((case.size // 2, case.size, case.size + 65536)) // 512 * 512)
    content = noise.randbytes(min(size, 200_000)) + bytes(max(0, size - 200_000))
    Path("base.raw").write_bytes(content)
    if case.storage == "qcow2-base":
        run_peer("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "base.raw", "base.qcow2")


def base_of(case: Case) -> list[str]:
    """The flags of create that name the base."""
    format = case.storage.removesuffix("-base")
    return ["-b", f"base.{format}", "-F", format] if case.based else []


def qemu_json(verb: str, *arguments: object, status: int = 0) -> Any:
    return json.loads(run_peer("qemu-img", verb, "--output=json", *arguments, status=status))


def agreed(found: Any, recorded: Any) -> Any:
    """`found` by the keys of `recorded`, which is what qemu says, without what is unsteady."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        keys = [key for key in recorded if key not in _UNSTEADY]
        return {key: agreed(found.get(key), recorded[key]) for key in keys}
    if isinstance(recorded, list) and isinstance(found, list) and len(found) == len(recorded):
        return [agreed(one, other) for one, other in zip(found, recorded, strict=True)]
    return found


def read_ours(path: str = IMAGE, **options: Any) -> bytes:
    with open_chain(path, format="qcow2", gate=ReferenceGate.below_image(), **options) as chain:
        return chain.read(offset=0, length=chain.size)


def read_qemu(path: str = IMAGE, *options: str) -> bytes:
    run_peer("qemu-img", "convert", *options, "-f", "qcow2", "-O", "raw", path, "qemu.raw")
    return Path("qemu.raw").read_bytes()


def assert_both_see_the_same(path: str = IMAGE, *, clean: bool = True) -> None:
    """Content, map, description and verdict of qemu-img are ours."""
    assert read_ours(path) == read_qemu(path)
    rows = qemu_json("map", "-f", "qcow2", path)
    assert agreed(qcow("map", "--output=json", "-f", "qcow2", path).json(), rows) == rows
    info = qemu_json("info", "-f", "qcow2", path)
    assert agreed(qcow("info", "--output=json", "-f", "qcow2", path).json(), info) == agreed(
        info, info
    )
    ours = qcow("check", "--output=json", "-f", "qcow2", path, code=None)
    verdict = qemu_json("check", "-f", "qcow2", path, status=0 if clean else ours.code)
    assert agreed(ours.json(), verdict) == verdict
    assert ours.code == 0 or not clean


def qemu_writes(case: Case) -> None:
    run_peer(
        "qemu-img",
        *("create", "-q", "-f", "qcow2", "-o", case.options(), *base_of(case)),
        *(IMAGE, case.size),
    )
    run_peer("qemu-io", "-f", "qcow2", *commands(plan_edits(case)), IMAGE)


def check_reading(case: Case) -> None:
    prepare(case)
    qemu_writes(case)
    assert_both_see_the_same()


def fill_source(case: Case) -> bytes:
    """A raw disk with data, zeros and holes, the content of the case's edits."""
    disk = bytearray(case.size)
    noise = random.Random(case.name + "source")
    for edit in plan_edits(case, count=10):
        apply(edit, disk, noise)
    Path("source.raw").write_bytes(disk)
    return bytes(disk)


def apply(edit: Edit, disk: bytearray, noise: random.Random) -> None:
    stop = edit.start + edit.length
    if "noise" in edit.words:
        disk[edit.start : stop] = noise.randbytes(edit.length)
    elif "-P" in edit.words:
        disk[edit.start : stop] = bytes([noise.randrange(1, 256)]) * edit.length
    else:
        disk[edit.start : stop] = bytes(edit.length)


def assert_options_are_shown(case: Case, *, path: str = IMAGE) -> None:
    """What qemu-img says of our file is what was asked for."""
    info = qemu_json("info", "-f", "qcow2", path)
    data = info["format-specific"]["data"]
    assert info["virtual-size"] == case.size
    assert info["cluster-size"] == case.cluster_size
    assert data["compat"] == case.compat
    assert data["refcount-bits"] == case.refcount_bits
    assert data.get("extended-l2", False) == case.extended_l2
    assert data["compression-type"] == ("zstd" if case.compression == "zstd" else "zlib")
    assert data.get("data-file") == ("disk.data" if case.external else None)
    assert data.get("data-file-raw", False) == (case.storage == "raw-data-file")
    if case.based:
        flags = base_of(case)
        assert info["backing-filename"] == flags[1]
        assert info["backing-filename-format"] == flags[3]


def check_converting(case: Case) -> None:
    prepare(case)
    disk = fill_source(case)
    compress = ["-c"] if case.compression != "none" else []
    base = [flag.replace("-b", "-B") for flag in base_of(case)]
    options = ["-o", case.options()]
    qcow("convert", *compress, *base, *options, "-f", "raw", "-O", "qcow2", "source.raw", IMAGE)
    assert read_ours() == disk
    run_peer("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "source.raw", IMAGE)
    assert_options_are_shown(case)
    assert_both_see_the_same()
    if case.storage == "raw-data-file":
        assert Path("disk.data").read_bytes() == disk


def check_creating(case: Case) -> None:
    prepare(case)
    qcow(
        *("create", "-q", "-f", "qcow2", "-o", case.options(), *base_of(case)),
        *(IMAGE, case.size),
    )
    assert_options_are_shown(case)
    assert_both_see_the_same()
    # What we made is good enough to be written by qemu.
    run_peer("qemu-io", "-f", "qcow2", *commands(plan_edits(case)), IMAGE)
    assert_both_see_the_same()


@pytest.mark.pinned("the matrix says every option")
@every_pair
def test_we_read_what_qemu_writes(case: Case) -> None:
    check_reading(case)


@pytest.mark.pinned("the matrix says every option")
@every_pair
def test_qemu_reads_what_we_convert(case: Case) -> None:
    check_converting(case)


@pytest.mark.pinned("the matrix says every option")
@every_pair
def test_qemu_reads_and_writes_what_we_create(case: Case) -> None:
    check_creating(case)


@pytest.mark.soak
@pytest.mark.parametrize("check", [check_reading, check_converting, check_creating])
@pytest.mark.parametrize("group", list(GROUPS))
def test_every_combination(
    group: str, check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, case in enumerate(GROUPS[group]):
        folder = tmp_path / str(index)
        folder.mkdir()
        monkeypatch.chdir(folder)
        try:
            check(case)
        except AssertionError as error:
            pytest.fail(f"{case.name}: {error}")
        for path in folder.iterdir():
            path.unlink()
