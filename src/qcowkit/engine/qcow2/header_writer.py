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
# Incompatible, compatible and autoclear features stand side by side.
_FEATURES = struct.Struct(">QQQ")
_KNOWN_AUTOCLEAR = int(Autoclear.BITMAPS | Autoclear.DATA_FILE_RAW)


class HeaderWriter:
    """The header of an open image. `header` is what the next reader will find, once it is durable.

    Callers order the writes: nothing here waits. All methods raise StorageError, and leave
    `header` as it was then."""

    def __init__(self, storage: Storage, header: Header, *, keeps_record: bool = False) -> None:
        """keeps_record: the caller keeps the record of dirty L2 tables up to date; without that its
        bit is an unknown one."""
        self._storage = storage
        self._known = _KNOWN_AUTOCLEAR | (Autoclear.DIRTY_TABLES if keeps_record else 0)
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

    @property
    def recorded(self) -> bool:
        """Whether the header says that the record of dirty L2 tables holds."""
        return bool(self.header.autoclear_features & Autoclear.DIRTY_TABLES)

    def set_dirty(self, *, on: bool, recorded: bool = False) -> None:
        """The dirty bit, and with it whether the record of dirty L2 tables holds."""
        header, bit = self.header, Incompatible.DIRTY
        bits = header.incompatible_features & ~bit | (bit if on else 0)
        cleared = header.autoclear_features & ~Autoclear.DIRTY_TABLES
        autoclear = cleared | (Autoclear.DIRTY_TABLES if recorded else 0)
        if autoclear == header.autoclear_features:
            self.set_incompatible(bit, on=on)
            return
        raw = _FEATURES.pack(bits, header.compatible_features, autoclear)
        after = replace(header, incompatible_features=int(bits), autoclear_features=int(autoclear))
        self._write("incompatible_features", raw, after)

    def drop_record(self) -> None:
        """The record of dirty L2 tables holds no longer."""
        self._keep_autoclear(~Autoclear.DIRTY_TABLES)

    def set_incompatible(self, bit: Incompatible, *, on: bool) -> None:
        """One of the dirty and corrupt bits."""
        bits = self.header.incompatible_features & ~bit | (bit if on else 0)
        after = replace(self.header, incompatible_features=int(bits))
        self._write("incompatible_features", _U64.pack(bits), after)

    @property
    def has_unknown_autoclear(self) -> bool:
        """Whether bits are set whose promise a writer that does not know them would break."""
        return bool(self.header.autoclear_features & ~self._known)

    def clear_unknown_autoclear(self) -> None:
        """Drop those bits."""
        self._keep_autoclear(self._known)

    def _keep_autoclear(self, mask: int) -> None:
        bits = int(self.header.autoclear_features & mask)
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
