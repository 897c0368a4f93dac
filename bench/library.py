"""Where the images of the rows come from, how much room they need, and when they may go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import qcowkit
from bench.images import GiB, MiB, make_disk, make_fragmented, repeat_disk
from bench.measure import run_quietly
from bench.rows import ENCRYPT, retried
from qcowkit.operations.create import CreateOptions, create_image

_IN_MEMORY = ("tmpfs", "ramfs")


class NoRoom(Exception):
    """The file system, or the memory behind it, cannot hold what a row needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the images are. disk, big: bytes of data. extents: of the fragmented image.
    spots: data clusters of the vast one, `vast_step` clusters of 64 KiB apart. full: guest bytes of
    the one in which all are allocated."""

    disk: int = 700 * MiB
    big: int = 3 * GiB
    extents: int = 1_000_000
    spots: int = 1 << 15
    vast_step: int = 1 << 15
    full: int = 1 << 40


FULL = Scale()
QUICK = Scale(
    disk=48 * MiB, big=128 * MiB, extents=50_000, spots=1 << 10, vast_step=1 << 20, full=1 << 36
)


@dataclass(slots=True, kw_only=True)
class Library:
    """Images by name, made in `folder` when they are first asked for."""

    folder: Path
    scale: Scale
    say: Callable[[str], None]
    _made: dict[str, Path] = field(default_factory=dict)

    def get(self, name: str) -> Path:
        """The path of an image. Raises NoRoom, CommandFailed, OSError."""
        if name not in self._made:
            path = self.folder / name.replace("_", ".")
            self._require(2 * self._data_of(name))
            try:
                RECIPES[name](self, path)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            self._made[name] = path
        return self._made[name]

    def require_room(self, name: str, *, copies: int) -> None:
        """Raise NoRoom unless so many copies of the image fit."""
        self._require(copies * self._data_of(name) + 64 * MiB)

    def keep_only(self, names: set[str]) -> None:
        """Remove the images that no row needs any more."""
        for name in self._made.keys() - names:
            self._made.pop(name).unlink()

    def _data_of(self, name: str) -> int:
        kind = name.partition("_")[0]
        scale = self.scale
        # Of the others: a page an L2 table, or 10 bytes an extent and some more.
        # 10 bytes a cluster, and as much for each set of tables that a snapshot makes.
        others = {
            "vast": 4096 * scale.spots,
            "huge": 200 * scale.extents,
            "full": scale.full >> 11,
        }
        sizes = {"disk": scale.disk, "big": scale.big, **others}
        return sizes.get(kind, 20 * scale.extents)

    def _require(self, wanted: int) -> None:
        found = free_bytes(self.folder)
        if found < wanted:
            raise NoRoom(f"{wanted >> 20} MiB wanted in {self.folder}, found {found >> 20} MiB")


def free_bytes(folder: Path) -> int:
    """What may be written there; where files live in memory, not more than is available."""
    free = shutil.disk_usage(folder).free
    if file_system(folder) in _IN_MEMORY:
        free = min(free, _memory_available() - GiB)
    return max(0, free)


def file_system(folder: Path) -> str:
    """The type of the innermost mount that holds the folder."""
    found, best = "", ""
    inside = os.path.realpath(folder) + "/"
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, place, kind = line.split(" ")[:3]
        if inside.startswith(place.rstrip("/") + "/") and len(place) >= len(best):
            found, best = kind, place
    return found


def _memory_available() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return GiB


def _disk_raw(library: Library, path: Path) -> None:
    make_disk(path, size=library.scale.disk, say=library.say)


def _big_raw(library: Library, path: Path) -> None:
    repeat_disk(library.get("disk_raw"), path, size=library.scale.big)


def _converted(source: str, *flags: str) -> Callable[[Library, Path], None]:
    """A recipe: another image, written by qemu-img, so that both read what is usual."""

    def make(library: Library, path: Path) -> None:
        run_quietly("qemu-img", "convert", "-f", "raw", *flags, library.get(source), path)

    return make


def _sealed(library: Library, path: Path) -> None:
    """The disk encrypted, by qemu-img as well."""
    run_quietly(*retried(*ENCRYPT), library.get("disk_raw"), path)


def _fragmented(library: Library, path: Path) -> None:
    make_fragmented(path, library.scale.extents)


def _huge(library: Library, path: Path) -> None:
    make_fragmented(path, 10 * library.scale.extents)


def _full(library: Library, path: Path) -> None:
    """Every cluster has its place, and no data."""
    options = ("-f", "qcow2", "-o", "preallocation=metadata")
    run_quietly("qemu-img", "create", "-q", *options, path, str(library.scale.full))


def _vast(library: Library, path: Path) -> None:
    make_fragmented(path, library.scale.spots, step=library.scale.vast_step)


def _moved(library: Library, path: Path) -> None:
    """An overlay whose backing file lies among a thousand images in a directory beside it."""
    gate = qcowkit.ReferenceGate.trusting()
    values = {"size": MiB, "cluster_size": 4096, "guid": "auto"}
    images = path.with_name(path.name + ".d")
    images.mkdir()
    for index in range(1000):
        create_image(images / f"{index}.qcow2", CreateOptions.of("qcow2", values), gate=gate)
    backing = {"backing_file": f"{images}/777.qcow2", "backing_fmt": "qcow2"}
    create_image(path, CreateOptions.of("qcow2", {**values, **backing}), gate=gate)
    (images / "777.qcow2").rename(images / "moved.qcow2")


RECIPES: dict[str, Callable[[Library, Path], None]] = {
    "disk_raw": _disk_raw,
    "big_raw": _big_raw,
    "disk_qcow2": _converted("disk_raw", "-O", "qcow2"),
    "big_qcow2": _converted("big_raw", "-O", "qcow2"),
    "disk_zlib": _converted("disk_raw", "-O", "qcow2", "-c"),
    "disk_zstd": _converted("disk_raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd"),
    "disk_luks": _sealed,
    "disk_vpc": _converted("disk_raw", "-O", "vpc"),
    "fragmented": _fragmented,
    "huge": _huge,
    "vast": _vast,
    "full": _full,
    "moved": _moved,
}
