"""The qcow2 header: its fields, its feature bits, and the values a field may hold. Pure.

Source: the qcow2 specification, "Header". A version 2 header ends at byte 72: what follows are
header extensions, never feature bits. Numbers in comments are rows of docs/formats/qcow2.md."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum, IntFlag
from typing import Self

from qcowkit.codecs.qcow2.geometry import (
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS,
    Geometry,
)
from qcowkit.errors import CorruptMetadata, UnsupportedFeature
from qcowkit.units import INT64_MAX

MAGIC = b"QFI\xfb"
V2_HEADER_LENGTH = 72
MIN_V3_HEADER_LENGTH = 104
V3_HEADER_LENGTH = 112
MAX_BACKING_NAME = 1023
MAX_SNAPSHOTS = 65536
MAX_REFCOUNT_ORDER = 6
# In the version of a capsule, a copy without guest data: other readers stop at the version.
CAPSULE = 1 << 31
_INT_MAX = (1 << 31) - 1
_L1_ENTRY_SIZE = 8

# Both layouts are big-endian and without holes.
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")


class Incompatible(IntFlag):
    """Bits that a reader must know (header byte 72)."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(IntFlag):
    """Bits that may be ignored and are kept (header byte 80)."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntFlag):
    """Bits that a writer who does not know them must clear (header byte 88)."""

    BITMAPS = 1 << 0
    DATA_FILE_RAW = 1 << 1
    # Ours: the record of dirty L2 tables holds (codecs/qcow2/dirty_tables.py).
    DIRTY_TABLES = 1 << 62
    # Ours: the contiguous runs hold (codecs/qcow2/runs.py).
    CONTIGUOUS_RUNS = 1 << 61


class CryptMethod(IntEnum):
    """How guest clusters are encrypted (header byte 32)."""

    NONE = 0
    AES = 1
    LUKS = 2


class CompressionType(IntEnum):
    """What compressed clusters hold (header byte 104)."""

    ZLIB = 0
    ZSTD = 1


class FeatureKind(Enum):
    """The three sets of feature bits; the value is the kind byte of the feature name table."""

    INCOMPATIBLE = 0
    COMPATIBLE = 1
    AUTOCLEAR = 2


FeatureNames = Mapping[tuple[FeatureKind, int], str]

_KNOWN_INCOMPATIBLE = sum(Incompatible)
FIELD_OFFSETS = {
    "magic": 0,
    "version": 4,
    "backing_file_offset": 8,
    "backing_file_size": 16,
    "cluster_bits": 20,
    "size": 24,
    "crypt_method": 32,
    "l1_size": 36,
    "l1_table_offset": 40,
    "refcount_table_offset": 48,
    "refcount_table_clusters": 56,
    "nb_snapshots": 60,
    "snapshots_offset": 64,
    "incompatible_features": 72,
    "compatible_features": 80,
    "autoclear_features": 88,
    "refcount_order": 96,
    "header_length": 100,
    "compression_type": 104,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Every field of the header. Offsets and sizes in bytes, `*_count` and `*_entries` count.

    For version 2 the fields from `incompatible_features` on hold what that version implies.
    unknown: the bytes from 105 to header_length (padding, then fields of a later specification),
    kept verbatim. capsule: the file is a copy of an image without its guest data."""

    version: int = 3
    backing_file_offset: int = 0
    backing_file_size: int = 0
    cluster_bits: int = 16
    size: int = 0
    crypt_method: int = CryptMethod.NONE
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = V3_HEADER_LENGTH
    compression_type: int = CompressionType.ZLIB
    unknown: bytes = bytes(7)
    capsule: bool = False

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """The fields of a header, from the file's first bytes: the first cluster, or what there is.

        Judges only what decides where the fields and the extensions lie (rows 1-5); `check` judges
        the rest. Raises CorruptMetadata, and UnsupportedFeature for an unknown version."""
        version, capsule = _decode_version(raw)
        values = _V2.unpack_from(raw)
        fields: dict[str, int] = dict(zip(_V2_FIELDS, values[2:], strict=True))
        _check_cluster_bits(fields["cluster_bits"])
        if version == 2:
            length = V2_HEADER_LENGTH
            return cls(version=2, header_length=length, unknown=b"", capsule=capsule, **fields)
        fields |= zip(_V3_FIELDS, _V3.unpack_from(raw, _V2.size), strict=True)
        length = fields["header_length"]
        _check_header_length(length, cluster_size=1 << fields["cluster_bits"])
        if length > len(raw):
            raise _bad("header_length", f"{length}, but the file has {len(raw)} bytes")
        kind, unknown = 0, b""
        if length > MIN_V3_HEADER_LENGTH:
            kind, unknown = raw[MIN_V3_HEADER_LENGTH], raw[MIN_V3_HEADER_LENGTH + 1 : length]
        return cls(
            version=3, compression_type=kind, unknown=bytes(unknown), capsule=capsule, **fields
        )

    def encode(self) -> bytes:
        """The fixed part only: `header_length` bytes, without extensions and backing name."""
        values = [getattr(self, name) for name in _V2_FIELDS]
        raw = _V2.pack(MAGIC, self.version | (CAPSULE if self.capsule else 0), *values)
        if self.version == 2:
            return raw
        raw += _V3.pack(*(getattr(self, name) for name in _V3_FIELDS))
        if self.header_length > MIN_V3_HEADER_LENGTH:
            raw += bytes((self.compression_type,)) + self.unknown
        assert len(raw) == self.header_length, "header_length does not match the fields"
        return raw

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def geometry(self) -> Geometry:
        """The sizes that follow from the header."""
        return Geometry(
            cluster_bits=self.cluster_bits,
            refcount_order=self.refcount_order,
            extended_l2=bool(self.incompatible_features & Incompatible.EXTENDED_L2),
        )

    @property
    def l1_bytes(self) -> int:
        """Bytes of the active L1 table."""
        return self.l1_size * _L1_ENTRY_SIZE

    def check(self, feature_names: FeatureNames | None = None) -> None:
        """Judge every field on its own and against the others (rows 7-9, 12-18 and 25).

        feature_names: of the image's own table, for messages. Places and overlaps need the file
        and are judged by the engine. Raises CorruptMetadata and UnsupportedFeature."""
        # Feature bits first: an unknown one may give every other field a new meaning.
        _check_incompatible(self.incompatible_features, feature_names or {})
        _check_widths(self)
        _check_compression(self)
        _check_data_file(self)
        _check_backing(self)
        _check_size(self)
        _check_tables(self)


_V2_FIELDS = (
    "backing_file_offset",
    "backing_file_size",
    "cluster_bits",
    "size",
    "crypt_method",
    "l1_size",
    "l1_table_offset",
    "refcount_table_offset",
    "refcount_table_clusters",
    "nb_snapshots",
    "snapshots_offset",
)
_V3_FIELDS = (
    "incompatible_features",
    "compatible_features",
    "autoclear_features",
    "refcount_order",
    "header_length",
)


def new_header(
    geometry: Geometry,
    *,
    size: int,
    version: int = 3,
    compression_type: int = CompressionType.ZLIB,
    crypt_method: int = CryptMethod.NONE,
    lazy_refcounts: bool = False,
    data_file: bool = False,
    data_file_raw: bool = False,
) -> Header:
    """The header of a new image of `size` guest bytes; the places of the tables are still 0.

    Sets the feature bits that the options imply. Follow it with `dataclasses.replace`."""
    bits = Incompatible(0)
    if geometry.extended_l2:
        bits |= Incompatible.EXTENDED_L2
    if compression_type:
        bits |= Incompatible.COMPRESSION
    if data_file:
        bits |= Incompatible.DATA_FILE
    assert version == 3 or not (bits or lazy_refcounts or data_file_raw), "version 3 features"
    return Header(
        version=version,
        cluster_bits=geometry.cluster_bits,
        size=size,
        crypt_method=crypt_method,
        incompatible_features=int(bits),
        compatible_features=int(Compatible.LAZY_REFCOUNTS) if lazy_refcounts else 0,
        autoclear_features=int(Autoclear.DATA_FILE_RAW) if data_file_raw else 0,
        refcount_order=geometry.refcount_order,
        header_length=V3_HEADER_LENGTH if version == 3 else V2_HEADER_LENGTH,
        compression_type=compression_type,
        unknown=bytes(7) if version == 3 else b"",
    )


def feature_label(names: FeatureNames, kind: FeatureKind, bit: int) -> str:
    """A feature in words: its name from the image's own table where there is one."""
    name = names.get((kind, bit))
    label = f"{kind.name.lower()} feature bit {bit}"
    # The name comes from the image: quoted, so that control characters cannot reach a terminal.
    return f"{label} ({ascii(name)})" if name else label


def _bad(field: str, reason: str) -> CorruptMetadata:
    return CorruptMetadata(f"header field {field}", reason=reason, host_offset=FIELD_OFFSETS[field])


def _decode_version(raw: bytes) -> tuple[int, bool]:
    """The version, and whether the file is a capsule."""
    if raw[:4] != MAGIC:
        if len(raw) < V2_HEADER_LENGTH:
            raise CorruptMetadata("header", reason=f"{len(raw)} bytes, expected at least 72")
        raise _bad("magic", f"{raw[:4].hex()}, expected {MAGIC.hex()}")
    if len(raw) < V2_HEADER_LENGTH:
        raise CorruptMetadata("header", reason=f"{len(raw)} bytes, expected at least 72")
    version = int.from_bytes(raw[4:8], "big")
    capsule = bool(version & CAPSULE) and version & ~CAPSULE in (2, 3)
    version = version & ~CAPSULE if capsule else version
    if version not in (2, 3):
        raise UnsupportedFeature(f"qcow2 version {version}", reason="expected version 2 or 3")
    if version == 3 and len(raw) < MIN_V3_HEADER_LENGTH:
        raise CorruptMetadata("header", reason=f"{len(raw)} bytes, expected at least 104")
    return version, capsule


def _check_cluster_bits(bits: int) -> None:
    if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        raise _bad("cluster_bits", f"{bits}, expected {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}")


def _check_header_length(length: int, *, cluster_size: int) -> None:
    if not MIN_V3_HEADER_LENGTH <= length <= cluster_size:
        raise _bad("header_length", f"{length}, expected 104 to the cluster size {cluster_size}")
    if length % 8:
        raise _bad("header_length", f"{length} is not a multiple of 8")


def _check_incompatible(features: int, names: FeatureNames) -> None:
    unknown = features & ~_KNOWN_INCOMPATIBLE
    if unknown:
        bits = [bit for bit in range(64) if unknown >> bit & 1]
        labels = [feature_label(names, FeatureKind.INCOMPATIBLE, bit) for bit in bits]
        raise UnsupportedFeature(
            ", ".join(labels), bit=bits[0], reason="the image needs it, and it is not known here"
        )


def _check_widths(header: Header) -> None:
    if header.refcount_order > MAX_REFCOUNT_ORDER:
        raise _bad("refcount_order", f"{header.refcount_order}, expected 0 to 6")
    if header.crypt_method not in tuple(CryptMethod):
        raise UnsupportedFeature(
            f"encryption method {header.crypt_method}", reason="expected 0 (none), 1 or 2"
        )
    extended = header.incompatible_features & Incompatible.EXTENDED_L2
    if extended and header.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        raise _bad(
            "cluster_bits",
            f"{header.cluster_bits}, expected at least {MIN_EXTENDED_CLUSTER_BITS} "
            "with extended L2 entries",
        )


def _check_compression(header: Header) -> None:
    kind, flagged = header.compression_type, header.incompatible_features & Incompatible.COMPRESSION
    if kind not in tuple(CompressionType):
        raise UnsupportedFeature(f"compression type {kind}", reason="expected 0 (zlib) or 1 (zstd)")
    if flagged and kind == CompressionType.ZLIB:
        raise _bad("compression_type", "0 (zlib), expected another while its feature bit is set")
    if kind != CompressionType.ZLIB and not flagged:
        raise _bad("compression_type", f"{kind}, expected 0 while its feature bit is clear")


def _check_data_file(header: Header) -> None:
    external = header.incompatible_features & Incompatible.DATA_FILE
    raw = header.autoclear_features & Autoclear.DATA_FILE_RAW
    if raw and not external:
        raise _bad(
            "autoclear_features",
            "the raw external data bit is set, expected clear without an external data file",
        )
    if external and header.nb_snapshots:
        raise _bad("nb_snapshots", f"{header.nb_snapshots}, expected 0 with an external data file")
    if raw and header.backing_file_offset:
        raise _bad(
            "backing_file_offset",
            f"{header.backing_file_offset:#x}, expected 0 with a raw external data file",
        )


def _check_backing(header: Header) -> None:
    offset, size, cluster = (
        header.backing_file_offset,
        header.backing_file_size,
        header.cluster_size,
    )
    if not offset:
        return
    if offset > cluster:
        raise _bad("backing_file_offset", f"{offset:#x} is above the cluster size {cluster:#x}")
    if offset < header.header_length:
        raise _bad(
            "backing_file_offset",
            f"{offset:#x} lies inside the header of {header.header_length} bytes",
        )
    limit = min(MAX_BACKING_NAME, cluster - offset)
    if size > limit:
        raise _bad("backing_file_size", f"{size}, expected at most {limit}")


def _check_size(header: Header) -> None:
    if header.size > INT64_MAX:
        raise _bad("size", f"{header.size}, expected at most {INT64_MAX}")
    needed = header.geometry.l1_entries(header.size)
    if needed > _INT_MAX:
        raise _bad("size", f"{header.size} needs {needed} L1 entries, expected at most {_INT_MAX}")
    if needed > header.l1_size:
        raise _bad(
            "l1_size", f"{header.l1_size} entries, expected {needed} for a disk of {header.size}"
        )


def _check_tables(header: Header) -> None:
    entries = MAX_L1_BYTES // _L1_ENTRY_SIZE
    if header.l1_size > entries:
        raise _bad("l1_size", f"{header.l1_size} entries, expected at most {entries}")
    clusters = MAX_REFCOUNT_TABLE_BYTES >> header.cluster_bits
    if header.refcount_table_clusters > clusters:
        found = header.refcount_table_clusters
        raise _bad("refcount_table_clusters", f"{found}, expected at most {clusters}")
    if header.nb_snapshots > MAX_SNAPSHOTS:
        raise _bad("nb_snapshots", f"{header.nb_snapshots}, expected at most {MAX_SNAPSHOTS}")
    _check_place(header, "l1_table_offset", header.l1_table_offset, header.l1_bytes)
    _check_place(
        header,
        "refcount_table_offset",
        header.refcount_table_offset,
        header.refcount_table_clusters << header.cluster_bits,
    )
    _check_place(header, "snapshots_offset", header.snapshots_offset, header.nb_snapshots)


def _check_place(header: Header, field: str, offset: int, length: int) -> None:
    """Aligned, and no wrap past 2**63. Of empty tables too: their place is 0, if anything."""
    if offset % header.cluster_size:
        raise _bad(
            field, f"{offset:#x} is not a multiple of the cluster size {header.cluster_size:#x}"
        )
    if offset + length > INT64_MAX:
        raise _bad(field, f"{offset:#x} with {length} bytes ends above 2**63 - 1")
