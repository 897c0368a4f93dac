"""L2 tables of a new image, filled in ascending guest order, written in large pieces."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcowkit.codecs.qcow2.entries import COPIED, Uint64Array
from qcowkit.engine.qcow2.layout import Layout
from qcowkit.storage.protocol import Storage
from qcowkit.units import MiB

Fill = Callable[[int, int], tuple[Uint64Array, Uint64Array | None]]
_BATCH = 1 * MiB


class L2Writer:
    """Tables get host clusters in the order in which they are first touched.

    fill: gives the entries of clusters that nothing was put for (first, count); None for zeros."""

    def __init__(self, storage: Storage, layout: Layout, *, fill: Fill | None) -> None:
        self._storage = storage
        self._layout = layout
        self._geometry = layout.geometry
        self._fill = fill
        self._l1 = np.zeros(layout.l1_entries, dtype=np.uint64)
        self._current = -1
        self._words: Uint64Array = np.zeros(0, dtype=np.uint64)
        self._batch: list[bytes] = []
        self._batch_at = 0
        self.tables = 0

    def put(self, first: int, entries: Uint64Array, bitmaps: Uint64Array | None) -> None:
        """Entries of guest clusters from index `first`. With `fill`, zero entries leave it be."""
        per_table = self._geometry.l2_entries
        done, count = 0, len(entries)
        while done < count:
            index, at = divmod(first + done, per_table)
            part = min(count - done, per_table - at)
            piece = slice(done, done + part)
            words = entries[piece]
            if words.any() or (bitmaps is not None and bitmaps[piece].any()):
                self._open(index)
                self._store(at, words, None if bitmaps is None else bitmaps[piece])
            done += part

    def finish(self, *, all_tables: bool) -> None:
        """Write what is left, then the L1 table. all_tables: also those nothing was put into."""
        if all_tables:
            for index in range(self._current + 1, self._layout.l1_entries):
                self._open(index)
        self._close()
        self._flush()
        if len(self._l1):
            raw = self._l1.astype(">u8").tobytes()
            self._storage.pwrite([raw], offset=self._layout.l1_offset)

    def _store(self, at: int, words: Uint64Array, bitmaps: Uint64Array | None) -> None:
        part = slice(at, at + len(words))
        if self._geometry.extended_l2:
            assert bitmaps is not None, "extended L2 entries come with bitmaps"
            pairs = self._words.reshape(-1, 2)
            taken = ((words | bitmaps) != 0) if self._fill else np.ones(len(words), dtype=bool)
            kept = words != 0
            pairs[part, 0] = np.where(taken & (kept | (self._fill is None)), words, pairs[part, 0])
            pairs[part, 1] = np.where(taken, bitmaps, pairs[part, 1])
        elif self._fill:
            self._words[part] = np.where(words != 0, words, self._words[part])
        else:
            self._words[part] = words

    def _open(self, index: int) -> None:
        if index == self._current:
            return
        assert index > self._current, "L2 tables are filled in ascending order"
        if self._fill is not None:
            for skipped in range(self._current + 1, index):
                self._begin(skipped)
        self._begin(index)

    def _begin(self, index: int) -> None:
        self._close()
        geometry = self._geometry
        self._current = index
        self._words = np.zeros(geometry.cluster_size // 8, dtype=np.uint64)
        if self._fill is None:
            return
        first = index * geometry.l2_entries
        total = self._layout.guest_clusters
        count = min(geometry.l2_entries, total - first)
        entries, bitmaps = self._fill(first, count)
        if bitmaps is None:
            self._words[:count] = entries
        else:
            self._words[: 2 * count : 2] = entries
            self._words[1 : 2 * count : 2] = bitmaps

    def _close(self) -> None:
        if self._current < 0:
            return
        size = self._geometry.cluster_size
        assert self.tables < self._layout.l2_tables, "the layout reserved too few L2 tables"
        host = self._layout.l2_offset + self.tables * size
        self._l1[self._current] = np.uint64(COPIED | host)
        self.tables += 1
        if not self._batch:
            self._batch_at = host
        self._batch.append(self._words.astype(">u8").tobytes())
        if len(self._batch) * size >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._batch:
            self._storage.pwrite(self._batch, offset=self._batch_at)
            self._batch = []
