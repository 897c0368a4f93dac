"""`qcow bitmap`: what it does, what it prints, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcowkit
from qcowkit.testing.qcow2_builder import BitmapSpec, build_qcow2
from tests.command import qcow

pytestmark = pytest.mark.pinned("bitmaps", "compat=0.10")


def make(folder: Path, name: str = "disk.qcow2") -> Path:
    path = folder / name
    qcow("create", "-q", "-f", "qcow2", path, "4M")
    return path


def write(path: Path, command: str) -> None:
    qcow("io", "-c", f"write -q {command}", path)


def listed(path: Path) -> dict[str, tuple[int, int, list[str]]]:
    """Granularity, dirty bytes and flags by name."""
    return {
        one["name"]: (one["granularity"], one["dirty-bytes"], one["flags"])
        for one in qcow("bitmap", "--list", "--output=json", path).json()
    }


def test_an_added_bitmap_records_what_is_written(tmp_path: Path) -> None:
    path = make(tmp_path)
    qcow("bitmap", "--add", "-g", "64k", path, "b")
    write(path, "1M 100k")
    assert listed(path) == {"b": (65536, 131072, ["auto"])}
    qcow("check", path)


def test_a_session_that_opens_the_disk_again_loses_nothing(tmp_path: Path) -> None:
    path = make(tmp_path)
    qcow("bitmap", "--add", "-g", "64k", path, "b")
    steps = ("write -q 0 64k", "reopen -r", "read -q 0 64k", "reopen -w", "write -q 1M 64k")
    qcow("io", *(word for step in steps for word in ("-c", step)), path)
    assert listed(path) == {"b": (65536, 131072, ["auto"])}


def test_the_list_is_text_to_read(tmp_path: Path) -> None:
    path = make(tmp_path)
    assert qcow("bitmap", "--list", path).out.decode() == f"{path}: no bitmaps\n"
    qcow("bitmap", "--add", "-g", "64k", path, "monday")
    write(path, "0 1")
    lines = qcow("bitmap", "--list", path).out.decode().splitlines()
    assert lines[0].split() == ["granularity", "dirty", "granules", "state", "name"]
    assert lines[1].split() == ["64", "KiB", "64", "KiB", "1", "enabled", "monday"]
    assert qcow("bitmap", "-q", "--list", path).out == b""


def test_actions_are_carried_out_in_their_order(tmp_path: Path) -> None:
    path = make(tmp_path)
    qcow("bitmap", "--add", "-g", "64k", path, "src")
    write(path, "0 64k")
    qcow("bitmap", path, "b", "--add", "--disable", "--merge", "src", "-g", "128k")
    assert listed(path)["b"] == (131072, 131072, [])
    qcow("bitmap", "--merge", "src", "--clear", "--enable", path, "b")
    assert listed(path)["b"] == (131072, 0, ["auto"])
    qcow("bitmap", "--clear", "--merge", "src", path, "b")
    assert listed(path)["b"] == (131072, 131072, ["auto"])


def test_all_actions_are_carried_out_or_none(tmp_path: Path) -> None:
    path = make(tmp_path)
    before = path.read_bytes()
    failed = qcow("bitmap", "--add", "--merge", "missing", path, "b", code=1)
    assert failed.err == "qcow bitmap: there is no bitmap 'missing'\n"
    assert path.read_bytes() == before


def test_bitmaps_are_merged_from_another_image(tmp_path: Path) -> None:
    path, other = make(tmp_path), make(tmp_path, "other.qcow2")
    qcow("bitmap", "--add", "-g", "512", other, "fine")
    write(other, "70k 1")
    qcow("bitmap", "--add", "-g", "64k", path, "b")
    qcow("bitmap", "--merge", "fine", "-b", other, "-F", "qcow2", path, "b")
    assert listed(path)["b"] == (65536, 65536, ["auto"])


def test_the_image_itself_may_be_named_as_the_source(tmp_path: Path) -> None:
    path = make(tmp_path)
    qcow("bitmap", "--add", "-g", "64k", path, "b")
    write(path, "0 1")
    qcow("bitmap", "--add", "-g", "64k", "--merge", "b", "-b", path, path, "other")
    assert listed(path)["other"] == (65536, 65536, ["auto"])


def test_a_name_takes_one_line_of_the_list(tmp_path: Path) -> None:
    path = make(tmp_path)
    qcow("bitmap", "--add", path, "two\nlines")
    lines = qcow("bitmap", "--list", path).out.decode().splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("two\\nlines")


def test_an_image_that_is_written_elsewhere_is_left_alone(tmp_path: Path) -> None:
    path = make(tmp_path)
    with qcowkit.open(path, writable=True, gate=qcowkit.ReferenceGate.below_image()):
        assert "open for writing elsewhere" in qcow("bitmap", "--add", path, "b", code=1).err
        qcow("bitmap", "--list", "-U", path)


def test_a_removed_bitmap_is_gone(tmp_path: Path) -> None:
    path = make(tmp_path)
    qcow("bitmap", "--add", path, "b")
    qcow("bitmap", "--remove", path, "b")
    assert listed(path) == {}
    assert "bitmaps" not in qcow("info", "--output=json", path).json()["format-specific"]["data"]


def test_a_bitmap_grows_with_its_disk(tmp_path: Path) -> None:
    path = make(tmp_path)
    qcow("bitmap", "--add", "-g", "64k", path, "b")
    qcow("resize", "-q", path, "8M")
    assert listed(path) == {"b": (65536, 4 << 20, ["auto"])}
    qcow("check", path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["disk.qcow2", "b"], "expected one of --add"),
        (["--add", "disk.qcow2"], "expected the NAME of a bitmap behind FILE"),
        (["--list", "--add", "disk.qcow2"], "--list excludes all actions"),
        (["--list", "disk.qcow2", "b"], "it takes no NAME"),
        (["--clear", "-g", "64k", "disk.qcow2", "b"], "-g goes with --add"),
        (["--add", "-b", "x", "disk.qcow2", "b"], "-b goes with --merge"),
        (["--add", "-F", "raw", "disk.qcow2", "b"], "-F goes with -b"),
        (["--add", "-U", "disk.qcow2", "b"], "-U: bitmaps are changed only"),
        (["--remove", "disk.qcow2", "b"], "there is no bitmap 'b'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path())
    assert message in qcow("bitmap", *flags, code=1).err


def test_other_formats_have_none(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    failed = qcow("bitmap", "--add", "-f", "raw", path, "b", code=1)
    assert "persistent bitmaps: raw images have none" in failed.err


def test_the_bitmaps_of_a_capsule_are_listed_and_not_changed(tmp_path: Path) -> None:
    path, capsule = make(tmp_path), tmp_path / "disk.capsule"
    qcow("bitmap", "--add", "-g", "64k", path, "b")
    write(path, "0 1")
    qcow("capsule", path, capsule)
    assert listed(capsule) == {"b": (65536, 65536, ["auto"])}
    failed = qcow("bitmap", "--clear", capsule, "b", code=1)
    assert "a change of bitmaps: this is a capsule" in failed.err


def test_an_image_that_has_to_be_repaired_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    built = build_qcow2(version=3, bitmaps=(BitmapSpec(name="b"),))
    path.write_bytes(built.set_field("incompatible_features", 2).to_bytes())
    assert "the corrupt bit is set" in qcow("bitmap", "--clear", path, "b", code=1).err


def test_version_2_images_hold_none(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow("create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "1M")
    failed = qcow("bitmap", "--add", path, "b", code=1)
    assert "version 2 images (compat=0.10) hold none" in failed.err


@pytest.mark.pinned("snapshots", "data_file", "compat=0.10")
def test_going_back_to_a_snapshot_needs_an_image_without_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow("create", "-q", "-f", "qcow2", "-o", "refcount_bits=16", path, "1M")
    qcow("snapshot", "-q", "-c", "s", path)
    qcow("bitmap", "--add", path, "b")
    assert "persistent bitmaps" in qcow("snapshot", "-a", "s", path, code=1).err


def test_the_flag_of_older_scripts_is_accepted_with_a_note(tmp_path: Path) -> None:
    """S003-18."""
    path = tmp_path / "disk.qcow2"
    qcow("create", "-q", "-f", "qcow2", path, "1M")
    done = qcow("bitmap", "--add", "--autoload", path, "b")
    assert "--autoload has no effect" in done.err
    assert [one["name"] for one in qcow("bitmap", "--list", "--output=json", path).json()] == ["b"]
