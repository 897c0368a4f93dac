"""Host clusters that structures of a qcow2 file have for themselves. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qcowkit.extents.table import Int64Array

_BATCH = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """Runs of clusters that are referred to once, by one structure each.

    first, count: int64 host clusters; owner: int64 index into `names`; all of shape (n,)."""

    names: tuple[str, ...]
    first: Int64Array
    count: Int64Array
    owner: Int64Array

    def clusters(self, base: int, stop: int) -> Iterator[tuple[Int64Array, Int64Array]]:
        """(clusters, owners) of the runs within host clusters [base, stop), a batch at a time."""
        low = np.maximum(self.first, base)
        size = np.minimum(self.first + self.count, stop) - low
        hit = np.flatnonzero(size > 0)
        if not len(hit):
            return
        low, size, owner = low[hit], size[hit], self.owner[hit]
        ends = np.cumsum(size)
        cuts = (np.flatnonzero(np.diff(ends // _BATCH)) + 1).tolist()
        for begin, end in zip([0, *cuts], [*cuts, len(hit)], strict=True):
            sizes = size[begin:end]
            inner = np.cumsum(sizes)
            within = np.arange(int(inner[-1]), dtype=np.int64)
            yield (
                within + np.repeat(low[begin:end] - (inner - sizes), sizes),
                np.repeat(owner[begin:end], sizes),
            )

    def without(self, *names: str) -> Claims:
        """Those of all other structures."""
        gone = [index for index, name in enumerate(self.names) if name in names]
        kept = ~np.isin(self.owner, gone)
        return Claims(
            names=self.names,
            first=self.first[kept],
            count=self.count[kept],
            owner=self.owner[kept],
        )

    def plus(self, name: str, *, first: Int64Array | int, count: int) -> Claims:
        """With one more structure: a run of `count` host clusters from each index in `first`."""
        places = np.atleast_1d(np.asarray(first, dtype=np.int64))
        return Claims(
            names=(*self.names, name),
            first=np.append(self.first, places),
            count=np.append(self.count, np.full(len(places), count, dtype=np.int64)),
            owner=np.append(self.owner, np.full(len(places), len(self.names), dtype=np.int64)),
        )

    @property
    def end(self) -> int:
        """One past the last host cluster of all."""
        return int((self.first + self.count).max()) if len(self.first) else 0


class ClaimsBuilder:
    """Collects runs; `build` freezes them."""

    def __init__(self, cluster_bits: int) -> None:
        self.cluster_bits = cluster_bits
        self._names: list[str] = []
        self._first: list[Int64Array] = []
        self._count: list[Int64Array] = []
        self._owner: list[Int64Array] = []

    def add(self, name: str, *, offset: int, length: int) -> None:
        """A structure of `length` bytes at a host offset; nothing if it is empty."""
        if length:
            first = offset >> self.cluster_bits
            last = (offset + length - 1) >> self.cluster_bits
            self._append(name, np.array([first]), np.array([last - first + 1]))

    def add_clusters(self, name: str, offsets: Int64Array) -> None:
        """Single clusters by their host offsets."""
        if len(offsets):
            self._append(name, offsets >> self.cluster_bits, np.ones(len(offsets), dtype=np.int64))

    def _append(self, name: str, first: Int64Array, count: Int64Array) -> None:
        self._first.append(first)
        self._count.append(count)
        self._owner.append(np.full(len(first), len(self._names), dtype=np.int64))
        self._names.append(name)

    def build(self) -> Claims:
        """All of them."""
        return Claims(
            names=tuple(self._names),
            first=np.concatenate(self._first).astype(np.int64),
            count=np.concatenate(self._count).astype(np.int64),
            owner=np.concatenate(self._owner),
        )
