"""Header extensions, and the whole first cluster that holds them. Pure.

Source: the qcow2 specification, "Header extensions". Known types are decoded, all others are kept
byte for byte and in their order. Numbers in comments are rows of docs/formats/qcow2.md."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Self

from qcowkit.codecs.qcow2.dirty_tables import (
    DIRTY_TABLES_NAME,
    DIRTY_TABLES_TYPE,
    DirtyTables,
)
from qcowkit.codecs.qcow2.header import (
    MAX_BACKING_NAME,
    V2_HEADER_LENGTH,
    V3_HEADER_LENGTH,
    Autoclear,
    FeatureKind,
    FeatureNames,
    Header,
)
from qcowkit.codecs.qcow2.identity import IDENTITY_TYPE, Identity
from qcowkit.codecs.qcow2.runs import RUNS_NAME, RUNS_TYPE, ContiguousRuns
from qcowkit.errors import CorruptMetadata, RequestError, UnsupportedFeature
from qcowkit.units import MiB, align_up

MAX_EXTENSIONS = 256
MAX_FORMAT_NAME = 15
MAX_DATA_FILE_NAME = 1023
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_BYTES = 1024 * MAX_BITMAPS
MAX_CRYPTO_HEADER_BYTES = 64 * MiB

_HEAD = struct.Struct(">II")
_BITMAPS = struct.Struct(">IIQQ")
_CRYPTO = struct.Struct(">QQ")
_FEATURE = struct.Struct(">BB46s")
# Bytes of a version 3 header up to and with the compression type.
_V3_FIXED = 105


class ExtensionType(IntEnum):
    """The extension types of the specification."""

    END = 0x00000000
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    CRYPTO = 0x0537BE77
    DATA_FILE = 0x44415441


_TITLES = {
    ExtensionType.BACKING_FORMAT: "backing format extension",
    ExtensionType.FEATURE_NAMES: "feature name table",
    ExtensionType.BITMAPS: "bitmaps extension",
    ExtensionType.CRYPTO: "crypto header extension",
    ExtensionType.DATA_FILE: "data file name extension",
}

# Names of formats that a backing file may declare. Whether one can be opened is another question.
KNOWN_FORMATS = frozenset(
    ("raw", "qcow2", "vpc", "qcow", "qed", "vdi", "vhdx", "vmdk", "parallels", "bochs", "cloop")
    + ("dmg", "luks", "file", "host_device")
)

FEATURE_NAMES: FeatureNames = {
    (FeatureKind.INCOMPATIBLE, 0): "dirty bit",
    (FeatureKind.INCOMPATIBLE, 1): "corrupt bit",
    (FeatureKind.INCOMPATIBLE, 2): "external data file",
    (FeatureKind.INCOMPATIBLE, 3): "compression type",
    (FeatureKind.INCOMPATIBLE, 4): "extended L2 entries",
    (FeatureKind.COMPATIBLE, 0): "lazy refcounts",
    (FeatureKind.AUTOCLEAR, 0): "bitmaps",
    (FeatureKind.AUTOCLEAR, 1): "raw external data",
}
# Named in images that have them, so that other tools can tell what they clear.
_RECORD_NAME = {(FeatureKind.AUTOCLEAR, Autoclear.DIRTY_TABLES.bit_length() - 1): DIRTY_TABLES_NAME}
_RUNS_NAME = {(FeatureKind.AUTOCLEAR, Autoclear.CONTIGUOUS_RUNS.bit_length() - 1): RUNS_NAME}


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapsExtension:
    """Where the bitmap directory lies. Size in bytes; the offset is a host offset."""

    bitmap_count: int
    directory_size: int
    directory_offset: int

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Row 30, but for the alignment of the offset, which needs the cluster size."""
        title = _TITLES[ExtensionType.BITMAPS]
        if len(raw) != _BITMAPS.size:
            raise CorruptMetadata(title, reason=f"{len(raw)} bytes, expected {_BITMAPS.size}")
        count, reserved, size, offset = _BITMAPS.unpack(raw)
        if reserved:
            raise CorruptMetadata(title, reason=f"reserved field is {reserved:#x}, expected 0")
        if not 1 <= count <= MAX_BITMAPS:
            raise CorruptMetadata(title, reason=f"{count} bitmaps, expected 1 to {MAX_BITMAPS}")
        if not 1 <= size <= MAX_BITMAP_DIRECTORY_BYTES:
            raise CorruptMetadata(
                title,
                reason=f"directory of {size} bytes, expected 1 to {MAX_BITMAP_DIRECTORY_BYTES}",
            )
        return cls(bitmap_count=count, directory_size=size, directory_offset=offset)

    def encode(self) -> bytes:
        """The 24 bytes of the extension's data."""
        return _BITMAPS.pack(self.bitmap_count, 0, self.directory_size, self.directory_offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class CryptoExtension:
    """Where the LUKS header lies. `offset`: a host offset; `length`: bytes."""

    offset: int
    length: int

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Row 28, but for what needs the cluster size or the file."""
        title = _TITLES[ExtensionType.CRYPTO]
        if len(raw) != _CRYPTO.size:
            raise CorruptMetadata(title, reason=f"{len(raw)} bytes, expected {_CRYPTO.size}")
        offset, length = _CRYPTO.unpack(raw)
        if length > MAX_CRYPTO_HEADER_BYTES:
            limit = MAX_CRYPTO_HEADER_BYTES
            raise CorruptMetadata(title, reason=f"{length} bytes, expected at most {limit}")
        return cls(offset=offset, length=length)

    def encode(self) -> bytes:
        """The 16 bytes of the extension's data."""
        return _CRYPTO.pack(self.offset, self.length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """One extension as it lies in the file: its type and its data, without padding."""

    type: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Extensions:
    """The decoded extensions. `unknown`: all others, in file order and byte for byte.

    feature_names: the image's own table by (kind, bit); empty where it has none. dirty_tables and
    runs: our record and our map, which hold only while their autoclear bits are set. identity: of
    the image and its backing file, ours as well."""

    backing_format: str | None = None
    data_file: str | None = None
    feature_names: FeatureNames = field(default_factory=dict)
    bitmaps: BitmapsExtension | None = None
    crypto: CryptoExtension | None = None
    dirty_tables: DirtyTables | None = None
    runs: ContiguousRuns | None = None
    identity: Identity | None = None
    unknown: tuple[Extension, ...] = ()


def decode_extensions(raw: bytes, *, start: int, stop: int) -> Extensions:
    """Extensions from byte `start` to an end marker, or to `stop` (rows 22-24 and 26-30).

    raw: the first bytes of the file; what lies between its end and `stop` counts as zeros.
    Raises CorruptMetadata, and UnsupportedFeature for an unknown backing format."""
    known: dict[int, bytes] = {}
    unknown = []
    record: DirtyTables | None = None
    runs: ContiguousRuns | None = None
    identity: Identity | None = None
    for offset, item in _iter_extensions(raw, start=start, stop=stop):
        if item.type == DIRTY_TABLES_TYPE and record is None:
            record = DirtyTables.decode(item.data, host_offset=offset + _HEAD.size)
            if record is None:
                unknown.append(item)
        elif item.type == RUNS_TYPE and runs is None:
            runs = ContiguousRuns.decode(item.data)
            if runs is None:
                unknown.append(item)
        elif item.type == IDENTITY_TYPE and identity is None:
            identity = Identity.decode(item.data)
            if identity is None:
                unknown.append(item)
        elif item.type not in _TITLES:
            unknown.append(item)
        elif item.type in known:
            title = _TITLES[ExtensionType(item.type)]
            raise CorruptMetadata(title, host_offset=offset, reason="a second one, expected one")
        else:
            known[item.type] = item.data
    bitmaps = known.get(ExtensionType.BITMAPS)
    crypto = known.get(ExtensionType.CRYPTO)
    return Extensions(
        backing_format=_decode_format(known.get(ExtensionType.BACKING_FORMAT)),
        data_file=_decode_data_file(known.get(ExtensionType.DATA_FILE)),
        feature_names=decode_feature_names(known.get(ExtensionType.FEATURE_NAMES, b"")),
        bitmaps=None if bitmaps is None else BitmapsExtension.decode(bitmaps),
        crypto=None if crypto is None else CryptoExtension.decode(crypto),
        dirty_tables=record,
        runs=runs,
        identity=identity,
        unknown=tuple(unknown),
    )


def _iter_extensions(raw: bytes, *, start: int, stop: int) -> Iterator[tuple[int, Extension]]:
    """(host offset, extension) up to the end marker. At most 256, each inside the region."""
    stop = min(stop, len(raw))
    offset, count = start, 0
    while offset < stop:
        if stop - offset < _HEAD.size:
            # A rest too short for an end marker can only be padding.
            if any(raw[offset:stop]):
                reason = f"{stop - offset} bytes left, expected {_HEAD.size}"
                raise CorruptMetadata("header extension", host_offset=offset, reason=reason)
            return
        kind, length = _HEAD.unpack_from(raw, offset)
        if kind == ExtensionType.END:
            return
        begin = offset + _HEAD.size
        if length > stop - begin:
            title = f"header extension {kind:#010x}"
            reason = f"{length} bytes, expected at most the {stop - begin} that are left"
            raise CorruptMetadata(title, host_offset=offset, reason=reason)
        count += 1
        if count > MAX_EXTENSIONS:
            reason = f"more than {MAX_EXTENSIONS} of them"
            raise CorruptMetadata("header extensions", host_offset=offset, reason=reason)
        yield offset, Extension(type=kind, data=bytes(raw[begin : begin + length]))
        offset = begin + align_up(length, 8)


def decode_name(raw: bytes, *, structure: str, limit: int, host_offset: int | None = None) -> str:
    """A file name inside an image: any bytes but NUL and control characters, at most `limit`.

    Bytes that are not UTF-8 become lone surrogates and come back unchanged from `encode_name`."""
    if len(raw) > limit:
        reason = f"name of {len(raw)} bytes, expected at most {limit}"
        raise CorruptMetadata(structure, host_offset=host_offset, reason=reason)
    for index, byte in enumerate(raw):
        if byte < 0x20 or byte == 0x7F:
            reason = f"byte {byte:#04x} at {index} of the name, expected no control characters"
            raise CorruptMetadata(structure, host_offset=host_offset, reason=reason)
    return raw.decode("utf-8", "surrogateescape")


def encode_name(name: str, *, what: str, limit: int) -> bytes:
    """The bytes of a file name for a header. Raises RequestError that names `what`."""
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise RequestError(f"{what} {name!r} cannot be written as UTF-8") from None
    if len(raw) > limit:
        raise RequestError(f"{what} of {len(raw)} bytes is longer than {limit}")
    if any(byte < 0x20 or byte == 0x7F for byte in raw):
        raise RequestError(f"{what} {name!r} has control characters")
    return raw


def _decode_format(raw: bytes | None) -> str | None:
    if raw is None:
        return None
    title = _TITLES[ExtensionType.BACKING_FORMAT]
    name = decode_name(raw, structure=title, limit=MAX_FORMAT_NAME)
    if name not in KNOWN_FORMATS:
        raise UnsupportedFeature(title, reason=f"{ascii(name)} is not the name of a known format")
    return name


def _decode_data_file(raw: bytes | None) -> str | None:
    title = _TITLES[ExtensionType.DATA_FILE]
    return None if raw is None else decode_name(raw, structure=title, limit=MAX_DATA_FILE_NAME)


def decode_feature_names(raw: bytes) -> FeatureNames:
    """Names by (kind, bit); records of an unknown kind or bit are left out. Row 27."""
    if len(raw) % _FEATURE.size:
        title = _TITLES[ExtensionType.FEATURE_NAMES]
        reason = f"{len(raw)} bytes, expected a multiple of {_FEATURE.size}"
        raise CorruptMetadata(title, reason=reason)
    kinds = {kind.value: kind for kind in FeatureKind}
    names: dict[tuple[FeatureKind, int], str] = {}
    for kind, bit, name in _FEATURE.iter_unpack(raw):
        if kind in kinds and bit < 64:
            text = name.split(b"\0", 1)[0].decode("utf-8", "replace")
            names.setdefault((kinds[kind], bit), text)
    return names


def encode_feature_names(names: FeatureNames = FEATURE_NAMES) -> bytes:
    """The records of a feature name table, 48 bytes each."""
    records = [_FEATURE.pack(kind.value, bit, name.encode()) for (kind, bit), name in names.items()]
    return b"".join(records)


def encode_first_cluster(header: Header, extensions: Extensions, backing_name: str | None) -> bytes:
    """The whole first cluster: header, extensions, end marker, backing name, zeros.

    Ordered as qemu orders it; a version 3 header grows to at least 112 bytes. The header's
    `header_length` and backing fields are set here, whatever they were. Raises RequestError where
    the cluster has no room for it all."""
    cluster_size = header.cluster_size
    name = b""
    if backing_name is not None:
        name = encode_name(backing_name, what="backing file name", limit=MAX_BACKING_NAME)
    header = _grown(header)
    tail = b"".join(
        _encode_extension(item.type, item.data) for item in _ordered(header, extensions)
    )
    tail += _HEAD.pack(ExtensionType.END, 0)
    offset = header.header_length + len(tail)
    if offset + len(name) > cluster_size:
        raise RequestError(
            f"the header needs {offset + len(name)} bytes with its extensions and names, "
            f"but a cluster has {cluster_size}"
        )
    header = replace(header, backing_file_offset=offset if name else 0, backing_file_size=len(name))
    return (header.encode() + tail + name).ljust(cluster_size, b"\0")


def _grown(header: Header) -> Header:
    """The same header at the length in which it is written."""
    if header.version == 2:
        return replace(header, header_length=V2_HEADER_LENGTH, unknown=b"")
    unknown = header.unknown or bytes(V3_HEADER_LENGTH - _V3_FIXED)
    return replace(header, header_length=_V3_FIXED + len(unknown), unknown=unknown)


def _ordered(header: Header, extensions: Extensions) -> Iterator[Extension]:
    if extensions.backing_format is not None:
        raw = encode_name(
            extensions.backing_format, what="backing format name", limit=MAX_FORMAT_NAME
        )
        yield Extension(type=ExtensionType.BACKING_FORMAT, data=raw)
    if extensions.data_file is not None:
        raw = encode_name(extensions.data_file, what="data file name", limit=MAX_DATA_FILE_NAME)
        yield Extension(type=ExtensionType.DATA_FILE, data=raw)
    if extensions.crypto is not None:
        yield Extension(type=ExtensionType.CRYPTO, data=extensions.crypto.encode())
    # Small clusters need the room for names.
    if header.version == 3 and header.cluster_size > 4096:
        names = {
            **FEATURE_NAMES,
            **({} if extensions.dirty_tables is None else _RECORD_NAME),
            **({} if extensions.runs is None else _RUNS_NAME),
        }
        yield Extension(type=ExtensionType.FEATURE_NAMES, data=encode_feature_names(names))
    if extensions.bitmaps is not None:
        yield Extension(type=ExtensionType.BITMAPS, data=extensions.bitmaps.encode())
    if extensions.dirty_tables is not None:
        yield Extension(type=DIRTY_TABLES_TYPE, data=extensions.dirty_tables.encode())
    if extensions.runs is not None:
        yield Extension(type=RUNS_TYPE, data=extensions.runs.encode())
    if extensions.identity is not None:
        yield Extension(type=IDENTITY_TYPE, data=extensions.identity.encode())
    yield from extensions.unknown


def _encode_extension(kind: int, data: bytes) -> bytes:
    return _HEAD.pack(kind, len(data)) + data.ljust(align_up(len(data), 8), b"\0")
