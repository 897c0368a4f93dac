"""What a bitmap records, through the disk that it is about."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcowkit
from qcowkit.codecs.qcow2.bitmaps import BitmapFlag
from qcowkit.errors import RequestError
from qcowkit.testing.qcow2_builder import BitmapSpec, SnapshotSpec, build_qcow2
from qcowkit.units import KiB, MiB
from tests.command import qcow

pytestmark = pytest.mark.pinned("files of the builder", "data_file", "compat=0.10")
SPECS = (
    BitmapSpec(name="b", bits=b"\x05", granularity_bits=16),
    BitmapSpec(name="broken", flags=int(BitmapFlag.IN_USE)),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    built = tmp_path / "disk.qcow2"
    built.write_bytes(build_qcow2(bitmaps=SPECS).to_bytes())
    return built


def rows(disk: qcowkit.Chain, name: str = "b") -> list[tuple[int, int, bool]]:
    table = disk.bitmap_extents(name)
    table.check()
    return [(row.start, row.length, bool(row.flags & qcowkit.Flag.DIRTY)) for row in table]


def test_rows_are_dirty_or_clean_and_cover_the_disk(path: Path) -> None:
    with qcowkit.open(path) as disk:
        assert rows(disk) == [
            (0, 64 * KiB, True),
            (64 * KiB, 64 * KiB, False),
            (128 * KiB, 64 * KiB, True),
            (192 * KiB, MiB - 192 * KiB, False),
        ]


def test_a_writable_disk_shows_what_was_recorded_since(path: Path) -> None:
    with qcowkit.open(path, writable=True) as disk:
        disk.write(b"x", offset=MiB - 1)
        assert rows(disk)[-1] == (MiB - 64 * KiB, 64 * KiB, True)
    with qcowkit.open(path) as disk:
        assert rows(disk)[-1] == (MiB - 64 * KiB, 64 * KiB, True)


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "there is no bitmap 'none'"), ("broken", "bitmap 'broken' is inconsistent")],
)
@pytest.mark.parametrize("writable", [False, True])
def test_what_says_nothing_is_refused(path: Path, name: str, message: str, writable: bool) -> None:
    with (
        qcowkit.open(path, writable=writable) as disk,
        pytest.raises(RequestError, match=message),
    ):
        disk.bitmap_extents(name)


def test_other_formats_have_no_bitmaps(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(512))
    with (
        qcowkit.open(raw, format="raw") as disk,
        pytest.raises(RequestError, match="bitmap 'b': raw images have no bitmaps"),
    ):
        disk.bitmap_extents("b")


@pytest.mark.pinned("snapshots", "refcount_bits=1", "data_file", "compat=0.10")
def test_a_snapshot_has_none(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    built = build_qcow2(bitmaps=SPECS, snapshots=[SnapshotSpec(id="1", name="s")])
    path.write_bytes(built.to_bytes())
    with (
        qcowkit.open(path, snapshot="s") as disk,
        pytest.raises(RequestError, match="is of the current disk, not of a snapshot"),
    ):
        disk.bitmap_extents("b")


def test_map_lists_a_bitmap_as_json(path: Path) -> None:
    done = qcow("map", "--bitmap", "b", "--output=json", "-s", "32k", "-l", "64k", path)
    assert done.json() == [
        {"start": 32 * KiB, "length": 32 * KiB, "dirty": True},
        {"start": 64 * KiB, "length": 32 * KiB, "dirty": False},
    ]
    assert qcow("map", "--bitmap", "b", "--output=json", "-l", "0", path).json() == []


def test_map_lists_a_bitmap_as_text(path: Path) -> None:
    lines = qcow("map", "--bitmap", "b", path).out.decode().splitlines()
    assert lines[1].split() == ["0x0", "0x10000", "64", "KiB", "dirty"]
    assert lines[-1] == "128 KiB of 1 MiB dirty"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plot"], "--bitmap excludes --plot and --plot-file"),
        (["--plot-file", "x.svg"], "--bitmap excludes --plot and --plot-file"),
        (["-s", "2M"], "start offset 2097152 is beyond the disk of 1048576 bytes"),
    ],
)
def test_map_refuses_what_makes_no_sense(path: Path, flags: list[str], message: str) -> None:
    assert message in qcow("map", "--bitmap", "b", *flags, path, code=1).err
