"""Backing chains in memory for tests of verbs that move content between their layers."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qcowkit.budget import TRUSTED
from qcowkit.engine.options import OpenOptions
from qcowkit.image.chain import Chain
from qcowkit.image.lineage import Layer
from qcowkit.image.metadata import load_metadata
from qcowkit.image.registry import build_chain
from qcowkit.operations.check import Verdict, check_image
from qcowkit.operations.create import CreateOptions, OptionValue, open_target
from qcowkit.storage.protocol import Storage
from qcowkit.testing.crash_storage import Content, CrashFiles
from qcowkit.units import KiB

# A disk whose power was cut is never closed: nothing may go on running for it.
OPENING = OpenOptions(cache_clean_interval=0)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One layer. size: guest bytes. options: keys of `-o`."""

    format: str = "qcow2"
    size: int = 128 * KiB
    options: Mapping[str, OptionValue] = field(default_factory=dict)

    def create(self, storage: Storage, *, base: Kind | None) -> None:
        """An empty image; `base`: the kind that its backing name declares."""
        values = dict(self.options)
        if base is not None:
            values |= {"backing_file": "base", "backing_fmt": base.format}
        options = CreateOptions(format=self.format, values=values)
        target, _ = open_target(storage, options, size=self.size)
        target.finish()


SMALL = {"cluster_size": 4096}
TINY = {"cluster_size": 512}
EXTENDED = {"cluster_size": 16 * KiB, "extended_l2": True}
QCOW2 = Kind(options=SMALL)
RAW = Kind(format="raw")
VHD = Kind(format="vpc")


def make_chain(kinds: Sequence[Kind], *, seed: int = 1, count: int = 12) -> CrashFiles:
    """A file a layer, top first, each with changes of its own; the journal is empty."""
    files = CrashFiles([Content() for _ in kinds], names=[f"<{one.format}>" for one in kinds])
    rng = random.Random(seed)
    for depth in reversed(range(len(kinds))):
        base = kinds[depth + 1] if depth + 1 < len(kinds) else None
        kinds[depth].create(files.open(depth), base=base)
        scribble(files, kinds, rng, depth=depth, count=count)
    files.begin()
    return files


def scribble(
    files: CrashFiles, kinds: Sequence[Kind], rng: random.Random, *, depth: int = 0, count: int = 12
) -> None:
    """Random changes of the disk that the layer at `depth` shows."""
    with open_disk(files, kinds, depth=depth, writable=True) as disk:
        for _ in range(count):
            length = rng.choice((512, 1024, 4096, 9000, 16384))
            offset = rng.randrange(0, disk.size - length, 512)
            verb = rng.randrange(5)
            if verb == 0:
                disk.write_zeroes(offset=offset, length=length, unmap=rng.random() < 0.5)
            elif verb == 1 and kinds[depth].format == "qcow2":
                disk.discard(offset=offset, length=length)
            else:
                disk.write(rng.randbytes(length), offset=offset)


def layers_of(
    files: CrashFiles,
    kinds: Sequence[Kind],
    *,
    writable: Collection[int] = (),
    depths: Iterable[int] | None = None,
) -> list[Layer]:
    """The open layers, top first."""
    layers = []
    for depth in range(len(kinds)) if depths is None else depths:
        storage = files.open(depth, writable=depth in writable)
        metadata = load_metadata(storage, kinds[depth].format, budget=TRUSTED)
        layers.append(Layer(storage=storage, metadata=metadata))
    return layers


def open_disk(
    files: CrashFiles, kinds: Sequence[Kind], *, depth: int = 0, writable: bool = False
) -> Chain:
    """The disk that the layer at `depth` shows."""
    layers = layers_of(
        files, kinds, writable=(depth,) if writable else (), depths=range(depth, len(kinds))
    )
    return build_chain(layers, writable=writable, options=OPENING)


def content(files: CrashFiles, kinds: Sequence[Kind], *, depth: int = 0) -> bytes:
    """All guest bytes of that disk."""
    with open_disk(files, kinds, depth=depth) as disk:
        return disk.read(offset=0, length=disk.size)


def decided(files: CrashFiles, kinds: Sequence[Kind], *, depth: int = 0) -> int:
    """Guest bytes that this layer itself decides."""
    with open_disk(files, kinds, depth=depth) as disk:
        table = disk.images[0].extents(start=0, length=disk.size)
        return int(table.length[(table.flags & 4) != 0].sum())


def faults_of(files: CrashFiles, kinds: Sequence[Kind], *, leaks: bool = False) -> list[str]:
    """What checks of the layers say, where it is worse than clean, or than leaks. Those that were
    left dirty are repaired when they are opened next."""
    fine = (Verdict.CLEAN, Verdict.LEAKS) if leaks else (Verdict.CLEAN,)
    found = []
    for layer, kind in zip(layers_of(files, kinds), kinds, strict=True):
        if kind.format == "raw" or (leaks and getattr(layer.metadata, "dirty", False)):
            continue
        verdict = check_image(layer).verdict
        if verdict not in fine:
            found.append(f"{layer.storage.name}: a check says {verdict.value}")
    return found
