"""Capsules: all of the metadata, none of the data, and no reader that takes holes for zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.errors import OperationError, QcowkitError, RequestError, UnsupportedFeature
from qcowkit.operations.capsule import make_capsule, restore_capsule
from qcowkit.operations.check import check_image, open_for_check
from qcowkit.operations.compact import compact_image
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import BitmapSpec, build_qcow2
from qcowkit.units import KiB, MiB
from tests.amending import Disk, make_disk
from tests.command import qcow
from tests.crypt_disks import KINDS as CRYPT
from tests.crypt_disks import OBJECT, described
from tests.peers import run_peer

pytestmark = pytest.mark.pinned("its kinds of images are its own")

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"cluster_bits": 12, "snapshots": 1, "packed": True},
    "large clusters": {"cluster_bits": 16, "size": 2 * MiB},
    "subclusters over a base": {"cluster_bits": 14, "extended_l2": True, "base": 100 * KiB},
    "version 2": {"cluster_bits": 9, "version": 2, "snapshots": 1},
    "data file": {"cluster_bits": 12, "data_file": True},
}


def capsule_of(disk: Disk, folder: Path) -> Path:
    path = folder / "disk.capsule"
    make_capsule(disk.layers()[0], path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_check_finds_the_same_in_it(kind: str, tmp_path: Path) -> None:
    disk = make_disk(**KINDS[kind])
    layer = open_for_check(capsule_of(disk, tmp_path))
    found, expected = check_image(layer).as_json(), disk.check().as_json()
    layer.storage.close()
    assert found | {"filename": ""} == expected | {"filename": ""}


@pytest.mark.parametrize("kind", KINDS)
def test_no_byte_of_guest_data_is_in_it(kind: str, tmp_path: Path) -> None:
    disk = make_disk(**KINDS[kind])
    raw = capsule_of(disk, tmp_path).read_bytes()
    image = disk.storage.pread(disk.storage.size(), offset=0)
    data = disk.view()[""]
    for offset in range(0, len(data), 512):
        sector = data[offset : offset + 512]
        if any(sector) and sector in image and sector != sector[:1] * 512:
            assert sector not in raw


def test_it_is_mapped_as_the_image_is(tmp_path: Path) -> None:
    disk = make_disk(cluster_bits=12, packed=True)
    path = capsule_of(disk, tmp_path)
    (tmp_path / "disk.qcow2").write_bytes(disk.storage.pread(disk.storage.size(), offset=0))
    ours = qcow("map", "--output=json", path).json()
    assert ours == qcow("map", "--output=json", tmp_path / "disk.qcow2").json()
    info = qcow("info", "--output=json", path)
    assert info.json()["virtual-size"] == disk.open().size
    assert "this is a capsule" in info.err


def test_reading_it_says_what_it_is(tmp_path: Path) -> None:
    path = capsule_of(make_disk(cluster_bits=12, packed=True), tmp_path)
    reason = "a capsule: guest data were left out when it was made"
    assert reason in qcow("convert", "-O", "raw", path, tmp_path / "x.raw", code=1).err
    assert reason in qcow("compare", path, path, code=None).err
    assert not (tmp_path / "x.raw").exists()


def test_nothing_is_written_into_it(tmp_path: Path) -> None:
    disk = make_disk(cluster_bits=12)
    path = capsule_of(disk, tmp_path)
    raw = path.read_bytes()
    assert "this is a capsule" in qcow("io", "-c", "write 0 4k", path, code=1).err
    assert "this is a capsule" in qcow("amend", "-o", "refcount_bits=8", path, code=1).err
    assert "this is a capsule" in qcow("snapshot", "-c", "x", path, code=1).err
    capsule = Disk(storage=MemoryStorage(raw))
    with pytest.raises(UnsupportedFeature, match="this is a capsule"):
        compact_image(capsule.layers()[0])
    assert path.read_bytes() == raw


def test_it_is_small_and_as_long_as_the_image(tmp_path: Path) -> None:
    disk = make_disk(cluster_bits=16, size=8 * MiB, count=60)
    path = capsule_of(disk, tmp_path)
    assert path.stat().st_size == disk.storage.size()
    assert path.stat().st_blocks * 512 < disk.storage.size() // 2


def test_bitmaps_come_along(tmp_path: Path) -> None:
    bitmap = BitmapSpec(name="b", bits=b"\xff" * 4)
    disk = Disk(storage=MemoryStorage(build_qcow2(bitmaps=[bitmap]).to_bytes()))
    path = capsule_of(disk, tmp_path)
    metadata = load_qcow2_metadata(MemoryStorage(path.read_bytes()))
    assert [one.name for one in metadata.bitmaps] == ["b"]


def test_a_damaged_image_has_one_too(tmp_path: Path) -> None:
    built = build_qcow2(clusters={0: b"data", 1: b"more"})
    built.data[built.places["refcount_block"] + 1] = 0
    built.data[built.places["l2"] + 7] |= 0x1E
    disk = Disk(storage=MemoryStorage(built.to_bytes()))
    path = capsule_of(disk, tmp_path)
    layer = open_for_check(path)
    assert check_image(layer).corruptions == disk.check().corruptions > 0
    layer.storage.close()


def test_a_capsule_of_a_capsule_is_refused(tmp_path: Path) -> None:
    path = capsule_of(make_disk(), tmp_path)
    assert "is a capsule already" in qcow("capsule", path, tmp_path / "x", code=None).err


def test_other_formats_have_none(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(512))
    done = qcow("capsule", "-f", "raw", tmp_path / "disk.raw", tmp_path / "x", code=None)
    assert "raw images have hardly any metadata" in done.err


def test_key_slots_stay_at_home(tmp_path: Path) -> None:
    path, out = tmp_path / "disk.qcow2", tmp_path / "disk.capsule"
    keys = CRYPT["luks"] + ",encrypt.key-secret=s"
    words = ("--object", "secret,id=s,data=old", "-o", keys)
    qcow("create", "-q", "-f", "qcow2", *words, path, "1M")
    qcow("capsule", "-q", path, out)
    crypto = load_qcow2_metadata(MemoryStorage(out.read_bytes())).extensions.crypto
    assert crypto is not None
    material = slice(crypto.offset + 4096, crypto.offset + crypto.length)
    assert any(path.read_bytes()[material])
    assert not any(out.read_bytes()[material])
    assert qcow("map", "--output=json", out).code == 0


def test_json_has_sizes_in_bytes(tmp_path: Path) -> None:
    qcow("create", "-q", "-f", "qcow2", tmp_path / "disk.qcow2", "1M")
    out = tmp_path / "x"
    found = qcow("capsule", "--output=json", tmp_path / "disk.qcow2", out).json()
    assert found["size"] == out.stat().st_size
    assert 0 < found["copied"] <= found["size"]


@pytest.mark.peer("qemu-img")
def test_qemu_does_not_take_it_for_a_disk(tmp_path: Path) -> None:
    path = capsule_of(make_disk(cluster_bits=16), tmp_path)
    run_peer("qemu-img", "info", path, status=1)
    run_peer("qemu-img", "convert", "-O", "raw", path, tmp_path / "x.raw", status=1)


def test_a_version_of_no_capsule_is_told_as_it_is() -> None:
    raw = bytearray(build_qcow2().to_bytes())
    raw[4:8] = (0x8000_0004).to_bytes(4, "big")
    with pytest.raises(QcowkitError, match="qcow2 version 2147483652"):
        load_qcow2_metadata(MemoryStorage(bytes(raw)))


def damaged(disk: Disk, capsule: Path) -> bytes:
    """The file of the image, in which whatever the capsule has is lost."""
    image = bytearray(disk.storage.pread(disk.storage.size(), offset=0))
    for index, byte in enumerate(capsule.read_bytes()):
        if byte:
            image[index] ^= 0xFF
    return bytes(image)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_whose_metadata_are_lost_is_written_again(kind: str, tmp_path: Path) -> None:
    disk = make_disk(**KINDS[kind])
    path, out = capsule_of(disk, tmp_path), tmp_path / "mended"
    lost = MemoryStorage(damaged(disk, path))
    layer = open_for_check(path)
    with layer.storage:
        restore_capsule(layer, lost, out)
    assert out.read_bytes() == disk.storage.pread(disk.storage.size(), offset=0)


def test_on_the_command_line_a_capsule_gives_the_image_back(tmp_path: Path) -> None:
    disk = make_disk(cluster_bits=12, snapshots=1)
    path = capsule_of(disk, tmp_path)
    (tmp_path / "lost").write_bytes(damaged(disk, path))
    done = qcow("capsule", "--restore", tmp_path / "lost", path, tmp_path / "mended")
    assert done.out.decode().endswith("of metadata restored, and sound\n")
    qcow("check", "-q", tmp_path / "mended")
    again = qcow(
        "capsule", "--restore", tmp_path / "lost", path, tmp_path / "mended", "--output=json"
    )
    assert set(again.json()) == {"filename", "size", "copied"}


def test_what_is_of_another_file_is_not_restored(tmp_path: Path) -> None:
    disk = make_disk(cluster_bits=12)
    path = capsule_of(disk, tmp_path)
    layer = open_for_check(path)
    with layer.storage, pytest.raises(RequestError, match="are not those of this file"):
        restore_capsule(layer, MemoryStorage(bytes(4096)), tmp_path / "mended")
    image = tmp_path / "image"
    image.write_bytes(disk.storage.pread(disk.storage.size(), offset=0))
    layer = open_for_check(image)
    with layer.storage, pytest.raises(RequestError, match="is not a capsule"):
        restore_capsule(layer, MemoryStorage(image.read_bytes()), tmp_path / "mended")
    assert not (tmp_path / "mended").exists()


def test_damaged_metadata_are_not_restored(tmp_path: Path) -> None:
    built = build_qcow2(size=MiB, clusters={0: b"x" * 4096})
    built.data[built.places["refcount_block"] + 1] ^= 1
    disk = Disk(storage=MemoryStorage(built.to_bytes()))
    layer = open_for_check(capsule_of(disk, tmp_path))
    with layer.storage, pytest.raises(OperationError, match="metadata of the capsule are damaged"):
        restore_capsule(layer, disk.storage, tmp_path / "mended")
    assert not (tmp_path / "mended").exists()


def test_key_slots_come_from_the_image_itself(tmp_path: Path) -> None:
    image, path, out = (tmp_path / name for name in ("image", "disk.capsule", "mended"))
    keys = CRYPT["luks"] + ",encrypt.key-secret=s"
    qcow("create", "-q", "-f", "qcow2", "--object", OBJECT, "-o", keys, image, "1M")
    said = ("--object", OBJECT, "--image-opts")
    qcow("io", *said, "-c", "write -q -P 7 0 64k", described(image))
    qcow("capsule", "-q", image, path)
    raw = bytearray(image.read_bytes())
    raw[:4] = b"lost"
    image.write_bytes(raw)
    qcow("capsule", "-q", "--restore", image, path, out)
    qcow("io", *said, "-c", "read -q -P 7 0 64k", described(out))
