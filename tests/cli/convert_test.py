"""`qcow convert` and `qcow dd` from end to end: what each flag makes of the target's bytes."""

from __future__ import annotations

import hashlib
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from qcowkit.codecs.qcow2.compression import make_compressor
from qcowkit.extents.table import Flag
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.registry import open_chain
from qcowkit.testing.qcow2_builder import Compressed, ImageSpec, SnapshotSpec, build_qcow2
from qcowkit.units import KiB, MiB
from tests.command import qcow

SIZE = 3 * MiB + 512


def make_disk(size: int = SIZE, *, seed: int = 1) -> bytes:
    """Noise, text, zeros and an odd tail: something of all that clusters can be."""
    noise = random.Random(seed)
    parts = []
    total = 0
    while total < size:
        length = noise.randrange(1, 300) * 512
        kind = noise.randrange(3)
        if kind == 0:
            parts.append(noise.randbytes(length))
        elif kind == 1:
            parts.append((b"line %d\n" % total * length)[:length])
        else:
            parts.append(bytes(length))
        total += length
    return b"".join(parts)[: size - 512] + b"\x77" * 512


@pytest.fixture(scope="module")
def disk() -> bytes:
    return make_disk()


@pytest.fixture
def raw(tmp_path: Path, disk: bytes) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(disk)
    return path


def read(path: Path, format: str | None = None, **options: Any) -> bytes:
    with open_chain(path, format=format, gate=ReferenceGate.below_image(), **options) as chain:
        return chain.read(offset=0, length=chain.size)


def rows(path: Path, format: str = "qcow2") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = qcow("map", "--output=json", "-f", format, path).json()
    return found


def assert_clean(path: Path) -> None:
    qcow("check", "-q", "-f", "qcow2", path)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".part")]


@pytest.mark.parametrize(
    ("source", "target"), list(product(["raw", "qcow2", "vpc"], ["raw", "qcow2", "vpc"]))
)
def test_every_format_becomes_every_other(
    raw: Path, disk: bytes, tmp_path: Path, source: str, target: str
) -> None:
    between, end = tmp_path / "between", tmp_path / "end"
    qcow("convert", "-f", "raw", "-O", source, raw, between)
    qcow("convert", "-f", source, "-O", target, between, end)
    assert read(end, target) == disk
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize(
    ("cluster", "extended"),
    [("512", "off"), ("4k", "off"), ("16k", "on"), ("64k", "off"), ("2M", "off"), ("2M", "on")],
)
def test_a_compressed_image_reads_as_its_source(
    raw: Path, disk: bytes, tmp_path: Path, kind: str, cluster: str, extended: str
) -> None:
    target = tmp_path / "small.qcow2"
    options = f"compression_type={kind},cluster_size={cluster},extended_l2={extended}"
    qcow("convert", "-c", "-o", options, "-O", "qcow2", "-f", "raw", raw, target)
    assert read(target) == disk
    assert_clean(target)
    assert any(row["compressed"] for row in rows(target))


def test_a_compressed_target_of_another_format_is_refused(raw: Path, tmp_path: Path) -> None:
    done = qcow("convert", "-c", "-O", "vpc", raw, tmp_path / "x", code=1)
    assert done.err == "qcow convert: -c: vpc images cannot be compressed, only qcow2\n"


@pytest.mark.pinned("small clusters leave no choice", "cluster_size=512")
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_a_higher_level_is_smaller(tmp_path: Path, kind: str) -> None:
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    (tmp_path / "text.raw").write_bytes(text[: len(text) // 512 * 512])
    sizes = []
    for level in (1, 9):
        target = tmp_path / f"{level}.qcow2"
        options = f"compression_type={kind},compression_level={level}"
        qcow("convert", "-c", "-O", "qcow2", "-o", options, tmp_path / "text.raw", target)
        assert read(target) == (tmp_path / "text.raw").read_bytes()
        sizes.append(sum(map(len, blobs(target).values())))
    assert sizes[1] < sizes[0]


@pytest.mark.pinned("levels of zlib", "compression_type=zstd")
@pytest.mark.parametrize(
    ("level", "message"),
    [
        ("0", "compression_level 0 is not in 1..9 for zlib"),
        ("10", "compression_level 10 is not in 1..9 for zlib"),
        ("x", "-o compression_level is 'x', expected a whole number"),
    ],
)
def test_a_level_that_is_none_is_refused(
    raw: Path, tmp_path: Path, level: str, message: str
) -> None:
    target = tmp_path / "x.qcow2"
    options = f"compression_level={level}"
    done = qcow("convert", "-c", "-O", "qcow2", "-o", options, raw, target, code=1)
    assert done.err == f"qcow convert: {message}\n"
    assert not target.exists()


@pytest.mark.pinned("the header names the data file", "data_file")
@pytest.mark.parametrize(
    "flags",
    [
        ["-c"],
        ["-c", "-o", "compression_type=zstd,cluster_size=4k"],
        ["-o", "extended_l2=on"],
        ["-o", "cluster_size=512"],
        ["-o", "preallocation=full"],
    ],
)
def test_the_number_of_threads_changes_no_byte(raw: Path, tmp_path: Path, flags: list[str]) -> None:
    digests = set()
    for threads in (1, 2, 3, 4):
        target = tmp_path / f"{threads}.qcow2"
        qcow("convert", *flags, "--threads", threads, "-f", "raw", "-O", "qcow2", raw, target)
        digests.add(hashlib.sha256(target.read_bytes()).digest())
    assert len(digests) == 1


def test_flags_of_out_of_order_work_are_accepted(raw: Path, disk: bytes, tmp_path: Path) -> None:
    target = tmp_path / "x.qcow2"
    qcow("convert", "-W", "-m", "16", "-t", "none", "-T", "writeback", "-O", "qcow2", raw, target)
    assert read(target) == disk


def test_a_flag_may_follow_the_operands(raw: Path, disk: bytes, tmp_path: Path) -> None:
    target = tmp_path / "x.qcow2"
    qcow("convert", raw, "-O", "qcow2", target, "-c")
    assert read(target) == disk


# Backing files and snapshots


@pytest.mark.pinned("clusters of 4 KiB", "extended_l2")
@pytest.mark.parametrize("compat", ["1.1", "0.10"])
@pytest.mark.parametrize("flags", [[], ["-c"]])
def test_only_what_lies_above_the_base_is_copied(
    tmp_path: Path, flags: list[str], compat: str
) -> None:
    base = b"\x11" * MiB
    (tmp_path / "base.raw").write_bytes(base)
    clusters = {1: b"\x22" * 4096, 2: bytes(4096)}
    spec = ImageSpec(clusters=clusters, backing_name="base.raw", backing_format="raw")
    (tmp_path / "top.qcow2").write_bytes(build_qcow2(spec).to_bytes())
    new = tmp_path / "new.qcow2"
    names = ("-B", "base.raw", "-F", "raw", "-O", "qcow2")
    options = f"cluster_size=4k,compat={compat}"
    qcow("convert", *flags, *names, "-o", options, tmp_path / "top.qcow2", new)
    disk = bytearray(base)
    disk[4096 : 3 * 4096] = b"\x22" * 4096 + bytes(4096)
    assert read(new) == bytes(disk)
    assert {row["depth"] for row in rows(new)} == {0, 1}
    assert sum(row["length"] for row in rows(new) if row["depth"] == 0) == 2 * 4096


def test_the_format_of_a_base_is_asked_for(raw: Path, tmp_path: Path) -> None:
    done = qcow("convert", "-B", "base.raw", "-O", "qcow2", raw, tmp_path / "x", code=1)
    assert done.err == "qcow convert: -B needs -F\n"


def test_a_snapshot_is_copied_by_id_and_by_name(tmp_path: Path) -> None:
    snapshot = SnapshotSpec(id="7", name="kept", clusters={0: b"\x33" * 4096}, disk_size=8192)
    built = build_qcow2(clusters={0: b"\x44" * 4096}, snapshots=[snapshot])
    (tmp_path / "disk.qcow2").write_bytes(built.to_bytes())
    for index, name in enumerate(("7", "kept", "snapshot.id=7", "snapshot.name=kept")):
        target = tmp_path / f"{index}.raw"
        qcow("convert", "-l", name, tmp_path / "disk.qcow2", target)
        assert target.read_bytes() == b"\x33" * 4096 + bytes(4096)
    done = qcow("convert", "-l", "lost", tmp_path / "disk.qcow2", tmp_path / "x.raw", code=1)
    assert done.err == "qcow convert: there is no snapshot with the id or name 'lost'\n"


# Zeros and holes


def holes(path: Path) -> int:
    """Bytes that the host has not allocated."""
    status = path.stat()
    return status.st_size - status.st_blocks * 512


def test_zeros_become_holes_in_a_raw_target(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"\x01" * 64 * KiB + bytes(MiB) + b"\x01" * 64 * KiB)
    qcow("convert", tmp_path / "a.raw", tmp_path / "b.raw", "-f", "raw")
    assert (tmp_path / "b.raw").read_bytes() == (tmp_path / "a.raw").read_bytes()
    assert holes(tmp_path / "b.raw") >= MiB


def test_sparse_size_0_allocates_everything(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"\x01" * 64 * KiB + bytes(MiB))
    qcow("convert", "-S", "0", "-f", "raw", tmp_path / "a.raw", tmp_path / "b.raw")
    assert (tmp_path / "b.raw").read_bytes() == (tmp_path / "a.raw").read_bytes()
    assert holes(tmp_path / "b.raw") <= 0
    qcow("convert", "-S", "0", "-O", "qcow2", "-f", "raw", tmp_path / "a.raw", tmp_path / "c")
    assert all(row["data"] for row in rows(tmp_path / "c"))


@pytest.mark.parametrize(("sparse", "hole"), [("512", True), ("4k", True), ("64k", False)])
def test_shorter_runs_of_zeros_than_the_sparse_size_stay_data(
    tmp_path: Path, sparse: str, hole: bool
) -> None:
    content = (b"\x01" * 8 * KiB + bytes(8 * KiB)) * 32
    (tmp_path / "a.raw").write_bytes(content)
    qcow("convert", "-S", sparse, "-f", "raw", tmp_path / "a.raw", tmp_path / "b.raw")
    assert (tmp_path / "b.raw").read_bytes() == content
    assert (holes(tmp_path / "b.raw") > 0) == hole


def test_clusters_of_zeros_are_not_stored(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(4 * MiB) + b"\x01" * 512)
    for flags in ([], ["-c"]):
        qcow("convert", *flags, "-O", "qcow2", tmp_path / "a.raw", tmp_path / "b.qcow2")
        data = [row for row in rows(tmp_path / "b.qcow2") if row["data"]]
        assert [(row["start"], row["length"]) for row in data] == [(4 * MiB, 512)]


# In place


def test_an_existing_target_is_overwritten_in_place(raw: Path, disk: bytes, tmp_path: Path) -> None:
    target = tmp_path / "device"
    target.write_bytes(b"\xee" * (SIZE + MiB))
    inode = target.stat().st_ino
    qcow("convert", "-n", "-f", "raw", raw, target)
    assert target.read_bytes() == disk + b"\xee" * MiB
    assert target.stat().st_ino == inode


def test_a_target_that_is_zero_is_not_zeroed_again(raw: Path, disk: bytes, tmp_path: Path) -> None:
    target = tmp_path / "device"
    target.touch()
    with target.open("r+b") as file:
        file.truncate(SIZE)
    qcow("convert", "-n", "--target-is-zero", "-f", "raw", raw, target)
    assert target.read_bytes() == disk
    assert holes(target) > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-n", "-O", "qcow2"], "magic at host offset 0x0: eeeeeeee, expected 514649fb"),
        (["-n"], "the target has 512 bytes, the source 3146240: it does not fit"),
        (["--target-is-zero"], "--target-is-zero needs -n"),
        (["-n", "-o", "size=1M"], "-n excludes -o"),
        (["-n", "-B", "a", "-F", "raw"], "-n excludes -B"),
    ],
)
def test_writing_in_place_is_refused_where_it_cannot_be(
    raw: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    target = tmp_path / "device"
    target.write_bytes(b"\xee" * 512)
    assert qcow("convert", *flags, raw, target, code=1).err.endswith(f"{message}\n")
    assert target.read_bytes() == b"\xee" * 512


def test_in_place_needs_a_target(raw: Path, tmp_path: Path) -> None:
    assert "ENOENT" in qcow("convert", "-n", raw, tmp_path / "none", code=1).err
    assert not (tmp_path / "none").exists()


# Sources


@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_several_sources_follow_one_another(
    raw: Path, disk: bytes, tmp_path: Path, target: str
) -> None:
    other = make_disk(777 * 512, seed=2)
    (tmp_path / "other.raw").write_bytes(other)
    qcow("convert", "-c", "-O", "qcow2", tmp_path / "other.raw", tmp_path / "other.qcow2")
    end = tmp_path / "end"
    qcow("convert", "-O", target, tmp_path / "other.qcow2", raw, tmp_path / "other.qcow2", end)
    assert read(end, target) == other + disk + other


@pytest.mark.parametrize("flag", ["-B", "-l"])
def test_several_sources_have_no_base_and_no_snapshot(raw: Path, tmp_path: Path, flag: str) -> None:
    flags = [flag, "x", *(["-F", "raw"] if flag == "-B" else [])]
    done = qcow("convert", *flags, "-O", "qcow2", raw, raw, tmp_path / "x", code=1)
    assert done.err == f"qcow convert: {flag} excludes several sources\n"


def test_the_host_may_copy(raw: Path, disk: bytes, tmp_path: Path) -> None:
    for format in ("raw", "qcow2"):
        target = tmp_path / f"copy.{format}"
        qcow("convert", "-C", "-f", "raw", "-O", format, raw, target)
        assert read(target, format) == disk


@pytest.mark.parametrize("flags", [["-c"], ["-S", "4k"], ["--salvage"]])
def test_what_the_host_copies_is_not_looked_at(raw: Path, tmp_path: Path, flags: list[str]) -> None:
    done = qcow("convert", "-C", *flags, "-O", "qcow2", raw, tmp_path / "x", code=1)
    assert done.err == f"qcow convert: -C excludes {flags[0]}\n"


def test_a_rate_changes_no_byte(raw: Path, disk: bytes, tmp_path: Path) -> None:
    qcow("convert", "-r", "1G", "-O", "qcow2", raw, tmp_path / "x.qcow2")
    assert read(tmp_path / "x.qcow2") == disk


def test_progress_reaches_its_end(raw: Path, tmp_path: Path) -> None:
    done = qcow("convert", "--progress=json", "-O", "qcow2", raw, tmp_path / "x.qcow2")
    reports = [json.loads(line) for line in done.err.splitlines()]
    assert reports[-1]["done"] == reports[-1]["total"] == SIZE


# Damage


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Cluster 1 of three does not inflate."""
    pack = make_compressor("zlib", None)
    built = build_qcow2(
        clusters={
            0: Compressed(payload=pack(b"\x01" * 4096)),
            1: Compressed(payload=b"\xff" * 100),
            2: Compressed(payload=pack(b"\x02" * 4096)),
            3: b"\x03" * 4096,
        }
    )
    path = tmp_path / "damaged.qcow2"
    path.write_bytes(built.to_bytes())
    return path


@pytest.mark.pinned("clusters of 4 KiB", "extended_l2")
@pytest.mark.parametrize("format", ["raw", "qcow2", "vpc"])
def test_salvage_writes_zeros_for_what_is_lost_and_says_so(damaged: Path, format: str) -> None:
    target = damaged.with_name("saved")
    done = qcow("convert", "--salvage", "-O", format, damaged, target)
    expected = b"\x01" * 4096 + bytes(4096) + b"\x02" * 4096 + b"\x03" * 4096
    assert read(target, format) == expected.ljust(MiB, b"\0")
    assert done.err.startswith(
        "warning: guest offset 0x1000, 4096 bytes: could not be read, zeros now: "
        "zlib compressed cluster at host offset "
    )


@pytest.mark.parametrize("flags", [[], ["-O", "qcow2"], ["-O", "qcow2", "-c"], ["-O", "vpc"]])
def test_a_damaged_source_leaves_the_target_as_it_was(damaged: Path, flags: list[str]) -> None:
    target = damaged.with_name("target")
    target.write_bytes(b"precious")
    if "-c" in flags:
        # Else the clusters would travel as they are, unread.
        flags = [*flags, "-o", "cluster_size=8k"]
    done = qcow("convert", *flags, damaged, target, code=1)
    assert done.err.startswith("qcow convert: zlib compressed cluster at host offset 0x")
    assert target.read_bytes() == b"precious"
    assert leftovers(target.parent) == []


def test_compressed_clusters_travel_as_they_are(raw: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.qcow2", tmp_path / "second.qcow2"
    # A level that the default would not reproduce.
    qcow("convert", "-c", "-o", "compression_level=9", "-O", "qcow2", raw, first)
    qcow("convert", "-c", "-O", "qcow2", first, second)
    assert same_streams(blobs(first), blobs(second))
    assert_clean(second)


@pytest.mark.pinned("small clusters leave no choice", "cluster_size=512")
def test_a_level_compresses_anew(raw: Path, disk: bytes, tmp_path: Path) -> None:
    first, second = tmp_path / "first.qcow2", tmp_path / "second.qcow2"
    qcow("convert", "-c", "-O", "qcow2", raw, first)
    qcow("convert", "-c", "-o", "compression_level=9", "-O", "qcow2", first, second)
    assert not same_streams(blobs(first), blobs(second))
    assert read(second) == disk


def blobs(path: Path) -> dict[int, bytes]:
    """The stored bytes of each compressed cluster, up to the first byte that may be another's."""
    content = path.read_bytes()
    with open_chain(path, format="qcow2") as chain:
        found = {
            row.start: content[row.host : row.host + row.stored - 511]
            for row in chain.extents()
            if row.flags & Flag.COMPRESSED
        }
    assert found
    return found


def same_streams(one: dict[int, bytes], other: dict[int, bytes]) -> bool:
    """Whether the streams are equal, as far as both are known: where one ends depends on its
    place within a sector."""
    assert one.keys() == other.keys()
    return all(
        mine[: len(other[start])] == other[start][: len(mine)] for start, mine in one.items()
    )


# dd


def test_dd_copies_the_blocks_that_were_asked_for(raw: Path, disk: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qcow("dd", f"if={raw}", f"of={out}", "bs=1000", "skip=3", "count=100", "-f", "raw")
    # A raw file holds whole sectors; what the disk does not have is zero.
    assert out.read_bytes()[:100_000] == disk[3000:103_000]
    assert not any(out.read_bytes()[100_000:])
    qcow("dd", "-O", "qcow2", "bs=64k", "skip=1", f"of={out}", f"if={raw}")
    assert read(out) == disk[64 * KiB :]


def test_dd_beyond_the_end_copies_nothing(raw: Path, tmp_path: Path) -> None:
    qcow("dd", f"if={raw}", f"of={tmp_path / 'out'}", "bs=1M", "skip=9")
    assert (tmp_path / "out").read_bytes() == b""


def test_a_base_image_is_refused_for_formats_that_have_none(raw: Path, tmp_path: Path) -> None:
    done = qcow("convert", "-B", raw, "-F", "raw", "-O", "vpc", raw, tmp_path / "t", code=1)
    assert done.err == "qcow convert: -B: vpc images have no base image here, only qcow2\n"


def test_a_base_image_that_is_not_there_is_an_error(raw: Path, tmp_path: Path) -> None:
    target = tmp_path / "t.qcow2"
    flags = ["-B", "nothing.raw", "-F", "raw", "-O", "qcow2"]
    done = qcow("convert", *flags, raw, target, code=1)
    assert "nothing.raw: open: No such file or directory (ENOENT)" in done.err
    assert not target.exists()


@pytest.mark.parametrize("operands", [["-", "t.raw"], ["disk.raw", "-"]])
def test_standard_streams_are_refused_and_make_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operands: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").write_bytes(bytes(512))
    done = qcow("convert", "-f", "raw", *operands, code=1)
    assert done.err.endswith("-: standard input and output are not supported as an image yet\n")
    assert not Path("-").exists()
