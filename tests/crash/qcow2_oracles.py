"""What must hold of a qcow2 image after a crash beside what holds of every disk."""

from __future__ import annotations

from collections.abc import Iterator

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.header import FIELD_OFFSETS
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.image.chain import data_rows
from qcowkit.testing.crash_disks import DiskKind
from qcowkit.testing.crash_effects import Content
from qcowkit.testing.crash_oracle import CrashedDisk, read_disk
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.units import align_up


def load(content: Content) -> Qcow2Metadata:
    """What the header of the image says."""
    return load_qcow2_metadata(CrashFiles([content]).open(writable=False), budget=TRUSTED)


class NothingBehindTheEnd:
    """A disk that was cut has nothing left behind its end, which another program would show once
    it makes the disk larger. For disks without a base."""

    name = "end"

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        if disk.failure is not None:
            return
        files = disk.fresh()
        metadata = load(files.live[0])
        header, geometry = metadata.header, metadata.geometry
        end = align_up(header.size, geometry.cluster_size)
        reach = header.l1_size * geometry.l2_coverage
        if end >= reach:
            return
        files.live[0].write(reach.to_bytes(8, "big"), offset=FIELD_OFFSETS["size"])
        # Whoever makes the disk larger makes a data file longer too.
        for data in files.live[1:]:
            data.size = max(data.size, reach)
        with disk.opener.open(files, writable=False) as chain:
            for run in data_rows(chain.extents(start=end)):
                if any(chain.read(offset=run.start, length=run.length)):
                    yield f"the disk ends at {header.size:#x}, and data lie at {run.start:#x}"
                    return


class UntouchedWhileMarked:
    """While autoclear bits of unknown features are set, the disk is what it was at the start."""

    name = "autoclear"

    def __init__(self, kind: DiskKind) -> None:
        self._kind = kind
        self._content = read_disk(kind.make(), kind)

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        if disk.failure is not None or disk.content == self._content:
            return
        if load(disk.state.contents[0]).header.autoclear_features & self._kind.autoclear:
            yield "the disk has changed while the bits of an unknown feature are set"


class CleanOnceClosed:
    """A disk that was closed is not dirty: nobody has to repair what came to an end."""

    name = "closed"

    def __init__(self, closed: int | None) -> None:
        """closed: the moment at which it was."""
        self._closed = closed

    def judge(self, disk: CrashedDisk) -> Iterator[str]:
        if disk.failure is not None or self._closed is None or disk.state.last < self._closed:
            return
        if load(disk.state.contents[0]).dirty:
            yield "the disk was closed, and its dirty bit is set"
