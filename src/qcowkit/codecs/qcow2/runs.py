"""Contiguous runs: a header extension of our own that maps guest ranges without L2 tables. Pure.

Seeds 002-15 to -18; docs/formats/qcow2.md, "Contiguous runs". A run says that the clusters of a
guest range are allocated, plain, of this disk alone, and lie in the file in the guest's order. The
L2 tables say the same, so the image is standard qcow2 for everybody else. Runs mean something only
while autoclear bit 61 is set, which any writer that does not know it clears."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from qcowkit.errors import RequestError
from qcowkit.units import INT64_MAX

# "qkru"
RUNS_TYPE = 0x716B7275
RUNS_NAME = "contiguous runs"
VERSION = 1
MAX_RUNS = 64
# What the first cluster has beside runs, generously: header, feature names, names of files.
OTHER_BYTES = 3072
_HEAD = struct.Struct(">BBHI")
_RUN = struct.Struct(">QQQ")
RUN_BYTES = _RUN.size


class Run(NamedTuple):
    """Guest bytes [start, start + length) lie in one piece at the host offset `host`."""

    start: int
    length: int
    host: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContiguousRuns:
    """Runs in guest order, none of which touches another. Offsets and lengths in bytes."""

    runs: tuple[Run, ...]
    _starts: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", [run.start for run in self.runs])

    @classmethod
    def decode(cls, raw: bytes) -> Self | None:
        """None for what is not exactly such a list: it is an unknown extension then, since an image
        is never refused for a hint that it may do without."""
        if len(raw) < _HEAD.size:
            return None
        version, reserved, spare, count = _HEAD.unpack_from(raw)
        if version != VERSION or reserved or spare or not 1 <= count <= MAX_RUNS:
            return None
        if len(raw) != _HEAD.size + count * _RUN.size:
            return None
        runs = tuple(Run(*words) for words in _RUN.iter_unpack(raw[_HEAD.size :]))
        return cls(runs=runs) if _in_order(runs) else None

    def encode(self) -> bytes:
        """The data of the extension."""
        return _HEAD.pack(VERSION, 0, 0, len(self.runs)) + b"".join(
            _RUN.pack(*run) for run in self.runs
        )

    def fits(self, *, cluster_size: int, disk_size: int, file_size: int) -> bool:
        """Whether all runs are whole clusters inside of the disk and of the file, none of them the
        header's. disk_size: bytes, rounded up to clusters; file_size: of the file with the data."""
        return all(
            not (run.start | run.length | run.host) % cluster_size
            and run.host >= 0
            and run.start + run.length <= disk_size
            and run.host + run.length <= file_size
            for run in self.runs
        )

    def find(self, offset: int) -> Run | None:
        """The run that holds a guest byte."""
        index = bisect_right(self._starts, offset) - 1
        if index < 0:
            return None
        run = self.runs[index]
        return run if offset < run.start + run.length else None

    def next_start(self, offset: int, default: int) -> int:
        """Where the first run behind a guest byte begins; `default` where there is none."""
        index = bisect_right(self._starts, offset)
        return self._starts[index] if index < len(self._starts) else default


def _in_order(runs: Sequence[Run]) -> bool:
    end = 0
    for run in runs:
        if not run.length or run.start < end or run.start + run.length > INT64_MAX:
            return False
        if run.host + run.length > INT64_MAX:
            return False
        end = run.start + run.length
    return True


def check_runs_fit(*, version: int, cluster_size: int) -> None:
    """Raise RequestError for an image that cannot have a record of runs."""
    if version < 3:
        raise RequestError("contiguous_runs needs compat=1.1, found compat=0.10")
    if cluster_size < OTHER_BYTES + RUN_BYTES:
        raise RequestError(
            f"contiguous_runs needs clusters of 4096 bytes at least, found {cluster_size}: the "
            "first one has no room for them"
        )
