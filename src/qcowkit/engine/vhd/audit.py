"""What is wrong with a VHD, or would be read differently by other readers.

Rows 47, 51 and 52 of docs/formats/vhd.md. Faults are written into a log; nothing ends the walk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.vhd.bat import ENTRY_SIZE, UNUSED, decode_bitmap
from qcowkit.codecs.vhd.footer import FOOTER_SIZE, DiskType
from qcowkit.engine.findings import Effort, Finding, FindingLog, Severity
from qcowkit.engine.vhd.mapping import load_bat
from qcowkit.engine.vhd.metadata import VhdMetadata, metadata_regions
from qcowkit.errors import StorageError
from qcowkit.extents.table import Int64Array
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, ceil_div

_TABLE = "block allocation table"
_FOOTER = "VHD footer"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStatistics:
    """Blocks of the disk, of which allocated, of which not behind the block before. file_end:
    bytes of the file that are in use."""

    total: int
    allocated: int
    fragmented: int
    file_end: int


def audit_vhd(
    storage: Storage, metadata: VhdMetadata, *, log: FindingLog, effort: Effort
) -> BlockStatistics:
    """Compare the footers, place every block, and look below the clear bits of dynamic disks.

    Raises CorruptMetadata and StorageError for a table that cannot be read, OperationError where
    the image is too complex, and Cancelled."""
    file_end = storage.size()
    if metadata.dynamic_header is None:
        return BlockStatistics(total=0, allocated=0, fragmented=0, file_end=file_end)
    _compare_footers(storage, metadata, log)
    effort.spend(metadata.block_count * ENTRY_SIZE)
    sectors = load_bat(metadata, storage)
    sound = _check_places(metadata, sectors, log)
    if metadata.footer.disk_type is DiskType.DYNAMIC:
        _Bitmaps(storage, metadata, log).check(np.flatnonzero(sound), sectors, effort)
    used = sectors[sectors != UNUSED]
    apart = np.count_nonzero(np.diff(used) != _span(metadata) // SECTOR)
    return BlockStatistics(
        total=metadata.block_count,
        allocated=len(used),
        fragmented=int(apart),
        file_end=file_end,
    )


def _span(metadata: VhdMetadata) -> int:
    """Bytes of a block with its bitmap."""
    assert metadata.dynamic_header is not None
    return metadata.dynamic_header.bitmap_size + metadata.dynamic_header.block_size


def _compare_footers(storage: Storage, metadata: VhdMetadata, log: FindingLog) -> None:
    """Row 47: both copies are there and equal."""
    size = storage.size()
    head = storage.pread(FOOTER_SIZE, offset=0)
    if metadata.data_end == size:
        reason = "it is missing or damaged; the copy at the start counts"
        log.corruption(_FOOTER, host_offset=max(0, size - FOOTER_SIZE), reason=reason)
        return
    tail = storage.pread(size - metadata.data_end, offset=metadata.data_end)
    if not head.startswith(b"conectix"):
        reason = "the copy at the start is missing; the footer at the end counts"
        log.corruption(_FOOTER, host_offset=0, reason=reason)
    elif head[: len(tail)] != tail:
        where = next(index for index, byte in enumerate(tail) if byte != head[index])
        reason = f"it differs from the copy at the start, first in byte {where}"
        log.corruption(_FOOTER, host_offset=metadata.data_end, reason=reason)


def _check_places(
    metadata: VhdMetadata, sectors: Int64Array, log: FindingLog
) -> npt.NDArray[np.bool_]:
    """Row 51, for every block: which entries have a whole block that nothing else uses."""
    header, span = metadata.dynamic_header, _span(metadata)
    assert header is not None
    sound: npt.NDArray[np.bool_] = sectors != UNUSED
    start = sectors * SECTOR

    def report(mask: npt.NDArray[np.bool_], text: str) -> None:
        index = np.flatnonzero(mask)

        def make(number: int) -> Finding:
            entry = int(index[number])
            return Finding(
                severity=Severity.CORRUPTION,
                structure=_TABLE,
                host_offset=header.table_offset,
                index=entry,
                reason=f"the block at sector {int(sectors[entry])} {text}",
            )

        log.add_many(Severity.CORRUPTION, len(index), make)
        sound[index] = False

    table_end = header.table_offset + header.max_table_entries * ENTRY_SIZE
    table_sector = ceil_div(table_end, SECTOR)
    report(
        sound & (sectors < table_sector), f"lies before sector {table_sector}, where the table ends"
    )
    report(
        sound & (start + span > metadata.data_end),
        f"reaches beyond the last byte for blocks, {metadata.data_end:#x}",
    )
    for name, begin, end in metadata_regions(metadata):
        report(sound & (start < end) & (start + span > begin), f"overlaps the {name} at {begin:#x}")
    report(_overlapping(sectors, sound, span // SECTOR), "shares sectors with another block")
    return sound


def _overlapping(
    sectors: Int64Array, used: npt.NDArray[np.bool_], length: int
) -> npt.NDArray[np.bool_]:
    """Entries whose block begins within one that is not behind it; of equal ones all but the
    first in the table."""
    index = np.flatnonzero(used)
    order = index[np.argsort(sectors[index], kind="stable")]
    close = np.diff(sectors[order]) < length
    found = np.zeros(len(sectors), dtype=bool)
    found[order[1:][close]] = True
    return found


class _Bitmaps:
    """Row 52: a dynamic disk reads as zeros where bits are clear, but not for every reader."""

    def __init__(self, storage: Storage, metadata: VhdMetadata, log: FindingLog) -> None:
        assert metadata.dynamic_header is not None
        self.storage = storage
        self.metadata = metadata
        self.header = metadata.dynamic_header
        self.log = log
        self.ones = b"\xff" * (self.header.block_size // SECTOR // 8)

    def check(self, blocks: npt.NDArray[np.intp], sectors: Int64Array, effort: Effort) -> None:
        """All sound blocks, in the order of the disk."""
        places = sectors[blocks] * SECTOR
        for number, (block, place) in enumerate(zip(blocks.tolist(), places.tolist(), strict=True)):
            effort.spend(self.header.bitmap_size)
            try:
                self._check_block(block, place, effort)
            except StorageError as error:
                self.log.failure("block", error, host_offset=place)
            effort.report((number + 1) * _span(self.metadata), len(places) * _span(self.metadata))

    def _check_block(self, block: int, place: int, effort: Effort) -> None:
        raw = self.storage.pread(len(self.ones), offset=place)
        if raw == self.ones:
            return
        size = self.header.block_size
        count = min(size, self.metadata.virtual_size - block * size) // SECTOR
        clear = ~decode_bitmap(raw.ljust(len(self.ones), b"\0"), count=count)
        if not clear.any():
            return
        effort.spend(count * SECTOR)
        data = self.storage.pread(count * SECTOR, offset=place + self.header.bitmap_size)
        rows = np.frombuffer(data.ljust(count * SECTOR, b"\0"), dtype=np.uint64)
        hidden = clear & rows.reshape(count, -1).any(axis=1)
        if hidden.any():
            first = int(hidden.argmax())
            self.log.corruption(
                "sector bitmap",
                host_offset=place,
                reason=f"block {block} has data in {int(np.count_nonzero(hidden))} sectors with a "
                f"clear bit, first in sector {first}: readers that ignore the bitmap show them, "
                "others show zeros",
            )
