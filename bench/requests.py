"""What a row about single requests is: images made for it, requests, clocks, proofs. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from bench.rows import Command

KiB = 1 << 10
TiB = 1 << 40
CLUSTER = 64 * KiB

# What the writes leave behind, and what a backing file is full of: neither is zero.
PATTERN = 0xA5
BASE_BYTE = 0x5C

# qemu-img takes no longer steps.
PEER_STEP = 1 << 31
_GOLDEN = 6_180_339_887

Clock = Literal["reported", "operations", "wall"]
Options = Mapping[str, int | str]
NO_OPTIONS: Options = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Blank:
    """How an image comes about. size, cluster: bytes. options: of `create -o`.

    base: the format of a backing file full of BASE_BYTE, empty for none. grown: bytes by which the
    disk grows once it is made: what is preallocated ends before them. crash: commands of qemu-io
    behind which `qcow io` ends as if it had been killed. tool: what creates it, empty for the one
    that is quick."""

    size: int
    cluster: int = CLUSTER
    options: tuple[str, ...] = ()
    base: Literal["", "raw", "qcow2"] = ""
    grown: int = 0
    crash: tuple[str, ...] = ()
    tool: Literal["", "qemu-img", "{qcow}"] = ""

    @property
    def full_size(self) -> int:
        """Bytes of the disk."""
        return self.size + self.grown

    @property
    def allocated(self) -> bool:
        """Whether all clusters have their place from the start."""
        return any(word.startswith("preallocation=") for word in self.options)

    @property
    def room(self) -> int:
        """Bytes that the image takes on the host before anything is written, and its base."""
        data = self.size if "preallocation=falloc" in self.options else 0
        tables = self.size // self.cluster * 10 if self.allocated else 0
        return data + tables + (2 * self.size if self.base else 0)

    def commands(self) -> list[Command]:
        """What makes it at {image}; {base} is the backing file, which is there already."""
        options = ",".join((f"cluster_size={self.cluster}", *self.options))
        # Ours writes the tables of large images in a tenth of the time; both make the same.
        tool = self.tool or ("{qcow}" if self.allocated else "qemu-img")
        create: Command = (tool, "create", "-q", "-f", "qcow2", "-o", options)
        if self.base:
            create += ("-b", "{base}", "-F", self.base)
        made: list[Command] = [(*create, "{image}", str(self.size))]
        if self.grown:
            # The same tool: another one would drop what it does not know from the header.
            made.append((tool, "resize", "-q", "{image}", str(self.full_size)))
        return made

    def killed(self) -> Command:
        """What leaves it behind as after a crash, and ends by SIGABRT itself."""
        return ("{qcow}", *io("io", (*self.crash, "abort"), "{image}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """Requests of `size` bytes, each `step` bytes behind the one before, modulo the disk's size.

    flush: a flush after so many, 0 for none. depth: how many the peer keeps under way. warm: how
    many more the library is asked before, which are not timed."""

    count: int
    step: int
    size: int = 4 * KiB
    write: bool = True
    flush: int = 0
    depth: int = 64
    warm: int = 0

    def words(self) -> Command:
        """The flags of `bench`, which both tools share."""
        words: tuple[object, ...] = ("-c", self.count, "-s", self.size, "-S", self.step)
        words += ("-d", self.depth)
        if self.write:
            words += ("-w", f"--pattern={PATTERN}")
        if self.flush:
            words += (f"--flush-interval={self.flush}",)
        return tuple(map(str, words))

    def loop(self) -> Command:
        """The flags of `bench.in_process`; depth means nothing there."""
        words: tuple[object, ...] = ("--count", self.count, "--size", self.size)
        words += ("--step", self.step, "--flush", self.flush)
        if self.warm:
            words += ("--warm", self.warm)
        if self.write:
            words += ("--pattern", PATTERN)
        return tuple(map(str, words))


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    """One row. In commands {image} stands for the image of the side, {qcow} and {python} for the
    project's own.

    image, peer_image: how they are made; None for one like ours. fresh: made anew before each run;
    if not, both sides share it where it is the same. api: the loop over the library, empty where
    there is none. script: lines for the standard input of both tools. clock: where the seconds come
    from. count: requests that they are for. peer_label: what the table calls a peer that is not
    `qemu-img bench`. written: what must be found afterwards, None where nothing is looked for.
    around: the byte that fills the rest of a cluster that was allocated, None where that is not
    looked at. goal: least ratio peer/ours, None for information. pairs: how many runs at most."""

    name: str
    title: str
    image: Blank
    peer: Command
    ours: Command
    count: int
    api: Command = ()
    peer_image: Blank | None = None
    fresh: bool = True
    script: tuple[str, ...] = ()
    clock: Clock = "reported"
    goal: float | None = None
    pairs: int | None = None
    peer_label: str = ""
    written: Requests | None = None
    around: int | None = None

    @property
    def images(self) -> tuple[str, ...]:
        """Images that are shared with other rows: none."""
        return ()

    @property
    def room(self) -> int:
        """Bytes that the images and what is written may take on the host, roughly."""
        blanks = {self.image, self.peer_image or self.image}
        size = self.written.size if self.written else 0
        data = self.count * max(size, CLUSTER if self.fresh else 0)
        return sum(blank.room for blank in blanks) + data


# Commands.


def paired(
    name: str,
    title: str,
    *,
    image: Blank,
    requests: Requests,
    goal: float | None = None,
    options: Options = NO_OPTIONS,
) -> RequestRow:
    """The same requests through `qemu-img bench`, `qcow bench` and the library."""
    return RequestRow(
        name=name,
        title=title,
        image=image,
        peer=("qemu-img", *bench(requests, options)),
        ours=("{qcow}", *bench(requests, options)),
        api=in_process(requests, options),
        count=requests.count,
        fresh=requests.write and not image.allocated,
        goal=goal,
        written=requests if requests.write else None,
        around=None if image.allocated else BASE_BYTE if image.base else 0,
    )


def bench(requests: Requests, options: Options = NO_OPTIONS) -> Command:
    """The verb `bench` with its words; options are of the block layer."""
    if not options:
        return ("bench", *requests.words(), "-f", "qcow2", "{image}")
    pairs = "".join(f",{name}={value}" for name, value in options.items())
    return (
        "bench",
        *requests.words(),
        "--image-opts",
        f"driver=qcow2,file.filename={{image}}{pairs}",
    )


def in_process(requests: Requests, options: Options = NO_OPTIONS) -> Command:
    """The same requests in a program that uses the library."""
    pairs = [word for name, value in options.items() for word in ("--option", f"{name}={value}")]
    return ("{python}", "-m", "bench.in_process", *requests.loop(), *pairs, "{image}")


def io(tool: str, commands: tuple[str, ...], image: str) -> Command:
    """A tool that speaks the language of qemu-io, with commands to carry out."""
    return (tool, "-f", "qcow2", *(word for one in commands for word in ("-c", one)), image)


def scattered(size: int, *, grain: int, most: int = PEER_STEP) -> int:
    """A step of less than `most` bytes that visits each grain of a disk once before any twice.

    size over grain is a power of two, so an odd number of grains is enough for that. Near a golden
    section, of the disk or of `most`, offsets spread evenly however many there are."""
    return (min(size, most) // grain * _GOLDEN // 10**10 | 1) * grain


# Clocks: seconds, from what a command printed.

_COMPLETED = re.compile(r"completed in ([\d.]+) seconds")
# bytes, operations, elapsed, bytes a second, operations a second
_OPERATION = re.compile(r"(?:qemu-io> )*\d+,1,[\d:.]+,[\d.]+,([\d.]+)$", re.MULTILINE)


def reported_seconds(text: str) -> float:
    """What `bench` says. Raises ValueError where it does not."""
    found = _COMPLETED.search(text)
    if found is None:
        raise ValueError(f"expected 'completed in ... seconds', found {text[-200:]!r}")
    return float(found[1])


def operation_seconds(text: str) -> float:
    """The sum over the requests whose figures `write -C` and its like print: the rate has the
    digits that the seconds lack. Raises ValueError where there is none."""
    rates = [float(rate) for rate in _OPERATION.findall(text)]
    if not rates or not all(rates):
        raise ValueError(f"expected figures of requests, found {text[-200:]!r}")
    return sum(1 / rate for rate in rates)


CLOCKS: Mapping[Clock, Callable[[str], float] | None] = {
    "reported": reported_seconds,
    "operations": operation_seconds,
    "wall": None,
}


# Proofs.


def probes(row: RequestRow, *, count: int = 16) -> tuple[str, ...]:
    """Commands of qemu-io that read some of what was written, and what must be beside it."""
    requests, cluster = row.written, row.image.cluster
    if requests is None:
        return ()
    commands = []
    for index in sorted({part * (requests.count - 1) // (count - 1) for part in range(count)}):
        offset = index * requests.step % row.image.full_size
        end = offset + requests.size
        commands.append(f"read -P {PATTERN} {offset} {requests.size}")
        rest = -end % cluster
        if row.around is not None and rest:
            commands.append(f"read -P {row.around} {end} {rest}")
    return tuple(commands)
