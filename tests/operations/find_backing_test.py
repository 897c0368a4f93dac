"""A backing file that was moved: found by its GUID, opened through the gate, named anew."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.errors import OperationError, UnsupportedFeature
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import close_layers, open_layers
from qcowkit.operations.backing_index import BackingIndex
from qcowkit.operations.find_backing import BackingSearch, find_backing, repair_backing
from qcowkit.storage.file import FileStorage
from qcowkit.testing.vhd_builder import DIFFERENCING, PARENT_ID, VhdBuilder
from qcowkit.units import MiB
from tests.command import qcow
from tests.peers import run_peer

pytestmark = pytest.mark.pinned("moves images and leaves their data files", "data_file")

GUID = UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An overlay over `base.qcow2`, side by side; the user's own index is left alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = ["-f", "qcow2", "-o", f"guid={GUID}", "base.qcow2", "1M"]
    qcow("create", "-q", *base)
    qcow("io", "-f", "qcow2", "-c", "write -P 7 0 64k", "base.qcow2")
    flags = ["-o", "guid=auto", "-b", "base.qcow2", "-F", "qcow2"]
    qcow("create", "-q", "-f", "qcow2", *flags, "top.qcow2")


@pytest.fixture
def index(tmp_path: Path) -> Iterator[BackingIndex]:
    with BackingIndex(tmp_path / "index.sqlite") as opened:
        yield opened


def load(path: str = "top.qcow2") -> Qcow2Metadata:
    with FileStorage.open(path) as storage:
        return load_qcow2_metadata(storage)


def move(target: str) -> Path:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move("base.qcow2", target))


def search(
    index: BackingIndex,
    path: str = "top.qcow2",
    *,
    allow: tuple[str, ...] = (),
    repair: bool = False,
) -> BackingSearch:
    gate = ReferenceGate.below_image(allow)
    layers = open_layers(
        path, gate=gate, budget=TRUSTED, writable=repair, follow_backing=False, follow_data=False
    )
    try:
        found = find_backing(layers[0], index, gate=gate)
        return repair_backing(layers[0], found) if repair else found
    finally:
        close_layers(layers)


def found_by(index: BackingIndex, *allow: str) -> list[Path]:
    return [one.path for one in search(index, allow=allow).found]


def forge(path: Path, *files: Path, guid: UUID = GUID) -> None:
    """An index that says of files what is not so."""
    with BackingIndex(path):
        pass
    database = sqlite3.connect(path)
    rows = [(os.fsencode(one.parent), os.fsencode(one.name), guid.bytes) for one in files]
    database.executemany("INSERT INTO files VALUES (?, ?, ?, 0, 0, 0, 0)", rows)
    database.commit()
    database.close()


def test_a_backing_file_in_its_place_is_told(index: BackingIndex, tmp_path: Path) -> None:
    index.scan([tmp_path])
    found = search(index)
    assert (found.in_place, found.found, found.guid) == (True, (), GUID)


def test_a_moved_file_is_found(index: BackingIndex, tmp_path: Path) -> None:
    moved = move("archive/old.qcow2")
    index.scan([tmp_path])
    found = search(index)
    assert not found.in_place
    assert [(one.path, one.format, one.size) for one in found.found] == [
        (tmp_path / moved, "qcow2", MiB)
    ]


def test_a_name_that_leads_to_another_disk_is_not_in_place(
    index: BackingIndex, tmp_path: Path
) -> None:
    move("archive/old.qcow2")
    qcow("create", "-q", "-f", "qcow2", "-o", "guid=auto", "base.qcow2", "1M")
    index.scan([tmp_path])
    assert not search(index).in_place
    assert found_by(index) == [tmp_path / "archive/old.qcow2"]


def test_a_file_that_is_gone_since_is_not_found(index: BackingIndex, tmp_path: Path) -> None:
    moved = move("archive/old.qcow2")
    index.scan([tmp_path])
    moved.unlink()
    assert found_by(index) == []


def test_a_file_that_was_replaced_since_is_not_found(index: BackingIndex, tmp_path: Path) -> None:
    moved = move("archive/old.qcow2")
    index.scan([tmp_path])
    qcow("create", "-q", "-f", "qcow2", "-o", "guid=auto", moved, "1M")
    assert found_by(index) == []


def test_files_outside_what_is_allowed_are_not_found(index: BackingIndex, tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    shutil.move("top.qcow2", "vm/top.qcow2")
    index.scan([tmp_path])
    gate = ReferenceGate.below_image()
    layers = open_layers("vm/top.qcow2", gate=gate, budget=TRUSTED, follow_backing=False)
    try:
        assert find_backing(layers[0], index, gate=gate).found == ()
        wider = ReferenceGate.below_image([tmp_path])
        (one,) = find_backing(layers[0], index, gate=wider).found
        assert one.path == tmp_path / "base.qcow2"
    finally:
        close_layers(layers)


def test_a_lying_index_chooses_no_file(tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    qcow("create", "-q", "-f", "qcow2", "-o", "guid=auto", other, "1M")
    move("elsewhere/base.qcow2")
    secret = tmp_path / "secret"
    secret.write_bytes(b"not an image")
    lies = [other, secret, Path("/etc/passwd"), Path("/dev/zero"), tmp_path, Path("nbd:host")]
    forge(tmp_path / "index", *lies, tmp_path / "none")
    with BackingIndex(tmp_path / "index") as index:
        assert found_by(index) == []


def test_a_link_out_of_what_is_allowed_is_not_followed(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "base.qcow2"
    shutil.move("base.qcow2", outside)
    (tmp_path / "link.qcow2").symlink_to(outside)
    forge(tmp_path / "index", tmp_path / "link.qcow2")
    with BackingIndex(tmp_path / "index") as index:
        assert found_by(index) == []
        assert found_by(index, str(outside.parent)) == [tmp_path / "link.qcow2"]


def test_a_capsule_is_not_the_disk_that_it_was_made_of(index: BackingIndex, tmp_path: Path) -> None:
    moved = move("archive/old.qcow2")
    qcow("capsule", "-q", moved, "capsule.qcow2")
    index.scan([tmp_path])
    assert found_by(index) == [tmp_path / moved]
    forge(tmp_path / "forged", tmp_path / "capsule.qcow2")
    with BackingIndex(tmp_path / "forged") as forged:
        assert found_by(forged) == []


def test_a_file_under_two_names_is_found_once(index: BackingIndex, tmp_path: Path) -> None:
    moved = move("a.qcow2")
    os.link(moved, "b.qcow2")
    index.scan([tmp_path])
    assert found_by(index) == [tmp_path / "a.qcow2"]


def test_two_files_of_one_guid_are_both_told_and_none_is_chosen(
    index: BackingIndex, tmp_path: Path
) -> None:
    shutil.copy(move("a.qcow2"), "b.qcow2")
    index.scan([tmp_path])
    assert found_by(index) == [tmp_path / "a.qcow2", tmp_path / "b.qcow2"]
    before = Path("top.qcow2").read_bytes()
    with pytest.raises(OperationError, match="expected exactly one to name as the backing file"):
        search(index, repair=True)
    assert Path("top.qcow2").read_bytes() == before


def test_a_repaired_name_is_relative_below_the_image(index: BackingIndex, tmp_path: Path) -> None:
    move("archive/old.qcow2")
    index.scan([tmp_path])
    assert search(index, repair=True).repaired == "archive/old.qcow2"
    after = load()
    assert after.backing_name == "archive/old.qcow2"
    assert after.backing_identity is not None
    qcow("io", "-f", "qcow2", "-c", "read -P 7 0 64k", "top.qcow2")


def test_a_repaired_name_is_absolute_elsewhere(index: BackingIndex, tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    shutil.move("top.qcow2", "vm/top.qcow2")
    index.scan([tmp_path])
    found = search(index, "vm/top.qcow2", allow=(str(tmp_path),), repair=True)
    assert found.repaired == str(tmp_path / "base.qcow2")
    assert load("vm/top.qcow2").backing_name == str(tmp_path / "base.qcow2")


def test_a_repaired_name_is_never_that_of_a_protocol(index: BackingIndex, tmp_path: Path) -> None:
    move("nbd:base")
    index.scan([tmp_path])
    assert search(index, repair=True).repaired == "./nbd:base"
    qcow("io", "-f", "qcow2", "-c", "read -P 7 0 64k", "top.qcow2")


def test_a_name_that_is_right_is_left_alone(index: BackingIndex, tmp_path: Path) -> None:
    index.scan([tmp_path])
    before = Path("top.qcow2").read_bytes()
    assert search(index, repair=True).repaired is None
    assert Path("top.qcow2").read_bytes() == before


def test_an_image_that_records_no_backing_is_told_so(index: BackingIndex) -> None:
    with pytest.raises(OperationError) as caught:
        search(index, "base.qcow2")
    assert str(caught.value) == (
        "base.qcow2: no GUID of a backing file is recorded for the name that the header has"
    )


def test_the_parent_of_a_vhd_is_found_and_its_name_left_alone(
    index: BackingIndex, tmp_path: Path
) -> None:
    child = VhdBuilder(size=8192, disk_type=DIFFERENCING)
    child.locator(b"W2ru", ".\\parent.vhd".encode("utf-16-le"))
    Path("child.vhd").write_bytes(child.build())
    parent = VhdBuilder(size=8192)
    parent.footer["unique_id"] = PARENT_ID.bytes
    Path("moved.vhd").write_bytes(parent.build())
    index.scan([tmp_path])
    found = search(index, "child.vhd")
    assert [one.path for one in found.found] == [tmp_path / "moved.vhd"]
    with pytest.raises(UnsupportedFeature) as caught:
        search(index, "child.vhd", repair=True)
    assert str(caught.value) == (
        "repair of the backing file name: that of vpc images is not changed, only that of qcow2 "
        "images"
    )


def test_the_command_finds_beside_the_image_by_itself(tmp_path: Path) -> None:
    move("archive/old.qcow2")
    done = qcow("find-backing", "top.qcow2")
    assert done.out.decode() == (
        f"top.qcow2: found the disk {GUID}: {tmp_path}/archive/old.qcow2 (qcow2, 1 MiB)\n"
    )
    assert (tmp_path / "cache" / "qcowkit" / "images.sqlite").exists()


def test_the_command_repairs_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    shutil.move("top.qcow2", "vm/top.qcow2")
    assert qcow("find-backing", "vm/top.qcow2", code=1).out.decode() == (
        f"vm/top.qcow2: the disk {GUID} was not found\n"
    )
    done = qcow("find-backing", "--repair", "--scan", tmp_path, "vm/top.qcow2")
    assert done.out.decode().splitlines()[-1] == (
        f"vm/top.qcow2: the backing file is {tmp_path}/base.qcow2 now"
    )
    assert load("vm/top.qcow2").backing_name == f"{tmp_path}/base.qcow2"
    assert qcow("find-backing", "--scan", tmp_path, "vm/top.qcow2").out.decode() == (
        f"vm/top.qcow2: {tmp_path}/base.qcow2 is the disk {GUID}\n"
    )


def test_json_says_the_same(tmp_path: Path) -> None:
    move("old.qcow2")
    flags = ["--output=json", "--index", "my.sqlite"]
    assert qcow("find-backing", *flags, "top.qcow2").json() == {
        "filename": "top.qcow2",
        "backing-filename": "base.qcow2",
        "backing-guid": str(GUID),
        "in-place": False,
        "repaired": False,
        "found": [
            {"filename": f"{tmp_path}/old.qcow2", "format": "qcow2", "virtual-size": MiB},
        ],
    }
    done = qcow("find-backing", *flags, "--repair", "top.qcow2").json()
    assert (done["backing-filename"], done["in-place"], done["repaired"]) == (
        "old.qcow2",
        True,
        True,
    )
    assert not (tmp_path / "cache").exists()


def test_bad_usage_has_a_code_of_its_own() -> None:
    assert "see qcow find-backing --help" in qcow("find-backing", code=2).err


@pytest.mark.peer("qemu-img")
def test_qemu_opens_what_was_repaired(tmp_path: Path) -> None:
    move("archive/old.qcow2")
    qcow("find-backing", "-q", "--repair", "top.qcow2")
    run_peer("qemu-img", "check", "top.qcow2")
    run_peer("qemu-img", "convert", "-O", "raw", "top.qcow2", "out.raw")
    assert Path("out.raw").read_bytes()[: 64 << 10] == b"\7" * (64 << 10)
