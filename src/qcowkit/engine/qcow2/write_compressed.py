"""Writing clusters compressed, packed one behind the other."""

from __future__ import annotations

from qcowkit.codecs.qcow2.compression import make_compressor
from qcowkit.codecs.qcow2.entries import MAX_HOST_OFFSET, encode_compressed
from qcowkit.codecs.qcow2.transitions import is_allocated, put_entry
from qcowkit.engine.qcow2.state import WriteState
from qcowkit.engine.qcow2.write import Writer
from qcowkit.errors import RequestError


class CompressedWriter:
    """Compressed writes of one image. The caller holds the lock."""

    def __init__(self, state: WriteState, writer: Writer) -> None:
        self._state = state
        self._writer = writer
        self._geometry = state.geometry
        self._size = state.geometry.cluster_size
        self._compressor = make_compressor(state.metadata.compression_type, None)

    def write(self, view: memoryview, *, offset: int) -> None:
        """Store whole clusters. Raises RequestError before anything is changed where the request
        is not made of whole clusters, or one of them is allocated."""
        self._check(len(view), offset)
        for start in range(0, len(view), self._size):
            part = view[start : start + self._size]
            self._write_cluster(part, offset + start)
            self._state.settle()

    def _check(self, length: int, offset: int) -> None:
        state, size = self._state, self._size
        stop = offset + length
        if state.cipher is not None:
            raise RequestError("compressed clusters cannot be encrypted")
        if state.external:
            raise RequestError("compressed clusters cannot lie in an external data file")
        whole = not offset % size and (not stop % size or stop == state.mapping.size)
        if not whole:
            raise RequestError(
                f"compressed write of {length} bytes at {offset:#x}: only whole clusters of {size} "
                "bytes can be compressed"
            )
        for start in range(offset, stop, size):
            if is_allocated(self._entry(start)):
                raise RequestError(
                    f"the cluster at guest offset {start:#x} is allocated already: compressed data "
                    "are only written where there is nothing yet (discard it first)"
                )

    def _entry(self, offset: int) -> int:
        """The entry now; nothing is made for it."""
        state = self._state
        number, index = divmod(offset >> self._geometry.cluster_bits, state.tables.slice_entries)
        if not is_allocated(int(state.tables.l1[number // state.tables.slices_per_table])):
            return 0
        return state.slice(number)[index * self._geometry.l2_entry_size // 8]

    def _write_cluster(self, data: memoryview, offset: int) -> None:
        padded = bytes(data).ljust(self._size, b"\0")
        packed = self._compressor(padded)
        if packed is None or len(packed) >= self._size:
            self._writer.write(data, offset=offset)
            return
        state = self._state
        number, index = divmod(offset >> self._geometry.cluster_bits, state.tables.slice_entries)
        state.ensure_table(number // state.tables.slices_per_table)
        state.barriers.observe("cluster_alloc_bytes")
        host = state.allocator.allocate_bytes(len(packed))
        try:
            limit = min(MAX_HOST_OFFSET, 1 << self._geometry.compressed_offset_bits)
            if host + len(packed) > limit:
                raise RequestError(f"compressed data would lie beyond host offset {limit:#x}")
            state.barriers.pending = True
            state.barriers.observe("write_compressed")
            state.storage.pwrite([packed], offset=host)
            # Before the entry: who reads without the lock must find it inside of the file.
            state.refresh_rules()
            words = state.edit(number, first=index, last=index + 1)
        except BaseException:
            bits = self._geometry.cluster_bits
            first, last = host >> bits, (host + len(packed) - 1) >> bits
            state.allocator.free(first, last + 1 - first, punch=False)
            raise
        entry = encode_compressed(host, len(packed), geometry=self._geometry)
        bitmap = 0 if self._geometry.has_subclusters else None
        put_entry(words, index, entry=entry, bitmap=bitmap)
