"""Bitmaps beside qemu: it reads what ours say, and we read its."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import close_layers, open_layers
from qcowkit.operations.bitmap import load_bitmap
from tests.command import qcow
from tests.corpus import Entry, entry_id, sound_images, unpack
from tests.peers import peer, run_peer

pytestmark = [
    pytest.mark.pinned("bitmaps", "compat=0.10"),
    pytest.mark.peer("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo"),
]
KINDS = ("cluster_size=512", "cluster_size=64k", "extended_l2=on", "lazy_refcounts=on")
Ranges = list[tuple[int, int]]


@contextmanager
def exported(path: Path, name: str) -> Iterator[str]:
    """An image behind qemu-nbd with one of its bitmaps; a URI."""
    socket = path.parent / "nbd.sock"
    socket.unlink(missing_ok=True)
    command = [peer("qemu-nbd"), "-r", "-t", "-f", "qcow2", "-B", name, "-k", str(socket), path]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not socket.exists():
            assert server.poll() is None, server.communicate()[1]
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        server.terminate()
        server.communicate()


def qemu_dirty(path: Path, name: str) -> Ranges:
    """Dirty ranges as qemu tells them. A copy is asked, disabled, as it exports no other."""
    copy = path.with_name("copy.qcow2")
    shutil.copyfile(path, copy)
    run_peer("qemu-img", "bitmap", "--disable", copy, name)
    with exported(copy, name) as uri:
        rows: list[dict[str, Any]] = json.loads(
            run_peer("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri)
        )
    runs = [(row["offset"], row["offset"] + row["length"]) for row in rows if row["type"] & 1]
    return joined(runs)


def joined(runs: Ranges) -> Ranges:
    found: Ranges = []
    for start, stop in runs:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def our_dirty(path: Path, name: str) -> Ranges:
    layers = open_layers(
        path,
        gate=ReferenceGate.deny_all(),
        budget=TRUSTED,
        follow_backing=False,
        follow_data=False,
    )
    try:
        return list(load_bitmap(layers[0], name).ranges())
    finally:
        close_layers(layers)


def commands(seed: int, *, size: int = 1 << 20) -> list[str]:
    rng = random.Random(seed)
    words = []
    for _ in range(12):
        offset, length = rng.randrange(size // 512) * 512, rng.choice((512, 4096, 70000, 3 << 16))
        length = min(length, size - offset) // 512 * 512
        verb = rng.choice(("write -q", "write -q", "write -qz", "discard -q"))
        words += ["-c", f"{verb} {offset} {length}"]
    return words


def create(path: Path, options: str) -> None:
    run_peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "1M")


@pytest.mark.parametrize("options", KINDS)
def test_qemu_reads_what_we_recorded(tmp_path: Path, options: str) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, options)
    for name, size in (("fine", "512"), ("coarse", "128k")):
        qcow("bitmap", "--add", "-g", size, path, name)
    qcow("io", *commands(1), path)
    run_peer("qemu-img", "check", path)
    for name in ("fine", "coarse"):
        assert qemu_dirty(path, name) == our_dirty(path, name) != []


@pytest.mark.parametrize("options", KINDS)
def test_we_record_what_qemu_records(tmp_path: Path, options: str) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    create(theirs, options)
    for name, size in (("fine", "512"), ("coarse", "128k")):
        run_peer("qemu-img", "bitmap", "--add", "-g", size, theirs, name)
    shutil.copyfile(theirs, ours)
    qcow("io", *commands(2), ours)
    run_peer("qemu-io", "-f", "qcow2", *commands(2), theirs)
    qcow("check", theirs)
    for name in ("fine", "coarse"):
        assert our_dirty(ours, name) == our_dirty(theirs, name) == qemu_dirty(theirs, name)


def test_we_and_qemu_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, "cluster_size=4k")
    run_peer("qemu-img", "bitmap", "--add", "-g", "64k", path, "b")
    for turn in range(3):
        qcow("io", "-c", f"write -q {turn * 256}k 1", path)
        run_peer("qemu-io", "-f", "qcow2", "-c", f"write -q {turn * 256 + 128}k 512", path)
    wanted = [(at << 17, (at << 17) + (64 << 10)) for at in range(6)]
    assert our_dirty(path, "b") == qemu_dirty(path, "b") == wanted
    run_peer("qemu-img", "check", path)


@pytest.mark.parametrize(
    "words",
    [
        ["--add", "-g", "2M", "{}", "new"],
        ["--remove", "{}", "b"],
        ["--clear", "{}", "b"],
        ["--disable", "{}", "b"],
        ["--enable", "{}", "off"],
        ["--merge", "b", "{}", "off"],
        ["--merge", "off", "--disable", "{}", "b"],
    ],
    ids=" ".join,
)
def test_an_action_does_what_it_does_in_qemu(tmp_path: Path, words: list[str]) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    create(theirs, "cluster_size=4k")
    run_peer("qemu-img", "bitmap", "--add", "-g", "4k", theirs, "b")
    run_peer("qemu-img", "bitmap", "--add", "--disable", "-g", "64k", theirs, "off")
    run_peer("qemu-io", "-f", "qcow2", *commands(3), theirs)
    shutil.copyfile(theirs, ours)
    run_peer("qemu-img", "bitmap", *(word.format(theirs) for word in words))
    qcow("bitmap", *(word.format(ours) for word in words))
    run_peer("qemu-img", "check", ours)
    info = [
        json.loads(run_peer("qemu-img", "info", "--output=json", one)) for one in (ours, theirs)
    ]
    found, wanted = (one["format-specific"]["data"].get("bitmaps", []) for one in info)
    assert sorted(found, key=str) == sorted(wanted, key=str)
    for bitmap in wanted:
        assert our_dirty(ours, bitmap["name"]) == our_dirty(theirs, bitmap["name"])


def test_a_conversion_takes_over_what_that_of_qemu_does(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, "cluster_size=4k")
    run_peer("qemu-img", "bitmap", "--add", "-g", "4k", path, "b")
    run_peer("qemu-io", "-f", "qcow2", *commands(4), path)
    run_peer("qemu-img", "bitmap", "--add", "--disable", "--merge", "b", path, "off")
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    qcow("convert", "--bitmaps", "-O", "qcow2", path, ours)
    run_peer("qemu-img", "convert", "--bitmaps", "-O", "qcow2", path, theirs)
    run_peer("qemu-img", "check", ours)
    for name in ("b", "off"):
        assert qemu_dirty(ours, name) == our_dirty(theirs, name) == our_dirty(path, name)
    measured = [
        json.loads(run_peer("qemu-img", "measure", "--output=json", "-O", "qcow2", one))["bitmaps"]
        for one in (ours, theirs)
    ]
    measured.append(qcow("measure", "--output=json", "-O", "qcow2", ours).json()["bitmaps"])
    assert len(set(measured)) == 1


def test_qemu_takes_a_bitmap_for_inconsistent_after_our_crash(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, "cluster_size=4k")
    qcow("bitmap", "--add", path, "b")
    run_and_die = (
        "import os, sys, qcowkit\n"
        "gate = qcowkit.ReferenceGate.below_image()\n"
        "disk = qcowkit.open(sys.argv[1], writable=True, gate=gate)\n"
        "disk.write(b'x' * 512, offset=0)\n"
        "disk.flush()\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", run_and_die, path], check=True)
    info = json.loads(run_peer("qemu-img", "info", "--output=json", path))
    (bitmap,) = info["format-specific"]["data"]["bitmaps"]
    assert sorted(bitmap["flags"]) == ["auto", "in-use"]
    run_peer("qemu-img", "bitmap", "--clear", path, "b", status=1)
    run_peer("qemu-img", "bitmap", "--remove", path, "b")
    qcow("check", path)


def test_a_bitmap_that_qemu_left_in_use_is_removed_by_us(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, "cluster_size=4k")
    run_peer("qemu-img", "bitmap", "--add", path, "b")
    # Dies as it is, without an end of its own.
    command = [peer("qemu-io"), "-f", "qcow2", "-c", "write -q 0 64k", "-c", "sigraise 9", path]
    subprocess.run(command, check=False, capture_output=True)
    assert "inconsistent" in qcow("bitmap", "--list", path).out.decode()
    assert "inconsistent" in qcow("bitmap", "--clear", path, "b", code=1).err
    qcow("io", "-c", "write -q 0 64k", path)
    qcow("bitmap", "--remove", path, "b")
    run_peer("qemu-img", "check", path)


@pytest.mark.parametrize(
    "entry", [one for one in sound_images(format="qcow2") if one.get("bitmaps")], ids=entry_id
)
def test_bitmaps_of_the_corpus_say_what_is_recorded(tmp_path: Path, entry: Entry) -> None:
    path = unpack(entry, tmp_path)
    for bitmap in entry["bitmaps"]:
        if "in-use" in bitmap["flags"]:
            continue
        wanted = [(start, start + length) for start, length in bitmap["dirty"]]
        assert our_dirty(path, bitmap["name"]) == wanted
