"""Disks in memory for tests of amendments: scribbled on, with snapshots, over a base."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass
from typing import Any

from qcowkit.budget import TRUSTED
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.findings import Effort
from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.amend_plan import Amendment
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.engine.qcow2.snapshots import Snapshots
from qcowkit.errors import RequestError
from qcowkit.image.chain import Chain
from qcowkit.image.lineage import Layer
from qcowkit.image.metadata import RawMetadata
from qcowkit.image.registry import build_chain
from qcowkit.operations.amend import Amended, AmendOptions, amend_image
from qcowkit.operations.check import CheckResult, check_image
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.crash_storage import Content, CrashFiles
from qcowkit.testing.qcow2_builder import build_qcow2
from qcowkit.units import KiB

View = dict[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """An image in memory, with its base and its data file where it has them."""

    storage: Storage
    base: bytes | None = None
    data: Storage | None = None

    def layers(self) -> list[Layer]:
        metadata = load_qcow2_metadata(self.storage)
        found = [Layer(storage=self.storage, metadata=metadata, data_storage=self.data)]
        if self.base is not None:
            below = MemoryStorage(self.base)
            found.append(Layer(storage=below, metadata=RawMetadata(virtual_size=len(self.base))))
        return found

    def open(self, *, writable: bool = False, snapshot: str | None = None) -> Chain:
        # Many disks are open at once, which need no threads.
        options = OpenOptions(cache_clean_interval=0)
        return build_chain(self.layers(), writable=writable, snapshot=snapshot, options=options)

    def view(self) -> View:
        """The content of the disk, under no name, and of every snapshot."""
        names = [one.id for one in load_qcow2_metadata(self.storage).snapshots]
        disks = {"": self.open()} | {name: self.open(snapshot=name) for name in names}
        return {name: disk.read(offset=0, length=disk.size) for name, disk in disks.items()}

    def amend(self, *, barriers: Barriers | None = None, **options: Any) -> Amended:
        size = options.pop("size", None)
        wanted = AmendOptions(amendment=Amendment(**options), size=size)
        return amend_image(self.layers(), wanted, budget=TRUSTED, barriers=barriers)

    def check(self) -> CheckResult:
        return check_image(self.layers()[0])

    def scribble(self, seed: int, *, count: int = 10, packed: bool = False) -> None:
        """Writes, zeroes, discards and, where asked for, compressed clusters."""
        rng, disk = random.Random(seed), self.open(writable=True)
        size = disk.cluster_size
        for _ in range(count):
            length = min(disk.size, rng.choice((512, 3000, 5000, size, 2 * size + 512, 70000)))
            offset = rng.randrange(disk.size - length + 1)
            aligned = offset // size * size
            kind = rng.randrange(8)
            if kind < 4:
                disk.write(rng.randbytes(length), offset=offset)
            elif kind == 4:
                disk.write_zeroes(offset=offset, length=length, unmap=rng.random() < 0.5)
            elif kind == 5:
                disk.discard(offset=offset, length=length)
            elif packed and aligned + size <= disk.size:
                data = rng.randbytes(64).ljust(size, b"\7")
                disk.discard(offset=aligned, length=size)
                with contextlib.suppress(RequestError):
                    # Version 2 keeps what hides a base.
                    disk.write_compressed(data, offset=aligned)
        disk.images[0].disk.close()  # type: ignore[attr-defined]

    def snapshot(self, name: str) -> None:
        Snapshots(
            storage=self.storage,
            metadata=load_qcow2_metadata(self.storage),
            barriers=Barriers(self.storage),
            effort=Effort(stored=self.storage.allocated()),
        ).create(name)


def make_disk(
    *,
    size: int = 256 * KiB,
    base: int | None = None,
    data_file: bool = False,
    seed: int = 1,
    snapshots: int = 0,
    packed: bool = False,
    count: int = 10,
    **kind: Any,
) -> Disk:
    """A disk with a history. base: bytes of a raw disk below. kind: of `ImageSpec`."""
    rng = random.Random(seed)
    if base is not None:
        kind |= {"backing_name": "base.raw", "backing_format": "raw"}
    if data_file:
        kind |= {"data_file_name": "data.raw"}
    built = build_qcow2(size=size, **kind)
    disk = Disk(
        storage=MemoryStorage(built.to_bytes()),
        base=None if base is None else rng.randbytes(base),
        data=MemoryStorage(bytes(size)) if data_file else None,
    )
    for number in range(snapshots):
        disk.scribble(seed * 100 + number, packed=packed, count=count)
        disk.snapshot(f"s{number}")
    disk.scribble(seed * 100 + 99, packed=packed, count=count)
    return disk


# Interruptions


class Leaky(Barriers):
    """Barriers of which one waits for nothing."""

    def __init__(self, *storages: Storage, without: str) -> None:
        super().__init__(*storages)
        self._without = without

    def wait(self, name: str) -> None:
        if name != self._without:
            super().wait(name)


def files_of(disk: Disk) -> CrashFiles:
    """What is to be interrupted, as the crash simulator has it."""
    storages = [disk.storage] if disk.data is None else [disk.storage, disk.data]
    contents = [Content.of(one.pread(one.size(), offset=0)) for one in storages]
    return CrashFiles(contents, names=["disk.qcow2", "data.raw"][: len(contents)])


def on(files: CrashFiles, disk: Disk) -> Disk:
    """The same disk on these files."""
    data = None if disk.data is None else files.open(1)
    return Disk(storage=files.open(), base=disk.base, data=data)


def after_cut(contents: tuple[Content, ...], disk: Disk) -> Disk:
    """The same disk on what an interruption has left."""
    storages = [MemoryStorage(one.to_bytes()) for one in contents]
    data = None if disk.data is None else storages[1]
    return Disk(storage=storages[0], base=disk.base, data=data)
