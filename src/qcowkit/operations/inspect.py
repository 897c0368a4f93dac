"""A verdict on a file that a stranger sent: may it be handed to a virtual machine or a converter?

Opens that file and no other, reads a bounded part of it, and never fails on what it finds there:
whatever is wrong becomes a reason. Reliability reference, section 1."""

from __future__ import annotations

import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from qcowkit.budget import UNTRUSTED, Budget
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.vhd.metadata import VhdMetadata
from qcowkit.errors import (
    BudgetExceeded,
    CorruptMetadata,
    QcowkitError,
    StorageError,
    UnknownFormat,
    UnsupportedFeature,
)
from qcowkit.image.metadata import Metadata, load_metadata
from qcowkit.image.probe import find_formats
from qcowkit.references import ReferenceKind
from qcowkit.storage.file import FileStorage
from qcowkit.storage.protocol import Storage
from qcowkit.units import KiB, MiB, format_size

# The mapping is looked at as far as this; a bomb is a small file, so it is seen whole.
_SCAN_BYTES = 2 * MiB
_CHUNK = 64 * KiB
# No writer maps one host cluster more often than this from one disk.
_MAX_SHARING = 16
_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED = 1 << 62
_COPIED = 1 << 63
_UNUSED_BLOCK = 0xFFFF_FFFF


class VerdictKind(Enum):
    """The three answers; the values are the words of the JSON form."""

    SAFE = "safe"
    UNSAFE = "unsafe"
    NOT_AN_IMAGE = "not an image"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a file is unsafe. code: a fixed word for programs. text: one line for people."""

    code: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What `inspect_file` found. virtual_size: bytes, None where it could not be learnt.

    format: `qcow2`, `vpc`, the name of a foreign format, or None. facts: what is no reason but good
    to know; values are ready for JSON. Codes of reasons: backing-file,
    data-file, parent, dirty, corrupt, unknown-feature, bad-metadata, oversize, foreign-format,
    polyglot, fan-in."""

    path: str
    kind: VerdictKind
    format: str | None = None
    virtual_size: int | None = None
    reasons: tuple[Reason, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The word for `kind`."""
        return self.kind.value


def inspect_file(path: str | os.PathLike[str], *, budget: Budget = UNTRUSTED) -> Verdict:
    """Judge one file. Raises StorageError if the file itself cannot be opened or read."""
    storage = FileStorage.open(path)
    try:
        return inspect_storage(storage, budget=budget)
    finally:
        storage.close()


def inspect_storage(storage: Storage, *, budget: Budget = UNTRUSTED) -> Verdict:
    """Judge what is open already; see `inspect_file`. The storage stays open."""
    formats = find_formats(storage)
    facts: dict[str, object] = {"file-size": storage.size()}
    if not formats:
        return Verdict(path=storage.name, kind=VerdictKind.NOT_AN_IMAGE, facts=facts)
    reasons = list(_format_reasons(formats))
    metadata = None
    if formats[0] in ("qcow2", "vpc"):
        try:
            metadata = load_metadata(storage, formats[0], budget=budget)
            reasons += _metadata_reasons(metadata)
            facts |= _facts(metadata)
            reasons += _mapping_reasons(storage, metadata)
        except StorageError:
            raise
        except QcowkitError as error:
            reasons.append(_reason_of(error))
    return Verdict(
        path=storage.name,
        kind=VerdictKind.UNSAFE if reasons else VerdictKind.SAFE,
        format=formats[0],
        virtual_size=metadata.virtual_size if metadata else None,
        reasons=tuple(reasons),
        facts=facts,
    )


def as_json(verdict: Verdict) -> dict[str, object]:
    """The verdict as an object for `json.dumps`."""
    return {
        "filename": verdict.path,
        "verdict": verdict.verdict,
        "format": verdict.format,
        "virtual-size": verdict.virtual_size,
        "reasons": [{"code": one.code, "text": one.text} for one in verdict.reasons],
        "facts": dict(verdict.facts),
    }


def as_text(verdict: Verdict) -> str:
    """The verdict as lines for people; names from the image are quoted and escaped."""
    head = f"{verdict.path}: {verdict.verdict}"
    if verdict.format is not None:
        head += f" ({verdict.format}"
        size = verdict.virtual_size
        head += ")" if size is None else f", {format_size(size)} virtual)"
    lines = [head]
    lines += [f"  {one.code}: {one.text}" for one in verdict.reasons]
    lines += [f"  {name}: {json.dumps(value)}" for name, value in verdict.facts.items()]
    return "\n".join(lines)


def _format_reasons(formats: tuple[str, ...]) -> Iterator[Reason]:
    if len(formats) > 1:
        text = f"the content is {' and '.join(formats)} at once, expected one format"
        yield Reason(code="polyglot", text=text)
    for name in formats:
        if name not in ("qcow2", "vpc"):
            text = f"the content is {name}, expected qcow2 or vpc"
            yield Reason(code="foreign-format", text=text)


def _reason_of(error: QcowkitError) -> Reason:
    match error:
        case BudgetExceeded():
            code = "oversize"
        case UnsupportedFeature():
            code = "unknown-feature"
        case CorruptMetadata() | UnknownFormat():
            code = "bad-metadata"
        case _:
            raise error
    return Reason(code=code, text=str(error))


_REFERENCE_CODES = {
    ReferenceKind.BACKING: "backing-file",
    ReferenceKind.DATA: "data-file",
    ReferenceKind.PARENT: "parent",
}


def _metadata_reasons(metadata: Metadata) -> Iterator[Reason]:
    for reference in metadata.references:
        names = ", ".join(ascii(name) for name in reference.names)
        text = f"the image names the {reference.kind.value} {names}"
        yield Reason(code=_REFERENCE_CODES[reference.kind], text=text)
    if not isinstance(metadata, Qcow2Metadata):
        return
    unused = metadata.extensions.data_file
    if unused is not None and not metadata.data_file:
        text = f"the image names the data file {ascii(unused)}, although it has none"
        yield Reason(code="data-file", text=text)
    if metadata.dirty:
        yield Reason(code="dirty", text="the dirty bit is set: refcounts may be wrong")
    if metadata.corrupt:
        yield Reason(code="corrupt", text="the corrupt bit is set: only repair may write")


def _facts(metadata: Metadata) -> dict[str, object]:
    facts: dict[str, object] = {}
    if isinstance(metadata, Qcow2Metadata):
        facts |= {
            "version": metadata.header.version,
            "cluster-size": metadata.cluster_size,
            "compression-type": metadata.compression_type,
            "encrypted": metadata.encrypted,
            "snapshots": len(metadata.snapshots),
            "bitmaps": len(metadata.bitmaps),
        }
    elif isinstance(metadata, VhdMetadata):
        facts |= {
            "subformat": metadata.subformat,
            "block-size": metadata.cluster_size,
            "unique-id": str(metadata.unique_id),
        }
    for reference in metadata.references:
        facts[_REFERENCE_CODES[reference.kind]] = reference.names[0]
    if metadata.warnings:
        facts["warnings"] = list(metadata.warnings)
    return facts


def _mapping_reasons(storage: Storage, metadata: Metadata) -> Iterator[Reason]:
    """Signs of a small file that unfolds to an enormous disk by naming the same place again."""
    if isinstance(metadata, Qcow2Metadata):
        yield from _snapshot_fan_in(metadata)
        yield from _qcow2_fan_in(storage, metadata)
    elif isinstance(metadata, VhdMetadata):
        yield from _vhd_fan_in(storage, metadata)


def _snapshot_fan_in(metadata: Qcow2Metadata) -> Iterator[Reason]:
    places = Counter(one.l1_offset for one in metadata.snapshots if one.l1_bytes)
    for offset, count in _crowded(places, limit=1):
        text = f"{count} snapshots share the L1 table at host offset {offset:#x}"
        yield Reason(code="fan-in", text=text)


def _qcow2_fan_in(storage: Storage, metadata: Qcow2Metadata) -> Iterator[Reason]:
    header = metadata.header
    tables: Counter[int] = Counter()
    for words in _words(storage, header.l1_table_offset, header.l1_bytes, code="Q"):
        tables.update(word & _OFFSET_MASK for word in words if word)
    for offset, count in _crowded(tables, limit=1):
        text = f"{count} L1 entries name the L2 table at host offset {offset:#x}"
        yield Reason(code="fan-in", text=text)
    yield from _cluster_fan_in(storage, metadata, list(tables))


def _cluster_fan_in(
    storage: Storage, metadata: Qcow2Metadata, tables: list[int]
) -> Iterator[Reason]:
    size = metadata.cluster_size
    # Spread over the disk where there are too many to look at all of them.
    step = max(1, len(tables) * size // _SCAN_BYTES)
    places: Counter[int] = Counter()
    for offset in tables[::step]:
        for words in _words(storage, offset, size, code="Q"):
            entries = words[::2] if metadata.geometry.has_subclusters else words
            places.update(filter(None, map(_place, entries)))
    for place, count in _crowded(places, limit=_MAX_SHARING):
        what = "compressed" if place & _COMPRESSED else "plain"
        text = f"{count} L2 entries name one {what} cluster ({place & ~_COMPRESSED:#x})"
        yield Reason(code="fan-in", text=text)


def _crowded(places: Counter[int], *, limit: int) -> Iterator[tuple[int, int]]:
    """The place that is named most often, and how often, if that is more than `limit`."""
    if places:
        place = max(places, key=places.__getitem__)
        if places[place] > limit:
            yield place, places[place]


def _place(entry: int) -> int:
    """What tells one cluster from another: a compressed descriptor whole, else the offset."""
    return entry & ~_COPIED if entry & _COMPRESSED else entry & _OFFSET_MASK


def _vhd_fan_in(storage: Storage, metadata: VhdMetadata) -> Iterator[Reason]:
    header = metadata.dynamic_header
    if header is None:
        return
    places: Counter[int] = Counter()
    for words in _words(storage, header.table_offset, 4 * metadata.block_count, code="I"):
        places.update(word for word in words if word != _UNUSED_BLOCK)
    for sector, count in _crowded(places, limit=1):
        text = f"{count} entries of the block allocation table name the sector {sector:#x}"
        yield Reason(code="fan-in", text=text)


def _words(storage: Storage, offset: int, length: int, *, code: str) -> Iterator[array[int]]:
    """A table of big-endian words in pieces; pieces of zeros are left out, and what is beyond the
    bytes that an inspection looks at."""
    looked = 0
    for position in range(0, length, _CHUNK):
        raw = storage.pread(min(_CHUNK, length - position), offset=offset + position)
        if not raw.strip(b"\0"):
            continue
        words = array(code)
        words.frombytes(raw[: len(raw) // words.itemsize * words.itemsize])
        if sys.byteorder == "little":
            words.byteswap()
        yield words
        looked += len(raw)
        if looked >= _SCAN_BYTES:
            return
