"""What a guest range holds before it is written: for the bytes beside the guest's own."""

from __future__ import annotations

from typing import Protocol

from qcowkit.engine.qcow2.clusters import ClusterReader
from qcowkit.engine.qcow2.mapping import Mapping
from qcowkit.engine.qcow2.state import WriteState
from qcowkit.errors import CorruptMetadata
from qcowkit.extents.table import Flag, Hit
from qcowkit.units import SECTOR, align_up


class Below(Protocol):
    """The layers under the image; see `image.protocol.Below`."""

    @property
    def size(self) -> int: ...

    def read_into(self, buffer: bytearray | memoryview, *, offset: int) -> None: ...

    def is_zero(self, *, start: int, length: int) -> bool: ...

    def read_or_none(self, *, start: int, length: int) -> bytes | bytearray | None: ...


class OldContent:
    """Guest bytes as they are now, through all layers. `below` is None without a base."""

    def __init__(self, state: WriteState, clusters: ClusterReader) -> None:
        self._state = state
        self._mapping: Mapping = state.mapping
        self._clusters = clusters
        self.below: Below | None = None

    def is_zero(self, start: int, stop: int) -> bool:
        """Whether [start, stop) is known to read as zeros without reading data."""
        while start < stop:
            kind, _, run = self._mapping.lookup(start)
            end = min(stop, start + run)
            if kind == Hit.DATA or kind == Hit.OTHER:
                return False
            if kind == Hit.NONE and not self._below_is_zero(start, end):
                return False
            start = end
        return True

    def _below_is_zero(self, start: int, stop: int) -> bool:
        below = self.below
        if below is None or start >= below.size:
            return True
        return below.is_zero(start=start, length=min(stop, below.size) - start)

    def read_or_none(self, start: int, length: int) -> bytearray | None:
        """The bytes, or None where there are none or they are known to be zeros."""
        if not length or self.is_zero(start, start + length):
            return None
        return self.read(start, length)

    def read(self, start: int, length: int) -> bytearray:
        """The bytes; what lies behind the end of the disk is zeros.

        An error is about data or another file, never a reason to call this image corrupt."""
        buffer = bytearray(length)
        view = memoryview(buffer)
        position, stop = start, min(start + length, self._mapping.size)
        self._state.barriers.observe("cow_read")
        try:
            while position < stop:
                kind, host, run = self._mapping.lookup(position)
                end = min(stop, position + run)
                self._read_run(kind, host, view[position - start : end - start], position)
                position = end
        except CorruptMetadata as error:
            self._state.foreign = error
            raise
        return buffer

    def _read_run(self, kind: Hit, host: int, view: memoryview, offset: int) -> None:
        if kind == Hit.DATA:
            self._read_data(host, view, offset)
        elif kind == Hit.NONE:
            self._read_below(view, offset)
        elif kind == Hit.OTHER:
            table = self._mapping.extents(start=offset, length=len(view))
            rows = [row for row in table if row.flags & Flag.COMPRESSED]
            self._clusters.read_into(rows, view, base=offset)

    def _read_data(self, host: int, view: memoryview, offset: int) -> None:
        cipher = self._state.cipher
        if cipher is None:
            self._read_stored(host, view)
            return
        head = offset % SECTOR
        sectors = memoryview(bytearray(align_up(head + len(view), SECTOR)))
        self._read_stored(host - head, sectors)
        cipher.decrypt(sectors, host=host - head, guest=offset - head)
        view[:] = sectors[head : head + len(view)]

    def _read_stored(self, host: int, view: memoryview) -> None:
        count = self._state.data.pread_into(view, offset=host)
        if count == len(view):
            return
        # What the file lacks of its last cluster is zeros, as the buffer is; more was lost.
        size = self._state.data.size()
        if host + len(view) > align_up(size, self._state.geometry.cluster_size):
            reason = f"lies beyond the end of the file at {size:#x}"
            raise CorruptMetadata("data cluster", host_offset=host, reason=reason)

    def _read_below(self, view: memoryview, offset: int) -> None:
        below = self.below
        if below is not None and offset < below.size:
            length = min(len(view), below.size - offset)
            below.read_into(view[:length], offset=offset)
