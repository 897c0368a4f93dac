"""Refcounts of an image written from front to back, kept only as long as they may change."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.refcount_block import encode_refcounts
from qcowkit.engine.qcow2.layout import Layout
from qcowkit.storage.protocol import Storage
from qcowkit.units import ceil_div

# No wider than needed: a block of one-bit counts has sixteen million entries with 2 MiB clusters.
_DTYPES = (np.uint8, np.uint8, np.uint8, np.uint8, np.uint16, np.uint32, np.uint64)


class RefcountWriter:
    """Counts host clusters. Blocks behind the writer's cursor are written and forgotten, so memory
    does not grow with the image; those of the tables at the front stay until `finish`."""

    def __init__(self, storage: Storage, layout: Layout) -> None:
        self._storage = storage
        self._layout = layout
        self._per_block = layout.geometry.refcounts_per_block
        self._dtype = _DTYPES[layout.geometry.refcount_order]
        self._front = ceil_div(layout.data_offset // layout.geometry.cluster_size, self._per_block)
        self._blocks: dict[int, npt.NDArray[Any]] = {}

    def add_run(self, first: int, count: int) -> None:
        """One more reference to each of `count` host clusters from index `first`."""
        while count:
            block, at = divmod(first, self._per_block)
            part = min(count, self._per_block - at)
            self._counts(block)[at : at + part] += 1
            first, count = first + part, count - part

    def release_before(self, cluster: int) -> None:
        """No cluster below this index gets another reference, but for the tables at the front."""
        done = cluster // self._per_block
        for block in [block for block in self._blocks if self._front <= block < done]:
            self._write(block)

    def finish(self, end_cluster: int) -> None:
        """Write what is left and the refcount table; `end_cluster` is one past the last in use."""
        layout, size = self._layout, self._layout.geometry.cluster_size
        count = ceil_div(end_cluster, self._per_block)
        assert count <= layout.refcount_blocks, "the layout reserved too few refcount blocks"
        for block in sorted(self._blocks):
            self._write(block)
        offsets = layout.refcount_block_offset + np.arange(count, dtype=np.int64) * size
        table = offsets.astype(">u8").tobytes()
        self._storage.pwrite([table], offset=layout.refcount_table_offset)

    def _counts(self, block: int) -> npt.NDArray[Any]:
        counts = self._blocks.get(block)
        if counts is None:
            counts = self._blocks[block] = np.zeros(self._per_block, self._dtype)
        return counts

    def _write(self, block: int) -> None:
        geometry = self._layout.geometry
        raw = encode_refcounts(self._blocks.pop(block), geometry.refcount_order)
        offset = self._layout.refcount_block_offset + block * geometry.cluster_size
        self._storage.pwrite([raw], offset=offset)
