"""The images that the benchmarks read: made once, kept while a row still needs them.

No numpy here: see `measure`. A real file system comes from `mke2fs -d` and the files of this
machine; images that no tool makes quickly are written table by table."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import run_quietly

MiB = 1 << 20
GiB = 1 << 30

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
_COPIED = 1 << 63
_ENTRIES = CLUSTER // 8
_COUNTS = CLUSTER // 2

_BLOCK = 4096
_ROOTS = ("/usr/lib", "/usr/share", sys.base_prefix, "/usr/bin", "/opt")
_FILE_SYSTEM_ID = "7b1d5f2e-0c5a-4f0e-9a55-1f2d3c4b5a69"


# Images written table by table.


def make_fragmented(path: Path, extents: int = 1_000_000, *, step: int = 2) -> None:
    """A qcow2 of `extents` data clusters of 64 KiB, none beside another in the guest or the file.

    Every `step`-th guest cluster is allocated, and neighbours trade places in the file. The data
    are holes: the file takes about 10 bytes of host space an extent, or a block for each L2 table
    when there are few extents a table. `qemu-img check` calls it clean."""
    guest = step * extents
    used = sorted({extent * step // _ENTRIES for extent in range(extents)})
    l1_size = -(-guest // _ENTRIES)
    first_l2 = 1 + -(-l1_size * 8 // CLUSTER)
    first_data = first_l2 + len(used)
    first_table = first_data + extents
    end, tables, blocks = _refcount_space(first_table)
    with path.open("wb") as file:
        file.truncate(end * CLUSTER)
        fd = file.fileno()
        header = _header(guest * CLUSTER, l1_size, CLUSTER, first_table * CLUSTER, tables)
        os.pwrite(fd, header, 0)
        l1 = array("Q", bytes(l1_size * 8))
        for place, index in enumerate(used):
            l1[index] = (first_l2 + place) << CLUSTER_BITS | _COPIED
            first, words = _l2_words(index, extents, step, first_data)
            os.pwrite(fd, _big_endian(words), (first_l2 + place) * CLUSTER + first * 8)
        os.pwrite(fd, _big_endian(l1), CLUSTER)
        table = array("Q", range(first_table + tables, end))
        os.pwrite(
            fd, _big_endian(array("Q", [n << CLUSTER_BITS for n in table])), first_table * CLUSTER
        )
        _write_all(fd, b"\0\1" * end, (first_table + tables) * CLUSTER)


def _l2_words(index: int, extents: int, step: int, first_data: int) -> tuple[int, array[int]]:
    """The entries of one L2 table: (index of the first, words up to the last that is used)."""
    first = -(-index * _ENTRIES // step)
    last = min(extents, -(-(index + 1) * _ENTRIES // step))
    hosts = (
        # The last of an odd number has no neighbour to trade with.
        (first_data + (extent ^ 1 if extent ^ 1 < extents else extent)) << CLUSTER_BITS | _COPIED
        for extent in range(first, last)
    )
    begin = first * step - index * _ENTRIES
    words = array("Q", bytes(((last - 1 - first) * step + 1) * 8))
    words[::step] = array("Q", hosts)
    return begin, words


def _refcount_space(used: int) -> tuple[int, int, int]:
    """(clusters in all, of the refcount table, of its blocks) behind `used` other clusters."""
    tables = blocks = 1
    while True:
        end = used + tables + blocks
        needed = -(-end // _COUNTS)
        needed_tables = -(-needed * 8 // CLUSTER)
        if (needed_tables, needed) == (tables, blocks):
            return end, tables, blocks
        tables, blocks = needed_tables, needed


def _header(size: int, l1_size: int, l1: int, table: int, table_clusters: int) -> bytes:
    """A version 3 header without extensions."""
    # magic, version, backing file, cluster bits, size, encryption; tables; snapshots
    fixed = struct.pack(">4sIQIIQI", b"QFI\xfb", 3, 0, 0, CLUSTER_BITS, size, 0)
    places = struct.pack(">IQQIIQ", l1_size, l1, table, table_clusters, 0, 0)
    return fixed + places + struct.pack(">QQQIIQ", 0, 0, 0, 4, 112, 0)


def _big_endian(words: array[int]) -> bytes:
    if sys.byteorder == "little":
        words = words[:]
        words.byteswap()
    return words.tobytes()


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


# A disk of real files.


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Files for a disk, in the order of their names. total: bytes of their content."""

    paths: tuple[Path, ...]
    total: int


def choose_files(roots: Sequence[str | Path], *, size: int) -> Chosen:
    """Regular files below the roots, in the order of roots and names, until `size` bytes are
    reached; fewer when there are no more. What cannot be read is left out."""
    paths: list[Path] = []
    seen: set[tuple[int, int]] = set()
    total = 0
    for root in roots:
        for path, status in _iter_files(Path(root)):
            key = (status.st_dev, status.st_ino)
            if key in seen or not os.access(path, os.R_OK):
                continue
            seen.add(key)
            paths.append(path)
            total += status.st_size
            if total >= size:
                return Chosen(paths=tuple(paths), total=total)
    return Chosen(paths=tuple(paths), total=total)


def _iter_files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            try:
                status = path.lstat()
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode) and status.st_size:
                yield path, status


def make_disk(path: Path, *, size: int, say: Callable[[str], None]) -> None:
    """A raw disk with about `size` bytes of real files, as an ext4 file system.

    Without mke2fs the files lie one behind the other, each from a block of its own, and `say` is
    told so; as it is when the machine has fewer files."""
    chosen = choose_files(_ROOTS, size=size)
    if chosen.total < size:
        say(f"this machine has only {chosen.total >> 20} MiB of files, wanted {size >> 20}")
    tool = find_tool("mke2fs")
    if tool is None:
        say("mke2fs is missing (package e2fsprogs): the disk is files without a file system")
        _string_together(path, chosen)
        return
    tree = path.with_suffix(".tree")
    try:
        for source in chosen.paths:
            target = tree / source.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        with path.open("wb") as file:
            # Room for inodes, the journal and the tails of files.
            file.truncate((chosen.total * 5 // 4 + 128 * MiB) // MiB * MiB)
        options = f"root_owner=0:0,hash_seed={_FILE_SYSTEM_ID}"
        run_quietly(
            tool, "-q", "-F", "-t", "ext4", "-U", _FILE_SYSTEM_ID, "-E", options, "-d", tree, path
        )
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def _string_together(path: Path, chosen: Chosen) -> None:
    with path.open("wb") as file:
        for source in chosen.paths:
            with source.open("rb") as content:
                shutil.copyfileobj(content, file)
            file.truncate(-(-file.tell() // _BLOCK) * _BLOCK)
            os.lseek(file.fileno(), 0, os.SEEK_END)
        file.truncate(file.tell() + 64 * MiB)


def repeat_disk(source: Path, path: Path, *, size: int) -> None:
    """A raw disk of copies of another, holes kept, until it has `size` bytes of data."""
    with source.open("rb") as content, path.open("wb") as file:
        length = os.fstat(content.fileno()).st_size
        base, left = 0, size
        while left > 0:
            for begin, end in _iter_data(content.fileno(), length):
                take = min(end - begin, left)
                _copy(content.fileno(), file.fileno(), begin, base + begin, take)
                left -= take
                if not left:
                    break
            base += length
        file.truncate(base)


def _iter_data(fd: int, length: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < length:
        try:
            begin = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(fd, begin, os.SEEK_HOLE)
        yield begin, end


def _copy(source: int, target: int, offset: int, target_offset: int, length: int) -> None:
    done = 0
    while done < length:
        part = os.pread(source, min(4 * MiB, length - done), offset + done)
        _write_all(target, part, target_offset + done)
        done += len(part)


def find_tool(name: str) -> str | None:
    """The path of a command, also where only root's search path leads; None where there is none."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    return shutil.which(name, path=path)
