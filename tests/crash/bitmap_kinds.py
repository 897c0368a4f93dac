"""Disks with bitmaps that record, and the judge of what these say after a crash."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qcowkit.budget import TRUSTED
from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.bitmap_bits import load_bits
from qcowkit.engine.qcow2.bitmap_edit import BitmapEditor
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.extents.bits import GranuleBits
from qcowkit.storage.protocol import Storage
from qcowkit.testing.crash_disks import DiskKind
from qcowkit.testing.crash_oracle import CrashedDisk, read_disk
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.testing.crash_workload import Plan
from qcowkit.units import KiB


class TrackedKind(DiskKind):
    """A disk with bitmaps: two that record, one that does not."""

    def make(self) -> CrashFiles:
        """See `DiskKind.make`."""
        files = super().make()
        storage = files.open()
        editor = edit(storage)
        editor.add("fine", granularity=512)
        editor.add("coarse", granularity=16 * KiB)
        editor.add("off", granularity=4 * KiB, enabled=False)
        editor.merge("off", kept_bits(self.size))
        editor.commit()
        files.begin()
        return files


KINDS = {
    kind.name: kind
    for kind in (
        TrackedKind(
            name="clusters of 512 bytes",
            size=64 * KiB,
            capacity=160 * KiB,
            options={"cluster_size": 512},
        ),
        TrackedKind(
            name="written in place",
            size=64 * KiB,
            filled=64 * KiB,
            options={"cluster_size": 4 * KiB},
        ),
        TrackedKind(
            name="clusters of 4 KiB, backing",
            size=256 * KiB,
            capacity=384 * KiB,
            backing=200 * KiB,
            options={"cluster_size": 4 * KiB},
        ),
        TrackedKind(
            name="clusters of 16 KiB, subclusters",
            size=192 * KiB,
            capacity=384 * KiB,
            options={"cluster_size": 16 * KiB, "extended_l2": True},
        ),
        TrackedKind(
            name="lazy refcounts",
            size=64 * KiB,
            capacity=96 * KiB,
            options={"cluster_size": KiB, "lazy_refcounts": True},
        ),
        TrackedKind(
            name="lazy refcounts without a record",
            size=64 * KiB,
            capacity=96 * KiB,
            options={"cluster_size": 512, "refcount_bits": 64},
            open_options=OpenOptions(lazy_refcounts=True),
        ),
        TrackedKind(
            name="data file",
            size=64 * KiB,
            capacity=96 * KiB,
            data_file=True,
            options={"cluster_size": 512},
        ),
    )
}


def edit(storage: Storage) -> BitmapEditor:
    return BitmapEditor(storage, load_qcow2_metadata(storage), budget=TRUSTED)


def kept_bits(size: int) -> GranuleBits:
    """What the bitmap says that does not record."""
    bits = GranuleBits(size=size, granularity_bits=12)
    bits.mark(start=8 * KiB, length=1)
    bits.mark(start=20 * KiB, length=8 * KiB)
    return bits


def bitmaps_of(storage: Storage) -> dict[str, GranuleBits | None]:
    """All bitmaps by name; None for an inconsistent one."""
    metadata = load_qcow2_metadata(storage)
    found: dict[str, GranuleBits | None] = {}
    for entry in metadata.bitmaps:
        found[entry.name] = None
        if not entry.in_use:
            found[entry.name] = load_bits(
                storage,
                entry,
                geometry=metadata.geometry,
                size=metadata.virtual_size,
                budget=TRUSTED,
            )
    return found


class TellsAllChanges:
    """Whatever differs from the disk as it was is dirty in every bitmap that records and can be
    relied on; the one that does not record says what it always said."""

    name = "bitmaps"

    def __init__(self, kind: DiskKind, plan: Plan, *, closed: int | None = None) -> None:
        """plan: what the guest does. closed: the moment at which the disk was closed for good."""
        self._resizes = bool(plan.weights.get("resize"))
        self._before = read_disk(kind.make(), kind)
        self._closed = closed

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        """See `Oracle`."""
        if disk.failure is not None:
            return
        found = bitmaps_of(disk.fresh().open(writable=False))
        if set(found) != {"fine", "coarse", "off"}:
            yield f"the bitmaps are {sorted(found)}"
            return
        changed = self._changed(disk.content)
        for name in ("fine", "coarse"):
            bits = found[name]
            if bits is None:
                if self._closed is not None and disk.state.first >= self._closed:
                    yield f"the disk was closed, and {name} is inconsistent"
                continue
            missing = changed[~bits.ranges().contains(changed)]
            if len(missing):
                yield f"{name} does not tell the change at {int(missing[0]):#x}"
        if found["off"] is not None:
            yield from self._judge_kept(found["off"], len(disk.content))

    def _judge_kept(self, bits: GranuleBits, size: int) -> Iterator[str]:
        kept = kept_bits(64 * KiB).ranges().clip(0, size)
        # What was cut off once does not come back.
        lost = 0 if self._resizes else kept.difference(bits.ranges()).total
        if lost or bits.ranges().difference(kept).total:
            yield f"the bitmap that does not record says {bits.ranges()}"

    def _changed(self, content: bytes) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Offsets of the sectors that differ; behind its end the disk counts as zeros."""
        before = self._before.ljust(len(content), b"\0")[: len(content)]
        first, second = (np.frombuffer(one, np.uint8).reshape(-1, 512) for one in (before, content))
        return np.flatnonzero((first != second).any(axis=1)).astype(np.int64) * 512
