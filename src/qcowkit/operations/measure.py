"""Measure: what a new image needs at least and at most, before any of it exists.

The figures for qcow2 are those of qemu-img, to the byte: the tables of a fully allocated disk are
always counted. Source: qcow2 reference, "Measure"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcowkit.codecs.vhd.dynamic_header import DEFAULT_BLOCK_SIZE
from qcowkit.engine.batches import rows_of
from qcowkit.engine.qcow2.layout import l2_bytes, refcount_clusters
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.spec import Qcow2Spec
from qcowkit.engine.vhd.layout import plan_disk_size
from qcowkit.engine.vhd.layout import plan_layout as plan_vhd_layout
from qcowkit.errors import RequestError
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import Flag
from qcowkit.image.chain import Chain
from qcowkit.image.views import Disk
from qcowkit.operations.create import CreateOptions, OptionValue, qcow2_spec
from qcowkit.operations.encryption import luks_params
from qcowkit.units import SECTOR, align_up, ceil_div, format_size

_DIRECTORY_ENTRY = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Bytes of a file. required: with the content as it is. fully_allocated: when every cluster
    holds data. bitmaps: what the source's bitmaps would add, None where it cannot have any."""

    required: int
    fully_allocated: int
    bitmaps: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The schema of qemu-img."""
        found = {"required": self.required, "fully-allocated": self.fully_allocated}
        return found if self.bitmaps is None else {**found, "bitmaps": self.bitmaps}

    def render(self) -> list[str]:
        """The lines to print."""
        rows = [("required size", self.required), ("fully allocated size", self.fully_allocated)]
        if self.bitmaps is not None:
            rows.append(("bitmaps size", self.bitmaps))
        return [f"{name}: {value} ({format_size(value)})" for name, value in rows]


def measure(
    source: Chain | None,
    *,
    size: int | None = None,
    format: str,
    options: Mapping[str, OptionValue],
) -> Measurement:
    """Measure a conversion of `source`, or an empty disk of `size` bytes, to `format`.

    Raises RequestError for options that the format does not have."""
    if source is not None:
        size = source.size
    if size is None:
        raise RequestError("neither a source nor a size was given")
    create = CreateOptions.of(format, options)
    if format == "qcow2":
        return measure_qcow2(qcow2_spec(create, size=size), source)
    if format == "vpc":
        return _measure_vhd(create, size, source)
    whole = align_up(size, SECTOR)
    if format == "luks":
        whole += luks_params(options, prefix="").header_bytes
    return Measurement(required=whole, fully_allocated=whole)


def measure_qcow2(spec: Qcow2Spec, source: Chain | None) -> Measurement:
    """The figures for a qcow2 image; `source` None stands for an empty disk."""
    geometry = spec.geometry
    cluster = geometry.cluster_size
    disk = align_up(spec.size, cluster)
    tables = l2_bytes(geometry, spec.size)
    meta = cluster + tables + align_up(tables // cluster * 8, cluster)
    # As qemu-img has it, the refcounts are those of an image in clear.
    meta += sum(refcount_clusters(geometry, (meta + disk) // cluster)) * cluster
    meta += spec.crypto_bytes
    if spec.backing_name is not None or spec.preallocation in ("falloc", "full"):
        data = disk
    else:
        data = 0 if source is None else touched_bytes(source, cluster)
    return Measurement(
        required=meta + data,
        fully_allocated=meta + disk,
        bitmaps=bitmaps_size(source, cluster) if source is not None and spec.version >= 3 else None,
    )


def touched_bytes(disk: Disk, unit: int) -> int:
    """Bytes of the units that hold data anywhere in the chain."""
    total, last = 0, -1
    for table in disk.iter_extents(align=unit):
        units = rows_of(table, Flag.DATA, without=Flag.ZERO).scale_outward(unit)
        total += units.difference(RangeSet.of([0], [last + 1])).total
        if len(units):
            last = int(units.stop[-1]) - 1
    return total * unit


def bitmaps_size(source: Chain, cluster: int) -> int | None:
    """Bytes for the persistent bitmaps of a source, each counted as if full of set bits."""
    metadata = source.images[0].metadata
    if not isinstance(metadata, Qcow2Metadata) or metadata.header.version < 3:
        return None
    total = directory = 0
    for bitmap in metadata.bitmaps:
        bits = ceil_div(source.size, 1 << bitmap.granularity_bits)
        clusters = ceil_div(ceil_div(bits, 8), cluster)
        total += clusters * cluster + align_up(clusters * 8, cluster)
        directory += align_up(_DIRECTORY_ENTRY + len(bitmap.name.encode()), 8)
    return total + align_up(directory, cluster)


def _measure_vhd(create: CreateOptions, size: int, source: Chain | None) -> Measurement:
    fixed = create.values.get("subformat", "dynamic") == "fixed"
    disk = plan_disk_size(
        align_up(size, SECTOR), force_size=bool(create.values.get("force_size", True))
    )
    layout = plan_vhd_layout(
        disk, subformat="fixed" if fixed else "dynamic", block_size=DEFAULT_BLOCK_SIZE, parent=None
    )
    most = layout.file_size(layout.table_entries if not fixed else 0)
    if fixed:
        return Measurement(required=most, fully_allocated=most)
    used = 0 if source is None else touched_bytes(source, DEFAULT_BLOCK_SIZE) // DEFAULT_BLOCK_SIZE
    return Measurement(required=layout.file_size(used), fully_allocated=most)
