"""The index of GUIDs: what a scan finds, reads again, forgets, and never follows."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from qcowkit.codecs.qcow2.extensions import Extension
from qcowkit.codecs.qcow2.identity import IDENTITY_TYPE, Identity
from qcowkit.errors import OperationError, StorageError
from qcowkit.operations.backing_index import BackingIndex, ScanLimits, Scanned
from qcowkit.testing.qcow2_builder import build_qcow2
from qcowkit.testing.vhd_builder import VhdBuilder

pytestmark = pytest.mark.pinned("builds the headers that it is about")

DISK, OTHER = UUID(int=1), UUID(int=2)
# A moment long ago, so that files count as settled.
LONG_AGO = 1_000_000_000 * 10**9


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def index(tmp_path: Path) -> Iterator[BackingIndex]:
    with BackingIndex(tmp_path / "index.sqlite") as opened:
        yield opened


def write(path: Path, guid: UUID | None = DISK) -> Path:
    """A settled image: one that was changed a moment ago is always read again."""
    own = () if guid is None else (Extension(type=IDENTITY_TYPE, data=Identity.of(guid).encode()),)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(build_qcow2(unknown=own).to_bytes())
    return settle(path)


def settle(path: Path, *, seconds: int = 0) -> Path:
    moment = LONG_AGO + seconds * 10**9
    os.utime(path, ns=(moment, moment))
    return path


def test_an_image_is_found_by_its_guid(images: Path, index: BackingIndex) -> None:
    disk = write(images / "deep" / "deeper" / "disk.qcow2")
    write(images / "other.qcow2", OTHER)
    write(images / "without.qcow2", None)
    (images / "notes").write_bytes(b"no image")
    assert index.scan([images]) == Scanned(files=4, read=4, unreadable=0, complete=True)
    assert index.find(DISK) == (disk,)
    assert index.find(UUID(int=3)) == ()


def test_a_vhd_is_found_by_its_unique_id(images: Path, index: BackingIndex) -> None:
    vhd = VhdBuilder(size=8192)
    vhd.footer["unique_id"] = DISK.bytes
    (images / "disk.vhd").write_bytes(vhd.build())
    index.scan([images])
    assert index.find(DISK) == (images / "disk.vhd",)


def test_what_is_no_sound_image_is_passed_over(images: Path, index: BackingIndex) -> None:
    (images / "cut").write_bytes(build_qcow2().to_bytes()[:90])
    (images / "foreign").write_bytes(b"KDMV" + bytes(2000))
    assert index.scan([images]).files == 2


def test_files_that_have_not_changed_are_not_read_again(images: Path, index: BackingIndex) -> None:
    disk = write(images / "disk.qcow2")
    index.scan([images])
    assert index.scan([images]).read == 0
    assert index.find(DISK) == (disk,)


def test_a_file_with_another_time_is_read_again(images: Path, index: BackingIndex) -> None:
    disk = write(images / "disk.qcow2")
    index.scan([images])
    write(disk, OTHER)
    settle(disk, seconds=60)
    assert index.scan([images]).read == 1
    assert (index.find(DISK), index.find(OTHER)) == ((), (disk,))


def test_a_file_in_place_of_another_is_read(images: Path, index: BackingIndex) -> None:
    disk = write(images / "disk.qcow2")
    index.scan([images])
    os.replace(write(images / "new", OTHER), disk)
    index.scan([images])
    assert index.find(OTHER) == (disk,)


def test_a_file_that_was_changed_just_now_is_read_once_more(
    images: Path, index: BackingIndex
) -> None:
    os.utime(write(images / "disk.qcow2"))
    assert (index.scan([images]).read, index.scan([images]).read) == (1, 1)


def test_a_moved_file_is_found_where_it_is(images: Path, index: BackingIndex) -> None:
    disk = write(images / "disk.qcow2")
    index.scan([images])
    (images / "archive").mkdir()
    disk.rename(images / "archive" / "disk.qcow2")
    index.scan([images])
    assert index.find(DISK) == (images / "archive" / "disk.qcow2",)


def test_a_deleted_directory_is_forgotten(images: Path, index: BackingIndex) -> None:
    disk = write(images / "deep" / "disk.qcow2")
    index.scan([images])
    disk.unlink()
    disk.parent.rmdir()
    index.scan([images])
    assert index.find(DISK) == ()


def test_what_lies_elsewhere_is_not_forgotten(tmp_path: Path, index: BackingIndex) -> None:
    disk = write(tmp_path / "images-2" / "disk.qcow2")
    (tmp_path / "images").mkdir()
    index.scan([disk.parent])
    index.scan([tmp_path / "images"])
    assert index.find(DISK) == (disk,)


def test_no_link_is_followed_out_of_a_directory(tmp_path: Path, index: BackingIndex) -> None:
    outside = write(tmp_path / "outside" / "disk.qcow2")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "file").symlink_to(outside)
    (inside / "folder").symlink_to(outside.parent)
    assert index.scan([inside]).files == 0
    assert index.find(DISK) == ()


def test_pipes_are_not_opened(images: Path, index: BackingIndex) -> None:
    os.mkfifo(images / "pipe")
    assert index.scan([images]).files == 0


def test_all_files_of_one_guid_are_told(images: Path, index: BackingIndex) -> None:
    found = [write(images / name) for name in ("a", "b")]
    index.scan([images])
    assert index.find(DISK) == tuple(found)


def test_names_that_are_no_utf_8_are_kept(images: Path, index: BackingIndex) -> None:
    disk = write(Path(os.fsdecode(os.fsencode(images) + b"/\xff\xfe")))
    index.scan([images])
    assert index.find(DISK) == (disk,)


@pytest.mark.parametrize("limits", [ScanLimits(entries=2), ScanLimits(depth=1)])
def test_a_scan_ends_at_its_limits_and_forgets_nothing_then(
    images: Path, index: BackingIndex, limits: ScanLimits
) -> None:
    for name in ("a", "b", "c/c/c"):
        write(images / name)
    index.scan([images])
    found = index.find(DISK)
    assert len(found) == 3
    assert not index.scan([images], limits=limits).complete
    assert set(index.find(DISK)) >= {images / "c/c/c"}


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path, index: BackingIndex) -> None:
    with pytest.raises(StorageError, match="scan: No such file or directory"):
        index.scan([tmp_path / "none"])


def test_the_index_outlives_its_process(images: Path, tmp_path: Path) -> None:
    disk = write(images / "disk.qcow2")
    with BackingIndex(tmp_path / "index") as first:
        first.scan([images])
    with BackingIndex(tmp_path / "index") as second:
        assert second.find(DISK) == (disk,)
        assert second.scan([images]).read == 0


def test_two_processes_may_scan_in_turns(images: Path, tmp_path: Path) -> None:
    write(images / "disk.qcow2")
    with BackingIndex(tmp_path / "index") as first, BackingIndex(tmp_path / "index") as second:
        assert first.scan([images]).read == 1
        assert second.scan([images]).read == 0


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.write_bytes(b"nothing of that kind" * 100)
    with pytest.raises(StorageError, match="index: file is not a database"):
        BackingIndex(path)
    assert path.read_bytes() == b"nothing of that kind" * 100


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("CREATE TABLE mine (one)", "application 0x0, version 0"),
        ("PRAGMA application_id = 7", "application 0x7, version 0"),
    ],
)
def test_a_database_of_another_program_is_left_alone(
    tmp_path: Path, statement: str, found: str
) -> None:
    path = tmp_path / "index"
    database = sqlite3.connect(path)
    database.execute(statement)
    database.commit()
    database.close()
    before = path.read_bytes()
    with pytest.raises(OperationError) as caught:
        BackingIndex(path)
    assert str(caught.value) == (
        f"{path}: the database is of {found}, expected 0x716b6964, version 1: delete it or name "
        "another --index"
    )
    assert path.read_bytes() == before


def test_rows_that_nobody_of_us_writes_are_passed_over(
    images: Path, tmp_path: Path, index: BackingIndex
) -> None:
    index.scan([images])
    database = sqlite3.connect(tmp_path / "index.sqlite")
    rows = [(b"/x", "text", DISK.bytes), ("text", b"y", DISK.bytes), (7, b"z", DISK.bytes)]
    database.executemany("INSERT INTO files VALUES (?, ?, ?, 0, 0, 0, 0)", rows)
    database.commit()
    database.close()
    assert index.find(DISK) == ()
    index.scan([images])
