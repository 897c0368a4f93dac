"""The first cluster changed in place: header fields, header extensions and the backing file name.

They may reach over several sectors, of which a crash leaves some as they were and some as they are
to be. So only the first sector is ever written while something leads to what it changes: it holds
all that decides how the rest is read (docs/adr/0016)."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from qcowkit.codecs.qcow2.extensions import (
    Extensions,
    ExtensionType,
    decode_extensions,
    encode_first_cluster,
)
from qcowkit.codecs.qcow2.header import Header
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.errors import RequestError, StorageError
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, align_up

# An extension that readers pass over, and with it what is being rewritten: "skip".
SKIP_TYPE = 0x736B6970
_HEAD = struct.Struct(">II")
# What a reader has to step over one by one.
_Ranges = list[tuple[int, int]]


class Keep(Enum):
    """The type of `KEEP`."""

    KEEP = "keep"


KEEP: Final = Keep.KEEP


class Part(Enum):
    """What a step writes, and so what has to be durable before the next."""

    COPY = "copy"
    DETOUR = "detour"
    REST = "rest"
    SWITCH = "switch"
    CLEARING = "clearing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One write into the first cluster. offset: a host offset."""

    part: Part
    offset: int
    data: bytes


def rewrite_first_cluster(
    storage: Storage,
    metadata: Qcow2Metadata,
    *,
    barriers: Barriers,
    header: Header | None = None,
    extensions: Extensions | None = None,
    backing_name: bytes | None | Keep = KEEP,
) -> Qcow2Metadata:
    """Change what the first cluster says; durable on return, with what was written before.

    header, extensions: as they are to be, derived from those in the file; None leaves them as the
    file has them, as KEEP does with the name. Unknown header bytes and unknown extensions stay,
    and so does the record of dirty tables, which may lie elsewhere then: nobody else has the image
    open for writing. Returns the metadata as they are now. Raises RequestError where there is no
    room, CorruptMetadata and StorageError; the first cluster then reads wholly as it was or wholly
    as it was to be."""
    size = metadata.cluster_size
    old = storage.pread(size, offset=0).ljust(size, b"\0")
    new = _encode(old, header, extensions, backing_name)
    steps = plan_first_cluster(old, new)
    # What the header is about to name comes first.
    barriers.wait("what the first cluster will name")
    _execute(storage, steps, old, barriers)
    return load_qcow2_metadata(storage) if steps else metadata


def check_room(
    storage: Storage, metadata: Qcow2Metadata, *, extensions: Extensions, backing_name: bytes | None
) -> None:
    """Raise RequestError where there is no room for the change that `rewrite_first_cluster` makes
    of the same: long work that ends with it should not begin."""
    size = metadata.cluster_size
    old = storage.pread(size, offset=0).ljust(size, b"\0")
    plan_first_cluster(old, _encode(old, None, extensions, backing_name))


def plan_first_cluster(old: bytes, new: bytes) -> tuple[Step, ...]:
    """The writes that lead from one content of the first cluster to another, in order.

    Each is durable before the next begins, and every mixture of the sectors of one leaves a cluster
    that reads as `old` or as `new`. Raises RequestError where there is no room for a copy."""
    if old == new:
        return ()
    live, end = _live_ranges(old), _end(_live_ranges(new))
    switch = Step(part=Part.SWITCH, offset=0, data=new[:SECTOR])
    rest = Step(part=Part.REST, offset=SECTOR, data=new[SECTOR:end])
    if old[SECTOR:end] == new[SECTOR:end]:
        steps = [switch]
    elif _is_unread(old, new, live, end):
        steps = [rest, switch]
    else:
        steps = [*_plan_detour(old, new, live, end), rest, switch]
    written = [one.offset + len(one.data) for one in steps]
    last = max(len(old.rstrip(b"\0")), *written)
    begin = max(end, SECTOR)
    if last > begin:
        steps.append(Step(part=Part.CLEARING, offset=begin, data=bytes(last - begin)))
    return tuple(steps)


def _is_unread(old: bytes, new: bytes, live: _Ranges, end: int) -> bool:
    """Whether no byte behind the first sector that is to change is read now."""
    inside = [(max(first, SECTOR), min(last, end)) for first, last in live]
    return all(old[first:last] == new[first:last] for first, last in inside if first < last)


def _plan_detour(old: bytes, new: bytes, live: _Ranges, end: int) -> Iterator[Step]:
    """The new extensions and name where nothing is read, and a first sector that leads there."""
    header = Header.decode(new)
    begin, size = header.header_length, header.cluster_size
    copied = new[begin:end]
    place = _find_room(live, first=align_up(max(end, SECTOR), 8), length=len(copied), stop=size)
    if begin + _HEAD.size > SECTOR or place is None:
        raise RequestError(
            f"the first cluster has no room for a copy of its {len(copied)} bytes of extensions "
            f"and names, without which they cannot be changed safely in {size} bytes"
        )
    if header.backing_file_offset:
        moved = header.backing_file_offset + place - begin
        header = replace(header, backing_file_offset=moved)
    skip = _HEAD.pack(SKIP_TYPE, place - begin - _HEAD.size)
    yield Step(part=Part.COPY, offset=place, data=copied)
    sector = (header.encode() + skip).ljust(SECTOR, b"\0")
    yield Step(part=Part.DETOUR, offset=0, data=sector)


def _find_room(live: _Ranges, *, first: int, length: int, stop: int) -> int | None:
    """The lowest host offset from `first` on, a multiple of 8, where nothing is read."""
    for place in sorted({first, *(align_up(last, 8) for _, last in live)}):
        free = all(last <= place or begin >= place + length for begin, last in live)
        if place >= first and free and place + length <= stop:
            return place
    return None


def _live_ranges(raw: bytes) -> _Ranges:
    """Bytes of a sound first cluster that its readers look at, as (first, one past the last)."""
    header = Header.decode(raw)
    offset = header.header_length
    stop = min(header.backing_file_offset or header.cluster_size, header.cluster_size)
    ranges = [(0, offset)]
    while stop - offset >= _HEAD.size:
        kind, length = _HEAD.unpack_from(raw, offset)
        begin = offset + _HEAD.size
        ranges.append((offset, begin if kind == SKIP_TYPE else begin + length))
        if kind == ExtensionType.END:
            # What its length says means nothing.
            ranges[-1] = (offset, begin)
            break
        offset = begin + align_up(length, 8)
    else:
        # Without an end marker whatever stood in the rest would be read as an extension.
        ranges.append((min(offset, stop), stop))
    if header.backing_file_offset:
        name = header.backing_file_offset
        ranges.append((name, name + header.backing_file_size))
    return ranges


def end_of_first_cluster(raw: bytes) -> int:
    """One past the last byte of a sound first cluster that a reader looks at; what follows may be
    anything that lay there before."""
    return _end(_live_ranges(raw))


def _end(ranges: _Ranges) -> int:
    return max(last for _, last in ranges)


def _encode(
    old: bytes,
    header: Header | None,
    extensions: Extensions | None,
    backing_name: bytes | None | Keep,
) -> bytes:
    """The first cluster as it is to be."""
    found = Header.decode(old)
    stop = min(found.backing_file_offset or found.cluster_size, found.cluster_size)
    present = decode_extensions(old, start=found.header_length, stop=stop)
    wanted = present if extensions is None else extensions
    if wanted.dirty_tables is not None and present.dirty_tables is not None:
        # A writer adds to the one in the file.
        wanted = replace(wanted, dirty_tables=present.dirty_tables)
    unknown = tuple(one for one in wanted.unknown if one.type != SKIP_TYPE)
    if isinstance(backing_name, Keep):
        begin = found.backing_file_offset
        backing_name = old[begin : begin + found.backing_file_size]
    name = backing_name.decode("utf-8", "surrogateescape") if backing_name else None
    assert header is None or header.cluster_bits == found.cluster_bits, "another cluster size"
    return encode_first_cluster(header or found, replace(wanted, unknown=unknown), name)


def _execute(storage: Storage, steps: Iterable[Step], old: bytes, barriers: Barriers) -> None:
    sector = old[:SECTOR]
    for step in steps:
        barriers.pending = True
        if step.offset == 0:
            _write_sector(storage, step.data, sector)
            sector = step.data
        else:
            storage.pwrite([step.data], offset=step.offset)
        match step.part:
            case Part.COPY:
                barriers.wait("copy of the first cluster before it is read")
            case Part.DETOUR:
                barriers.wait("detour to the copy of the first cluster")
            case Part.REST:
                barriers.wait("rest of the first cluster before its switch")
            case Part.SWITCH:
                barriers.wait("switch of the first cluster")
            case Part.CLEARING:
                # Nobody reads what was there.
                pass


def _write_sector(storage: Storage, data: bytes, before: bytes) -> None:
    try:
        storage.pwrite([data], offset=0)
    except StorageError:
        # A part of it may be there: what was read before is better than a mixture.
        with contextlib.suppress(StorageError):
            storage.pwrite([before], offset=0)
        raise
