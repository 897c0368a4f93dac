"""Guest writes into VHDs beside other tools: they read what we changed, we read what they did."""

from __future__ import annotations

import random
import uuid
from pathlib import Path
from typing import Any

import pytest

import qcowkit
from qcowkit.engine.vhd.bulk import VhdBulkWriter
from qcowkit.engine.vhd.layout import ParentLink
from qcowkit.extents.table import Flag
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.operations.check import Verdict, check_image, open_for_check
from qcowkit.storage.file import FileStorage
from qcowkit.units import KiB, MiB
from tests.peers import run_peer

SIZE = 20 * MiB
OPTIONS = {
    "dynamic": ("-o", "force_size=on"),
    "fixed": ("-o", "subformat=fixed,force_size=on"),
    "dynamic, rounded to cylinders": (),
}


def make_with_qemu(path: Path, options: tuple[str, ...]) -> None:
    run_peer("qemu-img", "create", "-q", "-f", "vpc", *options, path, SIZE)


def make_with_us(path: Path, *, block_size: int, **options: Any) -> None:
    with FileStorage.open(path, writable=True, create=True) as storage:
        VhdBulkWriter(storage, size=SIZE, block_size=block_size, **options).finish()


def scribble(disk: Chain, twin: bytearray, *, seed: int, rounds: int = 30) -> None:
    """Random writes, zeros and discards, and the same in the twin."""
    noise = random.Random(seed)
    for _ in range(rounds):
        start = noise.randrange(disk.size)
        length = min(noise.choice((1, 512, 5000, 64 * KiB, 3 * MiB)), disk.size - start)
        stop = start + length
        match noise.choice("wwwzd"):
            case "w":
                twin[start:stop] = noise.randbytes(length)
                disk.write(memoryview(twin)[start:stop], offset=start)
            case "z":
                disk.write_zeroes(offset=start, length=length, unmap=noise.random() < 0.5)
                twin[start:stop] = bytes(length)
            case "d":
                disk.discard(offset=start, length=length)
                twin[start:stop] = disk.read(offset=start, length=length)
        if noise.random() < 0.2:
            disk.flush()


def compare_with_qemu(path: Path, twin: bytes) -> None:
    raw = path.with_suffix(".raw")
    raw.write_bytes(twin)
    run_peer("qemu-img", "compare", "-f", "vpc", "-F", "raw", path, raw)


def check(path: Path) -> None:
    layer = open_for_check(path, format="vpc")
    try:
        assert layer.warnings == ()
        assert check_image(layer).verdict is Verdict.CLEAN
    finally:
        layer.storage.close()


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_qemu_reads_what_we_write_into_its_disks(tmp_path: Path, name: str, seed: int) -> None:
    path = tmp_path / "disk.vhd"
    make_with_qemu(path, OPTIONS[name])
    with qcowkit.open(path, format="vpc", writable=True) as disk:
        twin = bytearray(disk.size)
        scribble(disk, twin, seed=seed)
    compare_with_qemu(path, twin)
    check(path)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("block_size", [4 * KiB, 64 * KiB, 2 * MiB])
def test_qemu_reads_what_we_write_into_our_disks(tmp_path: Path, block_size: int) -> None:
    path = tmp_path / "disk.vhd"
    make_with_us(path, block_size=block_size)
    twin = bytearray(SIZE)
    with qcowkit.open(path, format="vpc", writable=True) as disk:
        scribble(disk, twin, seed=block_size)
    compare_with_qemu(path, twin)
    check(path)


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize("name", OPTIONS)
def test_qemu_and_we_take_turns_in_writing(tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.vhd"
    make_with_qemu(path, OPTIONS[name])
    twin = bytearray()
    for turn in range(3):
        with qcowkit.open(path, format="vpc", writable=True) as disk:
            twin = twin or bytearray(disk.size)
            scribble(disk, twin, seed=turn, rounds=8)
        commands = []
        for place in range(3):
            start, value = (7 * turn + 5 * place) * MiB + 1024 * place, 100 + 10 * turn + place
            start %= SIZE - MiB
            commands += ["-c", f"write -P {value} {start} 700k"]
            twin[start : start + 700 * KiB] = bytes([value]) * (700 * KiB)
        run_peer("qemu-io", "-f", "vpc", *commands, path)
        with qcowkit.open(path, format="vpc") as disk:
            assert disk.read(offset=0, length=disk.size) == twin
        check(path)
    compare_with_qemu(path, twin)


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [5 * MiB, 64 * MiB + 512, 3 << 30])
def test_qemu_reads_and_writes_a_disk_that_we_resized(tmp_path: Path, name: str, size: int) -> None:
    path = tmp_path / "disk.vhd"
    make_with_qemu(path, OPTIONS[name])
    with qcowkit.open(path, format="vpc", writable=True) as disk:
        disk.write(b"first" * 1000, offset=3 * MiB)
        disk.write(b"last" * 1000, offset=19 * MiB)
        disk.resize(size, shrink=True)
        disk.write(b"end", offset=size - 3)
    run_peer(
        "qemu-io",
        *("-f", "vpc", "-c", f"read -P 0 {4 * MiB} 100k", "-c", f"write -P 7 {4 * MiB} 100k"),
        *("-c", f"read -P 0 {size - 4096} 4093", path),
    )
    with qcowkit.open(path, format="vpc") as disk:
        assert disk.size == size
        assert disk.read(offset=3 * MiB, length=5) == b"first"
        assert disk.read(offset=4 * MiB, length=100 * KiB) == b"\7" * (100 * KiB)
        assert disk.read(offset=size - 3, length=3) == b"end"
        if size > SIZE:
            assert disk.read(offset=19 * MiB, length=8) == b"lastlast"
    check(path)


@pytest.mark.peer("7z")
def test_7_zip_reads_a_disk_that_we_wrote_and_resized(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    make_with_us(path, block_size=64 * KiB)
    twin = bytearray(SIZE)
    with qcowkit.open(path, format="vpc", writable=True) as disk:
        scribble(disk, twin, seed=1)
        # The table no longer fits before its first blocks.
        disk.resize(2 * SIZE)
    run_peer("7z", "x", "-y", f"-o{tmp_path / 'out'}", path)
    (found,) = (tmp_path / "out").iterdir()
    assert found.read_bytes() == bytes(twin).ljust(2 * SIZE, b"\0")


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("seed", range(3))
def test_qemu_finds_in_a_child_the_sectors_that_we_wrote(tmp_path: Path, seed: int) -> None:
    """It takes a child for a dynamic disk, and shows zeros where the parent should show: so only
    what the child itself has can be compared."""
    identity, parent, child = uuid.uuid4(), tmp_path / "parent.vhd", tmp_path / "child.vhd"
    link = ParentLink(relative="parent.vhd", absolute=str(parent), unique_id=identity)
    make_with_us(parent, block_size=64 * KiB, unique_id=identity)
    make_with_us(child, block_size=64 * KiB, parent=link)
    twin = bytearray(SIZE)
    with qcowkit.open(parent, format="vpc", writable=True) as disk:
        scribble(disk, twin, seed=seed)
    gate = ReferenceGate.below_image()
    with qcowkit.open(child, format="vpc", writable=True, gate=gate) as disk:
        scribble(disk, twin, seed=seed + 100)
        assert disk.read(offset=0, length=SIZE) == twin
        rows = [row for row in disk.extents() if row.layer == 0 and row.flags & Flag.PRESENT]
    assert rows
    raw = tmp_path / "child.raw"
    run_peer("qemu-img", "convert", "-f", "vpc", "-O", "raw", child, raw)
    found = raw.read_bytes()
    for row in rows:
        end = row.start + row.length
        assert found[row.start : end] == twin[row.start : end]
    check(child)


@pytest.mark.peer("vhdiinfo")
def test_libvhdi_opens_a_disk_that_we_resized(tmp_path: Path) -> None:
    """It calls the original size the size, so that is what it must still find."""
    path = tmp_path / "disk.vhd"
    make_with_us(path, block_size=2 * MiB)
    with qcowkit.open(path, format="vpc", writable=True) as disk:
        disk.write(b"x", offset=0)
        disk.resize(33 * MiB)
    told = run_peer("vhdiinfo", path)
    assert f"({SIZE} bytes)" in told
    assert ": Dynamic\n" in told
