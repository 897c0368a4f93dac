"""A new qcow2 image from guest data in ascending order: tables in bulk, the header last."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.entries import (
    ALL_ALLOCATED,
    ALL_ZERO,
    COPIED,
    READS_ZERO,
    Uint64Array,
    encode_compressed,
)
from qcowkit.codecs.qcow2.extensions import CryptoExtension, encode_first_cluster
from qcowkit.engine.batches import runs_of
from qcowkit.engine.crypt import EncryptedWrite
from qcowkit.engine.luks.format import NewCrypt
from qcowkit.engine.qcow2.l2_writer import L2Writer
from qcowkit.engine.qcow2.layout import Layout
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.engine.qcow2.refcount_writer import RefcountWriter
from qcowkit.engine.qcow2.runs import runs_of_disk, with_runs
from qcowkit.engine.qcow2.spec import Qcow2Spec
from qcowkit.engine.transfer import MAX_DIRECT, Blob, Chunk, UnitState, Write
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, ceil_div

# Clusters counted before finished refcount blocks are written: bounds memory.
_REFCOUNT_STEP = 1 << 20


class Qcow2BulkWriter:
    """A `BulkTarget`. The layout is an upper bound; what stays unused is counted as free.

    storage: empty and writable. data_storage: the external data file, where the spec names one.
    crypt: the keys, where the spec asks for encryption."""

    direct_limit = MAX_DIRECT

    def __init__(
        self,
        storage: Storage,
        spec: Qcow2Spec,
        layout: Layout,
        *,
        data_storage: Storage | None = None,
        crypt: NewCrypt | None = None,
    ) -> None:
        geometry = spec.geometry
        self._storage = storage
        self._spec = spec
        self._layout = layout
        self._data = data_storage or storage
        self._external = data_storage is not None
        assert (crypt is None) == (spec.encryption is None), "keys for what is encrypted"
        self._crypt = crypt
        self._size = geometry.cluster_size
        self._cursor = layout.data_offset
        self._last_compressed = 0
        self._refcounts = RefcountWriter(storage, layout)
        self._l2 = L2Writer(storage, layout, fill=self._preallocated if spec.preallocated else None)
        self.unit = geometry.cluster_size
        self.grain = geometry.subcluster_size
        self.explicit_zeros = spec.keeps_zeros

    def place(self, chunk: Chunk) -> list[Write]:
        """See `BulkTarget.place`."""
        per_cluster = self._spec.geometry.subcluster_count
        first = chunk.start // self._size
        count = ceil_div(chunk.length, self._size)
        states = chunk.states
        if per_cluster > 1:
            padded = np.zeros(count * per_cluster, dtype=np.uint8)
            padded[: len(states)] = states
            grid = padded.reshape(count, per_cluster)
            data = (grid == UnitState.DATA).any(axis=1)
        else:
            grid = None
            data = states == UnitState.DATA
        if chunk.blobs:
            return self._place_compressed(chunk, first, data, grid)
        entries, bitmaps = self._states_only(states, grid)
        writes: list[Write] = []
        for begin, end in zip(*runs_of(data), strict=True):
            host = self._allocate(first + begin, end - begin)
            hosts = host + np.arange(end - begin, dtype=np.int64) * self._size
            entries[begin:end] = hosts.view(np.uint64) | np.uint64(COPIED)
            last = min(end * self._size, chunk.length)
            view = chunk.view[begin * self._size : last]
            guest = chunk.start + begin * self._size
            writes.append(self._write(view, host=host, guest=guest))
        if bitmaps is not None and self._spec.data_file_raw:
            bitmaps[data] = np.uint64(ALL_ALLOCATED)
        self._l2.put(first, entries, bitmaps)
        return writes

    def _write(self, view: memoryview, *, host: int, guest: int) -> Write:
        if self._crypt is None:
            return Write(storage=self._data, buffers=[view], offset=host)
        buffers: list[bytes | bytearray | memoryview] = [view]
        # What nobody wrote decrypts to noise: clusters are whole, where the file reaches so far.
        unit = SECTOR if self._external else self._size
        if short := -len(view) % unit:
            whole = len(view) // SECTOR * SECTOR
            buffers = [view[:whole], bytearray(view[whole:]) + bytes(short)]
        return EncryptedWrite(
            storage=self._data,
            buffers=buffers,
            offset=host,
            cipher=self._crypt.cipher,
            guest=guest,
        )

    def place_zeros(self, start: int, length: int) -> None:
        """See `BulkTarget.place_zeros`."""
        first = start // self._size
        count = ceil_div(length, self._size)
        geometry = self._spec.geometry
        most = geometry.l2_entries
        while count:
            part = min(count, most - first % most)
            zero = np.uint64(0 if geometry.extended_l2 else READS_ZERO)
            bitmaps = np.full(part, ALL_ZERO, np.uint64) if geometry.extended_l2 else None
            self._l2.put(first, np.full(part, zero, np.uint64), bitmaps)
            first, count = first + part, count - part

    def place_direct(self, start: int, length: int) -> tuple[Storage, int]:
        """See `BulkTarget.place_direct`."""
        first, count = start // self._size, ceil_div(length, self._size)
        host = self._allocate(first, count)
        geometry = self._spec.geometry
        most = geometry.l2_entries
        done = 0
        while done < count:
            part = min(count - done, most - (first + done) % most)
            hosts = host + np.arange(done, done + part, dtype=np.int64) * self._size
            bitmaps = np.full(part, ALL_ALLOCATED, np.uint64) if geometry.extended_l2 else None
            self._l2.put(first + done, hosts.view(np.uint64) | np.uint64(COPIED), bitmaps)
            done += part
        return self._data, host

    def finish(self) -> None:
        """See `BulkTarget.finish`."""
        layout, size = self._layout, self._size
        if self._spec.preallocated:
            self._finish_preallocation()
        self._l2.finish(all_tables=self._spec.preallocated)
        self._refcounts.add_run(0, 1 + layout.refcount_table_clusters)
        l1_first = layout.l1_offset // size
        l2_first = layout.l2_offset // size
        self._refcounts.add_run(l1_first, layout.l1_clusters)
        self._refcounts.add_run(layout.crypto_offset // size, layout.crypto_clusters)
        self._refcounts.add_run(l2_first, self._l2.tables)
        end = ceil_div(self._cursor, size)
        if self._cursor == layout.data_offset:
            end = l2_first + self._l2.tables
        blocks = ceil_div(end, layout.geometry.refcounts_per_block)
        self._refcounts.add_run(layout.refcount_block_offset // size, blocks)
        self._refcounts.finish(end)
        self._storage.truncate(end * size)
        self._write_header()

    def _write_header(self) -> None:
        layout = self._layout
        header = dataclasses.replace(
            self._spec.header(),
            l1_size=layout.l1_entries,
            l1_table_offset=layout.l1_offset if layout.l1_entries else 0,
            refcount_table_offset=layout.refcount_table_offset,
            refcount_table_clusters=layout.refcount_table_clusters,
        )
        crypto = None
        if self._crypt is not None and self._crypt.area:
            area = self._crypt.area
            self._storage.pwrite([area], offset=layout.crypto_offset)
            crypto = CryptoExtension(offset=layout.crypto_offset, length=len(area))
        extensions = self._spec.extensions(crypto=crypto)
        raw = encode_first_cluster(header, extensions, self._spec.backing_name)
        self._storage.pwrite([raw], offset=0)
        if self._spec.contiguous_runs:
            self._record_runs()

    def _record_runs(self) -> None:
        """The same again, with what the finished tables say."""
        metadata = load_qcow2_metadata(self._storage)
        header, extensions = with_runs(
            metadata.header, metadata.extensions, runs_of_disk(self._storage, metadata)
        )
        raw = encode_first_cluster(header, extensions, self._spec.backing_name)
        self._storage.pwrite([raw], offset=0)

    def _allocate(self, first: int, count: int) -> int:
        """Host offset of `count` contiguous clusters for guest clusters from index `first`."""
        if self._external:
            return first * self._size
        if self._spec.preallocated:
            return self._layout.data_offset + first * self._size
        host = self._cursor
        self._cursor += count * self._size
        cluster = host // self._size
        self._refcounts.add_run(cluster, count)
        self._refcounts.release_before(cluster)
        return host

    def _states_only(
        self, states: npt.NDArray[np.uint8], grid: npt.NDArray[np.uint8] | None
    ) -> tuple[Uint64Array, Uint64Array | None]:
        """Entries (and bitmaps) before host clusters are known. Zeros without a backing file are
        left unallocated; with one, or over preallocated clusters, they are said."""
        if grid is None:
            zero = (states == UnitState.ZERO) & self.explicit_zeros
            return zero.astype(np.uint64) * np.uint64(READS_ZERO), None
        allocated = _pack_bits(grid == UnitState.DATA)
        zeros = _pack_bits((grid == UnitState.ZERO) & self.explicit_zeros)
        return np.zeros(len(grid), np.uint64), allocated | zeros << np.uint64(32)

    def _place_compressed(
        self,
        chunk: Chunk,
        first: int,
        data: npt.NDArray[np.bool_],
        grid: npt.NDArray[np.uint8] | None,
    ) -> list[Write]:
        """One blob behind the other at byte granularity; what did not shrink goes in plain."""
        geometry = self._spec.geometry
        entries, bitmaps = self._states_only(chunk.states, grid)
        writes: list[Write] = []
        run: list[bytes] = []
        run_at = run_end = self._cursor
        for index in np.flatnonzero(data).tolist():
            blob = chunk.blobs[index]
            if blob is None:
                host = self._plain_cluster()
                entries[index] = np.uint64(COPIED | host)
                view = chunk.view[index * self._size : (index + 1) * self._size]
                writes.append(Write(storage=self._storage, buffers=[view], offset=host))
                if bitmaps is not None:
                    bitmaps[index] = np.uint64(ALL_ALLOCATED)
                continue
            host = self._squeeze(blob)
            length = len(blob.data)
            entries[index] = np.uint64(encode_compressed(host, length, geometry=geometry))
            if bitmaps is not None:
                bitmaps[index] = np.uint64(0)
            if run and host != run_end:
                writes.append(Write(storage=self._storage, buffers=run, offset=run_at))
                run = []
            if not run:
                run_at = host
            run.append(blob.data)
            run_end = host + length
        if run:
            writes.append(Write(storage=self._storage, buffers=run, offset=run_at))
        self._l2.put(first, entries, bitmaps)
        self._refcounts.release_before(self._cursor // self._size)
        return writes

    def _plain_cluster(self) -> int:
        self._cursor = host = ceil_div(self._cursor, self._size) * self._size
        self._cursor += self._size
        self._refcounts.add_run(host // self._size, 1)
        self._last_compressed = 0
        return host

    def _squeeze(self, blob: Blob) -> int:
        """Host offset for compressed bytes; each touched cluster gets a reference."""
        size, most = self._size, self._spec.geometry.refcount_max
        before = (self._cursor - 1) // size
        # `_last_compressed` counts the blobs in the cluster under the cursor.
        if self._cursor % size and self._last_compressed >= most:
            self._cursor = ceil_div(self._cursor, size) * size
        if blob.phase >= 0:
            self._cursor += (blob.phase - self._cursor) % SECTOR
        host, length = self._cursor, len(blob.data)
        first, last = host // size, (host + length - 1) // size
        if first != before:
            self._last_compressed = 0
        self._refcounts.add_run(first, last - first + 1)
        self._last_compressed = self._last_compressed + 1 if last == first else 1
        self._cursor = host + length
        return host

    def _preallocated(self, first: int, count: int) -> tuple[Uint64Array, Uint64Array | None]:
        """Entries of guest clusters that got no data: a host cluster of their own."""
        base = 0 if self._external else self._layout.data_offset
        hosts = base + np.arange(first, first + count, dtype=np.int64) * self._size
        entries = hosts.view(np.uint64) | np.uint64(COPIED)
        # Zeros of the file are not zeros of the guest where they are decrypted: they must be said.
        hidden = self._crypt is not None
        if not self._spec.geometry.extended_l2:
            return entries | np.uint64(READS_ZERO if hidden else 0), None
        # Transparent where a backing file shows through; else the host cluster reads as zeros.
        word = ALL_ZERO if hidden else ALL_ALLOCATED
        word = 0 if self._spec.backing_name is not None else word
        return entries, np.full(count, word, np.uint64)

    def _finish_preallocation(self) -> None:
        clusters = self._spec.geometry.clusters(self._spec.size)
        if not self._external:
            self._cursor = self._layout.data_offset + clusters * self._size
            first, end = self._layout.data_offset // self._size, self._cursor // self._size
            for at in range(first, end, _REFCOUNT_STEP):
                self._refcounts.add_run(at, min(_REFCOUNT_STEP, end - at))
                self._refcounts.release_before(at)


def _pack_bits(mask: npt.NDArray[np.bool_]) -> Uint64Array:
    """Rows of 32 booleans as 32-bit words, first column in bit 0."""
    packed = np.packbits(mask, axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u4").ravel().astype(np.uint64)
