"""What is measured: pairs of commands, their goals, and how a result is verified. Pure."""

from __future__ import annotations

import fnmatch
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

# Goals in bytes: the peak memory of any convert; of check and map of a vast disk.
CONVERT_MEMORY = 150_000_000
VAST_MEMORY = 300_000_000
ZLIB_SIZE = 1.12

Command = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row. Words such as {disk_raw} in commands stand for images; {out} is the file to write,
    {qcow}, {python} and {bench} are the project's own.

    goal: least ratio peer/ours of wall clock, None for information. size_limit: most output of ours
    over the peer's. memory_limit: peak of ours, bytes. xfs: run on a file system with reflink.
    allocated: give the images there all the space of their holes, as if data had been written.
    verify: a command that must succeed after a run of ours, empty where exit codes say it all."""

    name: str
    title: str
    peer: Command
    ours: Command
    goal: float | None = None
    size_limit: float | None = None
    memory_limit: int | None = None
    xfs: bool = False
    allocated: bool = False
    verify: Command = ()

    @property
    def images(self) -> tuple[str, ...]:
        """The names of the images that the row needs, in the order of their mention."""
        words = " ".join((*self.peer, *self.ours, *self.verify))
        names = [name for _, name, _, _ in string.Formatter().parse(words) if name]
        return tuple(dict.fromkeys(name for name in names if name not in _NOT_IMAGES))

    @property
    def writes(self) -> bool:
        """Whether the commands write an output."""
        return "{out}" in self.ours


_NOT_IMAGES = frozenset({"out", "qcow", "python"})


def fill(command: Sequence[str], values: Mapping[str, object]) -> list[str]:
    """The words of a command with names replaced."""
    return [word.format_map(dict(values)) for word in command]


class Named(Protocol):
    """What all kinds of rows have."""

    @property
    def name(self) -> str:
        """By which it is chosen."""

    @property
    def images(self) -> tuple[str, ...]:
        """The names of the images that it shares with others."""


AnyRow = TypeVar("AnyRow", bound=Named)


def select(rows: Iterable[AnyRow], patterns: Sequence[str]) -> list[AnyRow]:
    """The rows whose name matches any of the shell patterns; all without patterns.

    Raises ValueError for a pattern that matches none."""
    rows = list(rows)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in rows):
            names = ", ".join(row.name for row in rows)
            raise ValueError(f"no row is called {pattern!r}; known are {names}")
    return [
        row
        for row in rows
        if not patterns or any(fnmatch.fnmatchcase(row.name, pattern) for pattern in patterns)
    ]


def needed_later(rows: Sequence[Named]) -> list[set[str]]:
    """For each row, the images to keep once it is done.

    An image may be made from the raw one of its family, which stays as long as any of them."""
    kept: list[set[str]] = []
    later: set[str] = set()
    for row in reversed(rows):
        kept.append(set(later))
        for image in row.images:
            later |= {image} | _ANCESTORS.get(image.partition("_")[0], set())
    return kept[::-1]


_ANCESTORS = {"disk": {"disk_raw"}, "big": {"big_raw", "disk_raw"}}


def _convert(
    name: str,
    title: str,
    *flags: str,
    source: str,
    target: str,
    peer_flags: Command = (),
    goal: float | None = None,
    size_limit: float | None = None,
    xfs: bool = False,
) -> Row:
    """Both sides with the same flags; the guest content of ours is compared with the source's."""
    kind = source.partition("_")[2]
    format = kind if kind in ("raw", "vpc") else "qcow2"
    image = f"{{{source}}}"
    words = ("convert", "-f", format, "-O", target, *flags)
    return Row(
        name=name,
        title=title,
        peer=("qemu-img", *words, *peer_flags, image, "{out}"),
        ours=("{qcow}", *words, image, "{out}"),
        goal=goal,
        size_limit=size_limit,
        memory_limit=CONVERT_MEMORY,
        xfs=xfs,
        verify=("qemu-img", "compare", "-f", format, "-F", target, image, "{out}"),
    )


def _both(
    name: str,
    title: str,
    *words: str,
    goal: float | None = None,
    memory_limit: int | None = None,
    allocated: bool = False,
    verify: Command = (),
) -> Row:
    """The same words for both sides."""
    return Row(
        name=name,
        title=title,
        peer=("qemu-img", *words),
        ours=("{qcow}", *words),
        goal=goal,
        memory_limit=memory_limit,
        xfs=allocated,
        allocated=allocated,
        verify=verify,
    )


def _same_answer(verb: str, image: str) -> Command:
    return ("{python}", "-m", "bench.verify", verb, "{qcow}", image)


_PARALLEL = ("-W", "-m", "16")
_MAP = ("map", "-f", "qcow2", "--output=json")
_CHECK = ("check", "-f", "qcow2")
_SECRET: Command = ("--object", "secret,id=s,data=benchmark")
_SEALED = "driver=qcow2,encrypt.key-secret=s,file.filename="
_PLAIN = "driver=raw,file.filename={disk_raw}"
_DECRYPT: Command = (
    *("convert", "-O", "raw", *_SECRET, "--image-opts", f"{_SEALED}{{disk_luks}}"),
)
ENCRYPT: Command = (
    *("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *_SECRET),
    *("-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"),
)


def _taken_and_deleted(tool: str) -> Command:
    """A snapshot taken, and deleted again."""
    return ("sh", "-c", '"$0" snapshot -c s "$1" && "$0" snapshot -d s "$1"', tool, "{full}")


def _widened(tool: str) -> Command:
    """Refcounts of another width, and of the old one again."""
    script = '"$0" amend -q -o refcount_bits=32 "$1" && "$0" amend -q -o refcount_bits=16 "$1"'
    return ("sh", "-c", script, tool, "{full}")


def _bitmaps_changed(tool: str) -> Command:
    """A bitmap of fine granules made, another merged with it, both gone again."""
    script = (
        '"$0" bitmap --add -g 4k "$1" a && "$0" bitmap --add -g 64k --merge a --disable "$1" b && '
        '"$0" bitmap --remove "$1" a && "$0" bitmap --remove "$1" b'
    )
    return ("sh", "-c", script, tool, "{full}")


def _committed(tool: str, *flags: str) -> Command:
    """The disk committed into an empty image that grows; afterwards it stands by itself again."""
    script = (
        'disk=$1 base=$2; shift 2; qemu-img create -q -f qcow2 "$base" 1M && '
        'qemu-img rebase -q -u -F qcow2 -b "$base" "$disk" && "$@" "$disk"; '
        'code=$?; qemu-img rebase -q -u -b "" "$disk"; exit $code'
    )
    words = (tool, "commit", "-q", "-d", *flags)
    return ("sh", "-c", script, "-", "{disk_qcow2}", "{out}", *words)


def _rebased(tool: str, *flags: str) -> Command:
    """An empty overlay of the disk put over nothing: it holds all of it then."""
    script = (
        'disk=$1 overlay=$2; shift 2; qemu-img create -q -f qcow2 -F qcow2 -b "$disk" "$overlay" '
        '&& "$@" "$overlay"'
    )
    words = (tool, "rebase", "-q", *flags, "-b", "")
    return ("sh", "-c", script, "-", "{disk_qcow2}", "{out}", *words)


def _rebased_above(tool: str, *flags: str) -> Command:
    """An empty overlay of the disk put over another empty one: nothing differs."""
    script = (
        'disk=$1 overlay=$2; shift 2; for one in "$overlay.base" "$overlay"; do '
        'qemu-img create -q -f qcow2 -F qcow2 -b "$disk" "$one"; done; '
        '"$@" -b "$overlay.base" "$overlay"'
    )
    words = (tool, "rebase", "-q", *flags, "-F", "qcow2")
    return ("sh", "-c", script, "-", "{disk_qcow2}", "{out}", *words)


def retried(*command: str) -> Command:
    """A command that makes a LUKS header with qemu-img, which sometimes finds the clock too coarse
    to count iterations by; ten times are enough."""
    return (
        "sh",
        "-c",
        'for _ in 0 1 2 3 4 5 6 7 8 9; do "$@" && exit; done; exit 1',
        "-",
        *command,
    )


_SAME_DISK: Command = (
    *("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", "{disk_qcow2}", "{out}"),
)
_INFO = ("info", "-f", "qcow2", "{disk_zlib}")
_START = ("{python}", "-c", "pass")
# The images lie in a directory beside the overlay.
_FIND = ("--scan", "{moved}.d", "{moved}")
_EACH_INFO = (
    *("sh", "-c", 'for one in "$1"/*; do qemu-img info "$one" > /dev/null; done'),
    *("-", "{moved}.d"),
)

ROWS: tuple[Row, ...] = (
    _convert("raw-qcow2-3g", "raw to qcow2, 3 GiB", source="big_raw", target="qcow2", goal=1.0),
    _convert(
        "xfs-3g",
        "raw to qcow2 on XFS, 3 GiB, clusters shared",
        source="big_raw",
        target="qcow2",
        xfs=True,
    ),
    _convert("qcow2-raw-3g", "qcow2 to raw, 3 GiB", source="big_qcow2", target="raw", goal=1.0),
    _convert("raw-qcow2", "raw to qcow2, 700 MB", source="disk_raw", target="qcow2", goal=0.9),
    _convert("qcow2-raw", "qcow2 to raw, 700 MB", source="disk_qcow2", target="raw", goal=0.9),
    _convert(
        "raw-qcow2-xfs",
        "raw to qcow2 on XFS, 700 MB, clusters shared",
        source="disk_raw",
        target="qcow2",
        goal=5.0,
        xfs=True,
    ),
    # Ours is durable when it ends; of qemu-img this must be asked for.
    _convert(
        "durable-xfs",
        "the same, qemu-img with -t writeback to be as durable",
        source="disk_raw",
        target="qcow2",
        peer_flags=("-t", "writeback"),
        xfs=True,
    ),
    _convert(
        "to-zlib",
        "raw to compressed qcow2, zlib",
        "-c",
        source="disk_raw",
        target="qcow2",
        peer_flags=_PARALLEL,
        goal=8.0,
        size_limit=ZLIB_SIZE,
    ),
    _convert(
        "to-zstd",
        "raw to compressed qcow2, zstd",
        "-c",
        "-o",
        "compression_type=zstd",
        source="disk_raw",
        target="qcow2",
        peer_flags=_PARALLEL,
        goal=1.5,
    ),
    _convert("zlib-raw", "zlib qcow2 to raw", source="disk_zlib", target="raw", goal=2.0),
    _convert("zstd-raw", "zstd qcow2 to raw", source="disk_zstd", target="raw", goal=1.2),
    Row(
        name="to-luks",
        title="raw to qcow2 encrypted with LUKS",
        peer=retried(*ENCRYPT, "{disk_raw}", "{out}"),
        ours=("{qcow}", *ENCRYPT[1:], "{disk_raw}", "{out}"),
        goal=3.0,
        memory_limit=CONVERT_MEMORY,
        verify=("qemu-img", "compare", *_SECRET, "--image-opts", _PLAIN, f"{_SEALED}{{out}}"),
    ),
    Row(
        name="luks-compare",
        title="reading LUKS: compare with what it was made from",
        peer=("qemu-img", "compare", *_SECRET, "--image-opts", _PLAIN, f"{_SEALED}{{disk_luks}}"),
        ours=("{qcow}", "compare", *_SECRET, "--image-opts", _PLAIN, f"{_SEALED}{{disk_luks}}"),
        goal=3.0,
        memory_limit=CONVERT_MEMORY,
    ),
    Row(
        name="luks-raw",
        title="qcow2 encrypted with LUKS to raw",
        peer=("qemu-img", *_DECRYPT, *_PARALLEL, "{out}"),
        ours=("{qcow}", *_DECRYPT, "{out}"),
        goal=3.0,
        memory_limit=CONVERT_MEMORY,
        verify=("qemu-img", "compare", "-f", "raw", "-F", "raw", "{disk_raw}", "{out}"),
    ),
    _both(
        "compare",
        "compare plain with zlib qcow2",
        *("compare", "-f", "qcow2", "-F", "qcow2", "{disk_qcow2}", "{disk_zlib}"),
        goal=3.0,
    ),
    _both(
        "map",
        "map of 1 M extents as JSON",
        *_MAP,
        "{fragmented}",
        goal=1.5,
        # Where the host has holes, both ask it for each extent: that is the next row.
        allocated=True,
        verify=_same_answer("map", "{fragmented}"),
    ),
    _both(
        "map-holes",
        "map of 1 M extents that are holes of the file",
        *_MAP,
        "{fragmented}",
        verify=_same_answer("map", "{fragmented}"),
    ),
    _both(
        "check",
        "check of 1 M extents",
        *_CHECK,
        "{fragmented}",
        goal=1.5,
        verify=_same_answer("check", "{fragmented}"),
    ),
    # Start-up is most of the row before; this one shows the rate.
    _both("check-10m", "check of 10 M extents", *_CHECK, "{huge}"),
    _both(
        "map-64t",
        "map of a sparse 64 TiB disk as JSON",
        *_MAP,
        "{vast}",
        memory_limit=VAST_MEMORY,
        verify=_same_answer("map", "{vast}"),
    ),
    _both(
        "check-64t",
        "check of a sparse 64 TiB disk",
        *_CHECK,
        "{vast}",
        memory_limit=VAST_MEMORY,
        verify=_same_answer("check", "{vast}"),
    ),
    Row(
        name="snapshot-1t",
        title="snapshot taken and deleted, 1 TiB all allocated",
        peer=_taken_and_deleted("qemu-img"),
        ours=_taken_and_deleted("{qcow}"),
        goal=1.5,
        verify=("qemu-img", "check", "-q", "{full}"),
    ),
    Row(
        name="amend-1t",
        title="refcounts of a full disk of 1 TiB to 32 bits and back",
        peer=_widened("qemu-img"),
        ours=_widened("{qcow}"),
        goal=1.0,
        verify=("qemu-img", "check", "-q", "{full}"),
    ),
    Row(
        name="bitmap-1t",
        title="bitmaps of 1 TiB added, merged and removed",
        peer=_bitmaps_changed("qemu-img"),
        ours=_bitmaps_changed("{qcow}"),
        verify=("qemu-img", "check", "-q", "{full}"),
    ),
    Row(
        name="commit",
        title="commit of 700 MB into an empty qcow2",
        peer=_committed("qemu-img"),
        ours=_committed("{qcow}", "--trust"),
        goal=1.0,
        verify=_SAME_DISK,
    ),
    Row(
        name="rebase",
        title="rebase of an overlay of 700 MB onto nothing",
        peer=_rebased("qemu-img"),
        ours=_rebased("{qcow}", "--trust"),
        goal=1.0,
        verify=_SAME_DISK,
    ),
    Row(
        name="find-backing",
        title="a backing file found among 1,000 images, by a loop of info",
        peer=_EACH_INFO,
        ours=("{qcow}", "find-backing", "--index", ":memory:", *_FIND),
    ),
    Row(
        name="find-backing-again",
        title="the same with an index that knows the images",
        peer=_EACH_INFO,
        ours=("{qcow}", "find-backing", "--index", "{moved}.sqlite", *_FIND),
    ),
    Row(
        name="rebase-shared",
        title="rebase between overlays of one disk of 700 MB",
        peer=_rebased_above("qemu-img"),
        ours=_rebased_above("{qcow}", "--trust"),
        goal=1.0,
        verify=_SAME_DISK,
    ),
    _both("info", "info", *_INFO),
    Row(
        name="info-start",
        title="info, against the bare interpreter",
        peer=_START,
        ours=("{qcow}", *_INFO),
    ),
    Row(
        name="help-start",
        title="--help, against the bare interpreter",
        peer=_START,
        ours=("{qcow}", "--help"),
    ),
    _convert("raw-vpc", "raw to VHD", source="disk_raw", target="vpc"),
    _convert("vpc-raw", "VHD to raw", source="disk_vpc", target="raw"),
    _convert(
        "zlib-zlib",
        "zlib qcow2 to zlib qcow2, clusters verbatim",
        "-c",
        source="disk_zlib",
        target="qcow2",
        peer_flags=_PARALLEL,
    ),
)
