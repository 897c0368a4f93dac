"""A backing chain as one disk: a flat list of layers, merged by `overlay`."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from qcowkit.engine.memory import keep_freed_memory
from qcowkit.engine.ranges import check_range
from qcowkit.errors import QcowkitError, RequestError
from qcowkit.extents.algebra import clip, overlay
from qcowkit.extents.table import Extent, ExtentTable, Flag, Hit, concatenate, make_table
from qcowkit.image.cleaner import CacheCleaner
from qcowkit.image.lineage import Layer
from qcowkit.image.protocol import Image, Tracker, WritableImage
from qcowkit.image.qcow2 import Qcow2Image
from qcowkit.image.qcow2_write import WritableQcow2Image
from qcowkit.image.rawio import DiskFile
from qcowkit.units import KiB, MiB, align_down

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Table entries decoded for one window of `iter_extents`.
WINDOW_ENTRIES = 1 << 17
_LEAST_ENTRIES = 1 << 12
_READ_WINDOW = 8 * MiB
# Up to here a request is answered piece by piece, without tables.
_SMALL = 256 * KiB
_DATA_OR_ZERO = int(Flag.DATA | Flag.ZERO)


def data_rows(table: ExtentTable) -> ExtentTable:
    """The rows whose bytes must be read: DATA that is not known to be zero. Not contiguous."""
    return table.take((table.flags & _DATA_OR_ZERO) == Flag.DATA)


def no_snapshots(id_or_name: str, format: str) -> RequestError:
    """What is said where a snapshot is asked of a format that has none."""
    return RequestError(f"snapshot {id_or_name!r}: {format} images have no internal snapshots")


class Chain:
    """A guest disk: the top image and what lies below it. Safe from several threads.

    Opened writable, the top image takes all changes: what lies below is only ever read.

    layers: what was opened, top first. images: their address spaces, in the same order.
    >>> import qcowkit, tempfile, pathlib
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name, "disk.raw")
    >>> _ = path.write_bytes(b"boot" + bytes(1020))
    >>> with qcowkit.open(path, format="raw") as disk:
    ...     disk.size, disk.read(offset=0, length=4)
    (1024, b'boot')
    >>> folder.cleanup()
    """

    def __init__(
        self,
        images: Sequence[Image],
        *,
        layers: Sequence[Layer] = (),
        top: WritableImage | None = None,
        cleaner: CacheCleaner | None = None,
        owner: bool = True,
    ) -> None:
        """top: the first of `images` again, where it may be written. cleaner: runs, and ends with
        this disk. owner: whether closing it closes the images."""
        self.images = tuple(images)
        self.layers = tuple(layers)
        self._top = top
        self._cleaner = cleaner
        self._owner = owner
        self._trackers: tuple[Tracker, ...] = ()
        self._measure()
        if top is not None:
            top.attach(Underlay(self.images[1:]) if self.images[1:] else None)

    def _measure(self) -> None:
        self.size = self.images[0].size
        # A byte beyond a short layer is zero there, whatever lies deeper.
        self._reach = np.minimum.accumulate([image.size for image in self.images]).tolist()

    @property
    def writable(self) -> bool:
        """Whether the disk was opened for writing."""
        return self._top is not None

    @property
    def cluster_size(self) -> int:
        """Bytes of the top image's allocation unit."""
        return self.images[0].cluster_size

    @property
    def format(self) -> str:
        """The top image's format: raw, qcow2 or vpc."""
        return self.images[0].metadata.format

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was tolerated while opening, one line each."""
        return tuple(line for layer in self.layers for line in layer.warnings)

    def extents(
        self, *, start: int = 0, length: int | None = None, limit: int | None = None
    ) -> ExtentTable:
        """Map [start, start + length) through the chain; `layer` is the depth that decides.

        Covers the range, or with `limit` a first part of it, as `Image.extents` does. Raises
        RequestError past the disk's end, CorruptMetadata for malformed tables."""
        length = self.size - start if length is None else length
        check_range(start=start, length=length, size=self.size)
        if length == 0:
            return concatenate([])
        stop = start + length
        tables: list[ExtentTable] = []
        for depth, image in enumerate(self.images):
            reach = min(stop, self._reach[depth])
            if reach <= start:
                break
            table = image.extents(start=start, length=reach - start, limit=limit)
            if table.end < reach:
                stop = table.end
            tables.append(_at_depth(table, depth))
            if bool(((table.flags & np.uint16(Flag.PRESENT)) != 0).all()):
                break
        result = tables.pop()
        while tables:
            result = overlay(tables.pop(), result)
        return clip(result, start, stop)

    def bitmap_extents(
        self, name: str, *, start: int = 0, length: int | None = None
    ) -> ExtentTable:
        """[start, start + length) as a persistent bitmap of the top image sees it: rows are DIRTY,
        or have no flag, and neighbours differ. Raises RequestError where there is no such bitmap,
        or an inconsistent one, or the range leaves the disk."""
        return concatenate(list(self.iter_bitmap_extents(name, start=start, length=length)))

    def iter_bitmap_extents(
        self, name: str, *, start: int = 0, length: int | None = None
    ) -> Iterator[ExtentTable]:
        """The same by tables of bounded length."""
        top = self.images[0]
        if not isinstance(top, Qcow2Image):
            raise RequestError(f"bitmap {name!r}: {self.format} images have no bitmaps")
        bits = top.bitmap(name)
        length = bits.size - start if length is None else length
        check_range(start=start, length=length, size=bits.size)
        yield from bits.iter_extents(start=start, stop=start + length)

    def iter_extents(
        self, *, start: int = 0, length: int | None = None, align: int = 1
    ) -> Iterator[ExtentTable]:
        """The same by windows of bounded memory, each ending at a multiple of `align` (a power of
        two) or at the end of the range."""
        keep_freed_memory()
        stop = self.size if length is None else start + length
        # The tables of all layers are held at once: a deep chain takes shorter windows.
        limit = max(_LEAST_ENTRIES, WINDOW_ENTRIES // len(self.images))
        while start < stop:
            table = self.extents(start=start, length=stop - start, limit=limit)
            if table.end < stop and align_down(table.end, align) > start:
                table = clip(table, start, align_down(table.end, align))
            elif table.end < stop and table.end % align:
                reach = min(stop, align_down(table.end, align) + align)
                table = self.extents(start=start, length=reach - start)
            yield table
            start = table.end

    def read(self, *, offset: int, length: int) -> bytes:
        """`length` guest bytes. Raises RequestError where the range leaves the disk."""
        check_range(start=offset, length=length, size=self.size)
        if length <= _SMALL:
            # One piece, as most small requests are: no buffer in between.
            releases = self.releases
            image, kind, host, run = self._lookup(offset)
            if kind == Hit.DATA and run >= length and image is not None:
                raw = image.data_storage.pread(length, offset=host)
                if len(raw) == length and self.releases == releases:
                    return raw
        buffer = bytearray(length)
        self._fill(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, buffer: bytearray | memoryview | npt.NDArray[Any], *, offset: int) -> None:
        """Fill a writable buffer with guest bytes from `offset`."""
        raw = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
        view = raw.cast("B")
        check_range(start=offset, length=len(view), size=self.size)
        self._fill(view, offset)

    @property
    def releases(self) -> int:
        """How often host clusters of the top image changed hands; see docs/adr/0010."""
        return 0 if self._top is None else self._top.releases

    def _fill(self, view: memoryview, offset: int) -> None:
        """Read, and read again what was overtaken by a writer that gave clusters away."""
        for at in range(0, len(view), _READ_WINDOW):
            part = view[at : at + _READ_WINDOW]
            while True:
                releases = self.releases
                try:
                    if len(part) > _SMALL or not self._fill_small(part, offset + at):
                        table = self.extents(start=offset + at, length=len(part))
                        self.read_table(table, part)
                except QcowkitError:
                    if self.releases == releases:
                        raise
                    continue
                if self.releases == releases:
                    break

    def _lookup(self, offset: int) -> tuple[Image | None, Hit, int, int]:
        """The layer that decides one byte, and what it says; see `Image.lookup`. No layer: NONE."""
        left = self.size - offset
        for image, reach in zip(self.images, self._reach, strict=True):
            if offset >= reach:
                break
            kind, host, run = image.lookup(offset)
            left = min(left, run, reach - offset)
            if kind != Hit.NONE:
                return image, kind, host, left
        return None, Hit.NONE, -1, left

    def read_or_none(self, *, start: int, length: int) -> bytes | bytearray | None:
        """A short range of a read-only disk, or None where it is known to be zeros."""
        image, kind, host, run = self._lookup(start)
        if run >= length and image is not None and kind == Hit.DATA:
            raw = image.data_storage.pread(length, offset=host)
            if len(raw) == length:
                return raw
        elif run >= length and kind != Hit.OTHER or self.is_zero_small(start=start, length=length):
            return None
        buffer = bytearray(length)
        self._fill(memoryview(buffer), start)
        return buffer

    def is_zero_small(self, *, start: int, length: int) -> bool:
        """Whether a short range is known to be zeros, without the tables of `extents`."""
        stop = start + length
        while start < stop:
            _, kind, _, run = self._lookup(start)
            if run <= 0 or kind in (Hit.DATA, Hit.OTHER):
                return False
            start += run
        return True

    def _fill_small(self, view: memoryview, offset: int) -> bool:
        """The scalar twin of extents and read_table, piece by piece. False, where a piece is for
        them: compressed, malformed, or short of its file."""
        position, stop = offset, offset + len(view)
        while position < stop:
            image, kind, host, run = self._lookup(position)
            if run <= 0:
                # Somebody has made the disk smaller.
                return False
            part = view[position - offset : position - offset + run]
            if kind == Hit.DATA and image is not None:
                if image.data_storage.pread_into(part, offset=host) < len(part):
                    return False
            elif kind == Hit.OTHER:
                return False
            else:
                part[:] = bytes(len(part))
            position += len(part)
        return True

    def read_table(self, table: ExtentTable, buffer: memoryview) -> None:
        """Fill the buffer with what the table covers; buffer[0] is guest offset `table.begin`."""
        rows = data_rows(table)
        if int(rows.length.sum()) < len(buffer):
            np.frombuffer(buffer, dtype=np.uint8).fill(0)
        runs = list(rows)
        if not runs:
            return
        for depth in {run.layer for run in runs}:
            own: Sequence[Extent] = [run for run in runs if run.layer == depth]
            self.images[depth].read_runs(own, buffer, base=table.begin)

    # Changes: docs/architecture.md, "How a write flows".

    def write(self, data: Buffer, *, offset: int) -> None:
        """Write the bytes; acknowledged on return, durable after `flush`.

        Raises RequestError outside of the disk or where it is read-only, StorageError and
        CorruptMetadata where the image fails; the old content or the new is there then."""
        view = memoryview(data)
        if type(data) is not bytes:
            view = view.cast("B")
        top, length = self._top, len(view)
        if top is None or self._trackers or offset < 0 or offset + length > self.size:
            top = self._begin_change(offset, length)
        top.write(view, offset=offset)

    def write_compressed(self, data: Buffer, *, offset: int) -> None:
        """Store whole clusters compressed, of which none may be allocated yet; the last cluster of
        the disk may be short. Raises as `write`, and RequestError where that cannot be done."""
        length = memoryview(data).nbytes
        self._begin_change(offset, length).write_compressed(data, offset=offset)

    def write_zeroes(
        self, *, offset: int, length: int, unmap: bool = False, fallback: bool = True
    ) -> None:
        """Make the range read as zeros. unmap: its space may be given back. fallback: False raises
        UnsupportedFeature where zeros would have to be written as data. Raises as `write`."""
        top = self._begin_change(offset, length)
        top.write_zeroes(offset=offset, length=length, unmap=unmap, fallback=fallback)

    def discard(self, *, offset: int, length: int) -> None:
        """Say that the content is no longer needed; whole clusters of it are given up and read as
        zeros (version 2 images without a base), the rest stays. Raises as `write`."""
        self._begin_change(offset, length).discard(offset=offset, length=length)

    def flush(self) -> None:
        """Make durable all that was acknowledged before. Nothing to do for a read-only disk."""
        if self._top is not None:
            self._top.flush()

    def resize(
        self,
        size: int,
        *,
        shrink: bool = False,
        preallocation: str = "off",
        expose: bool = False,
    ) -> None:
        """Change the disk's size, in bytes; what is added reads as zeros.

        preallocation of what is added: off, metadata, falloc or full. expose: what is added shows
        what the layers below hold there, which only qcow2 images can do. Raises RequestError for a
        smaller size without `shrink`, and as `write`; then `size` says whether it took place."""
        top = self._writable_top()
        if expose and not isinstance(top, WritableQcow2Image):
            raise RequestError(f"{self.format} images show no backing file where they grow")
        try:
            if isinstance(top, WritableQcow2Image):
                top.resize(size, shrink=shrink, preallocation=preallocation, expose=expose)
            else:
                top.resize(size, shrink=shrink, preallocation=preallocation)
        finally:
            self._measure()

    def track(self, tracker: Tracker) -> None:
        """Tell `tracker` of every change from now on, before it is made."""
        self._trackers = (*self._trackers, tracker)

    def untrack(self, tracker: Tracker) -> None:
        """Tell it no more."""
        self._trackers = tuple(one for one in self._trackers if one is not tracker)

    def _writable_top(self) -> WritableImage:
        if self._top is None:
            raise RequestError("the disk was opened read-only")
        return self._top

    def _begin_change(self, offset: int, length: int) -> WritableImage:
        top = self._writable_top()
        if offset < 0 or length < 0 or offset + length > self.size:
            check_range(start=offset, length=length, size=self.size)
        for tracker in self._trackers:
            tracker.mark(start=offset, length=length)
        return top

    def snapshot(self, id_or_name: str) -> Chain:
        """An internal snapshot of the top image as a read-only disk, above the same layers.

        It uses the files of this disk, which has to stay open meanwhile; closing it closes none.
        Raises RequestError where there is no such snapshot."""
        top = self.images[0]
        if not isinstance(top, Qcow2Image):
            raise no_snapshots(id_or_name, self.format)
        return Chain([top.snapshot(id_or_name), *self.images[1:]], layers=self.layers, owner=False)

    def open_file(self) -> io.RawIOBase:
        """A read-only file object over the guest disk; it does not own the chain."""
        return DiskFile(self)

    def close(self) -> None:
        """Close every file of the chain, also behind one that fails; the last failure is raised.

        A writable disk is flushed first: its error means that acknowledged changes were lost."""
        with ExitStack() as stack:
            for image in self.images if self._owner else ():
                stack.callback(image.close)
            if self._cleaner is not None:
                stack.callback(self._cleaner.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Underlay:
    """The layers under a writable image, as `Below`: a disk of their own."""

    def __init__(self, images: Sequence[Image]) -> None:
        self._disk = Chain(images)
        self.size = self._disk.size

    def read_into(self, buffer: bytearray | memoryview, *, offset: int) -> None:
        """See `Below.read_into`."""
        self._disk.read_into(buffer, offset=offset)

    def is_zero(self, *, start: int, length: int) -> bool:
        """See `Below.is_zero`."""
        if length <= _SMALL:
            return self._disk.is_zero_small(start=start, length=length)
        return len(data_rows(self._disk.extents(start=start, length=length))) == 0

    def read_or_none(self, *, start: int, length: int) -> bytes | bytearray | None:
        """See `Below.read_or_none`."""
        return self._disk.read_or_none(start=start, length=length)


def _at_depth(table: ExtentTable, depth: int) -> ExtentTable:
    if depth == 0:
        return table
    return make_table(
        table.start,
        table.length,
        table.flags,
        layer=depth,
        host=table.host,
        stored=table.stored,
    )
