"""`qcow resize` beside `qemu-img resize`: same sizes and refusals, same content and map, clean."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcowkit.operations.resize import SizeChange
from qcowkit.units import KiB, MiB
from tests.command import qcow
from tests.peers import peer, run_peer

pytestmark = [
    pytest.mark.peer("qemu-img", "qemu-io"),
    pytest.mark.pinned("the matrix says every option"),
]

IMAGE = "disk.qcow2"
SIZE = 4 * MiB
OURS, THEIRS = "ours", "theirs"

OPTIONS = (
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=64k",
    "cluster_size=2M,refcount_bits=64",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=64k,extended_l2=on",
    "compat=0.10,cluster_size=4k",
    "data_file=disk.data",
    "data_file=disk.data,data_file_raw=on",
    "compression_type=zstd",
)
BASES = {"no base": None, "short base": MiB + 512, "long base": 16 * MiB}
DONE = (
    ("8M",),
    ("+512",),
    ("+65536",),
    ("64M",),
    ("--shrink 1M",),
    ("--shrink -512",),
    ("--shrink 512",),
    ("--shrink -100k", "+100k"),
    ("--shrink 1M", "8M", "--shrink 3M", "4M"),
    ("--preallocation=metadata 5M",),
    ("--preallocation=falloc +100k",),
    ("--preallocation=full 4608k",),
    ("--preallocation=metadata --shrink 6M",),
    ("+0",),
)
REFUSED = (
    ("1M",),
    ("0",),
    ("-4M",),
    ("1000",),
    ("--preallocation=metadata 4M",),
    ("--shrink --preallocation=metadata 1M",),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One image and what is done to it."""

    options: str
    base: str
    steps: tuple[str, ...]

    @property
    def name(self) -> str:
        """For test ids."""
        return f"{self.options}-{self.base}-{'-then-'.join(self.steps)}".replace(" ", "_")

    @property
    def preallocated(self) -> bool:
        """Whether what is added gets its clusters at once."""
        return "prealloc" in self.steps[0]

    @property
    def transparent(self) -> bool:
        """Whether a cluster can be there and still show the base."""
        return "extended_l2" in self.options or self.base == "no base"


def cases() -> list[Case]:
    """Every kind of image with every other step; the bases take turns. Each refusal once."""
    found = [
        Case(options=OPTIONS[2], base=base, steps=steps) for steps in REFUSED for base in BASES
    ]
    for row, options in enumerate(OPTIONS):
        for column, steps in enumerate(DONE):
            base = list(BASES)[(row // 2 + column) % len(BASES)]
            if "data_file_raw" in options:
                base = "no base"
            if (row + column) % 2 == 0:
                found.append(Case(options=options, base=base, steps=steps))
    return found


def make_image(case: Case, folder: Path) -> None:
    """The same bytes for both: made and filled by qemu."""
    folder.mkdir()
    base = BASES[case.base]
    flags: list[str] = []
    if base is not None:
        (folder / "base.raw").write_bytes((b"base" * 128)[:512] * (base // 512))
        flags = ["-b", "base.raw", "-F", "raw"]
    command = ["create", "-q", "-f", "qcow2", "-o", case.options, *flags, IMAGE, str(SIZE)]
    subprocess.run([peer("qemu-img"), *command], cwd=folder, check=True)
    edits = (
        "write -P 1 0 70k",
        "write -P 2 1000k 200k",
        "write -P 3 2M 512",
        "write -z 2560k 300k",
        "write -P 4 3584k 512k",
        "discard 3840k 64k",
    )
    words = [word for edit in edits for word in ("-c", edit)]
    done = subprocess.run(
        [peer("qemu-io"), "-f", "qcow2", *words, IMAGE],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    # Version 2 over a base discards nothing; all else must work.
    assert done.returncode == 0 or "0.10" in case.options, done.stdout + done.stderr


def qemu_map(*, zeros: bool) -> list[tuple[int, int, int, bool | None]]:
    """(start, stop, depth, zero) of maximal runs. zeros: tell them from data of the same depth."""
    rows = json.loads(run_peer("qemu-img", "map", "--output=json", "-f", "qcow2", IMAGE))
    runs: list[tuple[int, int, int, bool | None]] = []
    for row in rows:
        state = (row["depth"], row["zero"] if zeros else None)
        start = row["start"]
        if runs and runs[-1][2:] == state:
            start = runs.pop()[0]
        runs.append((start, row["start"] + row["length"], *state))
    return runs


def qemu_disk() -> bytes:
    run_peer("qemu-img", "convert", "-f", "qcow2", "-O", "raw", IMAGE, "disk.raw")
    return Path("disk.raw").read_bytes()


def resize_ours(text: str) -> tuple[int, str]:
    *flags, size = text.split()
    done = qcow("resize", "-q", "-f", "qcow2", *flags, IMAGE, size, code=None)
    return done.code, done.err


def resize_theirs(text: str) -> tuple[int, str]:
    *flags, size = text.split()
    command = [peer("qemu-img"), "resize", "-q", "-f", "qcow2", *flags, IMAGE, size]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def applied(disk: bytes, text: str) -> bytes:
    """What a resize means: what is added is zero, whatever was there once."""
    new = SizeChange.parse(text.split()[-1]).apply(len(disk))
    return disk[:new].ljust(new, b"\0")


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_resized_disk_is_that_of_qemu(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image(case, tmp_path / OURS)
    make_image(case, tmp_path / THEIRS)
    # qemu looks for a data file in the working directory.
    monkeypatch.chdir(tmp_path / OURS)
    disk = qemu_disk()
    for step in case.steps:
        code, message = resize_ours(step)
        run_peer("qemu-img", "check", "-f", "qcow2", IMAGE)
        qcow("check", IMAGE)
        monkeypatch.chdir(tmp_path / THEIRS)
        theirs, reason = resize_theirs(step)
        monkeypatch.chdir(tmp_path / OURS)
        if case.preallocated and not case.transparent and theirs == 0:
            # As when creating; qemu refuses it there only.
            assert "needs subclusters" in message
            return
        if "0.10" in case.options and case.base == "long base" and "Operation not" in reason:
            # Without zero clusters there are still zeros to write; qemu does not.
            return
        assert code == theirs, (message, reason)
        disk = applied(disk, step) if code == 0 else disk
        assert qemu_disk() == disk
    mapped = qemu_map(zeros=not case.preallocated)
    monkeypatch.chdir(tmp_path / THEIRS)
    if len(case.steps) == 1:
        # After shrinking and growing qemu shows what lay in the rest of the last cluster.
        assert qemu_disk() == disk
        assert qemu_map(zeros=not case.preallocated) == mapped


@pytest.mark.parametrize("steps", [*DONE, *REFUSED], ids=" then ".join)
def test_both_make_the_same_raw_file(steps: tuple[str, ...], tmp_path: Path) -> None:
    ours, theirs = tmp_path / OURS, tmp_path / THEIRS
    for folder in (ours, theirs):
        folder.mkdir()
        (folder / "disk.raw").write_bytes(b"0123456789abcdef" * (MiB // 16) + bytes(3 * MiB))
    for step in steps:
        *flags, size = step.split()
        done = qcow("resize", "-f", "raw", *flags, ours / "disk.raw", size, code=None)
        reference = subprocess.run(
            [peer("qemu-img"), "resize", "-f", "raw", *flags, theirs / "disk.raw", size],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.code == reference.returncode, (done.err, reference.stderr)
        found = (ours / "disk.raw").stat(), (theirs / "disk.raw").stat()
        assert found[0].st_size == found[1].st_size
        # Reserved space is reserved, whatever the file system adds for itself.
        assert abs(found[0].st_blocks - found[1].st_blocks) * 512 <= 64 * KiB
    if found[0].st_size <= 16 * MiB:
        assert (ours / "disk.raw").read_bytes() == (theirs / "disk.raw").read_bytes()
