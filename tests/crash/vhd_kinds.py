"""VHDs to be crashed: small blocks, so that tables and files grow within a run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcowkit.budget import TRUSTED
from qcowkit.codecs.vhd.footer import FOOTER_COOKIE, FOOTER_SIZE, Footer
from qcowkit.engine.vhd.metadata import load_vhd_metadata
from qcowkit.errors import QcowkitError
from qcowkit.image.chain import Chain
from qcowkit.image.metadata import RawMetadata
from qcowkit.image.raw import RawImage
from qcowkit.image.vhd import VhdImage
from qcowkit.image.vhd_write import WritableVhdImage
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.crash_oracle import (
    CrashedDisk,
    GuestDataKept,
    OpensReadOnly,
    Oracle,
    Recovers,
)
from qcowkit.testing.crash_states import iter_crash_states, split_epochs
from qcowkit.testing.crash_storage import Content, CrashFiles, CrashStorage, WriteEffect
from qcowkit.testing.crash_workload import Plan, Recorded, run_guest
from qcowkit.testing.guest_log import Int64Array, sector_values, values_of
from qcowkit.testing.stamps import make_stamps
from qcowkit.testing.vhd_builder import DIFFERENCING, DYNAMIC, FIXED, VhdBuilder
from qcowkit.units import SECTOR
from tests.vhd_disks import BLOCK, FIRST_BLOCK, TABLE_AT, build_with_a_name_behind_the_table

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PER_BLOCK = BLOCK // SECTOR
_BACKING_VALUE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class VhdKind:
    """A `Crashable` disk. blocks: at first; capacity: at most. backing: guest sectors of the raw
    disk below a differencing one. make_raw: the file at first, if not an empty disk. appends: see
    `AppendingFiles`."""

    name: str
    disk_type: int = DYNAMIC
    blocks: int = 24
    capacity: int = 160
    backing: int = 0
    make_raw: Callable[[VhdKind], bytes] | None = None
    appends: bool = False
    format: str = "vpc"
    cluster_size: int = BLOCK
    compresses: bool = False

    @property
    def sectors(self) -> int:
        return self.capacity * _PER_BLOCK

    def backing_values(self) -> Int64Array:
        return sector_values(self.backing, [(0, self.backing, _BACKING_VALUE)])

    def initial_values(self) -> Int64Array:
        size = self.blocks * _PER_BLOCK
        return sector_values(size, [(0, min(size, self.backing), _BACKING_VALUE)])

    def make(self) -> CrashFiles:
        raw = (self.make_raw or make_empty)(self)
        return (AppendingFiles if self.appends else CrashFiles)([Content.of(raw)])

    def open(self, files: CrashFiles, *, writable: bool) -> Chain:
        storage = files.open(writable=writable)
        metadata = load_vhd_metadata(storage, budget=TRUSTED)
        below = []
        if self.backing:
            stamps = make_stamps(first=0, count=self.backing, value=_BACKING_VALUE)
            base = MemoryStorage(stamps, writable=False)
            below = [RawImage(RawMetadata(virtual_size=base.size()), base)]
        if not writable:
            return Chain([VhdImage(metadata, storage), *below])
        top = WritableVhdImage(metadata, storage)
        return Chain([top, *below], top=top)


def make_empty(kind: VhdKind) -> bytes:
    return bytes(VhdBuilder(size=kind.blocks * BLOCK, disk_type=kind.disk_type).build())


def make_without_tail(kind: VhdKind) -> bytes:
    return make_empty(kind)[:-SECTOR]


def make_with_stale_entries(kind: VhdKind) -> bytes:
    """A table that is longer than the disk, and full of what does not count."""
    raw = VhdBuilder(size=kind.blocks * BLOCK, entries=kind.capacity).build()
    first, end = TABLE_AT + 4 * kind.blocks, TABLE_AT + 4 * kind.capacity
    raw[first:end] = (FIRST_BLOCK // SECTOR + 1).to_bytes(4, "big") * ((end - first) // 4)
    return bytes(raw)


def make_with_a_name_behind_the_table(kind: VhdKind) -> bytes:
    return build_with_a_name_behind_the_table(kind.blocks)


KINDS = (
    VhdKind(name="dynamic"),
    VhdKind(name="dynamic, whole appends", blocks=8, capacity=16, appends=True),
    VhdKind(name="dynamic without a footer", make_raw=make_without_tail, appends=True),
    VhdKind(name="stale entries", capacity=64, make_raw=make_with_stale_entries),
    VhdKind(name="long table", blocks=126, capacity=300),
    VhdKind(name="differencing", disk_type=DIFFERENCING, backing=100),
    VhdKind(name="differencing, larger parent", disk_type=DIFFERENCING, backing=900),
    VhdKind(
        name="name behind the table",
        disk_type=DIFFERENCING,
        blocks=120,
        backing=100,
        make_raw=make_with_a_name_behind_the_table,
    ),
    VhdKind(name="fixed", disk_type=FIXED, appends=True),
)


class _Append(WriteEffect):
    """Bytes behind the end and the size to hold them, both or neither.

    The footer of a fixed disk has no copy. That a file system makes the size durable before the
    bytes, which the journal tries otherwise, would lose it, and nothing could be done."""

    __slots__ = ()

    def apply(self, content: Content) -> None:
        WriteEffect.apply(self, content)
        content.size = max(content.size, self.offset + len(self.data))


class _AppendingStorage(CrashStorage):
    def pwrite(self, buffers: Sequence[Buffer], *, offset: int) -> None:
        data = b"".join(memoryview(buffer).cast("B") for buffer in buffers)
        if offset + len(data) <= self.size():
            super().pwrite([data], offset=offset)
            return
        with self._files.lock:
            tick = self._files.tick()
            effect = _Append(sequence=tick, file=self._index, offset=offset, data=data)
            self._files.add(effect)


class AppendingFiles(CrashFiles):
    """Files whose growth comes with its bytes: a write at the end is there or not."""

    def open(self, index: int = 0, *, writable: bool = True) -> CrashStorage:
        return _AppendingStorage(self, index, writable=writable)

    def like(self, contents: Sequence[Content]) -> CrashFiles:
        return AppendingFiles(contents, names=self.names, discard_clears=self.discard_clears)


class BlocksSound:
    """A check finds nothing but a footer at the end that is lost, or not yet like its copy: the
    leading one counts, and the next writer mends the other (`Recovers`)."""

    name = "check"

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        try:
            verdict = disk.verdict
        except QcowkitError as error:
            yield f"cannot be checked: {error}"
            return
        assert verdict is not None
        yield from (str(one) for one in verdict.findings if one.structure != "VHD footer")


class EndsInFooter:
    """A file that had a footer at its end has one at every moment."""

    name = "footer"

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        raw = disk.fresh().live[0].to_bytes()
        try:
            Footer.decode(raw[-FOOTER_SIZE:])
        except QcowkitError as error:
            yield f"the file does not end in a footer: {error}"


def find_footers_in_flight(files: CrashFiles) -> Iterator[str]:
    """Of two footers one is durable: a host that spoils more than it was asked to write, a sector
    of 4 KiB perhaps, must not get both."""
    for epoch in split_epochs(files):
        writes = [one for one in epoch.effects if isinstance(one, WriteEffect)]
        footers = [one.offset for one in writes if one.data.startswith(FOOTER_COOKIE)]
        if len(footers) > 1:
            yield f"epoch {epoch.number}: footers at {footers} between two flushes"


class _CrashesAgain:
    """A disk that was recovered is used, and crashes again."""

    name = "again"

    def __init__(self, kind: VhdKind, *, seed: int, every: int) -> None:
        self._kind = kind
        self._noise = random.Random(seed)
        self._every = every

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        if disk.failure is not None or self._noise.randrange(self._every):
            return
        seed = self._noise.getrandbits(32)
        initial = values_of(disk.content)
        if not len(initial):
            return
        recorded = run_guest(
            self._kind, seed=seed, plan=Plan(operations=6), files=disk.fresh(), initial=initial
        )
        yield from judge_run(self._kind, recorded, seed=seed, budget=12)


def judge_run(
    kind: VhdKind, recorded: Recorded, *, seed: int, budget: int, again: int = 0
) -> list[str]:
    """What is wrong with the crash states of a run, in words. again: one of so many is crashed a
    second time; 0 for none."""
    oracles: list[Oracle] = [OpensReadOnly(), BlocksSound(), GuestDataKept(recorded.log)]
    oracles.append(Recovers(every=2))
    if kind.appends and kind.make_raw is None:
        oracles.append(EndsInFooter())
    if again:
        oracles.append(_CrashesAgain(kind, seed=seed, every=again))
    wrong = [*recorded.faults, *find_footers_in_flight(recorded.files)]
    marks = recorded.log.marks
    for state in iter_crash_states(recorded.files, seed=seed, budget=budget, marks=marks):
        disk = CrashedDisk(state, recorded.files, kind)
        for oracle in oracles:
            wrong += [f"{oracle.name}: {state.label}: {text}" for text in oracle.judge(disk)]
        if len(wrong) > 8:
            break
    return wrong


def crash(kind: VhdKind, *, seed: int, budget: int, plan: Plan, again: int = 0) -> list[str]:
    """Run a guest on a new disk, and judge what crashes leave of it."""
    recorded = run_guest(kind, seed=seed, plan=plan)
    return judge_run(kind, recorded, seed=seed, budget=budget, again=again)
