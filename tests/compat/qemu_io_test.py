"""qemu-io and `qcow io` are twins: the same commands, from a seed, on two copies of an image give
the same answers, the same disk, the same allocation, and a file without fault."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcowkit.units import KiB, MiB
from tests.command import qcow
from tests.peers import peer, run_peer

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

_COMMANDS = 30
_FIGURES = re.compile(r", 1 ops; .*")
_MACHINE = re.compile(r"(\d+,1),[\d:.]+,[\d.]+,[\d.]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of image. unit: bytes of a cluster, or of a subcluster. base: bytes of a backing disk,
    0 for none. grows: False where qemu maps what is added and we leave it to the data file. plain:
    only data are read and written, where qemu knows neither discards nor zeros nor resizing."""

    name: str
    format: str = "qcow2"
    options: str = ""
    unit: int = 64 * KiB
    size: int = 2 * MiB
    base: int = 0
    compresses: bool = False
    grows: bool = True
    plain: bool = False

    def make(self, folder: Path) -> str:
        """A new image in a folder of its own; its path."""
        folder.mkdir()
        path = str(folder / "disk")
        words = ["-o", self.options.format(folder=folder)] if self.options else []
        if self.base:
            run_peer("qemu-img", "create", "-q", "-f", "qcow2", folder / "base", self.base)
            fill = [
                "-c",
                f"write -P 0xb0 0 {self.base // 2}",
                "-c",
                f"write -P 0xb1 {self.base - 512} 512",
            ]
            run_peer("qemu-io", "-f", "qcow2", *fill, folder / "base")
            words += ["-b", "base", "-F", "qcow2"]
        run_peer("qemu-img", "create", "-q", "-f", self.format, *words, path, self.size)
        return path


KINDS = (
    Kind(name="raw", format="raw", unit=512),
    Kind(name="raw-odd", format="raw", unit=512, size=2 * MiB - 1536),
    Kind(name="default", size=4 * MiB, compresses=True),
    Kind(name="odd-size", size=2 * MiB + 4608, compresses=True),
    Kind(name="small-clusters", options="cluster_size=512", unit=512, size=MiB, compresses=True),
    Kind(name="large-clusters", options="cluster_size=2M", unit=2 * MiB, size=20 * MiB),
    Kind(name="version-2", options="compat=0.10,cluster_size=4k", unit=4096, compresses=True),
    Kind(name="one-bit", options="refcount_bits=1,cluster_size=4k", unit=4096, compresses=True),
    Kind(name="wide", options="refcount_bits=64,cluster_size=4k", unit=4096, compresses=True),
    Kind(name="lazy", options="lazy_refcounts=on,cluster_size=4k", unit=4096, compresses=True),
    Kind(name="zstd", options="compression_type=zstd,cluster_size=8k", unit=8192, compresses=True),
    Kind(name="extended", options="extended_l2=on,cluster_size=16k", unit=512, compresses=True),
    Kind(name="extended-64k", options="extended_l2=on", unit=2048),
    Kind(name="data-file", options="data_file={folder}/data,cluster_size=4k", unit=4096),
    Kind(name="raw-data", options="data_file={folder}/data,data_file_raw=on", grows=False),
    Kind(name="overlay", options="cluster_size=4k", unit=4096, base=MiB, compresses=True),
    Kind(name="long-base", options="cluster_size=4k", unit=4096, base=3 * MiB, compresses=True),
    Kind(name="extended-overlay", options="extended_l2=on", unit=2048, base=MiB, compresses=True),
    Kind(name="v2-overlay", options="compat=0.10,cluster_size=4k", unit=4096, base=MiB),
    Kind(name="vhd", format="vpc", options="force_size=on", unit=512, plain=True),
    Kind(
        name="fixed-vhd", format="vpc", options="subformat=fixed,force_size", unit=512, plain=True
    ),
    Kind(name="metadata", options="preallocation=metadata,cluster_size=4k", unit=4096),
)


class Script:
    """Commands from a seed."""

    def __init__(self, kind: Kind, seed: str) -> None:
        self.kind = kind
        self.noise = random.Random(f"{kind.name} {seed}")
        self.size = kind.size

    def commands(self, count: int = _COMMANDS) -> list[str]:
        """So many of them, and a look at everything in the end."""
        makers = [*[self.write] * 4, self.read, self.verify, self.vector]
        if not self.kind.plain:
            makers += self.further()
        lines = [line for _ in range(count) for line in self.noise.choice(makers)()]
        return (
            [*lines, "length", "flush"] if self.kind.plain else [*lines, "length", "map", "flush"]
        )

    def further(self) -> list[Callable[[], list[str]]]:
        """What not every image can."""
        makers = [
            *[self.write] * 4,
            *[self.zeroes] * 3,
            *[self.discard] * 3,
            *[self.read] * 2,
            self.verify,
            self.vector,
            *[self.asynchronous] * 2,
            self.alloc,
            self.truncate,
            self.small,
            self.wrong,
        ]
        if self.kind.compresses:
            makers += [self.compressed] * 4
        return makers

    def place(self, *, aligned: bool | None = None) -> tuple[int, int]:
        """(offset, length) within the disk, often of whole units."""
        if aligned is None:
            aligned = self.noise.random() < 0.5
        unit = self.kind.unit if aligned else self.noise.choice([1, 512, 4096])
        units = self.size // unit
        first = self.noise.randrange(units)
        most = max(1, min(units - first, 256 * KiB // unit))
        count = min(self.noise.choice([1, 1, 2, 3, 9, 40, most]), most)
        return first * unit, count * unit

    def pattern(self) -> str:
        """A byte in one of the three ways to write it."""
        value = self.noise.randrange(256)
        return self.noise.choice([f"{value}", f"{value:#x}", f"0{value:o}"])

    def write(self) -> list[str]:
        offset, length = self.place()
        flags = self.noise.choice(["", "-f ", "-q ", "-p ", "-C "])
        return [f"write {flags}-P {self.pattern()} {offset} {length}"]

    def zeroes(self) -> list[str]:
        offset, length = self.place()
        if self.kind.compresses and self.cluster > self.kind.unit:
            # Zeros that begin within a compressed cluster make qemu write all of them as data.
            offset -= offset % self.cluster
        flags = self.noise.choice(["-z", "-zu", "-z -u -f"])
        return [f"write {flags} {offset} {length}"]

    def discard(self) -> list[str]:
        offset, length = self.place()
        return [f"discard {offset} {length}"]

    def read(self) -> list[str]:
        offset, length = self.place()
        return [f"read -v {offset} {min(length, 96)}"]

    def verify(self) -> list[str]:
        offset, length = self.place()
        start = self.noise.randrange(length)
        part = self.noise.choice(["", f"-s {start} ", f"-l {length - start} "])
        return [f"read -P {self.noise.choice(['0', self.pattern()])} {part}{offset} {length}"]

    def vector(self) -> list[str]:
        offset, length = self.place()
        rest = max(0, self.size - offset - length)
        lengths = f"{length} {min(rest, 700)} {min(max(0, rest - 700), 512)}"
        return [f"writev -P {self.pattern()} {offset} {lengths}", f"readv {offset} {lengths}"]

    def asynchronous(self) -> list[str]:
        offset, length = self.place()
        if self.kind.compresses:
            offset -= offset % self.cluster
        kind = self.noise.choice([f"-P {self.pattern()}", "-z", "-z -u"])
        return [
            f"aio_write {kind} {offset} {length}",
            "aio_flush",
            f"aio_read {offset} {length}",
            "aio_flush",
        ]

    def compressed(self) -> list[str]:
        # One at a time: of several, those that are written beside one that fails are up to chance.
        unit = self.cluster
        first = self.noise.randrange(self.size // unit + 1)
        length = min(unit, self.size - first * unit)
        # Within one opening qemu may pack compressed data into a cluster that it has given to
        # somebody else since (reference of the format, traps); opened anew it does not.
        again = ["close", "open -o driver=qcow2 {path}"]
        return [*again, f"write -c -P {self.pattern()} {first * unit} {length}"]

    @property
    def cluster(self) -> int:
        """Bytes of a cluster, where units are subclusters."""
        return self.kind.unit * (32 if "extended_l2" in self.kind.options else 1)

    def alloc(self) -> list[str]:
        offset, length = self.place()
        return [f"alloc {offset}", f"alloc {offset} {length}"]

    def truncate(self) -> list[str]:
        # Whole clusters: what a smaller size cuts from one, qemu shows again to a larger one.
        unit = max(512, self.cluster)
        units = self.kind.size // unit
        most = units + units // 2 if self.kind.grows else self.size // unit
        self.size = self.noise.randrange(units // 2, most + 1) * unit
        return [f"truncate {self.size}", "length"]

    def small(self) -> list[str]:
        return [self.noise.choice(["flush", "length", "map", "reopen", "info"])]

    def wrong(self) -> list[str]:
        end = self.size
        return [
            self.noise.choice(
                [
                    f"write {end} 512",
                    f"read {end - 512} 1k",
                    f"discard {end} 4k",
                    f"write -z {end - 512} 1k",
                    f"aio_write {end} 1",
                    "write -P 256 0 1k",
                    "write 0",
                    "write -c 512 1k",
                    "read -s 1k 0 4k",
                    "nonsense 3",
                    "write -n 0 1k",
                    "alloc 100G",
                ]
            ),
            "aio_flush",
        ]


def plain(output: str) -> list[str]:
    """The lines without times, and without complaints about the usage, which are ours."""
    lines = []
    for line in output.splitlines():
        line = _MACHINE.sub(r"\1", _FIGURES.sub("", line))
        if line.startswith(_ANSWERS) or line[:1].isdigit():
            lines.append(line)
    return lines


_ANSWERS = (
    "wrote",
    "read ",
    "discard ",
    "Pattern",
    "write failed",
    "writev failed",
    "readv failed",
    "read failed",
    "aio_write failed",
    "aio_read failed",
    "discard failed",
    "cluster size",
    "format name",
    "vm state",
)
_OPTIONAL = re.compile(r"read \[|length cannot|\d+ is not a (valid|sector)")


def run_theirs(path: str, kind: Kind, lines: list[str]) -> tuple[list[str], int]:
    command = [peer("qemu-io"), "-f", kind.format]
    command += [word for line in lines for word in ("-c", line.format(path=path))]
    done = subprocess.run([*command, path], capture_output=True, text=True, check=False)
    output = "\n".join(line for line in done.stdout.splitlines() if not _OPTIONAL.match(line))
    return plain(output), done.returncode


def run_ours(path: str, kind: Kind, lines: list[str]) -> tuple[list[str], int]:
    words = [word for line in lines for word in ("-c", line.format(path=path))]
    done = qcow("io", "-f", kind.format, *words, path, code=None)
    return plain(done.out.decode()), done.code


def differences(lines: list[str], ours: list[str], theirs: list[str]) -> str:
    """What to show of a failure."""
    for index, (one, other) in enumerate(zip([*ours, "(end)"], [*theirs, "(end)"], strict=False)):
        if one != other:
            before = "\n".join(theirs[max(0, index - 3) : index])
            return f"after\n{before}\nours:   {one}\ntheirs: {other}\nscript: {lines}"
    return ""


def check_clean(path: str, kind: Kind) -> None:
    if kind.format == "qcow2":
        run_peer("qemu-img", "check", "-f", "qcow2", path)
        qcow("check", "-f", "qcow2", path)


def run_twins(kind: Kind, seed: int, folder: Path) -> None:
    """Two halves; the second goes to the other one: each goes on with what its twin has left."""
    ours, theirs = kind.make(folder / "ours"), kind.make(folder / "theirs")
    script = Script(kind, str(seed))
    for first, second in ((ours, theirs), (theirs, ours)):
        lines = script.commands()
        answers, code = run_ours(first, kind, lines)
        expected, status = run_theirs(second, kind, lines)
        assert not differences(lines, answers, expected)
        assert code == status
        run_peer("qemu-img", "compare", "-f", kind.format, "-F", kind.format, ours, theirs)
        check_clean(ours, kind)
        check_clean(theirs, kind)


@pytest.mark.pinned(
    "scripts for kinds of their own", "compat=0.10", "data_file", "cluster_size=512"
)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_same_commands_give_the_same_answers_and_the_same_disk(
    kind: Kind, seed: int, tmp_path: Path
) -> None:
    run_twins(kind, seed, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 40))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_many_more_scripts_find_no_difference(kind: Kind, seed: int, tmp_path: Path) -> None:
    run_twins(kind, seed, tmp_path)
