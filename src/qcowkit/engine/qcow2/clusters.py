"""Compressed clusters of one image, read and decoded; neighbours in the file share a read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from qcowkit.codecs.qcow2.compression import BadCluster, decompress
from qcowkit.errors import CorruptMetadata
from qcowkit.extents.table import Extent
from qcowkit.storage.protocol import Storage
from qcowkit.units import KiB, MiB

MAX_SPAN = 4 * MiB
MAX_WASTE = 64 * KiB
_KEEP_BYTES = 1 * MiB


def plan_spans(runs: Sequence[Extent]) -> Iterator[tuple[int, int, Sequence[Extent]]]:
    """Group compressed rows whose bytes lie close together: (host offset, length, rows). Pure."""
    index = 0
    while index < len(runs):
        begin = runs[index].host
        end = begin + runs[index].stored
        last = index + 1
        while last < len(runs):
            host, stored = runs[last].host, runs[last].stored
            if not begin <= host <= end + MAX_WASTE or host + stored - begin > MAX_SPAN:
                break
            end = max(end, host + stored)
            last += 1
        yield begin, end - begin, runs[index:last]
        index = last


class ClusterReader:
    """Decodes compressed clusters of one file. Safe from several threads.

    lasting: nobody writes the file, so that what was decoded last may be kept. A reader without a
    lock could otherwise keep what it found at a place that has changed hands."""

    def __init__(self, storage: Storage, *, kind: str, cluster_size: int) -> None:
        self.lasting = True
        self._storage = storage
        self._kind = kind
        self._cluster_size = cluster_size
        self._recent: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, runs: Sequence[Extent], buffer: memoryview, *, base: int) -> None:
        """Put the bytes of compressed rows where they belong; buffer[0] is guest offset `base`."""
        if len(runs) == 1 and runs[0].length < self._cluster_size:
            self._read_part(runs[0], buffer, base)
            return
        for begin, length, rows in plan_spans(runs):
            raw = memoryview(self._storage.pread(length, offset=begin))
            data, decoded = b"", -1
            for row in rows:
                # A cluster that upper layers have cut to pieces is decoded once.
                if row.host != decoded:
                    at = row.host - begin
                    data = self.decode(raw[at : at + row.stored], host=row.host)
                    decoded = row.host
                self._put(row, data, buffer, base)

    def read_stored(self, run: Extent) -> bytes:
        """The compressed bytes as they lie in the file."""
        return self._storage.pread(run.stored, offset=run.host)

    def decode(self, data: bytes | memoryview, *, host: int) -> bytes:
        """One cluster of guest bytes. Raises CorruptMetadata at `host` for anything else."""
        try:
            return decompress(self._kind, data, size=self._cluster_size)
        except BadCluster as error:
            raise CorruptMetadata(
                f"{self._kind} compressed cluster", host_offset=host, reason=str(error)
            ) from None

    def _read_part(self, run: Extent, buffer: memoryview, base: int) -> None:
        """Small sequential reads come back to the same cluster: keep the last few decoded."""
        with self._lock:
            data = self._recent.get(run.host)
        if data is None:
            data = self.decode(self.read_stored(run), host=run.host)
            with self._lock:
                if self.lasting:
                    self._recent[run.host] = data
                while len(self._recent) > max(1, _KEEP_BYTES // self._cluster_size):
                    self._recent.popitem(last=False)
        self._put(run, data, buffer, base)

    def _put(self, run: Extent, data: bytes, buffer: memoryview, base: int) -> None:
        at = run.start - base
        inside = run.start & (self._cluster_size - 1)
        if run.length == len(data):
            buffer[at : at + run.length] = data
        else:
            buffer[at : at + run.length] = memoryview(data)[inside : inside + run.length]
