"""A LUKS disk by itself as the top layer of a disk that the guest may change."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from qcowkit.budget import Budget
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.crypt import PIECE
from qcowkit.engine.luks.metadata import LuksMetadata
from qcowkit.errors import RequestError, UnsupportedFeature
from qcowkit.extents.table import Extent, Flag
from qcowkit.image.luks import LuksImage
from qcowkit.image.protocol import Below
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, align_down, align_up

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MODES = ("off", "falloc", "full")


class WritableLuksImage(LuksImage):
    """A LUKS disk as a `WritableImage`. One writer at a time: the rest of a sector is read before
    the sector is encrypted anew."""

    def __init__(
        self, metadata: LuksMetadata, storage: Storage, *, secret: bytes | None, budget: Budget
    ) -> None:
        super().__init__(metadata, storage, secret=secret, budget=budget)
        self._lock = threading.RLock()
        self._barriers = Barriers(storage)

    @property
    def releases(self) -> int:
        """See `WritableImage.releases`: host space never changes hands."""
        return 0

    def attach(self, below: Below | None) -> None:
        """Nothing lies under a LUKS disk that it could show."""

    def write(self, data: Buffer, *, offset: int) -> None:
        """See `WritableImage.write`."""
        view = memoryview(data).cast("B")
        with self._lock:
            self._barriers.check()
            self._barriers.pending = True
            begin, end = align_down(offset, SECTOR), align_up(offset + len(view), SECTOR)
            while begin < end:
                to = min(end, begin + PIECE)
                sectors = self._around(view, offset, begin, to)
                host = self._payload + begin
                self.cipher.encrypt_in_place(sectors, host=host, guest=begin)
                self.data_storage.pwrite([sectors], offset=host)
                begin = to

    def write_compressed(self, data: Buffer, *, offset: int) -> None:
        """A LUKS disk has no compressed clusters. Raises RequestError."""
        raise RequestError("compressed clusters: a luks disk has none")

    def write_zeroes(
        self, *, offset: int, length: int, unmap: bool = False, fallback: bool = True
    ) -> None:
        """See `WritableImage.write_zeroes`. Zeros are data like others here."""
        if not length:
            return
        if not fallback:
            raise UnsupportedFeature(
                "zeroing without writing", reason="the zeros of a luks disk must be encrypted"
            )
        for at in range(offset, offset + length, PIECE):
            self.write(bytes(min(PIECE, offset + length - at)), offset=at)

    def discard(self, *, offset: int, length: int) -> None:
        """See `WritableImage.discard`. Nothing is given up: what the host would leave is noise."""

    def flush(self) -> None:
        """See `WritableImage.flush`."""
        with self._lock:
            self._barriers.wait("flush")

    def resize(self, size: int, *, shrink: bool = False, preallocation: str = "off") -> None:
        """See `WritableImage.resize`. What is added is written, whatever the preallocation is."""
        if preallocation not in _MODES:
            reason = f"expected {', '.join(_MODES[:-1])} or {_MODES[-1]} for a luks disk"
            raise RequestError(f"preallocation {preallocation!r}: {reason}")
        if size < 0 or size % SECTOR:
            raise RequestError(f"size {size} is not a multiple of {SECTOR}")
        with self._lock:
            old = self.size
            if self.data_storage.caps.block_device and size != old:
                raise RequestError(f"size {size}: a device has {old} bytes and keeps them")
            if size < old and not shrink:
                raise RequestError(
                    f"size {size} is below the disk's {old}, and shrinking was not asked for"
                )
            if size != old:
                self._set_length(size, old=old)

    def close(self) -> None:
        """Flush what was changed, and close the file in any case."""
        with ExitStack() as stack:
            stack.callback(super().close)
            if self._barriers.pending:
                self.flush()

    def _set_length(self, size: int, *, old: int) -> None:
        self._barriers.check()
        self._barriers.pending = True
        storage, end = self.data_storage, self._payload + old
        if size > old:
            try:
                self.cipher.write_zeros(storage, host=end, guest=old, length=size - old)
            except BaseException:
                # All or nothing: what was not encrypted would read as noise.
                storage.truncate(end)
                raise
        storage.truncate(self._payload + size)
        self.metadata = replace(self.metadata, virtual_size=size)

    def _around(self, data: memoryview, offset: int, begin: int, end: int) -> bytearray:
        """Guest bytes [begin, end) as they shall be: whole sectors."""
        sectors = bytearray(end - begin)
        low, high = max(begin, offset), min(end, offset + len(data))
        for start, stop in ((begin, low), (high, end)):
            if start < stop:
                part = memoryview(sectors)[start - begin : stop - begin]
                host = self._payload + start
                run = Extent(start, stop - start, int(Flag.DATA), 0, host, 0)
                self.read_runs([run], part, base=start)
        sectors[low - begin : high - begin] = data[low - offset : high - offset]
        return sectors
