"""What a power cut may leave: crash states from the journal of a run.

Between two flushes of a file the host may have carried out any of its changes, in any order, and
the last one in part. States are made of prefixes, subsets and torn writes, take turns between the
epochs of the run, so that a budget is spread over all of it, and are the same for the same seed.
Reliability reference, section 3.4 (i) to (iv)."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qcowkit.testing.crash_effects import (
    Content,
    DataEffect,
    Effect,
    SizeEffect,
    count_sectors,
    replay,
    tear,
)
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.units import SECTOR

# Up to that many effects in flight, all of their subsets are tried.
EXHAUSTIVE = 10
RANDOM_SUBSETS = 64
_RANDOM_TEARS = 6
_SECTORS_PER_PAGE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which effects in flight survive: indices into them, ascending.

    torn: the one of them that was cut short. sectors: those of it that made it."""

    kind: str
    kept: tuple[int, ...]
    torn: int | None = None
    sectors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashState:
    """One outcome. first, last: moments between which the cut may have come (`CrashFiles.tick`).

    contents: of every file. label: how to find it again."""

    label: str
    first: int
    last: int
    contents: tuple[Content, ...]

    def key(self) -> tuple[int, ...]:
        """Equal for equal contents."""
        return tuple(content.key() for content in self.contents)


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """The time between two flushes, of whichever files.

    bases: what is durable, by file. effects: in flight at its end, also older ones of files that
    were not flushed. first, last: its moments; last is just before the flush that ends it."""

    number: int
    first: int
    last: int
    bases: tuple[Content, ...]
    effects: tuple[Effect, ...]

    def make(self, choice: Choice) -> CrashState:
        """The state that a choice leads to."""
        kept = self._close(choice.kept)
        first = max(self.first, self.effects[kept[-1]].sequence if kept else 0)
        label = f"epoch {self.number}, {choice.kind} {_spell(kept)} of {len(self.effects)}"
        chosen: list[Effect] = []
        for index in kept:
            effect = self.effects[index]
            if index == choice.torn and not isinstance(effect, SizeEffect):
                chosen += tear(effect, choice.sectors)
                label += f", sectors {_spell(choice.sectors)} of {count_sectors(effect)} of {index}"
            else:
                chosen.append(effect)
        contents = tuple(
            replay(base, [effect for effect in chosen if effect.file == file])
            for file, base in enumerate(self.bases)
        )
        return CrashState(label=label, first=first, last=self.last, contents=contents)

    def _close(self, kept: Sequence[int]) -> tuple[int, ...]:
        """With a later size of a file comes the cut before it: file systems keep these in order,
        and no old bytes come back when a file grows again."""
        closed: list[int] = []
        sized: set[int] = set()
        chosen = set(kept)
        for index in range(max(chosen, default=-1), -1, -1):
            effect = self.effects[index]
            is_size = isinstance(effect, SizeEffect)
            implied = isinstance(effect, SizeEffect) and effect.cut and effect.file in sized
            if index in chosen or implied:
                closed.append(index)
                if is_size:
                    sized.add(effect.file)
        return tuple(reversed(closed))


def _spell(numbers: Sequence[int]) -> str:
    """Runs of numbers in short: 0-3 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [f"{low}" if low == high else f"{low}-{high}" for low, high in runs]
    return "[" + " ".join(words) + "]"


def split_epochs(files: CrashFiles) -> list[Epoch]:
    """The epochs of a journal, in order; the last one ends now."""
    bases = list(files.bases)
    flushed = [0] * len(bases)
    epochs: list[Epoch] = []
    begin = 0

    def close(last: int, count: int) -> None:
        flying = [
            effect
            for index, effect in enumerate(files.effects[:count])
            if index >= flushed[effect.file]
        ]
        epochs.append(
            Epoch(
                number=len(epochs),
                first=begin,
                last=last,
                bases=tuple(bases),
                effects=tuple(flying),
            )
        )

    for point in files.flushes:
        close(point.sequence - 1, point.count)
        bases[point.file] = point.durable
        flushed[point.file] = point.count
        begin = point.sequence
    close(files.tick(), len(files.effects))
    return epochs


def iter_crash_states(
    files: CrashFiles, *, seed: int, budget: int | None = None, marks: Sequence[int] = ()
) -> Iterator[CrashState]:
    """Distinct states of the run that the journal holds, at most `budget` of them.

    marks: moments at which the guest's promises changed, ascending; the same content between
    other marks is another state. The order is as random as the seed."""
    epochs = split_epochs(files)
    noise = random.Random(seed)
    noise.shuffle(epochs)
    turns = [(epoch, _interleave(epoch, random.Random(noise.random()))) for epoch in epochs]
    seen: set[tuple[int, ...]] = set()
    while turns and (budget is None or len(seen) < budget):
        waiting = []
        for epoch, choices in turns:
            state = _next_new(epoch, choices, seen, marks)
            if state is None:
                continue
            yield state
            if len(seen) == budget:
                return
            waiting.append((epoch, choices))
        turns = waiting


def _next_new(
    epoch: Epoch, choices: Iterator[Choice], seen: set[tuple[int, ...]], marks: Sequence[int]
) -> CrashState | None:
    for choice in choices:
        state = epoch.make(choice)
        moments = bisect_right(marks, state.first), bisect_right(marks, state.last)
        key = (*state.key(), *moments)
        if key not in seen:
            seen.add(key)
            return state
    return None


def _interleave(epoch: Epoch, noise: random.Random) -> Iterator[Choice]:
    """The choices of an epoch, its kinds in turn."""
    kinds = [_prefixes(epoch, noise), _subsets(epoch, noise), _tears(epoch, noise)]
    while kinds:
        for kind in list(kinds):
            choice = next(kind, None)
            if choice is None:
                kinds.remove(kind)
            else:
                yield choice


def _prefixes(epoch: Epoch, noise: random.Random) -> Iterator[Choice]:
    counts = list(range(len(epoch.effects) + 1))
    noise.shuffle(counts)
    for count in counts:
        yield Choice(kind="prefix", kept=tuple(range(count)))


def _subsets(epoch: Epoch, noise: random.Random) -> Iterator[Choice]:
    count = len(epoch.effects)
    if count <= EXHAUSTIVE:
        masks = list(range(1 << count))
        noise.shuffle(masks)
        for mask in masks:
            yield Choice(kind="subset", kept=_bits(mask, count))
        return
    singles = [(kind, index) for kind in ("omission", "survivor") for index in range(count)]
    others = [("subset", 0)] * RANDOM_SUBSETS
    order = singles + others
    noise.shuffle(order)
    for kind, index in order:
        if kind == "omission":
            kept = tuple(other for other in range(count) if other != index)
        elif kind == "survivor":
            kept = (index,)
        else:
            kept = _bits(noise.getrandbits(count), count)
        yield Choice(kind=kind, kept=kept)


def _bits(mask: int, count: int) -> tuple[int, ...]:
    return tuple(index for index in range(count) if mask >> index & 1)


def _tears(epoch: Epoch, noise: random.Random) -> Iterator[Choice]:
    """The last write of a prefix in part; what was before it is there, or some of it."""
    turns = [
        (index, _sector_sets(effect, noise))
        for index, effect in enumerate(epoch.effects)
        if not isinstance(effect, SizeEffect) and count_sectors(effect) > 1
    ]
    noise.shuffle(turns)
    while turns:
        for turn in list(turns):
            index, sets = turn
            sectors = next(sets, None)
            if sectors is None:
                turns.remove(turn)
                continue
            whole = noise.random() < 0.5
            before = tuple(range(index)) if whole else _bits(noise.getrandbits(index + 1), index)
            kept = (*before, index, *_growth_of(epoch, index))
            yield Choice(kind="torn", kept=kept, torn=index, sectors=sectors)


def _growth_of(epoch: Epoch, index: int) -> tuple[int, ...]:
    """The new size that came with a write: without it a torn one at the end would not be seen."""
    effect = epoch.effects[index]
    for other in epoch.effects[index + 1 : index + 2]:
        if isinstance(other, SizeEffect) and other.sequence == effect.sequence + 1:
            return (index + 1,)
    return ()


def _sector_sets(effect: DataEffect, noise: random.Random) -> Iterator[tuple[int, ...]]:
    """Which sectors of a write survive: neither none nor all."""
    count = count_sectors(effect)
    if count <= 4:
        masks = list(range(1, (1 << count) - 1))
        noise.shuffle(masks)
        yield from (_bits(mask, count) for mask in masks)
        return
    lengths = noise.sample(range(1, count), min(count - 1, _RANDOM_TEARS))
    # A page of the host's cache lies at a multiple of its size.
    head = -(effect.offset // SECTOR) % _SECTORS_PER_PAGE
    for length in lengths:
        yield tuple(range(length))
        yield _bits(noise.randrange(1, (1 << count) - 1), count)
        pages = noise.getrandbits(count // _SECTORS_PER_PAGE + 2)
        chosen = [
            index
            for index in range(count)
            if pages >> ((index - head) // _SECTORS_PER_PAGE + 1) & 1
        ]
        if 0 < len(chosen) < count:
            yield tuple(chosen)
