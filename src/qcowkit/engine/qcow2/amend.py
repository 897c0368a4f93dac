"""The options of a qcow2 image changed in place: what is refused, and the steps of the rest.

Each step is wholly there after a crash or not at all, and leaves a sound image with the same disk:
an interrupted amendment can be begun again. Order: whatever needs version 3 comes after the upgrade
and before the downgrade. Source: qemu's amend, which cannot change the geometry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from qcowkit.codecs.qcow2.compression import COMPRESSION_TYPES
from qcowkit.codecs.qcow2.extensions import decode_extensions
from qcowkit.codecs.qcow2.geometry import (
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS,
)
from qcowkit.codecs.qcow2.header import (
    MAX_REFCOUNT_ORDER,
    V2_HEADER_LENGTH,
    V3_HEADER_LENGTH,
    Autoclear,
    Compatible,
    CompressionType,
    Header,
    Incompatible,
)
from qcowkit.codecs.qcow2.snapshots import encode_snapshots
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.executor import ProgressReport
from qcowkit.engine.findings import Effort
from qcowkit.engine.qcow2.cutover import Cutover
from qcowkit.engine.qcow2.first_cluster import rewrite_first_cluster
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.engine.qcow2.reform import Change, Reform, Tree
from qcowkit.engine.qcow2.renewed_data import GuestReader
from qcowkit.engine.qcow2.transform import Transform
from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.storage.protocol import Storage

COMPATS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
# A conversion walks over everything several times.
_FACTOR = 4
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Amender:
    """Carries amendments out on an image that is sound, recovered and closed to everybody else.

    data: where guest clusters lie, `storage` itself mostly. barriers: of both. make_reader: how the
    guest sees the image by these metadata."""

    storage: Storage
    data: Storage
    barriers: Barriers
    make_reader: Callable[[Qcow2Metadata], GuestReader]
    progress: ProgressReport | None = None

    def run(self, amendment: Amendment, *, resize: Callable[[], None] | None = None) -> list[str]:
        """What was changed, as `key=value`. resize: changes the size at its place in the order.

        Raises RequestError before anything is written; CorruptMetadata, OperationError and
        StorageError, after which the image is as some of the steps have left it."""
        metadata = load_qcow2_metadata(self.storage)
        plan_header(metadata, amendment)
        version, done = wanted_version(metadata, amendment), list[str]()
        if metadata.header.version < version:
            metadata = self._upgrade(metadata)
            done.append("compat=1.1")
        done += self._change(metadata, amendment, downgrades=version < metadata.header.version)
        if resize is not None:
            resize()
        metadata = load_qcow2_metadata(self.storage)
        if metadata.header.version > version:
            self._downgrade(metadata)
            done.append("compat=0.10")
        return done

    def _change(
        self, metadata: Qcow2Metadata, amendment: Amendment, *, downgrades: bool
    ) -> list[str]:
        """Everything but version and size."""
        target = plan_header(metadata, amendment)
        if target.compression_type and metadata.header.header_length < V3_HEADER_LENGTH:
            # The field is not there yet.
            metadata = rewrite_first_cluster(
                self.storage, metadata, barriers=self.barriers, header=metadata.header
            )
            target = plan_header(metadata, amendment)
        if downgrades:
            target = _without_version_3(target)
        done = _describe(metadata, target)
        metadata = self._change_tables(metadata, target, amendment, downgrades=downgrades)
        if metadata.header != _placed(target, metadata.header):
            self._switch(metadata, _placed(target, metadata.header))
        if amendment.data_file not in (None, metadata.extensions.data_file):
            metadata = load_qcow2_metadata(self.storage)
            extensions = replace(metadata.extensions, data_file=amendment.data_file)
            rewrite_first_cluster(
                self.storage, metadata, barriers=self.barriers, extensions=extensions
            )
            done.append(f"data_file={amendment.data_file}")
        return done

    def _switch(self, metadata: Qcow2Metadata, header: Header) -> None:
        """Feature bits alone."""
        with Cutover(self.storage, metadata.header, barriers=self.barriers) as cutover:
            cutover.switch(header)

    def _effort(self) -> Effort:
        return Effort(stored=self.storage.allocated(), factor=_FACTOR, progress=self.progress)

    # Tables and refcounts

    def _change_tables(
        self,
        metadata: Qcow2Metadata,
        target: Header,
        amendment: Amendment,
        *,
        downgrades: bool,
    ) -> Qcow2Metadata:
        old, new = metadata.header, target
        moves = (old.cluster_bits, old.geometry.extended_l2) != (
            new.cluster_bits,
            new.geometry.extended_l2,
        )
        if new.cluster_bits != old.cluster_bits:
            self._check_first_cluster(metadata, target)
        if moves or new.compression_type != old.compression_type or downgrades:
            transform = Transform(
                self.storage,
                metadata,
                target,
                data=self.data,
                read=self.make_reader(metadata),
                barriers=self.barriers,
                effort=self._effort(),
                zero_clusters=not downgrades and old.version >= 3,
            )
            zeros, packed = transform.find_kinds()
            repacks = packed and new.compression_type != old.compression_type
            if repacks and amendment.compression_type is None:
                raise RequestError(
                    "compat=0.10 excludes compression_type=zstd, and the image has such clusters: "
                    "amend compression_type=zlib too"
                )
            if moves or repacks or (downgrades and zeros):
                transform.run()
                return load_qcow2_metadata(self.storage)
        if new.refcount_order != old.refcount_order:
            self._reform(metadata, target)
            return load_qcow2_metadata(self.storage)
        return metadata

    def _reform(self, metadata: Qcow2Metadata, target: Header) -> None:
        """Snapshot table and refcounts anew; everything else stays where it is."""
        reform = Reform(self.storage, metadata, barriers=self.barriers, effort=self._effort())
        reform.run(
            Change(
                active=Tree(tables=np.zeros(0, dtype=np.int64)),
                size=metadata.header.size,
                snapshots=metadata.snapshots,
                in_place=True,
                target=target,
            )
        )
        size = metadata.cluster_size
        for first, count in reform.freed:
            self.storage.discard(offset=first * size, length=count * size)

    def _check_first_cluster(self, metadata: Qcow2Metadata, target: Header) -> None:
        """Whether a first cluster of the new size reads as the old one does."""
        header, size = metadata.header, target.cluster_size
        raw = self.storage.pread(size, offset=0)
        stop = min(header.backing_file_offset or size, size)
        fits = header.backing_file_offset + header.backing_file_size <= size
        try:
            found = decode_extensions(raw, start=header.header_length, stop=stop)
        except CorruptMetadata:
            fits = False
        if not fits or found != metadata.extensions:
            raise RequestError(
                f"the header with its extensions and names has no room in clusters of {size} bytes"
            )

    # Versions

    def _upgrade(self, metadata: Qcow2Metadata) -> Qcow2Metadata:
        """Version 3 wants more of a snapshot than version 2 may have written."""
        table = encode_snapshots(metadata.snapshots)
        raw = self.storage.pread(
            metadata.snapshot_table_bytes, offset=metadata.header.snapshots_offset
        )
        if table != raw.ljust(len(table), b"\0"):
            self._reform(metadata, metadata.header)
            metadata = load_qcow2_metadata(self.storage)
        header = replace(
            metadata.header,
            version=3,
            header_length=V3_HEADER_LENGTH,
            unknown=bytes(7),
        )
        return rewrite_first_cluster(self.storage, metadata, barriers=self.barriers, header=header)

    def _downgrade(self, metadata: Qcow2Metadata) -> None:
        header = replace(
            _without_version_3(metadata.header),
            version=2,
            header_length=V2_HEADER_LENGTH,
            unknown=b"",
        )
        extensions = replace(metadata.extensions, bitmaps=None, dirty_tables=None, runs=None)
        rewrite_first_cluster(
            self.storage, metadata, barriers=self.barriers, header=header, extensions=extensions
        )


def _without_version_3(header: Header) -> Header:
    """The header without what version 2 cannot say and nothing depends on."""
    return replace(
        header,
        incompatible_features=int(header.incompatible_features & ~Incompatible.COMPRESSION),
        compatible_features=0,
        autoclear_features=0,
        compression_type=int(CompressionType.ZLIB),
    )


def _placed(target: Header, found: Header) -> Header:
    """The target with sizes and places as they are now."""
    return replace(
        target,
        size=found.size,
        l1_size=found.l1_size,
        l1_table_offset=found.l1_table_offset,
        refcount_table_offset=found.refcount_table_offset,
        refcount_table_clusters=found.refcount_table_clusters,
        nb_snapshots=found.nb_snapshots,
        snapshots_offset=found.snapshots_offset,
    )


def _describe(metadata: Qcow2Metadata, target: Header) -> list[str]:
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
