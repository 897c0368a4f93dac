"""`qcow bench`: flags as qemu-img has them, text and JSON."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qcowkit.units import KiB, MiB
from tests.command import qcow
from tests.peers import run_peer


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow("create", "-q", "-f", "qcow2", path, "1M")
    return path


def test_the_text_ends_with_the_time(image: Path) -> None:
    lines = qcow("bench", "-c", "100", image).out.decode().splitlines()
    assert lines[0] == (
        "100 read requests of 4 KiB, from offset 0 in steps of 4 KiB; depth 64, 1 thread"
    )
    assert re.fullmatch(r"Run completed in \d+\.\d{3} seconds\.", lines[1])
    assert re.fullmatch(r"\d+ requests/s, .*iB/s", lines[2])


def test_flags_are_those_of_qemu_img(image: Path) -> None:
    flags = "-c 20 -d 4 -s 1k -S 8k -o 4k -t none -n -i native --no-drain -f qcow2 -U"
    found = qcow("bench", *flags.split(), "--output=json", image).json()
    assert (found["count"], found["depth"], found["size"]) == (20, 4, KiB)
    assert (found["step"], found["offset"], found["write"]) == (8 * KiB, 4 * KiB, False)
    assert found["seconds"] > 0
    assert {"ops-per-second", "bytes-per-second"} <= set(found)


def test_a_write_test_writes(image: Path) -> None:
    qcow("bench", "-w", "--pattern", "0x5a", "-c", "16", "-s", "64k", image)
    qcow("io", "-r", "-c", "read -P 0x5a 0 1M", image)


def test_random_offsets_have_a_seed(image: Path) -> None:
    plain = qcow("bench", "-c", "9", "--output=json", "--random", "--", image).json()
    assert plain["random"] == 0
    assert qcow("bench", "-c9", "--output=json", "--random=7", image).json()["random"] == 7


def test_latencies_come_when_asked_for(image: Path) -> None:
    found = qcow("bench", "-c", "50", "--latency", "--output=json", image).json()
    assert list(found["latency"]) == ["50", "90", "99", "99.9", "100"]


def test_quiet_says_nothing(image: Path) -> None:
    assert qcow("bench", "-q", "-c", "5", image).out == b""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-c x", "argument -c: 'x' is not a whole number"),
        ("-w --pattern 300", "argument --pattern: pattern '300' is not a byte from 0 to 255"),
        ("--flush-interval 64", "a flush interval needs a write test"),
        ("-w --flush-interval 4", "flush interval 4 is below the depth of 64"),
        ("-t fast", "argument -t: invalid choice: 'fast'"),
        ("-i fast", "argument -i: invalid choice: 'fast'"),
        ("-s 0", "request size 0, expected 1 to"),
        ("-d 0", "depth 0, expected at least 1"),
        ("-o 2M", "offset 2097152 is beyond the disk of 1048576 bytes"),
        ("-s 768k", "the request of 786432 bytes at offset 786432 leaves the disk"),
        ("-w -U", "force-share is for reading"),
    ],
)
def test_what_cannot_be_done_is_refused_with_one(image: Path, flags: str, message: str) -> None:
    done = qcow("bench", *flags.split(), image, code=1)
    assert message in done.err


def test_a_raw_disk_is_overwritten_only_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MiB))
    assert "the content looks raw" in qcow("bench", "-w", "-c", "1", path, code=1).err
    qcow("bench", "-w", "-c", "1", "-f", "raw", "--pattern", "1", path)
    assert path.read_bytes()[:4096] == b"\x01" * 4096


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "flags",
    [
        "-c 300 -s 4k -S 12k -o 8k",
        "-c 99 -s 512 -S 0x10200",
        "-c 64 -d 1 -s 16k --flush-interval 7",
        "-c 128 -s 8k -t writethrough",
    ],
)
def test_a_write_test_leaves_the_disk_that_qemu_leaves(tmp_path: Path, flags: str) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path in (ours, theirs):
        run_peer("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    words = ["-f", "qcow2", "-w", "--pattern", "171", *flags.split()]
    qcow("bench", *words, ours)
    run_peer("qemu-img", "bench", *words, theirs)
    run_peer("qemu-img", "compare", ours, theirs)
    run_peer("qemu-img", "check", ours)
