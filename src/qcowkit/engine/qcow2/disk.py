"""The guest's hand on a qcow2 image: every change, one at a time (docs/adr/0010)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from qcowkit.budget import TRUSTED, Budget
from qcowkit.engine.barriers import Barriers, Observer, ignore_event
from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.bitmap_tracking import LiveBitmaps
from qcowkit.engine.qcow2.clusters import ClusterReader
from qcowkit.engine.qcow2.erase import Eraser
from qcowkit.engine.qcow2.old_content import Below, OldContent
from qcowkit.engine.qcow2.overlap import OverlapGuard, chosen_checks
from qcowkit.engine.qcow2.refcounts import check_blocks, load_refcount_table
from qcowkit.engine.qcow2.resize import Resizer
from qcowkit.engine.qcow2.small_write import SmallWriter
from qcowkit.engine.qcow2.state import Places, WriteState
from qcowkit.engine.qcow2.tables import native_words, read_words
from qcowkit.engine.qcow2.write import Writer
from qcowkit.engine.qcow2.write_compressed import CompressedWriter
from qcowkit.engine.ranges import check_range
from qcowkit.errors import CorruptMetadata
from qcowkit.extents.bits import GranuleBits


class Qcow2Disk:
    """Changes the active disk of one image. Safe from several threads. Offsets in guest bytes; a
    range that leaves the disk, as a resize may have left it meanwhile, raises RequestError."""

    def __init__(
        self,
        places: Places,
        clusters: ClusterReader,
        *,
        options: OpenOptions,
        observe: Observer = ignore_event,
        budget: Budget = TRUSTED,
    ) -> None:
        """observe: told of barriers and metadata steps by name, before they happen. budget: of the
        bitmaps in memory."""
        self.state = state = open_state(places, options=options, observe=observe)
        self._bitmaps = LiveBitmaps(state, budget=budget)
        # The marks of every write, if there are any to make.
        self._recording = self._bitmaps.recording
        self._old = OldContent(state, clusters)
        self._writer = Writer(state, self._old)
        self._eraser = Eraser(state, self._writer, self._old)
        self._compressed = None if state.external else CompressedWriter(state, self._writer)
        self._resizer = Resizer(state, self._writer, self._eraser, self._old)
        self._lock = state.lock
        self._mapping = state.mapping
        self._barriers = state.barriers
        self._cache = state.tables.cache
        self._small = SmallWriter(state, self._old).write
        # Whether the first change was prepared, and nothing has failed since.
        self._ready = False

    def attach(self, below: Below | None) -> None:
        """The layers under the image."""
        self._old.below = below

    @property
    def releases(self) -> int:
        """See `WriteState.releases`."""
        return self.state.releases

    def write(self, data: memoryview, *, offset: int) -> None:
        """Plain data."""
        end = offset + len(data)
        with self._lock:
            if end > self._mapping.size:
                self._check(offset, len(data))
            # Whoever watches the steps wants to see those of every write.
            watched = self._barriers.observe is not ignore_event
            if self._recording and self._ready:
                self._bitmaps.mark(start=offset, length=len(data))
            if self._ready and not watched and self._small(data, offset):
                if self._cache.crowded:
                    with self._change():
                        self.state.settle()
                return
            with self._change(offset, len(data)):
                self._writer.write(data, offset=offset)

    def write_compressed(self, data: memoryview, *, offset: int) -> None:
        """Whole clusters, compressed."""
        with self._lock, self._change(offset, len(data)):
            writer = self._compressed or CompressedWriter(self.state, self._writer)
            writer.write(data, offset=offset)

    def write_zeroes(self, *, offset: int, length: int, unmap: bool, fallback: bool) -> None:
        """Zeros, by entries where that can be."""
        with self._lock, self._change(offset, length):
            self._eraser.write_zeroes(offset, length, unmap=unmap, fallback=fallback)

    def discard(self, *, offset: int, length: int) -> None:
        """Whole clusters given up."""
        with self._lock, self._change(offset, length):
            self._eraser.discard(offset, length)

    def resize(self, size: int, *, shrink: bool, preallocation: str, expose: bool = False) -> None:
        """Another size of the disk, in bytes. expose: see `Resizer.resize`."""
        resizer = self._resizer
        with self._lock:
            resizer.check(size, shrink=shrink, preallocation=preallocation, expose=expose)
            with self._change():
                before = self._mapping.size
                self._bitmaps.begin_resize(size)
                try:
                    resizer.resize(size, shrink=shrink, preallocation=preallocation, expose=expose)
                    self.state.resize_caches()
                finally:
                    self._bitmaps.end_resize(before)

    def flush(self) -> None:
        """All that was acknowledged is durable."""
        with self._lock:
            if self.state.broken is not None:
                raise self.state.broken
            with self._guarded():
                self.state.flush()

    def close(self) -> None:
        """Flush, and say that the image is sound; not where it was found to be corrupt."""
        with self._lock:
            if self.state.broken is None:
                with self._guarded():
                    self.state.close()
                    self._bitmaps.close()
            elif self.state.staged:
                # What was acknowledged and not flushed is lost, and must not be lost in silence.
                raise self.state.broken

    def clean(self) -> None:
        """Drop cached tables that were not used since the last time."""
        self.state.tables.cache.clean()
        with self._lock:
            self.state.refcounts.blocks.clean()

    def _check(self, offset: int, length: int) -> None:
        check_range(start=offset, length=length, size=self._mapping.size)

    def bitmap(self, name: str) -> GranuleBits:
        """What a bitmap says now. Raises RequestError where there is no such, or an inconsistent
        one."""
        with self._lock:
            return self._bitmaps.copy_of(name)

    @contextmanager
    def _change(self, offset: int = 0, length: int = 0) -> Iterator[None]:
        """Around a change of [offset, offset + length), which is marked before it is made."""
        with self._guarded():
            self.state.begin()
            self._check(offset, length)
            self._bitmaps.begin()
            self._bitmaps.mark(start=offset, length=length)
            self._ready = True
            yield

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Notice what the image's own tables contradict."""
        try:
            yield
        except CorruptMetadata as error:
            self.state.fail(error)
            self._ready = self.state.broken is None
            raise
        finally:
            if self.state.barriers.failed:
                self._ready = False


def open_state(
    places: Places, *, options: OpenOptions, observe: Observer = ignore_event
) -> WriteState:
    """What a writer of an image needs. observe: told of barriers and metadata steps by name.

    Raises CorruptMetadata for a malformed refcount table, RequestError for unknown options."""
    files = [places.storage]
    if places.data is not places.storage:
        # Data first: what is durable in the tables must be durable there before.
        files.insert(0, places.data)
    table = load_refcount_table(places.storage, places.metadata)
    check_blocks(table, place=places.metadata.header.refcount_table_offset)
    return WriteState(
        places,
        table=native_words(table.astype(">u8").tobytes()),
        guard=make_guard(places, table, options),
        barriers=Barriers(*files, observe=observe),
        options=options,
    )


def make_guard(
    places: Places,
    refcount_table: np.ndarray[tuple[int], np.dtype[np.uint64]],
    options: OpenOptions,
) -> OverlapGuard:
    """Where the metadata of an image lie, as far as `options` ask for it."""
    metadata = places.metadata
    header, geometry = metadata.header, metadata.geometry
    guard = OverlapGuard(chosen_checks(options), cluster_bits=geometry.cluster_bits)
    guard.add_region("main-header", offset=0, length=geometry.cluster_size)
    guard.add_region("active-l1", offset=header.l1_table_offset, length=header.l1_bytes)
    guard.add_region(
        "refcount-table",
        offset=header.refcount_table_offset,
        length=header.refcount_table_clusters << geometry.cluster_bits,
    )
    guard.add_region(
        "snapshot-table", offset=header.snapshots_offset, length=metadata.snapshot_table_bytes
    )
    bitmaps = metadata.extensions.bitmaps
    if bitmaps is not None and metadata.bitmaps:
        guard.add_region(
            "bitmap-directory", offset=bitmaps.directory_offset, length=bitmaps.directory_size
        )
    guard.add_tables(places.mapping.tables.l1)
    guard.add_blocks(native_words(refcount_table.astype(">u8").tobytes()))
    for snapshot in metadata.snapshots:
        guard.add_region("inactive-l1", offset=snapshot.l1_offset, length=snapshot.l1_bytes)
        if "inactive-l2" in guard.names:
            words = read_words(
                places.storage,
                offset=snapshot.l1_offset,
                count=snapshot.l1_entries,
                structure="snapshot L1 table",
            )
            guard.add_tables(words, name="inactive-l2")
    return guard
