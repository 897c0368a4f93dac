"""qemu-img and we on the same files, verb by verb: snapshots, chains, measure and compare."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qcowkit.image.gate import ReferenceGate
from qcowkit.image.registry import open_chain
from qcowkit.units import KiB, MiB
from tests.command import qcow
from tests.peers import run_peer

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

IMAGE = "disk.qcow2"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def qemu_json(verb: str, *arguments: object) -> Any:
    return json.loads(run_peer("qemu-img", verb, "--output=json", *arguments))


def create(path: str, size: int, *options: str) -> None:
    run_peer("qemu-img", "create", "-q", "-f", "qcow2", *options, path, size)


def write(path: str, *edits: str, format: str = "qcow2") -> None:
    words = [word for edit in edits for word in ("-c", edit)]
    run_peer("qemu-io", "-f", format, *words, path)


def read(path: str, format: str = "qcow2", **options: Any) -> bytes:
    with open_chain(path, format=format, gate=ReferenceGate.below_image(), **options) as chain:
        return chain.read(offset=0, length=chain.size)


def qemu_raw(path: str, *options: str, format: str = "qcow2") -> bytes:
    run_peer("qemu-img", "convert", *options, "-f", format, "-O", "raw", path, "qemu.raw")
    return Path("qemu.raw").read_bytes()


# Snapshots


@pytest.mark.pinned("snapshots", "refcount_bits=1", "data_file")
@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=4k",
        "compat=0.10,cluster_size=512",
        "extended_l2=on,cluster_size=16k",
        "refcount_bits=2,cluster_size=64k",
        "compression_type=zstd",
    ],
)
def test_snapshots_of_qemu_are_read(options: str) -> None:
    create(IMAGE, MiB, "-o", options)
    kept: dict[str, bytes] = {}
    for index, name in enumerate(("first", "zweiter Stand", "3")):
        if index == 2 and "refcount_bits=2" in options:
            continue
        start = index * 200 * KiB
        write(IMAGE, f"write -P {index + 1} {start} 300k", f"write -z {start + 64 * KiB} 64k")
        kept[name] = qemu_raw(IMAGE)
        run_peer("qemu-img", "snapshot", "-c", name, IMAGE)
    write(IMAGE, "write -P 9 0 1M", "discard 512k 128k")
    for name, content in kept.items():
        assert read(IMAGE, snapshot=name) == content
        assert qemu_raw(IMAGE, "-l", name) == content
    assert read(IMAGE) == qemu_raw(IMAGE)


@pytest.mark.pinned("snapshots of several sizes", "refcount_bits=1", "compat=0.10", "data_file")
def test_a_snapshot_keeps_its_own_size_and_can_have_the_current_one() -> None:
    create(IMAGE, MiB)
    write(IMAGE, "write -P 5 0 1M")
    run_peer("qemu-img", "snapshot", "-c", "small", IMAGE)
    run_peer("qemu-img", "resize", "-q", IMAGE, "3M")
    write(IMAGE, "write -P 6 1M 2M")
    assert read(IMAGE, snapshot="small") == b"\x05" * MiB
    qcow("convert", "-l", "small", "--target-size", "current", "-f", "qcow2", IMAGE, "ours.raw")
    assert Path("ours.raw").read_bytes() == qemu_raw(IMAGE, "-l", "small")
    qcow("convert", "-l", "small", "-f", "qcow2", IMAGE, "own.raw")
    assert Path("own.raw").read_bytes() == b"\x05" * MiB


@pytest.mark.pinned("snapshots and bitmaps", "refcount_bits=1", "compat=0.10", "data_file")
def test_an_image_with_snapshots_and_bitmaps_is_found_clean() -> None:
    create(IMAGE, 2 * MiB, "-o", "cluster_size=4k")
    run_peer("qemu-img", "bitmap", "--add", IMAGE, "b0")
    write(IMAGE, "write -P 1 0 1M")
    run_peer("qemu-img", "snapshot", "-c", "one", IMAGE)
    write(IMAGE, "write -P 2 512k 1M")
    expected = qemu_json("check", "-f", "qcow2", IMAGE)
    found = qcow("check", "--output=json", "-f", "qcow2", IMAGE).json()
    assert {key: found.get(key) for key in expected} == expected


# Chains


def make_chain(seed: int) -> tuple[str, int]:
    """A chain of random formats and lengths; the name of its top and how many layers it has."""
    noise = random.Random(seed)
    format = noise.choice(("raw", "vpc", "qcow2"))
    below, depth = f"layer0.{format}", noise.randrange(2, 6)
    size = noise.randrange(1, 4000) * 512
    Path("seed.raw").write_bytes(noise.randbytes(size // 2).ljust(size, b"\0"))
    run_peer("qemu-img", "convert", "-f", "raw", "-O", format, "seed.raw", below)
    for index in range(1, depth):
        path = f"layer{index}.qcow2"
        size = noise.randrange(1, 5000) * 512
        bits = noise.choice((9, 12, 14, 16, 21))
        options = f"cluster_size={1 << bits}"
        if bits >= 14 and noise.random() < 0.4:
            options += ",extended_l2=on"
        elif noise.random() < 0.3:
            options += ",compat=0.10"
        create(path, size, "-o", options, "-b", below, "-F", format)
        edits = []
        for _ in range(3):
            start = noise.randrange(size // 512) * 512
            length = min(size - start, noise.randrange(1, 400) * 512)
            words = noise.choice(("write -P 7", "write -z", "discard", "write -P 200"))
            edits.append(f"{words} {start} {length}")
        write(path, *edits)
        below, format = path, "qcow2"
    return below, depth


@pytest.mark.parametrize("seed", range(16))
def test_chains_of_mixed_formats_and_lengths_read_as_in_qemu(seed: int) -> None:
    top, depth = make_chain(seed)
    assert read(top) == qemu_raw(top)
    rows = qemu_json("map", "-f", "qcow2", top)
    found = qcow("map", "--output=json", "-f", "qcow2", top).json()
    if any(path.suffix == ".vpc" for path in Path().iterdir()):
        # Sectors that the bitmap of a block leaves out are data to qemu and holes to us.
        rows, found = by_depth(rows), by_depth(found)
    assert [{key: row.get(key) for key in rows[0]} for row in found] == [
        {key: row.get(key) for key in rows[0]} for row in rows
    ]
    chain = qcow("info", "--output=json", "--backing-chain", "-f", "qcow2", top).json()
    assert len(chain) == depth


def by_depth(rows: list[Any]) -> list[Any]:
    """Runs of one depth, whatever is known of them beyond that."""
    runs: list[Any] = []
    for row in rows:
        if runs and runs[-1]["depth"] == row["depth"]:
            runs[-1]["length"] += row["length"]
        else:
            runs.append({key: row[key] for key in ("start", "length", "depth")})
    return runs


@pytest.mark.parametrize("seed", range(100, 106))
@pytest.mark.parametrize("flags", [["-c"], ["-o", "cluster_size=4k"], ["-c", "-o", "compat=0.10"]])
def test_qemu_finds_a_converted_chain_identical(seed: int, flags: list[str]) -> None:
    top, _ = make_chain(seed)
    qcow("convert", *flags, "-f", "qcow2", "-O", "qcow2", top, "ours.qcow2")
    run_peer("qemu-img", "check", "-q", "-f", "qcow2", "ours.qcow2")
    run_peer("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", top, "ours.qcow2")


@pytest.mark.parametrize("seed", range(200, 206))
@pytest.mark.parametrize("flags", [[], ["-c"], ["-o", "extended_l2=on,cluster_size=16k"]])
def test_a_conversion_onto_the_base_shows_the_same_disk(seed: int, flags: list[str]) -> None:
    top, _ = make_chain(seed)
    base = qemu_json("info", "-f", "qcow2", top)
    names = ("-B", base["backing-filename"], "-F", base["backing-filename-format"])
    qcow("convert", *flags, *names, "-f", "qcow2", "-O", "qcow2", top, "ours.qcow2")
    run_peer("qemu-img", "check", "-q", "-f", "qcow2", "ours.qcow2")
    run_peer("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", top, "ours.qcow2")


# Measure

MEASURED = [
    "",
    "cluster_size=4k",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=2M,refcount_bits=1",
    "compat=0.10",
    "extended_l2=on,cluster_size=32k",
    "preallocation=metadata",
    "preallocation=full",
]


def assert_measured_alike(*arguments: object, options: str) -> None:
    flags = ["-O", "qcow2", *(["-o", options] if options else [])]
    expected = qemu_json("measure", *flags, *arguments)
    assert qcow("measure", "--output=json", *flags, *arguments).json() == expected


@pytest.mark.parametrize("options", MEASURED)
@pytest.mark.parametrize("size", ["0", "512", "1048576", "1M", "1234567k", "16G"])
def test_an_empty_disk_is_measured_as_by_qemu(size: str, options: str) -> None:
    assert_measured_alike("--size", size, options=options)


@pytest.mark.parametrize("options", MEASURED)
def test_a_disk_with_data_is_measured_as_by_qemu(options: str) -> None:
    create(IMAGE, 9 * MiB + 512, "-o", "cluster_size=4k")
    write(IMAGE, "write 0 100k", "write 5M 3k", "write -z 2M 1M", "write 9M 512")
    assert_measured_alike("-f", "qcow2", IMAGE, options=options)


@pytest.mark.parametrize("options", MEASURED)
def test_a_raw_disk_is_measured_as_by_qemu(options: str) -> None:
    Path("disk.raw").write_bytes(b"x" * 70_000 + bytes(3 * MiB - 70_144) + b"y" * 144)
    assert_measured_alike("-f", "raw", "disk.raw", options=options)


@pytest.mark.pinned("bitmaps", "compat=0.10")
@pytest.mark.parametrize("target", ["cluster_size=4k", "cluster_size=64k", "compat=0.10"])
@pytest.mark.parametrize("grains", [("64k",), ("512", "1M", "4k")])
def test_bitmaps_are_measured_as_by_qemu(target: str, grains: tuple[str, ...]) -> None:
    create(IMAGE, 33 * MiB)
    for index, grain in enumerate(grains):
        run_peer("qemu-img", "bitmap", "--add", "-g", grain, IMAGE, f"bitmap-{index}")
    write(IMAGE, "write 1M 3M")
    assert_measured_alike("-f", "qcow2", IMAGE, options=target)


def test_a_raw_target_is_measured_as_by_qemu() -> None:
    create(IMAGE, 9 * MiB)
    expected = qemu_json("measure", "-O", "raw", "-f", "qcow2", IMAGE)
    assert qcow("measure", "--output=json", "-O", "raw", IMAGE).json() == expected


@pytest.mark.pinned("snapshots", "refcount_bits=1", "data_file")
def test_a_snapshot_is_measured_as_by_qemu() -> None:
    create(IMAGE, 4 * MiB)
    write(IMAGE, "write 0 1M")
    run_peer("qemu-img", "snapshot", "-c", "one", IMAGE)
    write(IMAGE, "write 1M 3M")
    assert_measured_alike("-f", "qcow2", "-l", "one", IMAGE, options="")


@pytest.mark.parametrize("options", ["", "cluster_size=4k,refcount_bits=8", "extended_l2=on"])
def test_the_measured_size_is_that_of_the_file(options: str) -> None:
    """Exact for a file without preallocation: qemu counts the tables of a full disk as well."""
    create(IMAGE, 9 * MiB, "-o", "cluster_size=4k")
    write(IMAGE, "write -P 1 0 9M")
    flags = ["-O", "qcow2", *(["-o", options] if options else [])]
    found = qcow("measure", "--output=json", *flags, "-f", "qcow2", IMAGE).json()
    qcow("convert", *flags, "-f", "qcow2", IMAGE, "ours.qcow2")
    assert Path("ours.qcow2").stat().st_size <= found["required"] == found["fully-allocated"]


# Compare


def make_pair(kind: str) -> None:
    """a.qcow2 and b.qcow2 in a relation."""
    create("a.qcow2", MiB)
    write("a.qcow2", "write -P 1 0 300k")
    if kind == "same":
        run_peer("qemu-img", "convert", "-O", "qcow2", "a.qcow2", "b.qcow2")
        return
    create("b.qcow2", 2 * MiB if "longer" in kind else MiB, "-o", "cluster_size=4k")
    write("b.qcow2", "write -P 1 0 300k")
    if kind == "content":
        write("b.qcow2", "write -P 2 299k 512")
    elif kind == "longer with data":
        write("b.qcow2", "write -P 2 1536k 512")
    elif kind == "longer with written zeros":
        write("b.qcow2", "write -P 0 1536k 64k")
    elif kind == "allocation":
        write("b.qcow2", "write -z 512k 64k")


@pytest.mark.parametrize("strict", [[], ["-s"]])
@pytest.mark.parametrize(
    "kind",
    [
        "same",
        "content",
        "longer",
        "longer with data",
        "longer with written zeros",
        "allocation",
    ],
)
def test_compare_ends_as_that_of_qemu(kind: str, strict: list[str]) -> None:
    make_pair(kind)
    for pair in (("a.qcow2", "b.qcow2"), ("b.qcow2", "a.qcow2")):
        flags = [*strict, "-f", "qcow2", "-F", "qcow2", *pair]
        found = qcow("compare", *flags, code=None)
        run_peer("qemu-img", "compare", *flags, status=found.code)


@pytest.mark.pinned("compressed clusters have no holes", "extended_l2")
def test_a_compressed_copy_is_allocated_alike() -> None:
    """qemu's -s also asks that both be compressed or neither, which its manual does not say."""
    make_pair("same")
    run_peer("qemu-img", "convert", "-c", "-O", "qcow2", "a.qcow2", "c.qcow2")
    run_peer("qemu-img", "compare", "a.qcow2", "c.qcow2")
    qcow("compare", "-s", "a.qcow2", "c.qcow2")


def test_compare_ends_with_2_where_a_disk_is_missing() -> None:
    create("a.qcow2", MiB)
    for pair in (("a.qcow2", "nowhere"), ("nowhere", "a.qcow2")):
        qcow("compare", *pair, code=2)
        run_peer("qemu-img", "compare", *pair, status=2)


@pytest.mark.pinned("one compressed cluster of 64 KiB", "data_file", "cluster_size=512")
def test_compare_ends_with_4_where_a_disk_cannot_be_read() -> None:
    create("a.qcow2", MiB)
    write("a.qcow2", "write -c -P 1 0 64k")
    run_peer("qemu-img", "convert", "-O", "qcow2", "a.qcow2", "b.qcow2")
    row = qcow("map", "-f", "qcow2", "a.qcow2").out.decode()
    assert "compressed" in row
    content = Path("a.qcow2").read_bytes()
    host = 5 * 64 * KiB
    assert any(content[host : host + 64])
    Path("a.qcow2").write_bytes(content[:host] + b"\xff" * 64 + content[host + 64 :])
    flags = ["-f", "qcow2", "-F", "qcow2", "a.qcow2", "b.qcow2"]
    qcow("compare", *flags, code=4)
    run_peer("qemu-img", "compare", *flags, status=4)
