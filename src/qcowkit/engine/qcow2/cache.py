"""Parts of tables in memory: bounded, changed in place, written back together.

The cache knows no image, only a storage and the size of an entry. Keys are the caller's numbers;
where an entry lies is said when it is first needed and again when it is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, align_down, align_up

Value = TypeVar("Value")


class MetadataCache(Generic[Value]):
    """Entries of `entry_size` bytes, `limit` bytes in all (but two entries at least).

    Two generations stand for the order of last use: an entry of the old one that is used moves to
    the young one, and room is made from the old one, which costs a hit nothing. Changed entries
    stay until `store` has written them. Safe from several threads; changes come from one."""

    def __init__(
        self,
        storage: Storage,
        *,
        entry_size: int,
        limit: int,
        decode: Callable[[bytes], Value],
        encode: Callable[[Value, int, int], bytes],
        whole: bool = False,
    ) -> None:
        """decode: from the bytes of an entry. encode: bytes [first, last) of it, from a value.
        whole: all entries that there are fit within the limit."""
        self.entry_size = entry_size
        self._storage = storage
        self._decode = decode
        self._encode = encode
        self._young: dict[int, Value] = {}
        self._old: dict[int, Value] = {}
        self._dirty: dict[int, tuple[int, int]] = {}
        # Whether so much is changed that it should be written back; no property, for the same
        # loops as `find`.
        self.crowded = False
        self.set_limit(limit, whole=whole)
        self._lock = threading.Lock()
        # Counts write-backs: whoever reads the storage beside the cache looks whether it moved.
        self.stores = 0
        # The fast way to an entry of the young generation, for loops that count nanoseconds.
        self.find = self._young.get

    @property
    def dirty(self) -> bool:
        """Whether anything is to be written."""
        return bool(self._dirty)

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, key: int, *, offset: int) -> Value:
        """The entry, read at host `offset` where it is not in memory. Raises StorageError.

        For callers to whom the entry cannot go away meanwhile; others use `get_if`."""
        while True:
            value = self.get_if(key, offset=offset, stores=self.stores)
            if value is not None:
                return value

    def get_if(self, key: int, *, offset: int, stores: int) -> Value | None:
        """The same; None where entries were written or dropped since `stores` was what it says:
        then `offset` may no longer be where the entry lies. Raises StorageError."""
        value = self._young.get(key)
        if value is None:
            with self._lock:
                value = self._promote(key)
        if value is not None:
            return value
        raw = self._storage.pread(self.entry_size, offset=offset)
        # The file may end inside of its last cluster.
        loaded = self._decode(raw.ljust(self.entry_size, b"\0"))
        with self._lock:
            value = self._promote(key)
            if value is None and self.stores == stores:
                self._insert(key, loaded)
                return loaded
        return value

    def edit(self, key: int, *, offset: int, first: int, last: int) -> Value:
        """The entry, whose bytes [first, last) the caller is going to change."""
        while True:
            value = self.get(key, offset=offset)
            with self._lock:
                # It may have been dropped in between, and loaded anew by somebody else.
                if self._promote(key) is value:
                    self._mark(key, first, last)
                    return value

    def touch(self, key: int, value: Value, *, first: int, last: int) -> bool:
        """As `edit` for an entry that `find` has just found; False where it is gone meanwhile."""
        before = self._dirty.get(key)
        if before is not None and before[0] <= first and last <= before[1]:
            # What is changed stays until the one who changes it has it written.
            return True
        with self._lock:
            if self._young.get(key) is not value:
                return False
            self._mark(key, first, last)
            return True

    def put(self, key: int, value: Value) -> None:
        """A new entry, to be written as a whole."""
        with self._lock:
            self._forget(key)
            self._insert(key, value)
            self._mark(key, 0, self.entry_size)

    def add(self, key: int, value: Value) -> None:
        """An entry that is known to be what the storage has."""
        with self._lock:
            if self._promote(key) is None:
                self._insert(key, value)

    def set_limit(self, limit: int, *, whole: bool) -> None:
        """Another limit in bytes; what is too much goes as room is next made."""
        self.capacity = max(2, limit // self.entry_size)
        # Where nothing has to make room, changes may wait for a flush.
        self._most_dirty = self.capacity if whole else self.capacity // 2
        self._count_changes()

    def dirty_keys(self) -> list[int]:
        """The keys of changed entries, ascending."""
        return sorted(self._dirty)

    def store(self, place: Callable[[int], int]) -> None:
        """Write what has changed, neighbours together; `place` gives host offsets by key.

        Nothing counts as written if any part fails. Raises StorageError."""
        with self._lock:
            # Readers move entries between the generations meanwhile; their values stay.
            changed = [(place(key), self._value(key), span) for key, span in self._dirty.items()]
        for offset, parts in self._runs(changed):
            self._storage.pwrite(parts, offset=offset)
        with self._lock:
            self._dirty.clear()
            self._count_changes()
            self.stores += 1

    def _runs(
        self, changed: list[tuple[int, Value, tuple[int, int]]]
    ) -> Iterator[tuple[int, list[bytes]]]:
        """(host offset, pieces that follow one another)."""
        begin, end, parts = 0, -1, list[bytes]()
        for offset, value, (first, last) in sorted(changed, key=lambda one: one[0]):
            if offset + first != end:
                if parts:
                    yield begin, parts
                begin, parts = offset + first, []
            parts.append(self._encode(value, first, last))
            end = offset + last
        if parts:
            yield begin, parts

    def drop(self, keys: Iterator[int] | range) -> None:
        """Forget entries, changed or not: what they were of is gone."""
        with self._lock:
            if isinstance(keys, range) and len(keys) > len(self):
                keys = iter([key for key in (*self._young, *self._old) if key in keys])
            for key in keys:
                self._forget(key)
            self._count_changes()
            self.stores += 1

    def clean(self) -> None:
        """Drop unchanged entries that were not used since the last time."""
        with self._lock:
            for key in [key for key in self._old if key not in self._dirty]:
                del self._old[key]
            self._old.update(self._young)
            self._young.clear()

    def _mark(self, key: int, first: int, last: int) -> None:
        """Bytes [first, last) are to be written. Whole sectors are, so that a torn write cannot mix
        two states of one word."""
        before = self._dirty.get(key, (first, last))
        first, last = min(before[0], first), max(before[1], last)
        self._dirty[key] = align_down(first, SECTOR), align_up(last, SECTOR)
        self._count_changes()

    def _count_changes(self) -> None:
        self.crowded = len(self._dirty) > self._most_dirty

    def _value(self, key: int) -> Value:
        value = self._young.get(key)
        return self._old[key] if value is None else value

    def _promote(self, key: int) -> Value | None:
        value = self._young.get(key)
        if value is None:
            value = self._old.pop(key, None)
            if value is not None:
                self._young[key] = value
        return value

    def _forget(self, key: int) -> None:
        self._young.pop(key, None)
        self._old.pop(key, None)
        self._dirty.pop(key, None)

    def _insert(self, key: int, value: Value) -> None:
        while len(self) >= self.capacity and self._evict():
            pass
        self._young[key] = value

    def _evict(self) -> bool:
        """Make room for one entry. False where all are changed: then it has to wait for `store`."""
        for _ in range(len(self)):
            if not self._old:
                # All that is here now has to prove itself by being used.
                self._old.update(self._young)
                self._young.clear()
            key = next(iter(self._old))
            value = self._old.pop(key)
            if key not in self._dirty:
                return True
            self._young[key] = value
        return False
