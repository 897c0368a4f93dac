"""Delta: a qcow2 image that holds only what changed, to be put over the disk that it changed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from qcowkit.engine.executor import ProgressReport, ignore_progress
from qcowkit.errors import RequestError
from qcowkit.extents.algebra import split_at
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import ExtentTable
from qcowkit.image.chain import Chain
from qcowkit.image.protocol import Image
from qcowkit.operations.convert import Converted, ConvertOptions, convert
from qcowkit.operations.create import OptionValue
from qcowkit.operations.rebase import NewBase, rename_base
from qcowkit.units import KiB

# Asking the host to share blocks, it would have to know which layer of the source is meant.
_SPARSE = 4 * KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaOptions:
    """backing, backing_format: of the disk that the delta is put over, as its header names it.
    standalone: the name is left out at the end. create: options of qcow2, by their names."""

    backing: str
    backing_format: str
    standalone: bool = False
    create: Mapping[str, OptionValue] = field(default_factory=dict)
    threads: int | None = None


class ChangedDisk:
    """A disk of which only `changed` counts as its top layer's own: what a conversion over a
    backing file copies. The rest counts as a layer below."""

    def __init__(self, disk: Chain, changed: RangeSet) -> None:
        self._disk = disk
        self._changed = changed
        self._edges = np.sort(np.concatenate((changed.start, changed.stop)))
        self.size = disk.size

    @property
    def images(self) -> tuple[Image, ...]:
        """Those of the disk. What rows call their layer is none of them."""
        return self._disk.images

    def iter_extents(
        self, *, start: int = 0, length: int | None = None, align: int = 1
    ) -> Iterator[ExtentTable]:
        """See `Disk.iter_extents`."""
        for table in self._disk.iter_extents(start=start, length=length, align=align):
            low, high = np.searchsorted(self._edges, (table.begin, table.end))
            cut = split_at(table, self._edges[low:high])
            below = ~self._changed.contains(cut.start)
            yield ExtentTable(
                start=cut.start,
                length=cut.length,
                flags=cut.flags,
                layer=below.astype(np.int32),
                host=cut.host,
                stored=cut.stored,
            )

    def read_table(self, table: ExtentTable, buffer: memoryview) -> None:
        """See `Disk.read_table`. Asked again, since the layers were given up."""
        self._disk.read_into(buffer, offset=table.begin)


def write_delta(
    disk: Chain,
    changed: RangeSet,
    path: str | os.PathLike[str],
    *,
    options: DeltaOptions,
    progress: ProgressReport = ignore_progress,
    cancel: threading.Event | None = None,
) -> Converted:
    """Make a qcow2 image at `path` that shows `disk` over its backing file and holds `changed`.

    changed: guest ranges, beyond which the two show the same. It appears when it is complete; the
    name of the backing file is taken out of it afterwards, if at all. Raises RequestError where the
    options cannot be, and as `convert`."""
    if str(options.create.get("compat", "1.1")) == "0.10" and options.standalone:
        raise RequestError(
            "compat=0.10 has no zero clusters, without which a delta needs its backing file"
        )
    create = {"size": disk.size, **options.create}
    made = convert(
        [ChangedDisk(disk, changed)],
        path,
        options=ConvertOptions(
            format="qcow2",
            create=create,
            backing=options.backing,
            backing_format=options.backing_format,
            sparse_size=_SPARSE,
            threads=options.threads,
        ),
        progress=progress,
        cancel=cancel,
    )
    if options.standalone:
        rename_base(path, NewBase(name=None), format="qcow2")
    return made
