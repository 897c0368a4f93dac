"""A raw disk as the top layer of a disk that the guest may change."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from qcowkit.engine.barriers import Barriers
from qcowkit.engine.preallocate import preallocate
from qcowkit.engine.ranges import check_range
from qcowkit.errors import RequestError
from qcowkit.image.metadata import RawMetadata
from qcowkit.image.protocol import Below
from qcowkit.image.raw import RawImage
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, align_up

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MODES = ("off", "falloc", "full")


class WritableRawImage(RawImage):
    """A file or device as a `WritableImage`. There is no table to keep, so writes of several
    threads go side by side; only a flush and a resize take turns."""

    def __init__(self, metadata: RawMetadata, storage: Storage) -> None:
        super().__init__(metadata, storage)
        self._lock = threading.RLock()
        self._barriers = Barriers(storage)
        self._changed = False

    @property
    def releases(self) -> int:
        """See `WritableImage.releases`: host space never changes hands."""
        return 0

    def attach(self, below: Below | None) -> None:
        """Nothing lies under a raw disk that it could show."""

    def write(self, data: Buffer, *, offset: int) -> None:
        """See `WritableImage.write`."""
        self._begin()
        self.data_storage.pwrite([data], offset=offset)
        self._cut_if_overtaken(offset, memoryview(data).nbytes)

    def write_compressed(self, data: Buffer, *, offset: int) -> None:
        """A raw disk has no compressed clusters. Raises RequestError."""
        raise RequestError("compressed clusters: a raw disk has none")

    def write_zeroes(
        self, *, offset: int, length: int, unmap: bool = False, fallback: bool = True
    ) -> None:
        """See `WritableImage.write_zeroes`. The host makes the zeros, as well as it can."""
        self._begin()
        self.data_storage.zero(offset=offset, length=length, unmap=unmap)
        self._cut_if_overtaken(offset, length)

    def discard(self, *, offset: int, length: int) -> None:
        """See `WritableImage.discard`. Bytes that the host cannot give up stay as they are."""
        self._begin()
        self.data_storage.discard(offset=offset, length=length)

    def flush(self) -> None:
        """See `WritableImage.flush`."""
        with self._lock:
            # Writers do not wait for one another, so none can say that nothing is to be flushed.
            self._barriers.pending = True
            self._barriers.wait("flush")

    def resize(self, size: int, *, shrink: bool = False, preallocation: str = "off") -> None:
        """See `WritableImage.resize`. The file gets exactly `size` bytes; as a disk it ends with a
        whole sector, whose rest is zeros. A device keeps its size."""
        if preallocation not in _MODES:
            reason = f"expected {', '.join(_MODES[:-1])} or {_MODES[-1]} for a raw disk"
            raise RequestError(f"preallocation {preallocation!r}: {reason}")
        with self._lock:
            self._begin()
            old = self.data_storage.size()
            if self.data_storage.caps.block_device:
                _check_device(size, present=old)
            elif size < old and not shrink:
                raise RequestError(
                    f"size {size} is below the disk's {old}, and shrinking was not asked for"
                )
            elif size < old:
                self._shorten(size)
            elif size > old:
                self._lengthen(size, old=old, preallocation=preallocation)
            self.metadata = self._resized(size)

    def close(self) -> None:
        """Flush what was changed, and close the file in any case."""
        with ExitStack() as stack:
            stack.callback(super().close)
            if self._changed:
                self.flush()

    def _resized(self, size: int) -> RawMetadata:
        return replace(self.metadata, virtual_size=align_up(size, SECTOR))

    def _shorten(self, size: int) -> None:
        before = self.metadata
        # First: whoever writes behind the new end afterwards finds out that it did.
        self.metadata = self._resized(size)
        try:
            self.data_storage.truncate(size)
        except BaseException:
            self.metadata = before
            raise

    def _lengthen(self, size: int, *, old: int, preallocation: str) -> None:
        self.data_storage.truncate(size)
        try:
            preallocate(self.data_storage, offset=old, length=size - old, mode=preallocation)
        except BaseException:
            # All or nothing: without its space the file is not longer.
            self.data_storage.truncate(old)
            raise

    def _cut_if_overtaken(self, offset: int, length: int) -> None:
        """A change that a shrink has overtaken has made the file longer again: that is undone."""
        if offset + length <= self.size:
            return
        with self._lock:
            if offset + length > self.size:
                if not self.data_storage.caps.block_device:
                    self.data_storage.truncate(self.size)
                check_range(start=offset, length=length, size=self.size)

    def _begin(self) -> None:
        self._barriers.check()
        self._changed = True


def _check_device(size: int, *, present: int) -> None:
    if size != present:
        raise RequestError(f"size {size}: a device has {present} bytes and keeps them")
