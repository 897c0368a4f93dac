"""Bitmaps that record what a guest changes, from the first change to the clean end.

While they record, the file says that they are in use: whoever finds that after a crash knows that
their content means nothing. Nothing is written for a disk that is not changed."""

from __future__ import annotations

from dataclasses import replace

from qcowkit.budget import Budget
from qcowkit.codecs.qcow2.bitmaps import BitmapEntry, BitmapFlag
from qcowkit.engine.qcow2.bitmap_bits import check_bitmap_size, find_bitmap
from qcowkit.engine.qcow2.bitmap_store import BitmapStore, StoredBitmap
from qcowkit.engine.qcow2.state import WriteState
from qcowkit.extents.bits import GranuleBits


class LiveBitmaps:
    """The bitmaps of an image that is open for writing. The caller holds its lock.

    recording: the bits of those that are enabled; each change is marked before it is made. Raises
    CorruptMetadata, BudgetExceeded and StorageError where one cannot be read."""

    def __init__(self, state: WriteState, *, budget: Budget) -> None:
        """budget: of the bits in memory, all bitmaps together."""
        self._state = state
        self._store = BitmapStore(state)
        self._budget = budget
        # Consistent bitmaps that are in memory, by name; what the file says of them is older.
        self._bits: dict[str, GranuleBits] = {}
        self._in_use = False
        for entry in self._store.entries:
            if entry.auto and not entry.in_use:
                self._load(entry)
        self.recording = tuple(self._bits.values())

    def _load(self, entry: BitmapEntry) -> None:
        bits = self._store.load(entry, size=self._state.mapping.size, budget=self._budget)
        self._bits[entry.name] = bits
        total = sum(one.byte_count for one in self._bits.values())
        limit = self._budget.metadata_bytes
        self._budget.spend("bytes of all bitmaps", value=total, limit=limit)

    def begin(self) -> None:
        """Before the first change of the disk."""
        if not self._in_use and self._bits:
            self._store.mark_in_use(self._bits)
            self._in_use = True

    def mark(self, *, start: int, length: int) -> None:
        """A range of guest bytes is about to change."""
        for bits in self.recording:
            bits.mark(start=start, length=length)

    def begin_resize(self, size: int) -> None:
        """Before another size of the disk, which every consistent bitmap has to cover. Raises
        RequestError where one would have too many bits."""
        entries = [one for one in self._store.entries if self._is_known(one)]
        for entry in entries:
            check_bitmap_size(entry.name, size=size, granularity=entry.granularity)
        added = [one for one in entries if one.name not in self._bits]
        for entry in added:
            self._load(entry)
        self._in_use = self._in_use and not added
        self.begin()

    def end_resize(self, before: int) -> None:
        """The disk has the size that the mapping says now, and had `before` bytes.

        What was added counts as changed: a disk that was cut and grows again reads as zeros where
        it had data, which nobody else would tell."""
        size = self._state.mapping.size
        for bits in self._bits.values():
            bits.resize(size)
        self.mark(start=before, length=max(0, size - before))

    def close(self) -> None:
        """Store what was recorded, and say that it can be relied on."""
        if not self._in_use:
            return
        self._store.replace([self._stored(entry) for entry in self._store.entries])
        self._in_use = False

    def _stored(self, entry: BitmapEntry) -> StoredBitmap:
        if entry.name not in self._bits:
            return StoredBitmap(entry=entry)
        entry = replace(entry, flags=entry.flags & ~int(BitmapFlag.IN_USE))
        return StoredBitmap(entry=entry, bits=self._bits[entry.name])

    def _is_known(self, entry: BitmapEntry) -> bool:
        return entry.name in self._bits or not entry.in_use

    def copy_of(self, name: str) -> GranuleBits:
        """What a bitmap says now. Raises RequestError where there is none, or none that means
        anything."""
        if name in self._bits:
            return self._bits[name].copy()
        entry = find_bitmap(self._store.entries, name)
        return self._store.load(entry, size=self._state.mapping.size, budget=self._budget)
