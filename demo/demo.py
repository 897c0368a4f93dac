"""The main job on a real disk: built from real files, converted, checked, drawn, compared.

Everything after the disk is built is done by the command `qcow`, as a reader would type it."""

from __future__ import annotations

import os
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20
SECTOR = 512
DISK_SIZE = 768 * MIB
# Of each source, so that the disk holds texts, programs and libraries alike.
SOURCE_BYTES = 90 * MIB
SOURCE_FILES = 2000
PLACE = Path(".demo")
QCOW = Path(sys.executable).with_name("qcow")


def main() -> int:
    """Run the demo; returns the exit code."""
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir()
    disk, packed, again = PLACE / "disk.raw", PLACE / "disk.qcow2", PLACE / "again.raw"
    say("A disk with real files")
    kind = build(disk)
    say("What it is")
    qcow("info", "-f", "raw", disk)
    say("Into a compressed qcow2")
    pack = qcow("convert", "-p", "-f", "raw", "-O", "qcow2", "-c", disk, packed)
    qcow("info", packed)
    say("Is it sound?")
    check = qcow("check", packed)
    say("Where its data lies")
    qcow("map", "--plot", packed)
    say("Is it the same disk?")
    compare = qcow("compare", "-f", "raw", "-F", "qcow2", disk, packed)
    say("And back to raw")
    unpack = qcow("convert", "-p", "-f", "qcow2", "-O", "raw", packed, again)
    qcow("compare", "-f", "raw", "-F", "raw", disk, again)
    say("Summary")
    used, stored = allocated(disk), allocated(packed)
    rows = [
        ("disk", f"{DISK_SIZE // MIB} MiB, {kind}"),
        ("data on the raw disk", f"{used / MIB:.0f} MiB"),
        ("compressed qcow2", f"{stored / MIB:.0f} MiB, {100 * stored / used:.0f} % of that"),
        ("convert to qcow2", rate(used, pack)),
        ("check", f"{check:.2f} s"),
        ("compare", rate(used, compare)),
        ("convert to raw", rate(used, unpack)),
    ]
    for name, text in rows:
        print(f"  {name:<22}{text}")
    print(f"\nThe files are in {PLACE}/; make clean removes them.")
    return 0


def say(title: str) -> None:
    """A heading."""
    print(f"\n\033[1m{title}\033[0m" if sys.stdout.isatty() else f"\n{title}", flush=True)


def qcow(*arguments: str | Path) -> float:
    """Run one command of `qcow`, shown as it is typed; returns the seconds it took."""
    words = [str(word) for word in arguments]
    print(f"$ qcow {shlex.join(words)}", flush=True)
    begun = time.perf_counter()
    done = subprocess.run([str(QCOW), *words], check=False)
    took = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(f"demo: qcow {words[0]} ended with exit code {done.returncode}")
    return took


def rate(size: int, seconds: float) -> str:
    """Seconds, and the data of the disk per second."""
    return f"{seconds:.2f} s, {size / MIB / seconds:.0f} MiB/s"


def allocated(path: Path) -> int:
    """Bytes that the host keeps for a file."""
    return path.stat().st_blocks * SECTOR


def build(disk: Path) -> str:
    """Write the disk; returns what it is."""
    tree = PLACE / "files"
    count, size = gather(tree)
    tool = find_tool("mke2fs")
    if tool:
        with disk.open("wb") as file:
            file.truncate(DISK_SIZE)
        command = [tool, "-q", "-F", "-t", "ext4", "-L", "demo", "-d", str(tree), str(disk)]
        print(f"$ {shlex.join(command)}", flush=True)
        subprocess.run(command, check=True)
        kind = "ext4"
    else:
        partition(disk, tree)
        kind = "two partitions (mke2fs is missing)"
    shutil.rmtree(tree)
    return f"{kind} with {count} files of {size / MIB:.0f} MiB"


def find_tool(name: str) -> str | None:
    """The tool, also where Debian hides it from users."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def sources() -> Iterator[Path]:
    """Where real files are found on any machine."""
    yield Path(sysconfig.get_paths()["stdlib"])
    yield Path(sysconfig.get_paths()["purelib"])
    yield Path("/usr/share/doc")
    yield Path("/usr/lib/x86_64-linux-gnu")
    yield Path("/usr/bin")


def gather(tree: Path) -> tuple[int, int]:
    """Copy real files below `tree`; returns how many, and their bytes."""
    count = size = 0
    for number, source in enumerate(sources()):
        files, length = copy_some(source, tree / f"{number}-{source.name}")
        count, size = count + files, size + length
    return count, size


def copy_some(source: Path, target: Path) -> tuple[int, int]:
    """Copy files of one source up to the limits; returns how many, and their bytes."""
    count = size = 0
    for folder, _, names in os.walk(source):
        for path in (Path(folder, name) for name in names):
            if path.is_symlink() or not path.is_file() or not os.access(path, os.R_OK):
                continue
            length = path.stat().st_size
            if size + length > SOURCE_BYTES or count == SOURCE_FILES:
                continue
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            count, size = count + 1, size + length
    return count, size


def partition(disk: Path, tree: Path) -> None:
    """A partition table with two partitions: an archive of the files, and one left empty."""
    middle = DISK_SIZE // 2 + 128 * MIB
    starts = (MIB, middle)
    with disk.open("wb") as file:
        file.truncate(DISK_SIZE)
        file.write(partition_table(starts, DISK_SIZE))
        file.seek(starts[0])
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.add(tree, arcname=".")


def partition_table(starts: tuple[int, ...], size: int) -> bytes:
    """A master boot record; `starts` and `size` are bytes, and a partition ends at the next."""
    entries = b""
    for start, stop in zip(starts, (*starts[1:], size), strict=True):
        chs = b"\xfe\xff\xff"
        sectors = struct.pack("<II", start // SECTOR, (stop - start) // SECTOR)
        entries += b"\0" + chs + b"\x83" + chs + sectors
    return b"\0" * 446 + entries.ljust(64, b"\0") + b"\x55\xaa"


if __name__ == "__main__":
    sys.exit(main())
