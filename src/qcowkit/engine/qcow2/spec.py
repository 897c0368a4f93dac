"""What a new qcow2 image shall be: the options of create and convert, checked as a whole. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from qcowkit.codecs.qcow2.compression import COMPRESSION_TYPES, ZLIB, ZSTD
from qcowkit.codecs.qcow2.dirty_tables import plan_dirty_tables
from qcowkit.codecs.qcow2.extensions import CryptoExtension, Extensions, encode_first_cluster
from qcowkit.codecs.qcow2.geometry import MAX_L1_BYTES, MIN_EXTENDED_CLUSTER_BITS, Geometry
from qcowkit.codecs.qcow2.header import CompressionType, CryptMethod, Header, new_header
from qcowkit.codecs.qcow2.identity import Identity
from qcowkit.codecs.qcow2.luks_params import Encryption
from qcowkit.codecs.qcow2.runs import check_runs_fit
from qcowkit.errors import RequestError, UnsupportedFeature
from qcowkit.units import align_up

PREALLOCATIONS: Final = ("off", "metadata", "falloc", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2Spec:
    """A new image. size: guest bytes. level: of the compressor, None for its default."""

    size: int
    geometry: Geometry = field(default_factory=lambda: Geometry(cluster_bits=16))
    version: int = 3
    compression_type: str = ZLIB
    compression_level: int | None = None
    lazy_refcounts: bool = False
    preallocation: str = "off"
    backing_name: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    data_file_raw: bool = False
    encryption: Encryption | None = None
    identity: Identity | None = None
    contiguous_runs: bool = False

    def __post_init__(self) -> None:
        """Raise RequestError for what the format does not allow, before any file is touched."""
        _check_choices(self)
        _check_version(self)
        _check_size(self)
        _check_preallocation(self)
        _check_data_file(self)
        _check_encryption(self)
        if self.contiguous_runs:
            check_runs_fit(version=self.version, cluster_size=self.geometry.cluster_size)

    @property
    def preallocated(self) -> bool:
        """Every guest cluster gets a host cluster. A raw data file needs that as well."""
        return self.preallocation != "off" or self.data_file_raw

    @property
    def keeps_zeros(self) -> bool:
        """Zeros must be said: a backing file would show through."""
        return self.backing_name is not None

    def header(self) -> Header:
        """The header without its table offsets."""
        return new_header(
            self.geometry,
            size=self.size,
            version=self.version,
            compression_type=CompressionType.ZSTD
            if self.compression_type == ZSTD
            else CompressionType.ZLIB,
            crypt_method=_crypt_method(self.encryption),
            lazy_refcounts=self.lazy_refcounts,
            data_file=self.data_file is not None,
            data_file_raw=self.data_file_raw,
        )

    @property
    def crypto_bytes(self) -> int:
        """Bytes of the LUKS header with its key material, in whole clusters."""
        length = 0 if self.encryption is None else self.encryption.header_bytes
        return align_up(length, self.geometry.cluster_size)

    def extensions(self, *, crypto: CryptoExtension | None = None) -> Extensions:
        """The header extensions of the new image. crypto: where its LUKS header is."""
        plain = Extensions(
            backing_format=self.backing_format,
            data_file=self.data_file,
            crypto=crypto,
            identity=self.identity,
        )
        if not self.lazy_refcounts:
            return plain
        geometry = self.geometry
        record = plan_dirty_tables(
            cluster_size=geometry.cluster_size, l1_entries=geometry.l1_entries(self.size)
        )
        recorded = replace(plain, dirty_tables=record)
        try:
            encode_first_cluster(self.header(), recorded, self.backing_name)
        except RequestError:
            # Names go first: the image does without a record.
            return plain
        return recorded


def _check_choices(spec: Qcow2Spec) -> None:
    if spec.compression_type not in COMPRESSION_TYPES:
        raise RequestError(f"compression_type {spec.compression_type!r} is not one of zlib, zstd")
    if spec.preallocation not in PREALLOCATIONS:
        raise RequestError(
            f"preallocation {spec.preallocation!r} is not one of {', '.join(PREALLOCATIONS)}"
        )
    geometry = spec.geometry
    if geometry.extended_l2 and geometry.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        raise RequestError(
            f"extended_l2 needs a cluster_size of at least {1 << MIN_EXTENDED_CLUSTER_BITS}, "
            f"found {geometry.cluster_size}"
        )


def _check_version(spec: Qcow2Spec) -> None:
    if spec.version >= 3:
        return
    needs = {
        "extended_l2": spec.geometry.extended_l2,
        "lazy_refcounts": spec.lazy_refcounts,
        "data_file": spec.data_file is not None,
        "contiguous_runs": spec.contiguous_runs,
        "compression_type=zstd": spec.compression_type == ZSTD,
        f"refcount_bits={spec.geometry.refcount_bits}": spec.geometry.refcount_order != 4,
    }
    for name, wanted in needs.items():
        if wanted:
            raise RequestError(f"{name} needs compat=1.1, found compat=0.10")


def _check_size(spec: Qcow2Spec) -> None:
    geometry = spec.geometry
    if spec.size % 512:
        raise RequestError(f"size {spec.size} is not a multiple of 512")
    table = geometry.l1_entries(spec.size) * 8
    if table > MAX_L1_BYTES:
        most = MAX_L1_BYTES // 8 * geometry.l2_coverage
        raise RequestError(
            f"size {spec.size} is above the limit of {most} bytes for "
            f"cluster_size={geometry.cluster_size}: choose larger clusters"
        )


def _check_preallocation(spec: Qcow2Spec) -> None:
    if spec.preallocation == "off" or spec.backing_name is None:
        return
    if not spec.geometry.extended_l2:
        raise RequestError(
            "preallocation with a backing file needs extended_l2=on: plain clusters would hide it"
        )


def _check_data_file(spec: Qcow2Spec) -> None:
    if spec.data_file is None:
        if spec.data_file_raw:
            raise RequestError("data_file_raw=on needs data_file")
        return
    if spec.data_file_raw and spec.backing_name is not None:
        raise RequestError("data_file_raw=on excludes a backing file")
    if spec.data_file_raw and spec.geometry.extended_l2 and spec.preallocation == "off":
        # Every subcluster of a raw data file is allocated; nothing else could be true.
        return


def _check_encryption(spec: Qcow2Spec) -> None:
    if spec.encryption is None:
        return
    if spec.data_file_raw:
        raise RequestError("data_file_raw=on excludes encryption: a raw disk is in clear")
    if spec.preallocation != "off" and spec.version < 3:
        # Its clusters would have to read as zeros without having been written.
        raise RequestError("preallocation with encryption needs compat=1.1, found compat=0.10")


def _crypt_method(encryption: Encryption | None) -> CryptMethod:
    if encryption is None:
        return CryptMethod.NONE
    return CryptMethod.LUKS if encryption.method == "luks" else CryptMethod.AES


def refuse_compressed_data_file(spec: Qcow2Spec) -> None:
    """Raise where compressed clusters are asked for and cannot be."""
    if spec.encryption is not None:
        raise UnsupportedFeature("compression", reason="compressed clusters would not be encrypted")
    if spec.data_file is not None:
        raise UnsupportedFeature(
            "compression", reason="an external data file cannot hold compressed clusters"
        )
    if spec.preallocated:
        raise RequestError("compression and preallocation exclude one another")
