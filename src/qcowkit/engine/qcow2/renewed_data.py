"""Guest data that cannot stay where they are when the tables are said anew: read through the disk,
written where nothing lies."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.compression import make_compressor
from qcowkit.codecs.qcow2.entries import (
    ALL_ALLOCATED,
    ALL_ZERO,
    COPIED,
    READS_ZERO,
    Uint64Array,
    encode_compressed,
)
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.codecs.qcow2.snapshots import SnapshotEntry
from qcowkit.engine.crypt import DataCipher
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.room import Room
from qcowkit.errors import RequestError
from qcowkit.extents.table import Int64Array
from qcowkit.extents.zeros import zero_units
from qcowkit.storage.protocol import Storage
from qcowkit.units import MiB

_READ = 4 * MiB
# Narrower refcounts may not count all that a cluster could hold of compressed data.
PACKING_ORDER = 4


class GuestReader(Protocol):
    """The disk as the guest sees it, or saw it when a snapshot was taken, through all layers."""

    def __call__(
        self, snapshot: SnapshotEntry | None, buffer: npt.NDArray[np.uint8], *, offset: int
    ) -> None:
        """Fill `buffer` from guest byte `offset` on; the range lies inside the disk."""

    def cipher(self) -> DataCipher | None:
        """That of the image, None where it is in clear. Raises RequestError without its key."""


class DataRenewal:
    """Fills new host clusters. metadata: as they will be, but for places."""

    def __init__(
        self,
        storage: Storage,
        data: Storage,
        metadata: Qcow2Metadata,
        *,
        room: Room,
        read: GuestReader,
        zero_clusters: bool,
    ) -> None:
        """data: where guest clusters lie, `storage` itself mostly. zero_clusters: whether entries
        may say that a cluster is zero."""
        self._storage = storage
        self._data = data
        self._metadata = metadata
        self._geometry: Geometry = metadata.geometry
        self._size = metadata.geometry.cluster_size
        self._read = read
        self._zero_clusters = zero_clusters
        self._compress = make_compressor(metadata.compression_type, None)
        # Where the next compressed cluster goes, and where its room ends; bytes.
        self._cursor = self._stop = 0
        self._room = room

    def rewrite(
        self,
        snapshot: SnapshotEntry | None,
        offsets: Int64Array,
        packed: npt.NDArray[np.bool_],
        *,
        disk_size: int,
    ) -> tuple[Uint64Array, Uint64Array]:
        """(entries, bitmaps) of guest clusters at `offsets`, ascending, once their content is
        written; packed: which of them are compressed. All of shape (n,)."""
        if len(offsets) and int(offsets[-1]) >= disk_size:
            raise RequestError(
                "a snapshot holds the state of a machine, which would have to move: delete it first"
            )
        entries = np.zeros(len(offsets), dtype=np.uint64)
        bitmaps = np.zeros(len(offsets), dtype=np.uint64)
        for begin, end in self._runs(offsets):
            length = (end - begin) * self._size
            buffer = np.zeros(length, dtype=np.uint8)
            start = int(offsets[begin])
            self._read(snapshot, buffer[: min(length, disk_size - start)], offset=start)
            piece = slice(begin, end)
            self._write(
                buffer, start, packed[piece], entries[piece], bitmaps[piece], disk_size=disk_size
            )
        return entries, bitmaps

    def _runs(self, offsets: Int64Array) -> list[tuple[int, int]]:
        """Clusters that follow one another, some megabytes at most."""
        most = max(1, _READ // self._size)
        cuts = np.flatnonzero(np.diff(offsets) != self._size) + 1
        edges = [0, *cuts.tolist(), len(offsets)]
        return [
            (at, min(end, at + most))
            for begin, end in zip(edges[:-1], edges[1:], strict=True)
            for at in range(begin, end, most)
        ]

    def _write(
        self,
        buffer: npt.NDArray[np.uint8],
        start: int,
        packed: npt.NDArray[np.bool_],
        entries: Uint64Array,
        bitmaps: Uint64Array,
        *,
        disk_size: int,
    ) -> None:
        if self._metadata.data_file:
            # Each cluster has its place there; what the old tables show of it does not change.
            length = min(len(buffer), disk_size - start)
            raw = self._seal(buffer[:length].data, host=start, guest=start)
            self._data.pwrite([raw], offset=start)
            entries[:] = np.arange(len(entries)) * self._size + start
            entries |= np.uint64(COPIED)
            bitmaps[:] = ALL_ALLOCATED
            return
        zero = zero_units(buffer, self._size)
        entries[zero], bitmaps[zero] = self._zeros()
        if self._must_store_zeros:
            zero = np.zeros(len(zero), dtype=np.bool_)
        plain = []
        for index in np.flatnonzero(~zero).tolist():
            part = buffer[index * self._size : (index + 1) * self._size].data
            word = self._pack(part) if packed[index] else None
            if word is None:
                plain.append(index)
            else:
                entries[index] = word
        if plain:
            hosts = self._store(buffer, start, plain)
            entries[plain] = hosts.astype(np.uint64)
            bitmaps[plain] = ALL_ALLOCATED

    def _store(
        self, buffer: npt.NDArray[np.uint8], start: int, plain: list[int]
    ) -> npt.NDArray[np.int64]:
        """Host offsets of clusters of the buffer, written side by side."""
        rows = buffer.reshape(-1, self._size)[plain]
        place = self._room.take(len(plain)) * self._size
        hosts = np.arange(len(plain), dtype=np.int64) * self._size + place
        if self._metadata.encrypted is None:
            self._storage.pwrite([rows.data.cast("B")], offset=place)
            return hosts
        sealed = [
            self._seal(row.data, host=host, guest=start + index * self._size)
            for row, host, index in zip(rows, hosts.tolist(), plain, strict=True)
        ]
        self._storage.pwrite(sealed, offset=place)
        return hosts

    def _seal(self, data: memoryview, *, host: int, guest: int) -> memoryview | bytearray:
        """Guest data as they lie in the file."""
        if self._metadata.encrypted is None:
            return data
        cipher = self._read.cipher()
        assert cipher is not None, "an encrypted image has one"
        return cipher.encrypt(data, host=host, guest=guest)

    @property
    def _must_store_zeros(self) -> bool:
        """Without zero clusters only data hide a backing file."""
        return not self._zero_clusters and self._metadata.backing_name is not None

    def _zeros(self) -> tuple[int, int]:
        if self._geometry.has_subclusters:
            return 0, ALL_ZERO
        return (READS_ZERO if self._zero_clusters else 0), 0

    def _pack(self, part: memoryview) -> int | None:
        """Store a cluster compressed; None where that saves nothing."""
        raw = self._compress(part)
        if len(raw) >= self._size:
            return None
        alone = self._geometry.refcount_order < PACKING_ORDER
        if alone or self._cursor + len(raw) > self._stop:
            begin = self._room.take(1) * self._size
            if alone or begin != self._stop:
                self._cursor = begin
            # Otherwise what is left of the last cluster goes on into the next.
            self._stop = begin + self._size
        place, self._cursor = self._cursor, self._cursor + len(raw)
        self._storage.pwrite([raw], offset=place)
        return encode_compressed(place, len(raw), geometry=self._geometry)
