"""What a command says: lines in the form that scripts know from `qemu-io`. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qcowkit.operations.io_language.requests import Request, Style, Verification
from qcowkit.units import KiB

_NAMES = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_ROW = 16
_SIGNS = re.compile(rb"[^0-9A-Za-z]")


class Report(Protocol):
    """A result that renders itself."""

    def render(self) -> Iterator[str]:
        """Lines without their ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a command ended. reports: for standard output. errors: for people, a line each.

    failed: counts for the exit code. ends: no command follows. signal: to be raised once all is
    printed; `crash`: end at once, without closing anything."""

    reports: tuple[Report, ...] = ()
    errors: tuple[str, ...] = ()
    failed: bool = False
    ends: bool = False
    signal: int | None = None
    crash: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Text that was laid out already."""

    lines: Sequence[str]

    def render(self) -> Iterator[str]:
        """The lines."""
        yield from self.lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A request that was carried out. seconds: how long it took. mismatch: what was not as
    expected. dump: the bytes that were read, to be printed."""

    request: Request
    verb: str
    seconds: float
    mismatch: Verification | None = None
    dump: bytes | None = None

    def render(self) -> Iterator[str]:
        """The failed verification, the bytes, and the figures."""
        request = self.request
        if self.mismatch is not None:
            at = request.offset + self.mismatch.start
            yield f"Pattern verification failed at offset {at}, {self.mismatch.length} bytes"
        if request.style.quiet:
            return
        if self.dump is not None:
            yield from dump_lines(self.dump, offset=request.offset)
        yield from self._figures(request.style)

    def _figures(self, style: Style) -> Iterator[str]:
        length, offset = self.request.length, self.request.offset
        seconds = max(self.seconds, 1e-9)
        rate, ops = length / seconds, 1 / seconds
        if style.machine:
            yield f"{length},1,{_clock(self.seconds)},{rate:.3f},{ops:.3f}"
            return
        yield f"{self.verb} {length}/{length} bytes at offset {offset}"
        yield (
            f"{exact_size(length)}, 1 ops; {_duration(self.seconds)} "
            f"({exact_size(rate)}/sec and {ops:.4f} ops/sec)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A request that failed. reason: the system's text of its error number."""

    command: str
    reason: str

    def render(self) -> Iterator[str]:
        """One line."""
        yield f"{self.command} failed: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """How much of a range the top image holds. Bytes."""

    offset: int
    length: int
    allocated: int

    def render(self) -> Iterator[str]:
        """One line."""
        place = exact_size(self.offset)
        yield f"{self.allocated}/{self.length} bytes allocated at offset {place}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationMap:
    """Ascending (length, whether the top image holds it), from guest offset 0."""

    runs: tuple[tuple[int, bool], ...]

    def render(self) -> Iterator[str]:
        """One line a run."""
        offset = 0
        for length, held in self.runs:
            word = "    allocated" if held else "not allocated"
            yield (
                f"{exact_size(length)} ({length:#x}) bytes {word} at offset "
                f"{exact_size(offset)} ({offset:#x})"
            )
            offset += length


def exact_size(value: float) -> str:
    """Bytes with three decimals, unless those are zeros: `64 KiB`, `1.500 GiB`, `512 bytes`."""
    power = 0
    while power < len(_NAMES) and value >= KiB ** (power + 1):
        power += 1
    name = _NAMES[power - 1] if power else "bytes"
    return f"{f'{value / KiB**power:.3f}'.removesuffix('.000')} {name}"


def dump_lines(data: bytes, *, offset: int) -> Iterator[str]:
    """Offset, sixteen bytes in hexadecimal, and the letters and digits among them."""
    for at in range(0, len(data), _ROW):
        row = data[at : at + _ROW]
        text = _SIGNS.sub(b".", row).decode("ascii")
        yield f"{offset + at:08x}:  {row.hex(' ')}  {text}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    # Cut, not rounded: sixty seconds would need another minute.
    hundredths = int(rest * 100)
    return f"{hours}:{minutes:02}:{hundredths // 100:02}.{hundredths % 100:02}"


def _duration(seconds: float) -> str:
    if seconds >= 60:
        return _clock(seconds)
    return f"{int(seconds):02}.{int(seconds * 100) % 100:02} sec"
