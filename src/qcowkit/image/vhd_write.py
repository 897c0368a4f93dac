"""A VHD file as the top layer of a disk that the guest may change."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

from qcowkit.engine.ranges import check_range
from qcowkit.engine.vhd.fixed import FixedWriter
from qcowkit.engine.vhd.mapping import BlockMap
from qcowkit.engine.vhd.metadata import VhdMetadata
from qcowkit.engine.vhd.resize import resize_blocks
from qcowkit.engine.vhd.writer import BlockWriter
from qcowkit.errors import RequestError
from qcowkit.extents.table import ExtentTable
from qcowkit.image.protocol import Below
from qcowkit.image.vhd import VhdImage
from qcowkit.storage.protocol import Storage

if TYPE_CHECKING:
    from typing_extensions import Buffer

_FIXED_MODES = ("off", "falloc", "full")


class WritableVhdImage(VhdImage):
    """A fixed, dynamic or differencing disk as a `WritableImage`.

    Changes hold the image's one lock; readers take none (docs/adr/0010). The block table is read
    on first use."""

    def __init__(self, metadata: VhdMetadata, storage: Storage) -> None:
        super().__init__(metadata, storage)
        self._lock = threading.RLock()
        self._below: Below | None = None
        self._blocks_writer: BlockWriter | None = None
        self._fixed_writer: FixedWriter | None = None
        if metadata.dynamic_header is None:
            self._fixed_writer = FixedWriter(storage, metadata)

    @property
    def releases(self) -> int:
        """See `WritableImage.releases`: blocks move and go with a resize alone."""
        writer = self._blocks_writer
        return 0 if writer is None else writer.releases

    def attach(self, below: Below | None) -> None:
        """See `WritableImage.attach`."""
        with self._lock:
            self._below = below
            if self._blocks_writer is not None:
                self._blocks_writer.underneath.below = below

    def extents(self, *, start: int, length: int, limit: int | None = None) -> ExtentTable:
        """See `Image.extents`; one moment of a disk that others may be changing."""
        if self._fixed_writer is not None:
            return super().extents(start=start, length=length, limit=limit)
        blocks = self._block_map()
        check_range(start=start, length=length, size=blocks.size)
        return blocks.extents(start=start, length=length, limit=limit)

    def write(self, data: Buffer, *, offset: int) -> None:
        """See `WritableImage.write`."""
        view = memoryview(data).cast("B")
        with self._lock:
            self._begin(offset, len(view)).write(view, offset=offset)

    def write_compressed(self, data: Buffer, *, offset: int) -> None:
        """A VHD has no compressed clusters. Raises RequestError."""
        raise RequestError("compressed clusters: a VHD has none")

    def write_zeroes(
        self, *, offset: int, length: int, unmap: bool = False, fallback: bool = True
    ) -> None:
        """See `WritableImage.write_zeroes`; over a parent all zeros are data."""
        with self._lock:
            writer = self._begin(offset, length)
            writer.write_zeroes(offset=offset, length=length, unmap=unmap, fallback=fallback)

    def discard(self, *, offset: int, length: int) -> None:
        """See `WritableImage.discard`: whole blocks of a dynamic disk become zeros, a differencing
        disk keeps all."""
        with self._lock:
            self._begin(offset, length).discard(offset=offset, length=length)

    def flush(self) -> None:
        """See `WritableImage.flush`."""
        with self._lock:
            (self._fixed_writer or self._writer()).flush()

    def resize(self, size: int, *, shrink: bool = False, preallocation: str = "off") -> None:
        """See `WritableImage.resize`. preallocation: off; of a fixed disk also falloc and full.
        Raises UnsupportedFeature where the structure of the file is in the way."""
        with self._lock:
            modes = ("off",) if self._fixed_writer is None else _FIXED_MODES
            if preallocation not in modes:
                reason = f"expected {' or '.join(modes)} for a {self.metadata.subformat} VHD"
                raise RequestError(f"preallocation {preallocation!r}: {reason}")
            if self._fixed_writer is not None:
                fixed = self._fixed_writer
                try:
                    fixed.resize(size, shrink=shrink, preallocation=preallocation)
                finally:
                    self.metadata = fixed.metadata
                return
            writer = self._writer()
            try:
                resize_blocks(writer, size, shrink=shrink)
            finally:
                self.metadata = writer.metadata

    def close(self) -> None:
        """Flush what was changed, and close the file in any case."""
        with self._lock, ExitStack() as stack:
            stack.callback(super().close)
            writer = self._fixed_writer or self._blocks_writer
            if writer is not None and writer.pending:
                writer.flush()

    def _begin(self, offset: int, length: int) -> BlockWriter | FixedWriter:
        # Beyond the end of a fixed disk lies its footer: what a resize overtook must not go there.
        check_range(start=offset, length=length, size=self.size)
        return self._fixed_writer or self._writer()

    def _writer(self) -> BlockWriter:
        with self._lock:
            if self._blocks_writer is None:
                blocks = BlockMap.load(self.metadata, self.data_storage)
                self._blocks_writer = BlockWriter(self.data_storage, self.metadata, blocks)
                self._blocks_writer.underneath.below = self._below
            return self._blocks_writer

    def _block_map(self) -> BlockMap:
        writer = self._blocks_writer
        return (writer or self._writer()).blocks
