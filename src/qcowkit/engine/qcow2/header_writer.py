"""Header fields changed in place. Each change is one write within the first sector: it is wholly
there after a crash, or not at all."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import replace

from qcowkit.codecs.qcow2.header import FIELD_OFFSETS, Autoclear, Header, Incompatible
from qcowkit.errors import StorageError
from qcowkit.storage.protocol import Storage

_U64 = struct.Struct(">Q")
_KNOWN_AUTOCLEAR = int(Autoclear.BITMAPS | Autoclear.DATA_FILE_RAW)


class HeaderWriter:
    """The header of an open image. `header` is what the next reader will find, once it is durable.

    Callers order the writes: nothing here waits. All methods raise StorageError, and leave
    `header` as it was then."""

    def __init__(self, storage: Storage, header: Header) -> None:
        self._storage = storage
        self.header = header

    def set_size(self, size: int) -> None:
        """The disk's size in bytes."""
        self._write("size", _U64.pack(size), replace(self.header, size=size))

    def set_l1(self, *, offset: int, entries: int) -> None:
        """Size and place of the active L1 table, which stand side by side."""
        raw = struct.pack(">IQ", entries, offset)
        self._write("l1_size", raw, replace(self.header, l1_size=entries, l1_table_offset=offset))

    def set_refcount_table(self, *, offset: int, clusters: int) -> None:
        """Place and size of the refcount table, which stand side by side."""
        after = replace(self.header, refcount_table_offset=offset, refcount_table_clusters=clusters)
        self._write("refcount_table_offset", struct.pack(">QI", offset, clusters), after)

    def set_incompatible(self, bit: Incompatible, *, on: bool) -> None:
        """One of the dirty and corrupt bits."""
        bits = self.header.incompatible_features & ~bit | (bit if on else 0)
        after = replace(self.header, incompatible_features=int(bits))
        self._write("incompatible_features", _U64.pack(bits), after)

    @property
    def has_unknown_autoclear(self) -> bool:
        """Whether bits are set whose promise a writer that does not know them would break."""
        return bool(self.header.autoclear_features & ~_KNOWN_AUTOCLEAR)

    def clear_unknown_autoclear(self) -> None:
        """Drop those bits."""
        bits = self.header.autoclear_features & _KNOWN_AUTOCLEAR
        after = replace(self.header, autoclear_features=bits)
        self._write("autoclear_features", _U64.pack(bits), after)

    def _write(self, field: str, raw: bytes, after: Header) -> None:
        offset = FIELD_OFFSETS[field]
        before = self.header.encode()[offset : offset + len(raw)]
        try:
            self._storage.pwrite([raw], offset=offset)
        except StorageError:
            # A part of it may be there: what the header said before is better than a mixture.
            with contextlib.suppress(StorageError):
                self._storage.pwrite([before], offset=offset)
            raise
        self.header = after
