"""What must not be overwritten: where the metadata of an image lie, as far as is asked for.

Source: qemu's documentation of `overlap-check`; row 43 of docs/formats/qcow2.md. What an image
brings along is looked at when a slice of the mapping is first used for writing, and when clusters
are given out; what is made later is kept in a set. So a write costs no more than a look into it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping

import numpy as np

from qcowkit.codecs.qcow2.entries import OFFSET_MASK, Uint64Array
from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.refcounts import BLOCK_OFFSET_MASK
from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.extents.table import Int64Array

CONSTANT = (
    "main-header",
    "active-l1",
    "refcount-table",
    "snapshot-table",
    "bitmap-directory",
)
CACHED = (*CONSTANT, "active-l2", "refcount-block", "inactive-l1")
ALL = (*CACHED, "inactive-l2")
_TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "constant": CONSTANT,
    "cached": CACHED,
    "all": ALL,
}


def chosen_checks(options: OpenOptions) -> frozenset[str]:
    """The names of the structures to look for. Raises RequestError for unknown ones."""
    names = set(_TEMPLATES[options.overlap_check])
    for name, on in options.overlap_checks.items():
        if name not in ALL:
            raise RequestError(f"overlap-check.{name} is unknown; known are {', '.join(ALL)}")
        (names.add if on else names.discard)(name)
    return frozenset(names)


class OverlapGuard:
    """Host clusters of metadata, by name. Not safe from several threads."""

    def __init__(self, names: frozenset[str], *, cluster_bits: int) -> None:
        self.names = names
        self._bits = cluster_bits
        self._regions: list[tuple[int, int, str]] = []
        self._single: dict[str, Int64Array] = {}
        # What was made since the image was opened: cluster to name.
        self.recent: dict[int, str] = {}

    def add_region(self, name: str, *, offset: int, length: int) -> None:
        """A structure of `length` bytes that the image brought along."""
        if name in self.names and length:
            last = (offset + length - 1) >> self._bits
            self._regions.append((offset >> self._bits, last + 1, name))

    def add_tables(self, l1: Uint64Array, *, name: str = "active-l2") -> None:
        """The L2 tables of an L1 table."""
        self._add_single(name, (l1 & np.uint64(OFFSET_MASK)).view(np.int64))

    def add_blocks(self, table: array[int]) -> None:
        """The blocks of a refcount table."""
        words = np.frombuffer(table, dtype=np.uint64) & np.uint64(BLOCK_OFFSET_MASK)
        self._add_single("refcount-block", words.view(np.int64))

    def _add_single(self, name: str, offsets: Int64Array) -> None:
        if name in self.names:
            clusters = np.unique(offsets[offsets > 0] >> self._bits)
            before = self._single.get(name)
            if before is not None:
                clusters = np.union1d(before, clusters)
            self._single[name] = clusters

    def note(self, name: str, *, first: int, count: int = 1) -> None:
        """A structure was put into clusters that were free."""
        if name in self.names:
            self.recent.update(dict.fromkeys(range(first, first + count), name))

    def forget(self, *, first: int, count: int) -> None:
        """Clusters were released; whatever lay there is gone."""
        if self.recent and count < len(self.recent):
            for cluster in range(first, first + count):
                self.recent.pop(cluster, None)
        elif self.recent:
            for cluster in [key for key in self.recent if first <= key < first + count]:
                del self.recent[cluster]
        self._regions = [
            part
            for begin, end, name in self._regions
            for part in _without(begin, end, name, first, first + count)
        ]
        for name, clusters in self._single.items():
            low, high = np.searchsorted(clusters, [first, first + count])
            if low < high:
                self._single[name] = np.delete(clusters, slice(low, high))

    def check(self, *, first: int, count: int, ignore: str = "") -> None:
        """Raise CorruptMetadata where clusters to be written hold metadata.

        ignore: the name of the structure that is being written."""
        for begin, end, name in self._regions:
            if begin < first + count and first < end and name != ignore:
                raise self._hit(name, max(begin, first))
        for name, clusters in self._single.items():
            low = int(np.searchsorted(clusters, first))
            if low < len(clusters) and clusters[low] < first + count and name != ignore:
                raise self._hit(name, int(clusters[low]))
        if self.recent:
            self._check_recent(range(first, first + count), ignore)

    def _check_recent(self, clusters: range, ignore: str) -> None:
        few = clusters if len(clusters) < len(self.recent) else self.recent
        for cluster in few:
            if cluster in clusters and self.recent.get(cluster, ignore) != ignore:
                raise self._hit(self.recent[cluster], cluster)

    def check_many(self, clusters: Int64Array) -> None:
        """The same for single clusters in any order."""
        if not len(clusters):
            return
        lowest, highest = int(clusters.min()), int(clusters.max())
        for begin, end, name in self._regions:
            if highest < begin or end <= lowest:
                continue
            hit = (clusters >= begin) & (clusters < end)
            if hit.any():
                raise self._hit(name, int(clusters[hit.argmax()]))
        for name, known in self._single.items():
            low, high = np.searchsorted(known, [lowest, highest + 1])
            if low < high:
                place = np.minimum(np.searchsorted(known, clusters), len(known) - 1)
                hit = known[place] == clusters
                if hit.any():
                    raise self._hit(name, int(clusters[hit.argmax()]))
        for cluster in _both(self.recent, clusters):
            raise self._hit(self.recent[cluster], cluster)

    def _hit(self, name: str, cluster: int) -> CorruptMetadata:
        return CorruptMetadata(
            "data cluster",
            host_offset=cluster << self._bits,
            reason=f"overlaps the metadata that {name} protects: writing would destroy them",
        )


def _both(recent: Mapping[int, str], clusters: Int64Array) -> Iterable[int]:
    return [cluster for cluster in clusters.tolist() if cluster in recent] if recent else ()


def _without(begin: int, end: int, name: str, first: int, last: int) -> list[tuple[int, int, str]]:
    """The region without clusters [first, last)."""
    if last <= begin or end <= first:
        return [(begin, end, name)]
    parts = [(begin, first, name), (last, end, name)]
    return [part for part in parts if part[0] < part[1]]
