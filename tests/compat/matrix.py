"""The matrix of qcow2 options that we and qemu-img try on each other, and a small part that covers
every pair of values. Deterministic: the same cases in every run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from itertools import combinations, product

from qcowkit.units import KiB, MiB

CLUSTER_SIZES = (512, 4 * KiB, 16 * KiB, 64 * KiB, 2 * MiB)
REFCOUNT_BITS = (1, 2, 4, 8, 16, 32, 64)
COMPATS = ("0.10", "1.1")
COMPRESSIONS = ("none", "zlib", "zstd")
PREALLOCATIONS = ("off", "metadata", "falloc", "full")
SIZES = (512, MiB, MiB + 512, 3 * MiB - 2560)
STORAGES = ("plain", "raw-base", "qcow2-base", "data-file", "raw-data-file")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One combination. size: guest bytes. compression: of some clusters, or none."""

    cluster_size: int
    refcount_bits: int
    compat: str
    extended_l2: bool
    compression: str
    preallocation: str
    size: int
    storage: str

    @property
    def name(self) -> str:
        """For test ids."""
        extended = "-extl2" if self.extended_l2 else ""
        return (
            f"c{self.cluster_size}-r{self.refcount_bits}-{self.compat}{extended}"
            f"-{self.compression}-{self.preallocation}-s{self.size}-{self.storage}"
        )

    @property
    def based(self) -> bool:
        """Whether it has a backing file."""
        return self.storage.endswith("-base")

    @property
    def external(self) -> bool:
        """Whether the data lies in a file of its own."""
        return self.storage.endswith("data-file")

    def options(self) -> str:
        """The value of -o, the same for both programs."""
        words = {
            "compat": self.compat,
            "cluster_size": self.cluster_size,
            "refcount_bits": self.refcount_bits,
            "extended_l2": "on" if self.extended_l2 else "off",
            "preallocation": self.preallocation,
        }
        if self.compression == "zstd":
            words["compression_type"] = "zstd"
        if self.external:
            words["data_file"] = "disk.data"
        if self.storage == "raw-data-file":
            words["data_file_raw"] = "on"
        return ",".join(f"{key}={value}" for key, value in words.items())

    def possible(self) -> bool:
        """Whether the format, and both programs, allow it."""
        old = self.compat == "0.10"
        modern = self.extended_l2 or self.external or self.compression == "zstd"
        if old and (modern or self.refcount_bits != 16):
            return False
        if self.extended_l2 and self.cluster_size < 16 * KiB:
            return False
        if self.compression != "none" and (self.external or self.preallocation != "off"):
            return False
        if self.based and self.preallocation != "off" and not self.extended_l2:
            return False
        # For qemu a raw data file takes no preallocation below metadata.
        return self.storage != "raw-data-file" or self.preallocation != "off"


@cache
def all_cases() -> tuple[Case, ...]:
    """The full product of what is possible."""
    axes = product(
        CLUSTER_SIZES,
        REFCOUNT_BITS,
        COMPATS,
        (False, True),
        COMPRESSIONS,
        PREALLOCATIONS,
        SIZES,
        STORAGES,
    )
    cases = (
        Case(
            cluster_size=cluster_size,
            refcount_bits=refcount_bits,
            compat=compat,
            extended_l2=extended_l2,
            compression=compression,
            preallocation=preallocation,
            size=size,
            storage=storage,
        )
        for (
            cluster_size,
            refcount_bits,
            compat,
            extended_l2,
            compression,
            preallocation,
            size,
            storage,
        ) in axes
    )
    return tuple(case for case in cases if case.possible())


@cache
def covering_cases(rounds: int = 2) -> tuple[Case, ...]:
    """A part in which every possible pair of values occurs, in each round with other company."""
    return tuple(dict.fromkeys(case for seed in range(rounds) for case in _cover(seed)))


def _cover(seed: int) -> Iterator[Case]:
    cases = all_cases()
    at: dict[object, list[Case]] = {}
    for case in cases:
        for pair in _pairs(case):
            at.setdefault(pair, []).append(case)
    noise = random.Random(seed)
    open_pairs = dict.fromkeys(at)
    # Rare pairs first: the others come with them.
    for pair in sorted(at, key=lambda pair: len(at[pair])):
        if pair not in open_pairs:
            continue
        candidates = noise.sample(at[pair], min(60, len(at[pair])))
        best = max(candidates, key=lambda case: sum(one in open_pairs for one in _pairs(case)))
        yield best
        for one in _pairs(best):
            open_pairs.pop(one, None)


def _pairs(case: Case) -> Iterator[object]:
    yield from combinations(enumerate(astuple(case)), 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One change of a guest range, as words of qemu-io; whole sectors."""

    words: str
    start: int
    length: int

    def overlaps(self, other: Edit) -> bool:
        """Whether both touch a byte."""
        return self.start < other.start + other.length and other.start < self.start + self.length

    def command(self) -> str:
        """The command for `qemu-io -c`."""
        return f"{self.words} {self.start} {self.length}"


def plan_edits(case: Case, *, count: int = 8) -> list[Edit]:
    """Writes of patterns and noise, zeros and discards; compressed ones where the case has them."""
    noise = random.Random(case.name)
    kinds = ["write -P {byte}", "write -s noise.bin", "write -z", "write -z -u", "discard"]
    if case.compression != "none":
        kinds += ["write -c -P {byte}", "write -c -s noise.bin"] * 2
    edits: list[Edit] = []
    for _ in range(count):
        words = noise.choice(kinds).format(byte=noise.randrange(1, 256))
        # Compressed writes take whole clusters; others are aligned now and then.
        whole = "-c" in words or noise.random() < 0.4
        unit = case.cluster_size if whole else 512
        start = noise.randrange(-(-case.size // unit)) * unit
        most = min(case.size - start, max(4 * unit, 128 * KiB))
        length = min(-(-noise.randrange(1, most + 1) // unit) * unit, case.size - start)
        edit = Edit(words=words, start=start, length=length)
        # qemu compresses only what is not allocated yet.
        if "-c" not in words:
            edits.append(edit)
        elif not any(edit.overlaps(other) for other in edits if "-c" in other.words):
            edits.insert(0, edit)
    return edits


def commands(edits: Sequence[Edit]) -> list[str]:
    """Arguments for qemu-io."""
    return [word for edit in edits for word in ("-c", edit.command())]
