"""One write of the header that takes new metadata into use, or what was written is cut away again
(docs/adr/0014)."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from qcowkit.codecs.qcow2.header import Header
from qcowkit.engine.barriers import Barriers
from qcowkit.errors import StorageError
from qcowkit.storage.protocol import Storage

# Every field that may change lies before this byte, and so in the first sector.
_FIELDS = 105


class Cutover:
    """A `with` block in which a second set of metadata is written where nothing lies; `switch`
    takes it into use. Left by an error before that, the file is as long as it was."""

    def __init__(self, storage: Storage, header: Header, *, barriers: Barriers) -> None:
        """header: the one in use."""
        self._storage = storage
        self._header = header
        self._barriers = barriers
        self._size = storage.size()
        self._keep = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        device = self._storage.caps.block_device
        if error is None or self._keep or device or self._barriers.failed:
            return
        # What was written is nobody's; a file that cannot be cut has it behind its end.
        self._storage.truncate(self._size)

    def switch(self, header: Header, *, sector: bytes | None = None) -> None:
        """Make durable what was written, then the header that names it. Raises StorageError.

        sector: all of the first sector, which begins with that header; without it the header must
        be as long as the one in use, since only its fields are written then."""
        raw = header.encode()[:_FIELDS] if sector is None else sector
        same = header.header_length == self._header.header_length
        assert same or sector is not None, "another length moves extensions"
        old = self._storage.pread(len(raw), offset=0)
        self._barriers.pending = True
        self._barriers.wait("new metadata before their switch")
        self._barriers.pending = True
        # From here on the header may name the new metadata, whatever ends this call.
        self._keep = True
        try:
            self._storage.pwrite([raw], offset=0)
        except StorageError:
            # A part of it may be there; the old one is put back if that can be.
            self._storage.pwrite([old], offset=0)
            raise
        self._barriers.wait("switch of metadata")
