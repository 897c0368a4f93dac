"""What an amendment of a qcow2 image asks for: the header afterwards, and what is refused. Pure.

Source: qemu's amend, which cannot change the geometry."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qcowkit.codecs.qcow2.compression import COMPRESSION_TYPES
from qcowkit.codecs.qcow2.geometry import (
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS,
)
from qcowkit.codecs.qcow2.header import (
    MAX_REFCOUNT_ORDER,
    Autoclear,
    Compatible,
    CompressionType,
    Header,
    Incompatible,
)
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.errors import RequestError

COMPATS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_V2_REFCOUNT_ORDER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Amendment:
    """Options as they shall be, named as those of `create`; None for what stays.

    compat: 0.10 or 1.1. cluster_size: bytes."""

    compat: str | None = None
    refcount_bits: int | None = None
    lazy_refcounts: bool | None = None
    data_file: str | None = None
    data_file_raw: bool | None = None
    extended_l2: bool | None = None
    compression_type: str | None = None
    cluster_size: int | None = None

    @property
    def changes_geometry(self) -> bool:
        """Whether guest data may have to be read, and with them the backing file."""
        return self.extended_l2 is not None or self.cluster_size is not None

    def __post_init__(self) -> None:
        bits, size = self.refcount_bits, self.cluster_size
        if self.compat is not None and self.compat not in COMPATS:
            raise RequestError(f"compat is {self.compat!r}, expected 0.10 or 1.1")
        if bits is not None and bits not in [1 << order for order in range(MAX_REFCOUNT_ORDER + 1)]:
            raise RequestError(f"refcount_bits is {bits}, expected a power of two, at most 64")
        sizes = [1 << bits for bits in range(MIN_CLUSTER_BITS, MAX_CLUSTER_BITS + 1)]
        if size is not None and size not in sizes:
            raise RequestError(
                f"cluster_size is {size}, expected a power of two from {sizes[0]} to {sizes[-1]}"
            )
        kind = self.compression_type
        if kind is not None and kind not in COMPRESSION_TYPES:
            expected = " or ".join(COMPRESSION_TYPES)
            raise RequestError(f"compression_type is {kind!r}, expected {expected}")
        if self.data_file == "":
            raise RequestError("data_file is empty, expected a file name")


def plan_header(metadata: Qcow2Metadata, amendment: Amendment) -> Header:
    """The header as it is to be, but for places, as one of version 3 until the last step.

    Raises RequestError that names what stands against it."""
    old = metadata.header
    incompatible, compatible = old.incompatible_features, old.compatible_features
    autoclear, order, bits = old.autoclear_features, old.refcount_order, old.cluster_bits
    kind = old.compression_type
    if amendment.refcount_bits is not None:
        order = amendment.refcount_bits.bit_length() - 1
    if amendment.cluster_size is not None:
        bits = amendment.cluster_size.bit_length() - 1
    if amendment.compression_type is not None:
        kind = CompressionType[amendment.compression_type.upper()]
        incompatible = _set(incompatible, Incompatible.COMPRESSION, on=bool(kind))
    if amendment.extended_l2 is not None:
        incompatible = _set(incompatible, Incompatible.EXTENDED_L2, on=amendment.extended_l2)
    if amendment.lazy_refcounts is not None:
        compatible = _set(compatible, Compatible.LAZY_REFCOUNTS, on=amendment.lazy_refcounts)
    if amendment.data_file_raw is False:
        autoclear &= ~Autoclear.DATA_FILE_RAW
    target = replace(
        old,
        incompatible_features=incompatible,
        compatible_features=compatible,
        autoclear_features=int(autoclear),
        refcount_order=order,
        cluster_bits=bits,
        compression_type=kind,
    )
    _check(metadata, amendment, target)
    return target


def _set(bits: int, bit: int, *, on: bool) -> int:
    return int(bits & ~bit | (bit if on else 0))


def _check(metadata: Qcow2Metadata, amendment: Amendment, target: Header) -> None:
    if amendment.data_file is not None and not metadata.data_file:
        raise RequestError(
            "data_file names another file for data that lie outside already, and those of this "
            "image lie inside"
        )
    if amendment.data_file_raw and not metadata.data_file_raw:
        raise RequestError(
            "data_file_raw=on is possible when an image is created: what its data file holds now "
            "need not be the disk"
        )
    if target.geometry.has_subclusters and target.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        raise RequestError(
            f"extended_l2=on needs clusters of {1 << MIN_EXTENDED_CLUSTER_BITS} bytes at least, "
            f"and they have {target.cluster_size}"
        )
    if target.cluster_bits != metadata.header.cluster_bits:
        _check_cluster_size(metadata, target)
    if wanted_version(metadata, amendment) < 3:
        _check_version_2(metadata, target, amendment)


def _check_cluster_size(metadata: Qcow2Metadata, target: Header) -> None:
    if metadata.bitmaps:
        raise RequestError(
            "the image has persistent bitmaps, which are made of clusters: remove them first"
        )
    crypto = metadata.extensions.crypto
    if crypto is not None and crypto.offset % target.cluster_size:
        raise RequestError(
            f"the LUKS header at host offset {crypto.offset:#x} is not at a multiple of the new "
            f"cluster size {target.cluster_size}"
        )


def wanted_version(metadata: Qcow2Metadata, amendment: Amendment) -> int:
    """2 or 3, as the image will be."""
    if amendment.compat is None:
        return metadata.header.version
    return COMPATS[amendment.compat]


def _check_version_2(metadata: Qcow2Metadata, target: Header, amendment: Amendment) -> None:
    """What version 2 cannot say."""
    against = []
    if target.refcount_order != _V2_REFCOUNT_ORDER:
        against.append(f"refcount_bits={target.geometry.refcount_bits}, which has to be 16")
    if metadata.data_file:
        against.append("an external data file")
    if target.geometry.has_subclusters:
        against.append("extended_l2=on")
    if amendment.compression_type == "zstd":
        against.append("compression_type=zstd")
    if amendment.lazy_refcounts:
        against.append("lazy_refcounts=on")
    if metadata.bitmaps:
        against.append("persistent bitmaps")
    for one in metadata.snapshots:
        name = f"snapshot {one.id} ({one.name!r})"
        if one.disk_size != metadata.virtual_size:
            against.append(f"{name}, whose disk has {one.disk_size} bytes")
        if one.vm_state_size >> 32:
            against.append(f"{name}, whose machine state has {one.vm_state_size} bytes")
    if against:
        raise RequestError(f"compat=0.10 excludes {', '.join(against)}")


def without_version_3(header: Header) -> Header:
    """The header without what version 2 cannot say and nothing depends on."""
    return replace(
        header,
        incompatible_features=int(header.incompatible_features & ~Incompatible.COMPRESSION),
        compatible_features=0,
        autoclear_features=0,
        compression_type=int(CompressionType.ZLIB),
    )


def with_places(target: Header, found: Header) -> Header:
    """The target with sizes and places as they are now."""
    return replace(
        target,
        backing_file_offset=found.backing_file_offset,
        backing_file_size=found.backing_file_size,
        size=found.size,
        l1_size=found.l1_size,
        l1_table_offset=found.l1_table_offset,
        refcount_table_offset=found.refcount_table_offset,
        refcount_table_clusters=found.refcount_table_clusters,
        nb_snapshots=found.nb_snapshots,
        snapshots_offset=found.snapshots_offset,
    )


def describe(metadata: Qcow2Metadata, target: Header) -> list[str]:
    """Options that differ, as `key=value`."""
    old = metadata.header

    def lazy(header: Header) -> bool:
        return bool(header.compatible_features & Compatible.LAZY_REFCOUNTS)

    def raw(header: Header) -> bool:
        return bool(header.autoclear_features & Autoclear.DATA_FILE_RAW)

    pairs = (
        ("refcount_bits", old.geometry.refcount_bits, target.geometry.refcount_bits),
        ("cluster_size", old.cluster_size, target.cluster_size),
        ("extended_l2", old.geometry.extended_l2, target.geometry.extended_l2),
        ("compression_type", old.compression_type, target.compression_type),
        ("lazy_refcounts", lazy(old), lazy(target)),
        ("data_file_raw", raw(old), raw(target)),
    )
    return [f"{key}={_say(key, after)}" for key, before, after in pairs if before != after]


def _say(key: str, value: int | bool) -> str:
    if key == "compression_type":
        return CompressionType(value).name.lower()
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
