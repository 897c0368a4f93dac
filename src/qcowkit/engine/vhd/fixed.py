"""Guest writes into a fixed VHD: raw bytes, and a footer behind them that only a resize moves."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from qcowkit.codecs.vhd.footer import FOOTER_SIZE
from qcowkit.engine.barriers import Barriers, Observer, ignore_event
from qcowkit.engine.preallocate import preallocate
from qcowkit.engine.vhd.layout import plan_geometry
from qcowkit.engine.vhd.metadata import VhdMetadata
from qcowkit.engine.vhd.resize import check_size
from qcowkit.errors import RequestError, StorageError, UnsupportedFeature
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR


class FixedWriter:
    """A fixed VHD that is open for writing. One thread at a time, beside any readers.

    metadata: as it is now; `data_end` is where the footer lies."""

    def __init__(
        self, storage: Storage, metadata: VhdMetadata, *, observe: Observer = ignore_event
    ) -> None:
        """observe: told of every barrier by name."""
        self.metadata = metadata
        self.storage = storage
        self.barriers = Barriers(storage, observe=observe)
        # Whether the footer is as `metadata` says and the file ends with it.
        self._settled = True

    @property
    def pending(self) -> bool:
        """Whether anything is not durable yet."""
        return self.barriers.pending

    def write(self, data: memoryview, *, offset: int) -> None:
        """Bytes within the disk."""
        self._begin()
        self.storage.pwrite([data], offset=offset)

    def write_zeroes(
        self, *, offset: int, length: int, unmap: bool = False, fallback: bool = True
    ) -> None:
        """The host makes the zeros, as well as it can."""
        self._begin()
        self.storage.zero(offset=offset, length=length, unmap=unmap)

    def discard(self, *, offset: int, length: int) -> None:
        """Bytes may stay as they are."""
        self._begin()
        self.storage.discard(offset=offset, length=length)

    def flush(self) -> None:
        """All that was written before is durable when this returns."""
        if not self._settled:
            self._begin()
        self.barriers.wait("flush")

    def resize(self, size: int, *, shrink: bool, preallocation: str) -> None:
        """Make the disk `size` bytes long; what is added reads as zeros. Durable on return.

        The size changes in one write, that of the footer in its place: until then there may be a
        gap between the disk and its footer, afterwards it is closed. preallocation: off, falloc or
        full. Raises RequestError for a size that cannot be, or a smaller one without `shrink`,
        UnsupportedFeature for a footer at an odd place, and StorageError. After an error the disk
        has one of the two sizes, and `metadata` says which."""
        check_size(size)
        old = self.metadata.virtual_size
        if size == old:
            return
        if size < old and not shrink:
            raise RequestError(
                f"size {size} is below the disk's {old}, and shrinking was not asked for"
            )
        if self.metadata.data_end % SECTOR:
            reason = f"lies at {self.metadata.data_end:#x}, not on a sector: it cannot be moved"
            raise UnsupportedFeature("footer of a fixed VHD", reason=reason)
        if self.storage.caps.block_device and size > self.metadata.data_end:
            raise RequestError(
                f"size {size} does not fit before the footer at {self.metadata.data_end:#x} of a "
                "device"
            )
        self._begin()
        if size > old:
            self._extend(size, preallocation)
        self._place_footer(self.metadata.data_end, size=size)
        self._close_gap()

    def _extend(self, size: int, preallocation: str) -> None:
        """Move the footer so that the larger disk fits before it, and zero what is added."""
        old, footer_at = self.metadata.virtual_size, self.metadata.data_end
        if size > footer_at:
            self._place_footer(size, size=old)
        # A gap, and the old footer; what lies behind them has just been grown.
        end = min(size, footer_at + FOOTER_SIZE)
        self._begin()
        self.storage.zero(offset=old, length=end - old, unmap=False)
        preallocate(self.storage, offset=old, length=size - old, mode=preallocation)
        self.barriers.wait("added space before the size")

    def _place_footer(self, offset: int, *, size: int) -> None:
        """A footer for `size` bytes at the host offset, which is behind them; durable."""
        footer = self.metadata.footer
        if size != self.metadata.virtual_size:
            footer = replace(footer, current_size=size, geometry=plan_geometry(size))
        self._begin()
        self._settled = False
        try:
            self.storage.pwrite([footer.encode()], offset=offset)
        except StorageError:
            # Half a footer, or a file that is longer, would be no VHD any more.
            with suppress(StorageError):
                self._settle()
            raise
        self.barriers.wait("footer before what relies on it")
        self.metadata = replace(self.metadata, footer=footer, virtual_size=size, data_end=offset)
        self._settled = True

    def _close_gap(self) -> None:
        """Cut the file behind the disk, with a footer; a device keeps its gap."""
        size = self.metadata.virtual_size
        if self.storage.caps.block_device or self.metadata.data_end == size:
            return
        self._place_footer(size, size=size)
        self._settled = False
        self._begin()
        self.barriers.wait("flush")

    def _begin(self) -> None:
        """Before any change: nothing has failed for good, and the footer is in order."""
        self.barriers.check()
        if not self._settled:
            self._settle()
        self.barriers.pending = True

    def _settle(self) -> None:
        footer, offset = self.metadata.footer.encode(), self.metadata.data_end
        self.barriers.pending = True
        if self.storage.pread(FOOTER_SIZE, offset=offset) != footer:
            self.storage.pwrite([footer], offset=offset)
        if not self.storage.caps.block_device:
            self.storage.truncate(offset + FOOTER_SIZE)
        self._settled = True
