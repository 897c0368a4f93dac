"""`qcow check -r`: flags, exit codes, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcowkit.storage.file import FileStorage
from qcowkit.storage.locking import Role, acquire
from qcowkit.testing.qcow2_builder import BuiltImage
from qcowkit.testing.vhd_builder import VhdBuilder
from qcowkit.units import MiB
from tests.command import qcow
from tests.damage import COPIED, host_of, make, set_count, set_feature, set_word, table_entry


def write(folder: Path, image: BuiltImage) -> Path:
    path = folder / "disk.qcow2"
    path.write_bytes(image.to_bytes())
    return path


def leaky() -> BuiltImage:
    image = make()
    set_count(image, 200 * 512, 1)
    return image


def low() -> BuiltImage:
    image = make()
    set_count(image, host_of(image, 1), 0)
    return image


def lost() -> BuiltImage:
    image = make(cluster_bits=12)
    set_word(image, 0, COPIED | host_of(image, 0) + 0x200)
    return image


def unusable() -> BuiltImage:
    image = make()
    table_entry(image, 0, 0)
    return image


def too_narrow() -> BuiltImage:
    image = make(refcount_order=0, clusters={0: b"a", 1: b"b"})
    set_word(image, 1, COPIED | host_of(image, 0))
    return image


@pytest.mark.parametrize("mode", ["leaks", "all"])
def test_a_sound_image_stays_as_it_is(tmp_path: Path, mode: str) -> None:
    path = write(tmp_path, make())
    before = path.read_bytes()
    assert b"nothing was changed" in qcow("check", "-r", mode, path).out
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", ["leaks", "all"])
def test_leaks_are_repaired_by_both_modes(tmp_path: Path, mode: str) -> None:
    path = write(tmp_path, leaky())
    qcow("check", path, code=3)
    done = qcow("check", "-r", mode, "--output=json", path)
    assert done.json()["leaks-fixed"] == 1
    assert "corruptions-fixed" not in done.json()
    qcow("check", path, code=0)
    assert path.read_bytes() == make().to_bytes()


def test_only_all_repairs_corruptions(tmp_path: Path) -> None:
    path = write(tmp_path, low())
    qcow("check", "-r", "leaks", path, code=2)
    assert path.read_bytes() == low().to_bytes()
    done = qcow("check", "--repair=all", "--output=json", path)
    assert done.json()["corruptions-fixed"] == 1
    assert path.read_bytes() == make().to_bytes()


@pytest.mark.parametrize("mode", ["leaks", "all"])
def test_what_cannot_be_repaired_decides_the_exit_code(tmp_path: Path, mode: str) -> None:
    path = write(tmp_path, lost())
    done = qcow("check", "-r", mode, path, code=2)
    assert b"is not a multiple of the cluster size" in done.out
    assert b"leaks are kept" in done.out
    assert path.read_bytes() == lost().to_bytes()


def test_a_count_that_does_not_fit_stays_a_corruption(tmp_path: Path) -> None:
    path = write(tmp_path, too_narrow())
    assert qcow("check", "-r", "all", path, code=2).out
    qcow("check", path, code=2)


def test_leaks_alone_cannot_rebuild_refcounts(tmp_path: Path) -> None:
    path = write(tmp_path, unusable())
    done = qcow("check", "-r", "leaks", path, code=1)
    assert done.out == b""
    assert done.err == (
        "qcow check: the refcount structures must be rebuilt, which only a repair of all does: no "
        "refcount block counts the cluster at host offset 0x0\n"
    )
    assert path.read_bytes() == unusable().to_bytes()
    assert b"refcounts rebuilt" in qcow("check", "-r", "all", path).out
    qcow("check", path)


def test_a_dirty_image_is_clean_afterwards(tmp_path: Path) -> None:
    image = low()
    set_feature(image, 3)
    path = write(tmp_path, image)
    done = qcow("check", "-r", "all", path)
    assert b"header: the dirty bit" in done.out
    assert b"header: the corrupt bit" in done.out
    assert qcow("info", "--output=json", path).json()["dirty-flag"] is False


@pytest.mark.parametrize(
    ("image", "code"), [(make(), 0), (leaky(), 3), (low(), 2), (unusable(), 2)]
)
def test_a_dry_run_writes_nothing_and_judges_the_image_as_it_is(
    tmp_path: Path, image: BuiltImage, code: int
) -> None:
    path = write(tmp_path, image)
    path.chmod(0o400)
    done = qcow("check", "-r", "all", "--dry-run", path, code=code)
    assert done.out.startswith(f"{path}: dry run, nothing is written; ".encode())
    assert b"afterwards: clean, nothing to repair" in done.out
    assert path.read_bytes() == image.to_bytes()


def test_a_dry_run_tells_its_plan_as_json(tmp_path: Path) -> None:
    done = qcow("check", "-r", "all", "--dry-run", "--output=json", write(tmp_path, low()), code=2)
    assert done.json()["planned-changes"] == {"raised": 1}
    assert done.json()["would-remain"] == {"corruptions": 0, "leaks": 0}


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, low())
    assert qcow("check", "-q", "-r", "all", "--dry-run", path, code=2).out == b""
    assert qcow("check", "-q", "-r", "all", path).out == b""


def test_progress_is_told_as_json(tmp_path: Path) -> None:
    done = qcow("check", "-q", "-r", "all", write(tmp_path, low()))
    assert done.err == ""
    path = write(tmp_path, low())
    done = qcow("check", "--progress=json", "-r", "all", path)
    last = json.loads(done.err.splitlines()[-1])
    assert last["done"] == last["total"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("-r", "some"), "argument -r/--repair: invalid choice: 'some'"),
        (("--dry-run",), "--dry-run: needs -r, a check alone never writes"),
        (("-r", "all", "-U"), "-r: excludes -U, nobody may use an image while it is repaired"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    path = write(tmp_path, low())
    assert message in qcow("check", *flags, path, code=1).err
    assert path.read_bytes() == low().to_bytes()


def test_an_image_in_use_is_not_repaired(tmp_path: Path) -> None:
    path = write(tmp_path, low())
    with FileStorage.open(path) as reader:
        acquire(reader, Role.READER, name="disk")
        qcow("check", "-r", "all", path, code=1)
        assert path.read_bytes() == low().to_bytes()
        qcow("check", "-r", "all", "--dry-run", path, code=2)


def test_a_dry_run_may_look_at_an_image_in_use(tmp_path: Path) -> None:
    path = write(tmp_path, low())
    with FileStorage.open(path, writable=True) as writer:
        acquire(writer, Role.WRITER, name="disk")
        qcow("check", "-r", "all", "--dry-run", path, code=1)
        qcow("check", "-r", "all", "--dry-run", "-U", path, code=2)


def test_only_qcow2_can_be_repaired(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    assert "a raw disk has nothing to check" in qcow("check", "-r", "all", disk, code=63).err
    disk.write_bytes(VhdBuilder(size=MiB).build())
    done = qcow("check", "-f", "vpc", "-r", "all", disk, code=1)
    assert done.err == "qcow check: repair: vpc images can be checked only\n"
