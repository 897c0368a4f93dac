"""A raw disk as the target of a bulk copy: guest offsets are host offsets, zeros are holes."""

from __future__ import annotations

from qcowkit.engine.batches import runs_of
from qcowkit.engine.transfer import MAX_DIRECT, Chunk, UnitState, Write
from qcowkit.storage.protocol import Storage


class RawBulkWriter:
    """A `BulkTarget` on an empty file, or on one that keeps its content (`overwrite`).

    unit: the shortest run of zeros that becomes a hole, bytes. size: guest bytes."""

    direct_limit = MAX_DIRECT

    def __init__(self, storage: Storage, *, size: int, unit: int, overwrite: bool = False) -> None:
        self._storage = storage
        self._size = size
        self._overwrite = overwrite
        self.unit = self.grain = unit
        # Old content must not show where the source has nothing.
        self.explicit_zeros = overwrite

    def place(self, chunk: Chunk) -> list[Write]:
        """See `BulkTarget.place`."""
        unit = self.unit
        writes = []
        for begin, end in zip(*runs_of(chunk.states == UnitState.DATA), strict=True):
            view = chunk.view[begin * unit : min(end * unit, chunk.length)]
            offset = chunk.start + begin * unit
            writes.append(Write(storage=self._storage, buffers=[view], offset=offset))
        if self._overwrite:
            for begin, end in zip(*runs_of(chunk.states != UnitState.DATA), strict=True):
                length = min(end * unit, chunk.length) - begin * unit
                self.place_zeros(chunk.start + begin * unit, length)
        return writes

    def place_zeros(self, start: int, length: int) -> None:
        """See `BulkTarget.place_zeros`."""
        self._storage.zero(offset=start, length=length, unmap=True)

    def place_direct(self, start: int, length: int) -> tuple[Storage, int]:
        """See `BulkTarget.place_direct`."""
        return self._storage, start

    def finish(self) -> None:
        """See `BulkTarget.finish`."""
        if not self._storage.caps.block_device and self._storage.size() != self._size:
            self._storage.truncate(self._size)
