"""Cylinders, heads and sectors: the disk geometry of a VHD footer. Pure.

Source: the VHD specification, appendix "CHS Calculation"."""

from __future__ import annotations

from dataclasses import dataclass

from qcowkit.units import SECTOR, ceil_div

_MAX_CYLINDERS = 65535
_MAX_HEADS = 16
# Disks of at least this many sectors take 255 sectors a track. At exactly this count XAPI still
# takes 63, which would be exact; the specification and qemu do not.
_LONG_TRACKS = _MAX_CYLINDERS * _MAX_HEADS * 63
_LARGEST = _MAX_CYLINDERS * _MAX_HEADS * 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Chs:
    """A geometry; `sectors_per_track` counts sectors of 512 bytes."""

    cylinders: int
    heads: int
    sectors_per_track: int

    @property
    def sectors(self) -> int:
        """All sectors of 512 bytes that the geometry addresses."""
        return self.cylinders * self.heads * self.sectors_per_track

    def __str__(self) -> str:
        return f"{self.cylinders}/{self.heads}/{self.sectors_per_track}"


MAX_GEOMETRY = Chs(cylinders=_MAX_CYLINDERS, heads=_MAX_HEADS, sectors_per_track=255)


def chs_from_sectors(sectors: int) -> Chs:
    """The geometry for a disk of `sectors` sectors; it may address fewer, never more."""
    sectors = min(sectors, _LARGEST)
    if sectors >= _LONG_TRACKS:
        return _geometry(sectors // 255, heads=_MAX_HEADS, sectors_per_track=255)
    tracks = sectors // 17
    heads = max(4, ceil_div(tracks, 1024))
    if tracks < heads * 1024 and heads <= _MAX_HEADS:
        return _geometry(tracks, heads=heads, sectors_per_track=17)
    tracks = sectors // 31
    if tracks < _MAX_HEADS * 1024:
        return _geometry(tracks, heads=_MAX_HEADS, sectors_per_track=31)
    return _geometry(sectors // 63, heads=_MAX_HEADS, sectors_per_track=63)


def _geometry(tracks: int, *, heads: int, sectors_per_track: int) -> Chs:
    return Chs(cylinders=tracks // heads, heads=heads, sectors_per_track=sectors_per_track)


def round_up_to_chs(size: int) -> int:
    """The smallest size in bytes, at least `size`, that a geometry expresses exactly.

    Above the largest geometry (about 127.5 GiB) the size, in whole sectors, stays as it is."""
    wanted = ceil_div(size, SECTOR)
    if wanted >= _LARGEST:
        return wanted * SECTOR
    # A step is at most one cylinder, 4080 sectors, so this search is short.
    probe = wanted
    while (found := chs_from_sectors(probe).sectors) < wanted:
        probe += 1
    return found * SECTOR
