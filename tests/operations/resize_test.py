"""Resizing: the new size, what it shows, and what is refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qcowkit
from qcowkit.errors import RequestError
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.operations.check import Verdict, check_image, open_for_check
from qcowkit.operations.create import CreateOptions, create_image
from qcowkit.operations.resize import Resized, SizeChange, plan_notes, resize
from qcowkit.testing.qcow2_builder import SnapshotSpec, build_qcow2
from qcowkit.units import GiB, KiB, MiB

GATE = ReferenceGate.below_image()
FORMATS = ("raw", "qcow2", "vpc")


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(path: str, format: str, **values: Any) -> str:
    create_image(path, CreateOptions.of(format, values), gate=GATE)
    return path


def open_disk(path: str, format: str, *, writable: bool = True) -> Chain:
    return qcowkit.open(path, format=format, gate=GATE, writable=writable)


def read(path: str, format: str) -> bytes:
    with open_disk(path, format, writable=False) as chain:
        return chain.read(offset=0, length=chain.size)


def fill(path: str, format: str, data: bytes, *, offset: int = 0) -> None:
    with open_disk(path, format) as chain:
        chain.write(data, offset=offset)


def change(path: str, format: str, text: str, **options: Any) -> Resized:
    with open_disk(path, format) as chain:
        return resize(chain, SizeChange.parse(text), **options)


def verdict(path: str) -> Verdict:
    layer = open_for_check(path, format="qcow2")
    try:
        return check_image(layer).verdict
    finally:
        layer.storage.close()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10G", 10 * GiB),
        ("+512M", GiB + 512 * MiB),
        ("-1.5k", GiB - 1536),
        (" -1M", GiB - MiB),
        ("0x200", 512),
        ("+0", GiB),
        ("-2G", -GiB),
    ],
)
def test_a_change_is_a_size_or_a_difference(text: str, size: int) -> None:
    assert SizeChange.parse(text).apply(GiB) == size


@pytest.mark.parametrize("text", ["", "+", "--1", "1Z", "+-1"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is not a number of bytes"):
        SizeChange.parse(text)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_added_reads_as_zeros_and_the_rest_stays(format: str) -> None:
    make("disk", format, size=MiB)
    fill("disk", format, b"\xaa" * MiB)
    done = change("disk", format, "+512k")
    assert (done.old_size, done.size) == (MiB, MiB + 512 * KiB)
    assert done.notes == ("what was added reads as zeros",)
    assert read("disk", format) == b"\xaa" * MiB + bytes(512 * KiB)


@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_that_shrank_and_grew_again_brings_zeros(format: str) -> None:
    make("disk", format, size=MiB)
    fill("disk", format, b"\xaa" * MiB)
    done = change("disk", format, "-300k", shrink=True)
    assert done.size == 724 * KiB
    assert done.notes == (
        "what lay beyond the new end is gone: growing the disk again brings zeros",
    )
    change("disk", format, "1M")
    assert read("disk", format) == b"\xaa" * (724 * KiB) + bytes(300 * KiB)


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_size_is_no_change(format: str) -> None:
    make("disk", format, size=MiB)
    before = Path("disk").read_bytes()
    assert change("disk", format, "1M").render() == ["the disk has 1 MiB (1048576 bytes) already"]
    assert Path("disk").read_bytes() == before


# 5 GB, 3 GB, 10 GB of the original report, scaled down: the base has data everywhere.
def test_a_base_never_shows_through_what_was_cut_off_and_added_again() -> None:
    Path("base.raw").write_bytes(b"\xbb" * (5 * MiB))
    make("top", "qcow2", backing_file="base.raw", backing_fmt="raw")
    done = change("top", "qcow2", "3M", shrink=True)
    assert done.notes == (
        "what lay beyond the new end is gone: growing the disk again brings zeros, not what the "
        "backing file holds",
    )
    assert read("top", "qcow2") == b"\xbb" * (3 * MiB)
    done = change("top", "qcow2", "10M")
    assert done.notes == (
        "what was added reads as zeros",
        "the backing file has 5 MiB (5242880 bytes): what it holds beyond the old end stays hidden",
    )
    assert read("top", "qcow2") == b"\xbb" * (3 * MiB) + bytes(7 * MiB)
    assert verdict("top") is Verdict.CLEAN


def test_a_base_shows_through_what_was_added_where_that_is_asked_for() -> None:
    Path("base.raw").write_bytes(b"\xbb" * (5 * MiB))
    make("top", "qcow2", backing_file="base.raw", backing_fmt="raw")
    change("top", "qcow2", "3M", shrink=True)
    done = change("top", "qcow2", "4M", expose=True)
    assert done.notes == ("what was added shows the backing file",)
    done = change("top", "qcow2", "10M", expose=True)
    assert done.notes == (
        "what was added shows the backing file up to its end at 5 MiB (5242880 bytes), and zeros "
        "behind it",
    )
    assert read("top", "qcow2") == b"\xbb" * (5 * MiB) + bytes(5 * MiB)
    assert verdict("top") is Verdict.CLEAN


@pytest.mark.parametrize("format", ["raw", "vpc"])
def test_only_qcow2_images_show_a_backing_file_where_they_grow(format: str) -> None:
    make("disk", format, size=MiB)
    before = Path("disk").read_bytes()
    with pytest.raises(RequestError, match=f"{format} images show no backing file where they grow"):
        change("disk", format, "2M", expose=True)
    assert Path("disk").read_bytes() == before


@pytest.mark.parametrize("cut", [512, 2 * KiB, 64 * KiB, 100 * KiB])
def test_a_cut_within_a_cluster_hides_the_base_behind_it(cut: int) -> None:
    Path("base.raw").write_bytes(b"\xbb" * MiB)
    make("top", "qcow2", backing_file="base.raw", backing_fmt="raw")
    change("top", "qcow2", f"-{cut}", shrink=True)
    change("top", "qcow2", "+1M")
    assert read("top", "qcow2") == b"\xbb" * (MiB - cut) + bytes(MiB)


def test_beyond_a_shorter_base_only_the_image_has_data() -> None:
    Path("base.raw").write_bytes(b"\xbb" * MiB)
    make("top", "qcow2", backing_file="base.raw", backing_fmt="raw", size=2 * MiB)
    done = change("top", "qcow2", "4M")
    assert done.notes[1] == (
        "the backing file ends at 1 MiB (1048576 bytes): beyond it only this image has data"
    )
    assert read("top", "qcow2") == b"\xbb" * MiB + bytes(3 * MiB)


def test_snapshots_are_said_to_keep_what_they_have() -> None:
    image = build_qcow2(clusters={0: b"x"}, snapshots=[SnapshotSpec(id="1"), SnapshotSpec(id="2")])
    Path("disk").write_bytes(image.to_bytes())
    done = change("disk", "qcow2", "2M")
    assert done.notes[-1] == "snapshots keep sizes and content of their own: 2"


@pytest.mark.pinned("measures the image's own file", "data_file")
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocated_clusters_read_as_zeros(mode: str) -> None:
    make("disk", "qcow2", size=MiB)
    fill("disk", "qcow2", b"\xaa" * MiB)
    change("disk", "qcow2", "2M", preallocation=mode)
    assert read("disk", "qcow2") == b"\xaa" * MiB + bytes(MiB)
    assert verdict("disk") is Verdict.CLEAN
    if mode != "metadata":
        assert Path("disk").stat().st_blocks * 512 >= 2 * MiB


@pytest.mark.pinned("a refcount table that has moved to the end", "cluster_size=512")
def test_the_file_of_a_smaller_disk_is_shorter() -> None:
    make("disk", "qcow2", size=8 * MiB)
    fill("disk", "qcow2", b"\xaa" * (8 * MiB))
    change("disk", "qcow2", "1M", shrink=True)
    assert Path("disk").stat().st_size < 2 * MiB
    assert verdict("disk") is Verdict.CLEAN


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "512k",
            {},
            "new size is 524288 bytes, below the present 1048576: what lies beyond would be lost; "
            "--shrink does it all the same",
        ),
        ("0", {"shrink": True}, "new size is 0 bytes, expected at least 1"),
        ("-2M", {"shrink": True}, "new size is -1048576 bytes, expected at least 1"),
        (
            "1M",
            {"preallocation": "full"},
            "preallocation=full is for what is added, and a disk of 1048576 bytes does not grow to "
            "1048576",
        ),
        (
            "2M",
            {"preallocation": "some"},
            "preallocation is 'some', expected one of off, metadata, falloc, full",
        ),
    ],
)
def test_what_is_refused_changes_no_byte(
    format: str, text: str, options: dict[str, Any], message: str
) -> None:
    make("disk", format, size=MiB)
    before = Path("disk").read_bytes()
    with pytest.raises(RequestError) as refused:
        change("disk", format, text, **options)
    assert str(refused.value) == message
    assert Path("disk").read_bytes() == before


@pytest.mark.parametrize("format", ["qcow2", "vpc"])
def test_an_image_has_whole_sectors(format: str) -> None:
    make("disk", format, size=MiB)
    message = f"new size is 1048577 bytes, expected a multiple of 512 for {format} images"
    with pytest.raises(RequestError, match=message):
        change("disk", format, "+1")


def test_a_raw_file_may_have_any_length() -> None:
    make("disk", "raw", size=MiB)
    change("disk", "raw", "+1")
    assert Path("disk").stat().st_size == MiB + 1


def test_a_size_above_all_is_refused() -> None:
    make("disk", "raw", size=MiB)
    with pytest.raises(RequestError, match=r"new size is \d+ bytes, expected at most 9223372036"):
        change("disk", "raw", "+9223372036854775807")


@pytest.mark.parametrize(
    ("old", "new", "base", "count"),
    [(10, 20, None, 1), (10, 20, 15, 2), (10, 20, 5, 2), (20, 10, None, 1), (10, 10, 15, 0)],
)
def test_as_many_notes_as_there_is_to_say(old: int, new: int, base: int | None, count: int) -> None:
    assert len(plan_notes(old=old, new=new, base=base)) == count
