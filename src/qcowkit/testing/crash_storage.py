"""Files in memory that remember how they were changed, so that any crash can be replayed.

Every change goes through the journal as *effects*: the data of a write, the zeros of a hole, a new
size. Reliability reference, section 3.4."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcowkit.errors import StorageError
from qcowkit.storage.protocol import Storage, StorageCaps
from qcowkit.testing.crash_effects import (
    PAGE,
    Content,
    Effect,
    SizeEffect,
    WriteEffect,
    ZeroEffect,
    replay,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushPoint:
    """A flush that returned. count: effects of all files before it. durable: the file then."""

    sequence: int
    file: int
    count: int
    durable: Content


class CrashFiles:
    """Files with one journal: an image, its data file. Opened as `CrashStorage`, any number of
    times one after the other.

    bases: their contents when the journal began. effects, flushes: the journal. live: what a
    reader sees now. failed_flushes: how often one has failed."""

    def __init__(
        self,
        contents: Sequence[Content],
        *,
        names: Sequence[str] = (),
        discard_clears: bool = True,
    ) -> None:
        """Take over the contents. discard_clears: False makes a discard leave the old bytes, which
        a host may do as well."""
        self.names = tuple(names) or tuple(f"<file {index}>" for index in range(len(contents)))
        self.discard_clears = discard_clears
        self.lock = threading.Lock()
        self.live = list(contents)
        self.begin()

    def begin(self) -> None:
        """Start an empty journal: all that is there now is durable."""
        self.bases = tuple(content.copy() for content in self.live)
        self.effects: list[Effect] = []
        self.flushes: list[FlushPoint] = []
        self.failed_flushes = 0
        self._clock = 0
        self._durable = list(self.bases)
        self._flushed = [0] * len(self.live)
        self._lost: set[int] = set()
        self._diverged = [False] * len(self.live)

    def tick(self) -> int:
        """The next moment; marks of the guest share the clock with the journal."""
        self._clock += 1
        return self._clock

    def open(self, index: int = 0, *, writable: bool = True) -> Storage:
        """A new handle of one file."""
        return CrashStorage(self, index, writable=writable)

    def add(self, *effects: Effect) -> None:
        """Log what is done, and do it."""
        for effect in effects:
            self.effects.append(effect)
            effect.apply(self.live[effect.file])

    def note_flush(self, index: int) -> None:
        """A flush of one file returns: what was done to it before is durable."""
        if self._diverged[index]:
            kept = [one for one in self._pending(index) if one.sequence not in self._lost]
            durable = replay(self._durable[index], kept)
        else:
            durable = self.live[index].copy()
        self._durable[index] = durable
        self._flushed[index] = len(self.effects)
        point = FlushPoint(
            sequence=self.tick(), file=index, count=len(self.effects), durable=durable
        )
        self.flushes.append(point)

    def fail_flush(self, index: int) -> None:
        """A flush fails as the kernel's does: what was not durable yet is lost for good, while the
        cache goes on showing it, and later flushes succeed without it."""
        self.failed_flushes += 1
        self._lost.update(effect.sequence for effect in self._pending(index))
        self._diverged[index] = True

    def _pending(self, index: int) -> list[Effect]:
        later = self.effects[self._flushed[index] :]
        return [effect for effect in later if effect.file == index]

    def crash(self, keep: bool = True) -> CrashFiles:
        """The files after a power cut now. keep: what was not flushed, and not lost, is there."""
        contents = []
        for index, durable in enumerate(self._durable):
            kept = [one for one in self._pending(index) if one.sequence not in self._lost]
            contents.append(replay(durable, kept if keep else ()))
        return self.like(contents)

    def like(self, contents: Sequence[Content]) -> CrashFiles:
        """Other files of the same names and ways."""
        return CrashFiles(contents, names=self.names, discard_clears=self.discard_clears)


class CrashStorage:
    """One file of `CrashFiles` as Storage."""

    def __init__(self, files: CrashFiles, index: int, *, writable: bool) -> None:
        self._files = files
        self._index = index
        self._caps = StorageCaps(writable=writable)
        self._closed = False

    @property
    def name(self) -> str:
        """For messages."""
        return self._files.names[self._index]

    @property
    def caps(self) -> StorageCaps:
        """Fixed from the start."""
        return self._caps

    @property
    def _content(self) -> Content:
        return self._files.live[self._index]

    def size(self) -> int:
        """Bytes."""
        self._check("size")
        return self._content.size

    def allocated(self) -> int:
        """Bytes of the pages that are not zero."""
        self._check("size")
        return len(self._content.pages) * PAGE

    def pread_into(self, buffer: Buffer, *, offset: int) -> int:
        """Fill the buffer; returns its length, or less only where the file ends."""
        view = memoryview(buffer).cast("B")
        self._check("read", offset=offset)
        with self._files.lock:
            count = max(0, min(len(view), self._content.size - offset))
            if count:
                self._content.read_into(view[:count], offset=offset)
        return count

    def pread(self, length: int, *, offset: int) -> bytes:
        """`length` bytes, or fewer only where the file ends."""
        self._check("read", offset=offset, length=length)
        count = max(0, min(length, self._content.size - offset))
        buffer = bytearray(count)
        return bytes(buffer[: self.pread_into(buffer, offset=offset)])

    def pwrite(self, buffers: Sequence[Buffer], *, offset: int) -> None:
        """All buffers, one behind the other, as one effect; a growth is one of its own."""
        data = b"".join(memoryview(buffer).cast("B") for buffer in buffers)
        self._check("write", offset=offset, change=True)
        if not data:
            return
        with self._files.lock:
            tick = self._files.tick()
            effect = WriteEffect(sequence=tick, file=self._index, offset=offset, data=data)
            self._files.add(effect)
            self._grow(offset + len(data))

    def zero(self, *, offset: int, length: int, unmap: bool) -> None:
        """Zeros; a growth is an effect of its own."""
        self._check("zero", offset=offset, length=length, change=True)
        with self._files.lock:
            self._clear(offset=offset, length=length)
            self._grow(offset + length if length else 0)

    def discard(self, *, offset: int, length: int) -> None:
        """Zeros within the file, or nothing."""
        self._check("discard", offset=offset, length=length, change=True)
        with self._files.lock:
            if self._files.discard_clears:
                self._clear(offset=offset, length=length)

    def _clear(self, *, offset: int, length: int) -> None:
        count = min(length, self._content.size - offset)
        if count > 0:
            tick = self._files.tick()
            self._files.add(
                ZeroEffect(sequence=tick, file=self._index, offset=offset, length=count)
            )

    def allocate(self, *, offset: int, length: int) -> None:
        """Grow to hold the range."""
        self._check("allocate", offset=offset, length=length, change=True)
        with self._files.lock:
            self._grow(offset + length if length else 0)

    def truncate(self, size: int) -> None:
        """Cut, or grow with zeros."""
        self._check("truncate", offset=size, change=True)
        with self._files.lock:
            if size < self._content.size:
                self._resize(size, cut=True)
            self._grow(size)

    def _grow(self, size: int) -> None:
        if size > self._content.size:
            self._resize(size, cut=False)

    def _resize(self, size: int, *, cut: bool) -> None:
        tick = self._files.tick()
        self._files.add(SizeEffect(sequence=tick, file=self._index, size=size, cut=cut))

    def flush(self) -> None:
        """Make durable what was done to this file; other files have flushes of their own."""
        self._check("flush")
        with self._files.lock:
            self._files.note_flush(self._index)

    def iter_data(self, *, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The pages that are not zero."""
        self._check("read", offset=offset, length=length)
        stop = min(offset + length, self._content.size)
        return iter(_merge_pages(self._content.numbers(offset, stop), offset, stop))

    def clone_to(self, target: Storage, *, offset: int, length: int, target_offset: int) -> bool:
        """False: memory has no blocks to share."""
        return False

    def copy_to(self, target: Storage, *, offset: int, length: int, target_offset: int) -> bool:
        """False: there is no host between the two."""
        return False

    def close(self) -> None:
        """Later calls fail as on a closed file; a second close does nothing."""
        self._closed = True

    def _check(
        self, operation: str, *, offset: int = 0, length: int = 0, change: bool = False
    ) -> None:
        if self._closed or (change and not self._caps.writable):
            raise StorageError(operation, path=self.name, errno=errno.EBADF)
        if offset < 0 or length < 0:
            raise StorageError(operation, path=self.name, errno=errno.EINVAL)


def _merge_pages(numbers: Sequence[int], start: int, stop: int) -> list[tuple[int, int]]:
    """(offset, length) of runs of pages within [start, stop)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        first, last = max(start, number * PAGE), min(stop, (number + 1) * PAGE)
        if runs and sum(runs[-1]) == first:
            runs[-1] = (runs[-1][0], last - runs[-1][0])
        elif first < last:
            runs.append((first, last - first))
    return runs
