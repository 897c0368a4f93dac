"""The snapshot table. Pure.

Source: the qcow2 specification, "Snapshots". Rows 18 and 19 of docs/formats/qcow2.md, but for
what needs the size of the file."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qcowkit.codecs.qcow2.geometry import MAX_L1_BYTES, Geometry
from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.units import INT64_MAX, MiB, align_up

MAX_SNAPSHOT_TABLE_BYTES = 64 * MiB
MAX_SNAPSHOT_EXTRA = 1024
MIN_V3_EXTRA = 16
# Two 64 KiB strings and the extra data: what one entry can take at most.
MAX_SNAPSHOT_ENTRY = 40 + MAX_SNAPSHOT_EXTRA + 2 * 0xFFFF + 7

_ENTRY = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQQ")
_NO_ICOUNT = (1 << 64) - 1
_TABLE = "snapshot table"
_Bad = Callable[[str], CorruptMetadata]


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotEntry:
    """One internal snapshot. Sizes in bytes, times in seconds and nanoseconds.

    disk_size: guest bytes when it was taken; for old entries without the field, the size of the
    image. icount: None where none was recorded. unknown_extra: extra data past byte 24, kept."""

    id: str
    name: str
    l1_offset: int
    l1_entries: int
    date_sec: int = 0
    date_nsec: int = 0
    vm_clock_nsec: int = 0
    vm_state_size: int = 0
    disk_size: int = 0
    icount: int | None = None
    unknown_extra: bytes = b""

    @property
    def l1_bytes(self) -> int:
        """Bytes of the snapshot's L1 table."""
        return self.l1_entries * 8


def decode_snapshot(
    raw: bytes, *, offset: int, index: int, host_offset: int, version: int, image_size: int
) -> tuple[SnapshotEntry, int]:
    """The entry at byte `offset` of `raw`, and where the next one begins, aligned to 8.

    index, host_offset: of this entry, for messages. image_size: the disk's size, for entries
    that do not record their own. Raises CorruptMetadata."""

    def bad(reason: str) -> CorruptMetadata:
        return CorruptMetadata(_TABLE, host_offset=host_offset, index=index, reason=reason)

    if len(raw) - offset < _ENTRY.size:
        raise bad(f"{len(raw) - offset} bytes left, expected at least {_ENTRY.size}")
    (l1, entries, id_length, name_length, sec, nsec, clock, state, extra_size) = _ENTRY.unpack_from(
        raw, offset
    )
    if extra_size > MAX_SNAPSHOT_EXTRA:
        raise bad(f"{extra_size} bytes of extra data, expected at most {MAX_SNAPSHOT_EXTRA}")
    if version >= 3 and extra_size < MIN_V3_EXTRA:
        raise bad(f"{extra_size} bytes of extra data, expected at least {MIN_V3_EXTRA}")
    extra_start = offset + _ENTRY.size
    id_start = extra_start + extra_size
    name_start = id_start + id_length
    end = name_start + name_length
    if end > len(raw):
        raise bad(f"{end - offset} bytes, expected at most the {len(raw) - offset} that are left")
    extra = bytes(raw[extra_start:id_start])
    state, size, icount = _decode_extra(extra, state=state, image_size=image_size)
    entry = SnapshotEntry(
        id=_decode_text(raw[id_start:name_start], "id", bad),
        name=_decode_text(raw[name_start:end], "name", bad),
        l1_offset=l1,
        l1_entries=entries,
        date_sec=sec,
        date_nsec=nsec,
        vm_clock_nsec=clock,
        vm_state_size=state,
        disk_size=size,
        icount=icount,
        unknown_extra=extra[_EXTRA.size :],
    )
    return entry, offset + align_up(end - offset, 8)


def _decode_extra(extra: bytes, *, state: int, image_size: int) -> tuple[int, int, int | None]:
    """(VM state size, disk size, icount) with the fields that are there."""
    size, icount = image_size, None
    if len(extra) >= 8:
        state = int.from_bytes(extra[:8], "big")
    if len(extra) >= 16:
        size = int.from_bytes(extra[8:16], "big")
    if len(extra) >= 24:
        found = int.from_bytes(extra[16:24], "big")
        icount = None if found == _NO_ICOUNT else found
    return state, size, icount


def _decode_text(raw: bytes, what: str, bad: _Bad) -> str:
    try:
        return bytes(raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad(f"{what} is not UTF-8 at byte {error.start}") from None


def check_snapshot(
    entry: SnapshotEntry, *, index: int, geometry: Geometry, host_offset: int
) -> None:
    """What row 16 asks of an L1 table, asked of a snapshot's.

    index, host_offset: of the entry and the table, for messages. Raises CorruptMetadata."""
    reason = ""
    limit, size = MAX_L1_BYTES // 8, geometry.cluster_size
    if entry.disk_size > INT64_MAX:
        reason = f"disk size {entry.disk_size}, expected at most {INT64_MAX}"
    elif entry.l1_entries > limit:
        reason = f"L1 table of {entry.l1_entries} entries, expected at most {limit}"
    elif entry.l1_entries and entry.l1_offset % size:
        reason = f"L1 table offset {entry.l1_offset:#x} is not a multiple of {size:#x}"
    elif entry.l1_offset + entry.l1_bytes > INT64_MAX:
        reason = f"L1 table offset {entry.l1_offset:#x} ends above 2**63 - 1"
    if reason:
        raise CorruptMetadata(_TABLE, host_offset=host_offset, index=index, reason=reason)


def encode_snapshots(entries: Iterable[SnapshotEntry]) -> bytes:
    """The whole table, each entry aligned to 8; the extra data always has all known fields.

    Raises RequestError for ids and names that no entry can hold, and a table above 64 MiB."""
    table = b"".join(_encode_snapshot(entry) for entry in entries)
    if len(table) > MAX_SNAPSHOT_TABLE_BYTES:
        limit = MAX_SNAPSHOT_TABLE_BYTES
        raise RequestError(f"the snapshot table of {len(table)} bytes is above the {limit} allowed")
    return table


def _encode_snapshot(entry: SnapshotEntry) -> bytes:
    names = entry.id.encode(), entry.name.encode()
    if max(map(len, names)) > 0xFFFF:
        raise RequestError(f"the id or name of snapshot {entry.id[:32]!r} is above 65535 bytes")
    icount = _NO_ICOUNT if entry.icount is None else entry.icount
    extra = _EXTRA.pack(entry.vm_state_size, entry.disk_size, icount) + entry.unknown_extra
    # A state that the old 32-bit field cannot hold is written there as 0.
    state = entry.vm_state_size if entry.vm_state_size >> 32 == 0 else 0
    fixed = _ENTRY.pack(
        entry.l1_offset,
        entry.l1_entries,
        len(names[0]),
        len(names[1]),
        entry.date_sec,
        entry.date_nsec,
        entry.vm_clock_nsec,
        state,
        len(extra),
    )
    raw = fixed + extra + b"".join(names)
    return raw.ljust(align_up(len(raw), 8), b"\0")
