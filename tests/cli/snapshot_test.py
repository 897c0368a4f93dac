"""`qcow snapshot`: what it does, what it prints, what it refuses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.command import qcow

pytestmark = pytest.mark.pinned("snapshots", "refcount_bits=1", "data_file")


def make(folder: Path) -> Path:
    path = folder / "disk.qcow2"
    qcow("create", "-q", "-f", "qcow2", path, "4M")
    write(path, 3)
    return path


def write(path: Path, pattern: int) -> None:
    qcow("io", "-c", f"write -q -P {pattern} 0 1M", path)


def holds(path: Path, pattern: int) -> bool:
    return qcow("io", "-c", f"read -q -P {pattern} 0 1M", path, code=None).code == 0


def names(path: Path) -> list[str]:
    return [one["name"] for one in qcow("snapshot", "--output=json", path).json()]


def test_a_disk_goes_back_to_a_snapshot(tmp_path: Path) -> None:
    path = make(tmp_path)
    done = qcow("snapshot", "-c", "before", path)
    assert done.out.decode().strip() == f"{path}: snapshot 1 taken: before"
    write(path, 4)
    assert holds(path, 4)
    qcow("snapshot", "-a", "before", path)
    assert holds(path, 3)
    qcow("check", path)


def test_the_list_has_a_line_a_snapshot_and_is_the_default(tmp_path: Path) -> None:
    path = make(tmp_path)
    assert qcow("snapshot", path).out.decode() == f"{path}: no snapshots\n"
    qcow("snapshot", "-q", "-c", "one", path)
    listed = qcow("snapshot", path).out.decode()
    assert listed == qcow("snapshot", "-l", path).out.decode()
    assert listed.split("\n")[1].split()[:2] == ["1", "one"]
    assert qcow("snapshot", "--output=json", path).json()[0]["disk-size"] == 4 << 20


def test_an_id_is_looked_for_before_a_name(tmp_path: Path) -> None:
    path = make(tmp_path)
    for name in ("2", "other"):
        qcow("snapshot", "-q", "-c", name, path)
    qcow("snapshot", "-q", "-d", "2", path)
    assert names(path) == ["2"]
    qcow("snapshot", "-q", "-d", "snapshot.name=2", path)
    assert names(path) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("-a", "none"), "no snapshot with the id or name 'none'"),
        (("-d", "none"), "no snapshot with the id or name 'none'"),
        (("-c", "here"), "there is a snapshot 'here' already"),
        (("-c", ""), "the name of a snapshot is empty"),
        (("-c", "x", "-d", "here"), "exclude one another"),
        (("-U", "-c", "x"), "-U"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    tmp_path: Path, arguments: tuple[str, ...], text: str
) -> None:
    path = make(tmp_path)
    qcow("snapshot", "-q", "-c", "here", path)
    before = path.read_bytes()
    done = qcow("snapshot", *arguments, path, code=1)
    assert text in done.err
    assert done.err.count("\n") == 1
    assert path.read_bytes() == before


def test_snapshots_are_compared_and_mapped_like_disks(tmp_path: Path) -> None:
    path = make(tmp_path)
    qcow("snapshot", "-q", "-c", "a", path)
    qcow("snapshot", "-q", "-c", "b", path)
    write(path, 4)
    qcow("resize", "-q", path, "8M")
    assert qcow("compare", "-s", "-l", "a", "-L", "b", path, path).code == 0
    assert qcow("compare", "-l", "a", path, path, code=None).code == 1
    mapped = qcow("map", "--output=json", "--snapshot", "b", path).json()
    assert sum(one["length"] for one in mapped if one["data"]) == 1 << 20
    assert sum(one["length"] for one in mapped) == 4 << 20
    failed = qcow("map", "--snapshot", "c", path, code=1)
    assert "'c'" in failed.err


def test_other_formats_have_no_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    done = qcow("snapshot", "-f", "raw", path, code=1)
    assert "raw images have none" in done.err


@pytest.mark.peer("qemu-img")
def test_qemu_and_we_read_and_delete_each_others_snapshots(tmp_path: Path) -> None:
    path = make(tmp_path)
    qcow("snapshot", "-q", "-c", "ours", path)
    write(path, 4)
    subprocess.run(["qemu-img", "snapshot", "-c", "theirs", path], check=True)
    write(path, 5)
    assert names(path) == ["ours", "theirs"]
    subprocess.run(["qemu-img", "snapshot", "-a", "ours", path], check=True)
    assert holds(path, 3)
    qcow("snapshot", "-q", "-a", "theirs", path)
    assert holds(path, 4)
    subprocess.run(["qemu-img", "snapshot", "-d", "ours", path], check=True)
    qcow("snapshot", "-q", "-d", "theirs", path)
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    assert holds(path, 4)


def test_a_snapshot_is_deleted_where_a_promise_has_to_be_taken_back_first(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow("create", "-q", "-f", "qcow2", "-o", "compat=1.1", path, "1M")
    qcow("io", "-c", "write -q -P 5 0 64k", path)
    qcow("snapshot", "-q", "-c", "first", path)
    qcow("snapshot", "-q", "-c", "second", path)
    raw = bytearray(path.read_bytes())
    # An autoclear bit that nobody knows: the metadata are loaded again once it is cleared.
    raw[88:96] = (1 << 40).to_bytes(8, "big")
    path.write_bytes(raw)
    qcow("snapshot", "-q", "-d", "first", path)
    found = qcow("snapshot", "-l", "--output=json", path).json()
    assert [one["name"] for one in found] == ["second"]
    qcow("check", "-q", path)
