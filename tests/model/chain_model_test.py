"""A disk whose chain grows, shrinks and changes underneath it, beside an array of bytes."""

from __future__ import annotations

import random

import pytest

from qcowkit.operations.commit import CommitOptions, commit_layers
from qcowkit.operations.rebase import NewBase, RebaseOptions, rebase_layers
from qcowkit.testing.crash_effects import Content
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.units import KiB
from tests.chain_disks import (
    EXTENDED,
    OPENING,
    SMALL,
    TINY,
    Kind,
    content,
    faults_of,
    layers_of,
    make_chain,
    open_disk,
)

pytestmark = pytest.mark.pinned("its kinds of images are its own")

SIZES = (72 * KiB, 128 * KiB, 128 * KiB + 512, 200 * KiB)
OVERLAYS = (
    SMALL,
    TINY,
    EXTENDED,
    {"cluster_size": 64 * KiB},
    {"compat": "0.10", **SMALL},
    {"lazy_refcounts": True, **SMALL},
)
MOST_LAYERS = 5


class Walk:
    """One disk. kinds: of its layers, top first. model: what it holds."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.kinds: list[Kind] = [self.new_base()]
        self.files = make_chain(self.kinds, seed=seed)
        self.model = bytearray(content(self.files, self.kinds))
        self.done: list[str] = []

    def new_base(self) -> Kind:
        """A kind that can stand at the bottom."""
        format = self.rng.choice(("raw", "vpc", "qcow2"))
        options = self.rng.choice(OVERLAYS) if format == "qcow2" else {}
        return Kind(format=format, size=self.rng.choice(SIZES), options=options)

    def step(self) -> None:
        """One operation, which must leave the disk what the model says."""
        verbs = [self.write, self.write, self.push]
        if len(self.kinds) > 1:
            verbs += [self.commit, self.commit_deep, self.rebase_away, self.rebase_down]
        if self.kinds[0].format == "qcow2":
            verbs.append(self.rebase_new)
        verb = self.rng.choice(verbs)
        self.done.append(verb.__name__)
        verb()
        assert content(self.files, self.kinds) == self.model, self.done

    def write(self) -> None:
        """What a guest does."""
        with open_disk(self.files, self.kinds, writable=True) as disk:
            for _ in range(4):
                length = self.rng.choice((512, 4096, 9000, 20000))
                offset = self.rng.randrange(0, disk.size - length)
                data = bytes(length)
                if self.rng.random() < 0.3:
                    disk.write_zeroes(offset=offset, length=length, unmap=True)
                else:
                    data = self.rng.randbytes(length)
                    disk.write(data, offset=offset)
                self.model[offset : offset + length] = data

    def push(self) -> None:
        """A new overlay, maybe of another size."""
        if len(self.kinds) == MOST_LAYERS:
            return
        kind = Kind(size=self.rng.choice(SIZES), options=self.rng.choice(OVERLAYS))
        files = CrashFiles([Content()])
        kind.create(files.open(), base=self.kinds[0])
        self.change([*files.live, *self.files.live], [kind, *self.kinds])
        self.model = self.model[: kind.size].ljust(kind.size, b"\0")

    def change(self, contents: list[Content], kinds: list[Kind]) -> None:
        """Other layers from now on."""
        self.files = CrashFiles(contents, names=[f"<{one.format}>" for one in kinds])
        self.kinds = kinds

    def commit(self) -> None:
        """Into the backing file; half of the time the overlay is given up afterwards."""
        layers = layers_of(self.files, self.kinds, writable=(0, 1))
        commit_layers(layers, opening=OPENING, options=CommitOptions(threads=1))
        self.note_size(1)
        if self.rng.random() < 0.5:
            below = content(self.files, self.kinds, depth=1)
            assert below[: len(self.model)] == self.model
            self.model = bytearray(below)
            self.change(self.files.live[1:], self.kinds[1:])

    def commit_deep(self) -> None:
        """Into any layer below, which leaves the overlay as it is."""
        depth = self.rng.randrange(1, len(self.kinds))
        layers = layers_of(self.files, self.kinds, writable=(depth,))
        options = CommitOptions(empty=False, threads=1)
        commit_layers(layers, depth=depth, opening=OPENING, options=options)
        self.note_size(depth)
        shown = content(self.files, self.kinds, depth=depth)
        assert shown[: len(self.model)] == self.model

    def note_size(self, depth: int) -> None:
        """A base may have been grown."""
        kind, size = self.kinds[depth], len(content(self.files, self.kinds, depth=depth))
        self.kinds[depth] = Kind(format=kind.format, size=size, options=kind.options)

    def rebase(self, new: CrashFiles, kinds: list[Kind]) -> None:
        """Over the layers of `new`, which may be files of the old chain."""
        rebase_layers(
            tuple(layers_of(self.files, self.kinds, writable=(0,))),
            tuple(layers_of(new, kinds)),
            NewBase(name="base", format=kinds[0].format) if kinds else NewBase(name=None),
            opening=OPENING,
            options=RebaseOptions(compress=self.rng.random() < 0.3, threads=1),
        )
        self.change([self.files.live[0], *new.live], [self.kinds[0], *kinds])

    def rebase_away(self) -> None:
        """Onto nothing."""
        self.rebase(CrashFiles([]), [])

    def rebase_down(self) -> None:
        """Onto a deeper layer of the same chain."""
        depth = self.rng.randrange(1, len(self.kinds))
        self.rebase(CrashFiles(self.files.live[depth:]), self.kinds[depth:])

    def rebase_new(self) -> None:
        """Onto a disk with other content."""
        kinds = [self.new_base()]
        self.rebase(make_chain(kinds, seed=self.rng.getrandbits(30)), kinds)


def walk(seed: int, *, steps: int) -> None:
    """Steps of one walk; every layer is sound at the end."""
    one = Walk(seed)
    for _ in range(steps):
        one.step()
    assert faults_of(one.files, one.kinds) == [], one.done


@pytest.mark.parametrize("seed", range(25))
def test_the_disk_is_what_an_array_of_bytes_would_be(seed: int) -> None:
    walk(seed, steps=12)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1000, 1400))
def test_long_walks_end_with_what_an_array_of_bytes_would_be(seed: int) -> None:
    walk(seed, steps=40)
