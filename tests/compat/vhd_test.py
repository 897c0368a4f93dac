"""VHDs between qemu, libvhdi, 7-Zip and us, both ways."""

from __future__ import annotations

import json
import random
import uuid
from pathlib import Path
from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.engine.vhd.bulk import VhdBulkWriter
from qcowkit.engine.vhd.layout import ParentLink, plan_disk_size
from qcowkit.engine.vhd.metadata import load_vhd_metadata
from qcowkit.image.chain import Chain
from qcowkit.image.vhd import VhdImage
from qcowkit.storage.memory import MemoryStorage
from qcowkit.units import KiB, MiB
from tests.peers import run_peer

SIZE = 9 * MiB + 512


def write(path: Path, *blocks: int, **options: Any) -> bytes:
    """A VHD of ours with random data in the given blocks; returns the guest disk."""
    storage = MemoryStorage()
    writer = VhdBulkWriter(storage, **{"size": SIZE, **options})
    disk = bytearray(writer.size)
    noise = random.Random(writer.size)
    for block in blocks:
        start = block * writer.unit
        data = noise.randbytes(min(writer.unit, writer.size - start))
        disk[start : start + len(data)] = data
        storage.pwrite([data], offset=writer.place(block))
    writer.finish()
    path.write_bytes(storage.to_bytes())
    return bytes(disk)


def open_image(path: Path) -> VhdImage:
    storage = MemoryStorage(path.read_bytes(), name=str(path))
    return VhdImage(load_vhd_metadata(storage, budget=TRUSTED), storage)


def read(path: Path) -> bytes:
    chain = Chain([open_image(path)])
    return chain.read(offset=0, length=chain.size)


def qemu_read(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    run_peer("qemu-img", "convert", "-f", "vpc", "-O", "raw", path, raw)
    return raw.read_bytes()


def qemu_info(path: Path) -> dict[str, Any]:
    info: dict[str, Any] = json.loads(
        run_peer("qemu-img", "info", "--output=json", "-f", "vpc", path)
    )
    return info


def qemu_create(path: Path, size: int, *options: str) -> None:
    extra = [word for option in options for word in ("-o", option)]
    run_peer("qemu-img", "create", "-q", "-f", "vpc", *extra, path, size)


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize(
    ("size", "blocks"),
    [(512, (0,)), (2 * MiB, ()), (SIZE, (0, 2, 4)), (20 * MiB - 512, (1, 9)), (33554432, (3,))],
)
def test_qemu_reads_what_we_write(
    tmp_path: Path, subformat: str, size: int, blocks: tuple[int, ...]
) -> None:
    path = tmp_path / "disk.vhd"
    disk = write(path, *blocks, size=size, subformat=subformat)
    assert qemu_info(path)["virtual-size"] == size
    assert qemu_read(path) == disk == read(path)


@pytest.mark.parametrize("block_size", [4 * KiB, 64 * KiB, 512 * KiB, 4 * MiB])
def test_qemu_reads_other_block_sizes(tmp_path: Path, block_size: int) -> None:
    path = tmp_path / "disk.vhd"
    disk = write(path, 0, 2, block_size=block_size)
    assert qemu_read(path) == disk == read(path)


def test_qemu_takes_the_size_of_a_large_empty_disk_exactly(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    storage = MemoryStorage()
    VhdBulkWriter(storage, size=2040 << 30).finish()
    path.write_bytes(storage.to_bytes())
    assert qemu_info(path)["virtual-size"] == 2040 << 30


@pytest.mark.parametrize("options", [(), ("force_size=on",), ("subformat=fixed",)])
def test_we_read_what_qemu_writes(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = tmp_path / "disk.vhd"
    qemu_create(path, SIZE + 511 * 512, *options)
    writes = ["-c", "write -P 7 5M 1M", "-c", "write -P 8 512 1024", "-c", "write -P 9 9M 512"]
    run_peer("qemu-io", "-f", "vpc", *writes, path)
    disk = open_image(path)
    assert disk.metadata.warnings == ()
    assert disk.size == qemu_info(path)["virtual-size"]
    assert read(path) == qemu_read(path)


def test_our_map_of_a_dynamic_disk_is_that_of_qemu(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    qemu_create(path, 20 * MiB, "force_size=on")
    run_peer("qemu-io", "-f", "vpc", "-c", "write 5M 1M", "-c", "write 18M 1M", path)
    rows = json.loads(run_peer("qemu-img", "map", "--output=json", "-f", "vpc", path))
    found = [
        (row.start, row.length, bool(row.flags & 4), bool(row.flags & 2), bool(row.flags & 1))
        for row in open_image(path).extents(start=0, length=20 * MiB)
    ]
    names = ("start", "length", "present", "zero", "data")
    assert found == [tuple(row[name] for name in names) for row in rows]


def test_qemu_goes_on_writing_to_our_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    disk = bytearray(write(path, 1))
    run_peer("qemu-io", "-f", "vpc", "-c", "write -P 5 8M 64k", "-c", "write -P 6 2M 512", path)
    disk[8 * MiB : 8 * MiB + 64 * KiB] = b"\5" * (64 * KiB)
    disk[2 * MiB : 2 * MiB + 512] = b"\6" * 512
    assert read(path) == disk
    assert open_image(path).metadata.warnings == ()


@pytest.mark.parametrize(
    "size",
    [512, 1 * MiB, 10 * MiB + 512, 33554432, 8 << 30, 33822351360 - 512, 33822351360, 99 << 30],
)
def test_rounding_to_cylinders_gives_the_sizes_of_qemu(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.vhd"
    qemu_create(path, size)
    assert plan_disk_size(size, force_size=False) == qemu_info(path)["virtual-size"]


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_7_zip_reads_what_we_write(tmp_path: Path, subformat: str) -> None:
    path = tmp_path / "disk.vhd"
    disk = write(path, 0, 3, subformat=subformat)
    run_peer("7z", "x", "-y", f"-o{tmp_path / 'out'}", path)
    (found,) = (tmp_path / "out").iterdir()
    assert found.read_bytes() == disk


@pytest.mark.parametrize(("subformat", "kind"), [("dynamic", "Dynamic"), ("fixed", "Fixed")])
def test_libvhdi_agrees_on_type_size_and_identity(
    tmp_path: Path, subformat: str, kind: str
) -> None:
    path, identity = tmp_path / "disk.vhd", uuid.uuid4()
    write(path, 1, subformat=subformat, unique_id=identity)
    told = run_peer("vhdiinfo", path)
    assert f": {kind}\n" in told
    assert f"({SIZE} bytes)" in told
    assert f": {identity}\n" in told


def test_libvhdi_finds_the_parent_that_a_child_names(tmp_path: Path) -> None:
    path, identity = tmp_path / "child.vhd", uuid.uuid4()
    write(
        path,
        1,
        parent=ParentLink(
            relative="parent.vhd", absolute=str(tmp_path / "parent.vhd"), unique_id=identity
        ),
    )
    told = run_peer("vhdiinfo", path)
    assert ": Differential\n" in told
    assert f"Parent identifier\t: {identity}\n" in told
    assert "Parent filename\t\t: parent.vhd\n" in told
