"""`qcow convert --bitmaps`: bitmaps are taken over with the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcowkit.codecs.qcow2.bitmaps import BitmapFlag
from qcowkit.testing.qcow2_builder import BitmapSpec, build_qcow2
from tests.command import qcow

pytestmark = pytest.mark.pinned("bitmaps", "compat=0.10")

BROKEN = BitmapSpec(name="broken", flags=int(BitmapFlag.IN_USE))
SPECS = (
    BitmapSpec(name="fine", bits=b"\x05", granularity_bits=9),
    BitmapSpec(name="off", bits=b"\x03", granularity_bits=16, flags=0),
)


def source(folder: Path, *bitmaps: BitmapSpec, **more: object) -> Path:
    path = folder / "source.qcow2"
    built = build_qcow2(size=1 << 20, bitmaps=bitmaps, clusters={0: b"x" * 512}, **more)
    path.write_bytes(built.to_bytes())
    if built.external is not None:
        (folder / str(more.get("data_file_name", "data"))).write_bytes(built.external)
    return path


def listed(path: Path) -> list[tuple[str, int, int, list[str]]]:
    return [
        (one["name"], one["granularity"], one.get("dirty-bytes", -1), one["flags"])
        for one in qcow("bitmap", "--list", "--output=json", path).json()
    ]


@pytest.mark.pinned("the builder's data file has no name of its own", "data_file")
@pytest.mark.parametrize("flags", [[], ["-c"], ["-o", "cluster_size=512"], ["-n"]])
def test_bitmaps_are_taken_over_with_their_state(tmp_path: Path, flags: list[str]) -> None:
    path, target = source(tmp_path, *SPECS), tmp_path / "target.qcow2"
    if "-n" in flags:
        qcow("create", "-q", "-f", "qcow2", target, "1M")
    qcow("convert", "--bitmaps", "-O", "qcow2", *flags, path, target)
    assert listed(target) == [("fine", 512, 1024, ["auto"]), ("off", 65536, 131072, [])]
    qcow("check", target)
    qcow("compare", path, target)


def test_without_a_word_bitmaps_stay_behind(tmp_path: Path) -> None:
    path, target = source(tmp_path, *SPECS), tmp_path / "target.qcow2"
    qcow("convert", "-O", "qcow2", path, target)
    assert listed(target) == []


def test_a_bitmap_grows_with_the_disk_of_the_target(tmp_path: Path) -> None:
    path, target = source(tmp_path, *SPECS), tmp_path / "target.qcow2"
    qcow("convert", "--bitmaps", "-O", "qcow2", "-o", "size=4M", path, target)
    assert listed(target)[0] == ("fine", 512, 1024, ["auto"])
    qcow("io", "-c", "write -q 3M 512", target)
    assert listed(target)[0] == ("fine", 512, 1536, ["auto"])


def test_an_inconsistent_bitmap_ends_the_conversion_before_it_begins(tmp_path: Path) -> None:
    path, target = source(tmp_path, *SPECS, BROKEN), tmp_path / "target.qcow2"
    failed = qcow("convert", "--bitmaps", "-O", "qcow2", path, target, code=1)
    assert "bitmap 'broken' is inconsistent and cannot be copied" in failed.err
    assert not target.exists()


def test_inconsistent_bitmaps_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    path, target = source(tmp_path, *SPECS, BROKEN), tmp_path / "target.qcow2"
    flags = ("--bitmaps", "--skip-broken-bitmaps")
    done = qcow("convert", *flags, "-O", "qcow2", path, target)
    assert "bitmap 'broken' is inconsistent and was left out" in done.err
    assert [one[0] for one in listed(target)] == ["fine", "off"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--skip-broken-bitmaps", "-O", "qcow2", "a"], "--skip-broken-bitmaps needs --bitmaps"),
        (["--bitmaps", "-O", "qcow2", "a", "a"], "--bitmaps excludes several sources"),
        (["--bitmaps", "-O", "qcow2", "-l", "s", "a"], "--bitmaps excludes -l"),
        (["--bitmaps", "-O", "raw", "a"], "raw images hold no bitmaps, only qcow2 ones do"),
        (["--bitmaps", "-O", "qcow2", "-o", "compat=0.10", "a"], "version 2 images (compat=0.10)"),
        (["--bitmaps", "-O", "qcow2", "-f", "raw", "a"], "persistent bitmaps: raw images have"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, flags: list[str], message: str) -> None:
    path, target = source(tmp_path, *SPECS), tmp_path / "target"
    words = [str(path) if word == "a" else word for word in flags]
    assert message in qcow("convert", *words, target, code=1).err
    assert not target.exists()
