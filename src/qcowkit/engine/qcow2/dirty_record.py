"""The record of dirty L2 tables of an image that is written with lazy refcounts (docs/adr/0013).

Bits are only ever added while the image is dirty: a record that was written in part says more than
it has to, and never less than was durable before."""

from __future__ import annotations

from collections.abc import Iterable

from qcowkit.codecs.qcow2.dirty_tables import HEAD_SIZE, DirtyTables
from qcowkit.storage.protocol import Storage


class DirtyRecord:
    """The bits of one open image. Callers order the writes; a failure is a StorageError, after
    which the same call may be made again."""

    def __init__(self, storage: Storage, record: DirtyTables) -> None:
        self._storage = storage
        self._place = record.host_offset + HEAD_SIZE
        self._shift = record.shift
        self._covered = record.covered
        self._bits = bytearray(len(record.bits))

    def covers(self, entries: Iterable[int]) -> bool:
        """Whether there are bits for these entries of the L1 table."""
        return max(entries, default=0) < self._covered

    def start(self, entries: Iterable[int]) -> None:
        """Record these L1 entries, and nothing of what was recorded before."""
        bits = bytearray(len(self._bits))
        self._set(bits, entries)
        self._storage.pwrite([bits], offset=self._place)
        self._bits = bits

    def add(self, entries: Iterable[int]) -> bool:
        """Record these as well; False, and nothing written, where they are recorded already."""
        bits = self._bits.copy()
        changed = self._set(bits, entries)
        if not changed:
            return False
        first, last = min(changed), max(changed) + 1
        self._storage.pwrite([bits[first:last]], offset=self._place + first)
        self._bits = bits
        return True

    def _set(self, bits: bytearray, entries: Iterable[int]) -> list[int]:
        """Set the bits of entries; the indices of bytes that this changes."""
        changed = []
        for number in {entry >> self._shift for entry in entries}:
            index, bit = number >> 3, 1 << (number & 7)
            if not bits[index] & bit:
                bits[index] |= bit
                changed.append(index)
        return changed
