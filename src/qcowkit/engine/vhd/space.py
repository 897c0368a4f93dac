"""What surrounds the blocks of a dynamic or differencing VHD that is written: the two footers, the
header, and the place for new blocks. docs/formats/vhd.md, "Order of writes".

A file ends in its footer, and blocks are added by moving that first. A device has its footer in its
last sector for good; blocks fill it from the front."""

from __future__ import annotations

import errno
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from qcowkit.codecs.vhd.dynamic_header import DynamicHeader
from qcowkit.codecs.vhd.footer import FOOTER_SIZE
from qcowkit.engine.vhd.layout import plan_geometry
from qcowkit.engine.vhd.metadata import VhdMetadata
from qcowkit.errors import StorageError
from qcowkit.units import SECTOR, align_down, align_up

if TYPE_CHECKING:
    from qcowkit.engine.barriers import Barriers
    from qcowkit.storage.protocol import Storage

# The last sector number that an entry of the table can hold; all ones is unused.
_MAX_SECTOR = 0xFFFF_FFFE


class BlockSpace:
    """The host space of one VHD with blocks; not for several threads.

    metadata: what footers and header say, replaced whole when it changes. cursor: host offset of
    the next new block. footer_at: of the trailing footer."""

    def __init__(
        self, storage: Storage, metadata: VhdMetadata, *, blocks_end: int, barriers: Barriers
    ) -> None:
        """blocks_end: host offset behind everything that is in use but the footer."""
        assert metadata.dynamic_header is not None
        self.metadata = metadata
        self._storage = storage
        self._barriers = barriers
        self._device = storage.caps.block_device
        self._span = metadata.dynamic_header.bitmap_size + metadata.dynamic_header.block_size
        self._blocks_end = blocks_end
        size = storage.size()
        self.footer_at = align_up(metadata.data_end, SECTOR)
        self.cursor = self.footer_at
        # What lies behind this was never written, and is zeros.
        self._dirty_end = self.footer_at + FOOTER_SIZE
        if self._device:
            last = align_down(size - FOOTER_SIZE, SECTOR)
            self.footer_at = min(self.footer_at, last)
            self.cursor = align_up(blocks_end, SECTOR)
            self._dirty_end = size
        # Whether footers, header and the length of the file are known to be as they should.
        self._settled = False

    @property
    def header(self) -> DynamicHeader:
        """The dynamic header as it should be on disk."""
        assert self.metadata.dynamic_header is not None
        return self.metadata.dynamic_header

    def settle(self) -> None:
        """Bring footers, header and the end of the file in line with `metadata`, once: after
        opening, where a footer may be lost or differ, and after a change of them that failed."""
        if self._settled:
            return
        if self._device and self._blocks_end > self.footer_at:
            raise self._no_space("no room for a footer behind the last block")
        footer, header = self.metadata.footer.encode(), self._header_sector()
        if not self._device and self._storage.size() > self.footer_at + FOOTER_SIZE:
            self._truncate(self.footer_at + FOOTER_SIZE)
        wanted = ((0, footer), (self.footer_at, footer), (self.metadata.footer.data_offset, header))
        for offset, raw in wanted:
            if self._storage.pread(len(raw), offset=offset) != raw:
                self._write(raw, offset=offset)
                # One at a time: of two footers one is always whole.
                self._barriers.wait("one footer before the other")
        self._settled = True

    def reserve(self, count: int, *, floor: int = 0) -> int:
        """The host offset of `count` new blocks in a row, none of them below `floor`; the footer
        lies behind them, durably, when this returns. They are given out with `take`.

        Raises StorageError where there is no room."""
        first = max(self.cursor, floor)
        end = first + count * self._span
        if count and (end - self._span) // SECTOR > _MAX_SECTOR:
            reason = f"block at {end - self._span:#x} is beyond the last sector of a table entry"
            raise StorageError(
                "allocate", path=self._storage.name, errno=errno.EFBIG, reason=reason
            )
        if end > self.footer_at:
            if self._device:
                raise self._no_space("no room for another block before the footer")
            self._move_footer(end)
        return first

    def take(self, end: int) -> None:
        """What was reserved up to the host offset `end` is in use."""
        self.cursor = end

    def spoil(self, end: int) -> None:
        """What was reserved up to `end` is free again, but no longer zeros."""
        self._dirty_end = max(self._dirty_end, end)

    def clear(self, *, start: int, stop: int) -> None:
        """Make a part of reserved space read as zeros: where it was grown it does already."""
        stop = min(stop, self._dirty_end)
        if start < stop:
            self._barriers.pending = True
            self._storage.zero(offset=start, length=stop - start, unmap=False)

    def replace_header(self, header: DynamicHeader) -> None:
        """Another table: one write of the sector that has all of its fields. What relies on it
        comes behind a barrier."""
        self._replace(header.encode()[:SECTOR], offset=self.metadata.footer.data_offset)
        self.metadata = replace(self.metadata, dynamic_header=header)
        self._settled = True

    def replace_size(self, size: int) -> None:
        """Another size of the disk, bytes: the leading footer decides, and is one sector. The
        trailing one follows with the next `settle`."""
        footer = replace(self.metadata.footer, current_size=size, geometry=plan_geometry(size))
        self._replace(footer.encode(), offset=0)
        self._barriers.wait("leading footer before the trailing one")
        self.metadata = replace(
            self.metadata, footer=footer, virtual_size=size, data_end=self.footer_at
        )

    def cut(self, end: int) -> None:
        """Everything from the host offset `end` on is free: a file ends there, in its footer."""
        end = align_up(end, SECTOR)
        self._blocks_end = end
        if self._device:
            self.cursor = end
            return
        if end >= self.footer_at:
            return
        self._settled = False
        self._write(self.metadata.footer.encode(), offset=end)
        self._barriers.wait("footer before the file is cut")
        self.cursor = self.footer_at = end
        self.metadata = replace(self.metadata, data_end=end)
        self._dirty_end = end + FOOTER_SIZE
        self._truncate(end + FOOTER_SIZE)
        self._barriers.wait("flush")
        self._settled = True

    def _move_footer(self, offset: int) -> None:
        self._settled = False
        try:
            self._write(self.metadata.footer.encode(), offset=offset)
        except StorageError:
            # A file that grew without getting its footer would have lost it.
            with suppress(StorageError):
                self._truncate(self.footer_at + FOOTER_SIZE)
            raise
        self._barriers.wait("footer before blocks")
        self._dirty_end = max(self._dirty_end, self.footer_at + FOOTER_SIZE)
        self.footer_at = offset
        self._settled = True

    def _replace(self, raw: bytes, *, offset: int) -> None:
        """Write a sector over the one that counts; not settled afterwards."""
        self._settled = False
        try:
            self._write(raw, offset=offset)
        except StorageError:
            # Half of it would make the file unreadable, so the old one comes back if it can.
            with suppress(StorageError):
                self.settle()
            raise

    def _header_sector(self) -> bytes:
        return self.header.encode()[:SECTOR]

    def _write(self, raw: bytes, *, offset: int) -> None:
        self._barriers.pending = True
        self._storage.pwrite([raw], offset=offset)

    def _truncate(self, size: int) -> None:
        self._barriers.pending = True
        self._storage.truncate(size)

    def _no_space(self, reason: str) -> StorageError:
        name = self._storage.name
        return StorageError("allocate", path=name, errno=errno.ENOSPC, reason=reason)
