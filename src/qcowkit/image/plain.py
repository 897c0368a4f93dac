"""Reading plain runs: what every format shares once an extent has a host offset."""

from __future__ import annotations

from collections.abc import Sequence

from qcowkit.engine.crypt import PIECE, DataCipher
from qcowkit.errors import CorruptMetadata
from qcowkit.extents.table import Extent, ExtentTable, Flag, concatenate, make_table
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, align_up


def read_plain(
    storage: Storage,
    runs: Sequence[Extent],
    buffer: memoryview,
    *,
    base: int,
    cluster_size: int = 0,
) -> None:
    """Read runs at their host offsets; what the file lacks of them is zero.

    cluster_size: bytes, for formats whose file may end within its last cluster only: a cluster
    that begins beyond the end was lost, and raises CorruptMetadata; zeros would hide it."""
    for run in runs:
        at = run.start - base
        part = buffer[at : at + run.length]
        count = storage.pread_into(part, offset=run.host)
        if count < run.length:
            if cluster_size:
                _check_end(storage, run, cluster_size)
            part[count:] = bytes(run.length - count)


def read_encrypted(
    storage: Storage,
    runs: Sequence[Extent],
    buffer: memoryview,
    cipher: DataCipher,
    *,
    base: int,
    cluster_size: int = 0,
) -> None:
    """As `read_plain`, decrypted. What is asked of a sector may be a part of it."""
    for run in runs:
        at, head = run.start - base, run.start % SECTOR
        part = buffer[at : at + run.length]
        length = align_up(head + run.length, SECTOR)
        whole = run._replace(start=run.start - head, length=length, host=run.host - head)
        if length == run.length:
            _read_sectors(storage, whole, part, cipher, cluster_size)
            continue
        sectors = memoryview(bytearray(length))
        _read_sectors(storage, whole, sectors, cipher, cluster_size)
        part[:] = sectors[head : head + run.length]


def _read_sectors(
    storage: Storage, run: Extent, view: memoryview, cipher: DataCipher, cluster_size: int
) -> None:
    for at in range(0, run.length, PIECE):
        part = view[at : at + PIECE]
        piece = run._replace(start=run.start + at, length=len(part), host=run.host + at)
        read_plain(storage, [piece], part, base=piece.start, cluster_size=cluster_size)
        cipher.decrypt(part, host=piece.host, guest=piece.start)


def _check_end(storage: Storage, run: Extent, cluster_size: int) -> None:
    size = storage.size()
    lost = max(run.host, align_up(size, cluster_size))
    if lost < run.host + run.length:
        raise CorruptMetadata(
            "data cluster",
            host_offset=lost,
            reason=f"lies beyond the end of the file at {size:#x}",
        )


def map_flat(storage: Storage, *, start: int, length: int, limit: int | None) -> ExtentTable:
    """Extents of a disk whose guest and host offsets are the same, from the host's own holes.

    Holes are PRESENT and ZERO: a flat file has no backing to fall through to."""
    rows: list[tuple[int, int, int]] = []
    position, stop = start, start + length
    for offset, size in storage.iter_data(offset=start, length=length):
        if offset > position:
            rows.append((position, offset - position, Flag.ZERO | Flag.PRESENT))
        rows.append((offset, size, Flag.DATA | Flag.PRESENT))
        position = offset + size
        if limit is not None and len(rows) >= limit:
            stop = position
            break
    if position < stop:
        rows.append((position, stop - position, Flag.ZERO | Flag.PRESENT))
    if not rows:
        return concatenate([])
    starts, lengths, flags = zip(*rows, strict=True)
    return make_table(starts, lengths, flags, host=starts)
