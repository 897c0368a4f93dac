"""Resize: change the size of a guest disk, and say what will be visible then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.errors import RequestError
from qcowkit.image.chain import Chain
from qcowkit.image.metadata import Metadata
from qcowkit.units import INT64_MAX, SECTOR, format_size, parse_size

PREALLOCATIONS = ("off", "metadata", "falloc", "full")
_SIGNS = {"+": 1, "-": -1}


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeChange:
    """A new size, or a difference to the present one. sign: 0 for a size, 1 or -1. size: bytes."""

    size: int
    sign: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """`20G`, `+512M`, `-1.5G`. Raises RequestError for anything else."""
        text = text.strip()
        sign = _SIGNS.get(text[:1], 0)
        return cls(size=parse_size(text[1:] if sign else text), sign=sign)

    def apply(self, size: int) -> int:
        """The new size of a disk that has `size` bytes; may be out of every range."""
        return size + self.sign * self.size if self.sign else self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Resized:
    """What was done. Sizes in bytes. notes: what is visible now, a line each."""

    old_size: int
    size: int
    notes: tuple[str, ...] = ()

    def render(self) -> list[str]:
        """The lines to print."""
        old, new = map(_both, (self.old_size, self.size))
        if self.size == self.old_size:
            return [f"the disk has {new} already"]
        word = "grown" if self.size > self.old_size else "shrunk"
        return [f"{word} from {old} to {new}", *self.notes]


def resize(
    chain: Chain,
    change: SizeChange,
    *,
    shrink: bool = False,
    preallocation: str = "off",
    expose: bool = False,
) -> Resized:
    """Change the size of a writable disk; durable on return.

    shrink: a smaller size is meant. preallocation: off, metadata, falloc or full, for what is
    added. What is added reads as zeros, whatever a base holds there, or with `expose` shows it.
    Raises RequestError before anything is written, and as `Chain.resize`."""
    old, new = chain.size, change.apply(chain.size)
    check_size(new, format=chain.format)
    if preallocation not in PREALLOCATIONS:
        expected = ", ".join(PREALLOCATIONS)
        raise RequestError(f"preallocation is {preallocation!r}, expected one of {expected}")
    if new <= old and preallocation != "off":
        raise RequestError(
            f"preallocation={preallocation} is for what is added, and a disk of {old} bytes does "
            f"not grow to {new}"
        )
    if new < old and not shrink:
        raise RequestError(
            f"new size is {new} bytes, below the present {old}: what lies beyond would be lost; "
            "--shrink does it all the same"
        )
    base = chain.images[1].size if len(chain.images) > 1 else None
    metadata = [layer.metadata for layer in chain.layers[:1]]
    notes = plan_notes(old=old, new=new, base=base, expose=expose)
    notes += _snapshot_notes(metadata)
    chain.resize(new, shrink=shrink, preallocation=preallocation, expose=expose)
    chain.flush()
    return Resized(old_size=old, size=chain.size, notes=notes)


def check_size(size: int, *, format: str) -> None:
    """Raises RequestError for a size that no disk of this format can have."""
    if size < 1:
        raise RequestError(f"new size is {size} bytes, expected at least 1")
    if size > INT64_MAX:
        raise RequestError(f"new size is {size} bytes, expected at most {INT64_MAX}")
    if format != "raw" and size % SECTOR:
        raise RequestError(
            f"new size is {size} bytes, expected a multiple of {SECTOR} for {format} images"
        )


def plan_notes(*, old: int, new: int, base: int | None, expose: bool = False) -> tuple[str, ...]:
    """What a resize from `old` to `new` bytes shows. base: size of the backing file's disk. expose:
    it is shown where it reaches."""
    if new < old:
        beyond = "zeros" if base is None else "zeros, not what the backing file holds"
        return (f"what lay beyond the new end is gone: growing the disk again brings {beyond}",)
    if new == old:
        return ()
    if expose and base is not None and base > old:
        end = "" if base >= new else f" up to its end at {_both(base)}, and zeros behind it"
        return (f"what was added shows the backing file{end}",)
    notes = ["what was added reads as zeros"]
    if base is not None and base > old:
        notes.append(
            f"the backing file has {_both(base)}: what it holds beyond the old end stays hidden"
        )
    elif base is not None:
        notes.append(f"the backing file ends at {_both(base)}: beyond it only this image has data")
    return tuple(notes)


def _snapshot_notes(metadata: Sequence[Metadata]) -> tuple[str, ...]:
    count = sum(len(one.snapshots) for one in metadata if isinstance(one, Qcow2Metadata))
    return (f"snapshots keep sizes and content of their own: {count}",) if count else ()


def _both(size: int) -> str:
    return f"{format_size(size)} ({size} bytes)"
