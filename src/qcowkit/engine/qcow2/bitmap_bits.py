"""The bits of persistent bitmaps, as they lie in the file."""

from __future__ import annotations

from collections.abc import Iterable

from qcowkit.budget import Budget
from qcowkit.codecs.qcow2.bitmaps import MAX_BITMAP_BYTES, BitmapEntry
from qcowkit.codecs.qcow2.bitmaps_data import ALL_ONES
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.engine.qcow2.metadata import load_bitmap_table
from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.extents.bits import GranuleBits
from qcowkit.storage.protocol import Storage
from qcowkit.units import ceil_div


def find_bitmap(entries: Iterable[BitmapEntry], name: str) -> BitmapEntry:
    """The bitmap of that name. Raises RequestError where there is none."""
    for entry in entries:
        if entry.name == name:
            return entry
    raise RequestError(f"there is no bitmap {name!r}")


def require_consistent(entry: BitmapEntry) -> None:
    """Raise RequestError for a bitmap whose content means nothing."""
    if entry.in_use:
        raise RequestError(
            f"bitmap {entry.name!r} is inconsistent: its last writer has not closed the image; "
            "it can only be removed"
        )


def load_bits(
    storage: Storage, entry: BitmapEntry, *, geometry: Geometry, size: int, budget: Budget
) -> GranuleBits:
    """The bits of a consistent bitmap. size: guest bytes of the disk.

    Raises RequestError for an inconsistent one, CorruptMetadata, BudgetExceeded, StorageError."""
    require_consistent(entry)
    bits = GranuleBits(size=0, granularity_bits=entry.granularity_bits)
    needed = ceil_div(ceil_div(size, entry.granularity), 8)
    budget.spend("bitmap bytes", value=needed, limit=budget.metadata_bytes)
    bits.resize(size)
    cluster, file_size = geometry.cluster_size, storage.size()
    words = load_bitmap_table(storage, entry, geometry=geometry)
    for index, word in enumerate(words[: ceil_div(needed, cluster)]):
        if word == ALL_ONES:
            bits.put(b"\xff" * cluster, offset=index * cluster)
        elif word >= file_size:
            raise CorruptMetadata(
                "bitmap table",
                host_offset=entry.table_offset,
                index=index,
                reason=f"offset {word:#x} lies behind the end of the file at {file_size:#x}",
            )
        elif word:
            bits.put(storage.pread(cluster, offset=word), offset=index * cluster)
    return bits


def check_bitmap_size(name: str, *, size: int, granularity: int) -> None:
    """Raise RequestError where a bitmap of a disk of `size` bytes would have too many bits."""
    needed = ceil_div(ceil_div(size, granularity), 8)
    if needed > MAX_BITMAP_BYTES:
        raise RequestError(
            f"bitmap {name!r} with a granularity of {granularity} bytes would take {needed} bytes "
            f"for a disk of {size}, expected at most {MAX_BITMAP_BYTES}"
        )
