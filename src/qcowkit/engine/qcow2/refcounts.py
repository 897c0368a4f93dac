"""Stored refcounts of one image, read by windows of host clusters."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qcowkit.codecs.qcow2.entries import Uint64Array
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.codecs.qcow2.refcount_block import count_used, last_used
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.tables import read_words
from qcowkit.errors import CorruptMetadata
from qcowkit.storage.protocol import Storage
from qcowkit.units import MiB, ceil_div

_READ = 4 * MiB
BLOCK_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00


def load_refcount_table(storage: Storage, metadata: Qcow2Metadata) -> Uint64Array:
    """The refcount table as native words, shape (entries,); zeros where the file ends early."""
    header = metadata.header
    count = header.refcount_table_clusters * metadata.geometry.cluster_size // 8
    available = max(0, storage.size() - header.refcount_table_offset) // 8
    words = read_words(
        storage,
        offset=header.refcount_table_offset,
        count=min(count, available),
        structure="refcount table",
    )
    return words if len(words) == count else np.pad(words, (0, count - len(words)))


def check_blocks(table: Uint64Array, *, place: int) -> None:
    """Raise CorruptMetadata where two entries name one block: it would count two things at once,
    and a table of one block a million times would be searched a million times. place: host offset
    of the table."""
    used = np.flatnonzero(table)
    order = used[np.argsort(table[used], kind="stable")]
    same = np.flatnonzero(table[order[1:]] == table[order[:-1]])
    if len(same):
        first, second = int(order[same[0]]), int(order[same[0] + 1])
        raise CorruptMetadata(
            "refcount table",
            host_offset=place,
            index=second,
            reason=f"refcount block {int(table[second]):#x} is that of entry {first} too, expected "
            "a block of its own; check -r all makes new ones",
        )


def iter_blocks(
    storage: Storage, table: Uint64Array, *, cluster_size: int
) -> Iterator[tuple[int, bytes]]:
    """(table index, raw bytes) of the refcount blocks that exist, neighbours in one read.

    Entries that are unaligned or outside the file are left out; check reports them."""
    offsets = (table & np.uint64(BLOCK_OFFSET_MASK)).view(np.int64)
    sound = (offsets > 0) & (offsets % cluster_size == 0) & (offsets < storage.size())
    used = np.flatnonzero(sound)
    most = max(1, _READ // cluster_size)
    breaks = np.flatnonzero(
        (offsets[used[1:]] != offsets[used[:-1]] + cluster_size) | (np.diff(used) != 1)
    )
    edges = [0, *(breaks + 1).tolist(), len(used)]
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        for first in range(begin, end, most):
            count = min(most, end - first)
            raw = storage.pread(count * cluster_size, offset=int(offsets[used[first]]))
            raw = raw.ljust(count * cluster_size, b"\0")
            for item in range(count):
                part = raw[item * cluster_size : (item + 1) * cluster_size]
                yield int(used[first + item]), part


def holds_unwritten_clusters(storage: Storage, metadata: Qcow2Metadata) -> bool:
    """True when many more clusters are counted than the host has allocated.

    Such an image was preallocated: its data extents are worth asking the host for holes. The
    threshold is the one that qemu-img uses, so that both draw the same map."""
    size = metadata.geometry.cluster_size
    real = storage.allocated() // size
    threshold = max(real * 10 // 9, real + 2)
    if storage.size() // size + 1 < threshold:
        return False
    # Blocks that count nothing within the file have no say, and may be a million times the same.
    clusters = ceil_div(storage.size(), size)
    blocks = ceil_div(clusters, metadata.geometry.refcounts_per_block)
    table = load_refcount_table(storage, metadata)[:blocks]
    used = 0
    for _, raw in iter_blocks(storage, table, cluster_size=size):
        used += count_used(raw, metadata.geometry.refcount_order)
        if used >= threshold:
            return True
    return False


def end_of_counts(storage: Storage, table: Uint64Array, *, geometry: Geometry) -> int:
    """One past the last host cluster that counts, which may lie behind the end of the file.

    table: the refcount table as native words."""
    for index in np.flatnonzero(table)[::-1].tolist():
        part = table[index : index + 1]
        for _, raw in iter_blocks(storage, part, cluster_size=geometry.cluster_size):
            last = last_used(raw, geometry.refcount_order)
            if last >= 0:
                return int(index) * geometry.refcounts_per_block + last + 1
    return 0
