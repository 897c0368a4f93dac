"""A reader and a writer that overtake each other at every single step of the interpreter.

Readers take no lock (docs/adr/0010). So whatever a writer does while a reader is between two steps,
or the other way round, the reader must find the old content or the new one, and nothing else."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import pytest

from qcowkit.engine.options import OpenOptions
from qcowkit.testing.qcow2_builder import (
    BuiltImage,
    Cluster,
    Compressed,
    Data,
    SnapshotSpec,
    Zero,
    build_qcow2,
)
from qcowkit.units import KiB
from tests.engine.qcow2_rig import Rig

SIZE, WIDE_SIZE = 512, 16 * KiB
BELOW = random.Random(9).randbytes(8 * WIDE_SIZE)
GUEST = random.Random(1).randbytes(8 * WIDE_SIZE)
NEW = random.Random(2).randbytes(8 * WIDE_SIZE)
EAGER = OpenOptions(discard=True, pass_discard_other=True)

Act = Callable[[Rig], None]


class Interrupt:
    """Runs something once, before step number `at` of our own code, or as soon after it as `rig`
    holds no lock that would make another thread wait; counts the steps."""

    def __init__(self, rig: Rig, act: Callable[[], None], at: int) -> None:
        tables, blocks = rig.state.tables.cache, rig.state.refcounts.blocks
        self._locks = [rig.image.clusters._lock, tables._lock, blocks._lock]
        self._act, self._at = act, at
        self.steps = 0
        self.done = False

    def __enter__(self) -> Interrupt:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if "/qcowkit/engine/" not in frame.f_code.co_filename and (
            "/qcowkit/image/" not in frame.f_code.co_filename
            and "/qcowkit/codecs/" not in frame.f_code.co_filename
        ):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            self.steps += 1
            if not self.done and self.steps >= self._at:
                self._interrupt()
        return self._step

    def _interrupt(self) -> None:
        if not any(lock.locked() for lock in self._locks):
            self.done = True
            self._act()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A guest cluster in a state, and a change to it. wide: with subclusters, 16 KiB. read: how
    much of it a reader asks for. again: it is not the first change, so that a small write goes the
    short way."""

    name: str
    cluster: Cluster | None
    change: Act
    wide: bool = False
    base: bool = False
    snapshot: bool = False
    read: tuple[int, int] = (0, SIZE)
    again: bool = False

    def build(self) -> BuiltImage:
        clusters: dict[int, Cluster] = {1: GUEST[:SIZE]}
        if self.cluster is not None:
            clusters[0] = self.cluster
        return build_qcow2(
            size=8 * (WIDE_SIZE if self.wide else SIZE),
            cluster_bits=14 if self.wide else 9,
            extended_l2=self.wide,
            clusters=clusters,
            snapshots=[SnapshotSpec(id="1")] if self.snapshot else [],
        )

    def set_up(self, built: BuiltImage) -> Rig:
        rig = Rig(built, below=BELOW if self.base else None, options=EAGER, watch=False)
        if self.again:
            rig.chain.write(b"x", offset=rig.chain.size - 1)
        self.look(rig)
        return rig

    def look(self, rig: Rig) -> bytes:
        return rig.read(*self.read)


def write(offset: int, length: int) -> Act:
    return lambda rig: rig.chain.write(NEW[:length], offset=offset)


def zero(offset: int, length: int) -> Act:
    return lambda rig: rig.chain.write_zeroes(offset=offset, length=length, unmap=True)


def squeeze(length: int) -> Act:
    return lambda rig: rig.chain.write_compressed(b"ab" * (length // 2), offset=0)


def give_away(size: int) -> Act:
    """The cluster goes, and another guest cluster moves in where it was."""

    def act(rig: Rig) -> None:
        rig.chain.discard(offset=0, length=size)
        rig.chain.flush()
        for index in range(2, 6):
            rig.chain.write(NEW[:size], offset=index * size)
        rig.chain.flush()

    return act


def packed(size: int) -> Compressed:
    source = Rig(cluster_bits=size.bit_length() - 1, size=8 * size)
    source.chain.write_compressed(b"xyz" * (size // 3) + b"!" * (size % 3), offset=0)
    row = source.row(0)
    return Compressed(payload=source.memory.pread(row.stored, offset=row.host))


PART = 512
HALF = 0x0000_FFFF
WIDE_READ = (PART, 3 * PART)

SCENES = [
    Scene(name="new", cluster=None, change=write(0, SIZE)),
    Scene(name="new, the short way", cluster=None, again=True, change=write(0, SIZE)),
    Scene(name="new, over a base", cluster=None, base=True, change=write(100, 50)),
    Scene(
        name="new, over a base, the short way",
        cluster=None,
        base=True,
        again=True,
        change=write(100, 50),
    ),
    Scene(name="in place", cluster=GUEST[:SIZE], change=write(0, SIZE)),
    Scene(name="shared", cluster=GUEST[:SIZE], snapshot=True, change=write(100, 50)),
    Scene(name="zero", cluster=Zero(), base=True, change=write(100, 50)),
    Scene(name="zero in place", cluster=Zero(payload=NEW[:SIZE]), change=write(100, 50)),
    Scene(name="compressed", cluster=packed(SIZE), base=True, change=write(100, 50)),
    Scene(name="compressing", cluster=Zero(), base=True, change=squeeze(SIZE)),
    Scene(name="zeroed", cluster=GUEST[:SIZE], base=True, change=zero(0, SIZE)),
    Scene(name="given away", cluster=GUEST[:SIZE], change=give_away(SIZE)),
    Scene(name="compressed, given away", cluster=packed(SIZE), change=give_away(SIZE)),
    Scene(
        name="compressed, given away, a part read",
        cluster=packed(SIZE),
        change=give_away(SIZE),
        read=(7, 100),
    ),
    Scene(
        name="subclusters, new",
        cluster=None,
        wide=True,
        base=True,
        change=write(PART, 3 * PART),
        read=WIDE_READ,
    ),
    Scene(
        name="subclusters, new, the short way",
        cluster=None,
        wide=True,
        base=True,
        again=True,
        change=write(PART + 5, 2 * PART),
        read=WIDE_READ,
    ),
    Scene(
        name="subclusters, more of them",
        cluster=Data(payload=GUEST[:WIDE_SIZE], bitmap=HALF << 16),
        wide=True,
        base=True,
        change=write(PART, 3 * PART),
        read=WIDE_READ,
    ),
    Scene(
        name="subclusters, shared",
        cluster=Data(payload=GUEST[:WIDE_SIZE], bitmap=HALF << 16),
        wide=True,
        base=True,
        snapshot=True,
        change=write(PART, 3 * PART),
        read=WIDE_READ,
    ),
    Scene(
        name="subclusters, zero",
        cluster=Zero(),
        wide=True,
        base=True,
        change=write(PART, 3 * PART),
        read=WIDE_READ,
    ),
    Scene(
        name="subclusters, compressed",
        cluster=packed(WIDE_SIZE),
        wide=True,
        base=True,
        change=write(PART, 3 * PART),
        read=WIDE_READ,
    ),
    Scene(
        name="subclusters, compressing",
        cluster=Zero(),
        wide=True,
        base=True,
        change=squeeze(WIDE_SIZE),
        read=WIDE_READ,
    ),
    Scene(
        name="subclusters, zeroed whole",
        cluster=Data(payload=GUEST[:WIDE_SIZE]),
        wide=True,
        base=True,
        change=zero(0, WIDE_SIZE),
        read=WIDE_READ,
    ),
    Scene(
        name="subclusters, zeroed in part",
        cluster=Data(payload=GUEST[:WIDE_SIZE]),
        wide=True,
        base=True,
        change=zero(PART, 3 * PART),
        read=WIDE_READ,
    ),
    Scene(
        name="subclusters, several clusters",
        cluster=Data(payload=GUEST[:WIDE_SIZE], bitmap=HALF << 16),
        wide=True,
        base=True,
        snapshot=True,
        change=write(PART, 2 * WIDE_SIZE),
        read=WIDE_READ,
    ),
    Scene(
        name="subclusters, given away",
        cluster=Data(payload=GUEST[:WIDE_SIZE]),
        wide=True,
        change=give_away(WIDE_SIZE),
        read=WIDE_READ,
    ),
]


def contents(scene: Scene, built: BuiltImage) -> tuple[bytes, bytes]:
    """What the reader finds before and after the change."""
    rig = scene.set_up(built)
    old = scene.look(rig)
    scene.change(rig)
    return old, scene.look(rig)


def overtake_reader(scene: Scene, *, stride: int) -> None:
    """The whole change happens within one step of a reader."""
    built = scene.build()
    allowed = contents(scene, built)
    at, steps = 1, 1
    while at <= steps:
        rig = scene.set_up(built)
        with Interrupt(rig, partial(scene.change, rig), at) as interrupt:
            found = scene.look(rig)
        assert found in allowed, f"overtaken at step {at}"
        at, steps = at + stride, max(steps, interrupt.steps)


def look_meanwhile(scene: Scene, *, stride: int) -> None:
    """A reader comes and goes within one step of the change."""
    built = scene.build()
    allowed = contents(scene, built)
    seen: list[bytes] = []
    at, steps = 1, 1
    while at <= steps:
        rig = scene.set_up(built)
        look = partial(_look, seen, scene, rig)
        with Interrupt(rig, look, at) as interrupt:
            scene.change(rig)
        assert set(seen) <= set(allowed), f"in the middle of step {at}"
        at, steps = at + stride, max(steps, interrupt.steps)


# Steps between two tries: as few as the shortest moment that was ever found to be faulty has.
STRIDE, LONG_STRIDE = 7, 31
every_scene = pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)


@every_scene
def test_a_reader_that_is_overtaken_finds_the_old_content_or_the_new(scene: Scene) -> None:
    overtake_reader(scene, stride=STRIDE)


@every_scene
def test_a_reader_in_the_middle_of_a_change_finds_the_old_content_or_the_new(scene: Scene) -> None:
    look_meanwhile(scene, stride=LONG_STRIDE if "given away" in scene.name else STRIDE)


@pytest.mark.soak
@every_scene
def test_a_reader_is_right_at_every_single_step(scene: Scene) -> None:
    overtake_reader(scene, stride=1)
    look_meanwhile(scene, stride=1)


def _look(seen: list[bytes], scene: Scene, rig: Rig) -> None:
    seen.append(scene.look(rig))
