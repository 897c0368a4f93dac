"""Where the tables of an image lie: inside the file, and apart from one another. Pure.

Rows 20 and 21 of docs/formats/qcow2.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qcowkit.errors import CorruptMetadata
from qcowkit.units import INT64_MAX, align_up


class Region(NamedTuple):
    """A structure by name, host offset and bytes."""

    name: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        """One past its last byte."""
        return self.offset + self.length


def check_inside(regions: Sequence[Region], *, cluster_size: int, file_size: int) -> None:
    """Each region is aligned, begins inside the file, and ends less than a cluster past its end.

    A file may end inside its last cluster: the rest of that cluster reads as zeros. Raises
    CorruptMetadata."""
    for region in regions:
        reason = ""
        if region.offset % cluster_size:
            reason = f"offset is not a multiple of the cluster size {cluster_size:#x}"
        elif region.end > INT64_MAX:
            reason = f"{region.length} bytes end above 2**63 - 1"
        elif region.offset >= file_size or region.end - file_size >= cluster_size:
            reason = f"ends at {region.end:#x}, past the end of the file at {file_size:#x}"
        if reason:
            raise CorruptMetadata(region.name, host_offset=region.offset, reason=reason)


def check_disjoint(regions: Sequence[Region], *, cluster_size: int) -> None:
    """No two regions share a cluster. Raises CorruptMetadata."""
    ordered = sorted(regions, key=lambda region: region.offset)
    for before, after in zip(ordered, ordered[1:], strict=False):
        end = align_up(before.end, cluster_size)
        if after.offset < end:
            reason = f"overlaps the {before.name}, which ends at {end:#x}"
            raise CorruptMetadata(after.name, host_offset=after.offset, reason=reason)
