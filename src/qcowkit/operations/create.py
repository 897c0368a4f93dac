"""New images: what may be asked for, and the empty image that follows."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self
from uuid import UUID

from qcowkit.budget import TRUSTED, Budget
from qcowkit.codecs.qcow2.geometry import MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, Geometry
from qcowkit.codecs.qcow2.identity import BackingIdentity, Identity
from qcowkit.codecs.qcow2.luks_params import Encryption
from qcowkit.engine.luks.format import new_crypt
from qcowkit.engine.luks.target import LuksBulkWriter, write_zeros
from qcowkit.engine.preallocate import preallocate
from qcowkit.engine.qcow2.bulk import Qcow2BulkWriter
from qcowkit.engine.qcow2.layout import plan_layout
from qcowkit.engine.qcow2.spec import Qcow2Spec
from qcowkit.engine.raw_bulk import RawBulkWriter
from qcowkit.engine.transfer import BulkTarget
from qcowkit.engine.vhd.bulk import VhdBulkWriter
from qcowkit.engine.vhd.target import VhdTarget
from qcowkit.errors import RequestError
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import close_layers, lock_storage, open_layers
from qcowkit.image.metadata import guid_of
from qcowkit.image.probe import probe_format
from qcowkit.operations.encryption import luks_params, qcow2_encryption, require_new_secret
from qcowkit.operations.identity import NO_GUID, choose_guid
from qcowkit.storage.atomic import AtomicOutput
from qcowkit.storage.file import FileStorage
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, KiB, align_up, is_power_of_two

OptionValue = str | int | bool
DEFAULT_SPARSE = 4 * KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseDisk:
    """What is known of a base image: guest bytes, and which disk it says that it is."""

    size: int
    guid: UUID | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOptions:
    """A format and its options by their names of the command line, sizes in bytes. secret: the
    passphrase where the new image shall be encrypted. base: the backing file, once opened."""

    format: str
    values: Mapping[str, OptionValue] = field(default_factory=dict)
    secret: bytes | None = field(default=None, repr=False)
    base: BaseDisk | None = None

    @classmethod
    def of(
        cls, format: str, values: Mapping[str, OptionValue], *, secret: bytes | None = None
    ) -> Self:
        """From keys that were parsed; unknown ones are refused by `qcow2_spec` and its like."""
        return cls(format=format, values=dict(values), secret=secret)

    @property
    def size(self) -> int | None:
        """Guest bytes, if said."""
        value = self.values.get("size")
        return None if value is None else int(value)

    def text(self, key: str) -> str | None:
        """An option that is a name."""
        value = self.values.get(key)
        return None if value is None else str(value)

    def with_values(self, **values: OptionValue | None) -> CreateOptions:
        """The same with some keys set; None leaves a key as it is."""
        given = {key: value for key, value in values.items() if value is not None}
        return replace(self, values={**self.values, **given})


@dataclass(frozen=True, slots=True, kw_only=True)
class Created:
    """What was made: the guest's size in bytes and every option with its final value."""

    format: str
    size: int
    values: Mapping[str, OptionValue]

    def shown(self) -> dict[str, OptionValue]:
        """Keys in the order in which they are printed."""
        return {key: self.values[key] for key in sorted(self.values)}


def create_image(
    path: str | os.PathLike[str],
    options: CreateOptions,
    *,
    gate: ReferenceGate,
    check_backing: bool = True,
    budget: Budget = TRUSTED,
) -> Created:
    """Make an empty image that appears under its name when it is complete.

    A raw data file that exists becomes that of the new image with all it holds, and gives it its
    size where none is given. check_backing: open the base image, which must exist, and take its
    size. Raises RequestError for options that cannot be, StorageError and all errors of the base.
    """
    backing = options.text("backing_file")
    refuse_overlap(path, options)
    require_new_secret(options.format, options.values, options.secret)
    if backing is not None and check_backing:
        base = backing_disk(path, options, gate=gate, budget=budget)
        options = replace(options, base=base)
        options = options if options.size is not None else options.with_values(size=base.size)
    with ExitStack() as stack:
        adopted = adopt_data_file(path, options, stack=stack)
        if adopted is not None:
            options = options.with_values(size=_adopted_size(adopted, options))
        if options.size is None:
            raise RequestError("the size of the new image is missing")
        output = stack.enter_context(AtomicOutput(path))
        name = data_path(path, options)
        data = None
        if name is not None and adopted is None:
            data = stack.enter_context(AtomicOutput(name, replace=False))
        storage = data.storage if data else adopted
        target, made = open_target(output.storage, options, size=options.size, data_storage=storage)
        target.finish()
        if storage is not None:
            storage.truncate(made.size)
            # First the data: an image must not name a file that is not there.
            storage.flush() if data is None else data.commit()
        output.commit()
    return made


def adopt_data_file(
    path: str | os.PathLike[str], options: CreateOptions, *, stack: ExitStack
) -> FileStorage | None:
    """The raw disk that is there already and shall be the data file of a new image, locked for
    writing and closed by `stack`; None where there is none, or where a new file is asked for.

    Raises RequestError for what is no raw disk and for options that would write into it."""
    name = data_path(path, options)
    if name is None or not options.values.get("data_file_raw") or _identity(name) is None:
        return None
    storage = FileStorage.open(name, writable=True)
    stack.callback(storage.close)
    lock_storage(storage, writable=True, locking="auto", force_share=False)
    found = probe_format(storage)
    if found != "raw":
        raise RequestError(f"{name}: the content is {found}, and a raw data file is a raw disk")
    if options.values.get("preallocation") == "full":
        raise RequestError(
            f"{name}: preallocation=full would overwrite the disk that is there; metadata and "
            "falloc keep it"
        )
    return storage


def _adopted_size(storage: FileStorage, options: CreateOptions) -> int:
    present = align_up(storage.size(), SECTOR)
    wanted = present if options.size is None else align_up(options.size, SECTOR)
    if wanted < present:
        raise RequestError(
            f"{storage.name}: the data file has {present} bytes, more than the disk of {wanted}"
        )
    return wanted


def backing_disk(
    path: str | os.PathLike[str],
    options: CreateOptions,
    *,
    gate: ReferenceGate | None,
    budget: Budget,
) -> BaseDisk:
    """The base image that the options name, opened as the new image will see it.

    The user names the base, not an image: it may lie anywhere; what it names itself may not.
    gate: None looks at the base alone."""
    base = _beside(path, str(options.text("backing_file")))
    layers = open_layers(
        base,
        format=options.text("backing_fmt"),
        gate=gate or ReferenceGate.deny_all(),
        budget=budget,
        follow_backing=gate is not None,
        follow_data=gate is not None,
    )
    try:
        storages = [storage for layer in layers for storage in (layer.storage, layer.data_storage)]
        refuse_overlap(path, options, read=[storage for storage in storages if storage])
        metadata = layers[0].metadata
        return BaseDisk(size=metadata.virtual_size, guid=guid_of(metadata))
    finally:
        close_layers(layers)


def data_path(path: str | os.PathLike[str], options: CreateOptions) -> str | None:
    """Where the external data file lies: its name is relative to the image's directory."""
    name = options.text("data_file")
    return None if name is None else _beside(path, name)


def refuse_overlap(
    path: str | os.PathLike[str], options: CreateOptions, *, read: Iterable[Storage] = ()
) -> None:
    """Raise RequestError when a new file would take the place of one that is needed.

    path: of the new image. read: what is open and must stay: the sources, the base image's chain.
    Names are compared with links followed, files by their identity."""
    data, backing = data_path(path, options), options.text("backing_file")
    if data is not None and _same_file(path, data):
        raise RequestError(f"{data}: the data file cannot be the new image itself")
    kept = {one.identity for one in read if isinstance(one, FileStorage)}
    targets = [os.fsdecode(path)] if data is None else [os.fsdecode(path), data]
    for target in targets:
        if backing is not None and _same_file(target, _beside(path, backing)):
            raise RequestError(f"{target}: is the backing file of the new image")
        if _identity(target) in kept:
            raise RequestError(
                f"{target}: is one of the files that are read, so it cannot be written"
            )


def _beside(path: str | os.PathLike[str], name: str) -> str:
    """A name in an image, as seen from the image's directory."""
    return os.path.join(os.path.dirname(os.path.abspath(os.fsdecode(path))), name)


def _same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    return (identity := _identity(one)) is not None and identity == _identity(other)


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """As `FileStorage.identity`; None where there is no file that can be looked at."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (-1, found.st_rdev) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)


def open_target(
    storage: Storage,
    options: CreateOptions,
    *,
    size: int,
    data_storage: Storage | None = None,
    l2_tables: int = 0,
    data_clusters: int = 0,
    sparse: int = DEFAULT_SPARSE,
) -> tuple[BulkTarget, Created]:
    """The bulk writer of a new image on an empty storage, and what it makes.

    l2_tables, data_clusters: upper bounds of what a qcow2 image will hold. sparse: bytes, the
    shortest hole in a raw target."""
    if options.format == "qcow2":
        spec = qcow2_spec(options, size=size)
        return _qcow2_target(
            storage,
            spec,
            data_storage=data_storage,
            l2_tables=l2_tables,
            data_clusters=data_clusters,
            secret=options.secret,
        )
    if options.format == "vpc":
        return _vhd_target(storage, options, size=size)
    if options.format == "luks":
        return _luks_target(storage, options, size=size)
    return _raw_target(storage, options, size=size, sparse=sparse)


def qcow2_spec(options: CreateOptions, *, size: int) -> Qcow2Spec:
    """The options of qcow2 as one checked specification; the size is rounded up to sectors."""
    values = options.values
    version = 2 if values.get("compat", "1.1") == "0.10" else 3
    level = values.get("compression_level")
    return Qcow2Spec(
        size=align_up(size, SECTOR),
        geometry=Geometry(
            cluster_bits=_cluster_bits(int(values.get("cluster_size", 64 * KiB))),
            refcount_order=_refcount_order(int(values.get("refcount_bits", 16))),
            extended_l2=bool(values.get("extended_l2", False)),
        ),
        version=version,
        compression_type=str(values.get("compression_type", "zlib")),
        compression_level=None if level is None else int(level),
        lazy_refcounts=bool(values.get("lazy_refcounts", False)),
        preallocation=str(values.get("preallocation", "off")),
        backing_name=options.text("backing_file"),
        backing_format=options.text("backing_fmt"),
        data_file=options.text("data_file"),
        data_file_raw=bool(values.get("data_file_raw", False)),
        encryption=qcow2_encryption(values),
        identity=_identity_of(options),
        contiguous_runs=bool(values.get("contiguous_runs", False)),
    )


def _identity_of(options: CreateOptions) -> Identity | None:
    """What the new image is to say of itself, and of its base where that is known."""
    guid, base = choose_guid(options.text("guid") or NO_GUID), options.base
    if guid is None:
        return None
    backing = None
    if base is not None and base.guid is not None:
        backing = BackingIdentity(guid=base.guid, length=base.size)
    return Identity.of(guid, backing=backing, backing_name=options.text("backing_file"))


def _cluster_bits(size: int) -> int:
    least, most = 1 << MIN_CLUSTER_BITS, 1 << MAX_CLUSTER_BITS
    if not is_power_of_two(size) or not least <= size <= most:
        raise RequestError(f"cluster_size {size} is not a power of two between {least} and {most}")
    return size.bit_length() - 1


def _refcount_order(bits: int) -> int:
    if bits not in (1, 2, 4, 8, 16, 32, 64):
        raise RequestError(f"refcount_bits {bits} is not one of 1, 2, 4, 8, 16, 32, 64")
    return bits.bit_length() - 1


def _qcow2_target(
    storage: Storage,
    spec: Qcow2Spec,
    *,
    data_storage: Storage | None,
    l2_tables: int,
    data_clusters: int,
    secret: bytes | None,
) -> tuple[BulkTarget, Created]:
    geometry = spec.geometry
    external = spec.data_file is not None
    crypt = None if spec.encryption is None else new_crypt(spec.encryption, secret)
    if spec.preallocated:
        l2_tables, data_clusters = geometry.l1_entries(spec.size), geometry.clusters(spec.size)
    layout = plan_layout(
        geometry,
        size=spec.size,
        l2_tables=l2_tables,
        data_clusters=0 if external else data_clusters,
        crypto_clusters=spec.crypto_bytes // geometry.cluster_size,
    )
    if spec.preallocation in ("falloc", "full"):
        area = geometry.clusters(spec.size) * geometry.cluster_size
        where, offset = (data_storage, 0) if data_storage else (storage, layout.data_offset)
        length = spec.size if data_storage else area
        preallocate(where, offset=offset, length=length, mode=spec.preallocation)
    writer = Qcow2BulkWriter(storage, spec, layout, data_storage=data_storage, crypt=crypt)
    values = _qcow2_values(spec)
    return writer, Created(format="qcow2", size=spec.size, values=values)


def _qcow2_values(spec: Qcow2Spec) -> dict[str, OptionValue]:
    values: dict[str, OptionValue | None] = {
        "cluster_size": spec.geometry.cluster_size,
        "extended_l2": spec.geometry.extended_l2,
        "compat": "0.10" if spec.version == 2 else None,
        "compression_type": spec.compression_type,
        "size": spec.size,
        "lazy_refcounts": spec.lazy_refcounts,
        "refcount_bits": spec.geometry.refcount_bits,
        "backing_file": spec.backing_name,
        "backing_fmt": spec.backing_format,
        "data_file": spec.data_file,
        "data_file_raw": spec.data_file_raw or None,
        "guid": None if spec.identity is None else str(spec.identity.guid),
        **_encryption_values(spec.encryption),
        "preallocation": None if spec.preallocation == "off" else spec.preallocation,
        "contiguous_runs": spec.contiguous_runs or None,
    }
    return {key: value for key, value in values.items() if value is not None}


def _encryption_values(encryption: Encryption | None) -> dict[str, OptionValue | None]:
    if encryption is None:
        return {}
    if encryption.method == "aes":
        return {"encrypt.format": "aes"}
    luks = encryption.luks
    return {
        "encrypt.format": "luks",
        "encrypt.cipher-alg": luks.cipher_alg,
        "encrypt.cipher-mode": luks.cipher_mode,
        "encrypt.ivgen-alg": luks.ivgen_alg,
        "encrypt.ivgen-hash-alg": luks.ivgen_hash,
        "encrypt.hash-alg": luks.hash_alg,
        "encrypt.iter-time": luks.iter_time,
    }


def _vhd_target(
    storage: Storage, options: CreateOptions, *, size: int
) -> tuple[BulkTarget, Created]:
    fixed = options.values.get("subformat", "dynamic") == "fixed"
    force = bool(options.values.get("force_size", True))
    writer = VhdBulkWriter(
        storage,
        size=align_up(size, SECTOR),
        subformat="fixed" if fixed else "dynamic",
        force_size=force,
    )
    values: dict[str, OptionValue] = {
        "size": writer.size,
        "subformat": "fixed" if fixed else "dynamic",
        "force_size": force,
    }
    return VhdTarget(storage, writer), Created(format="vpc", size=writer.size, values=values)


def _luks_target(
    storage: Storage, options: CreateOptions, *, size: int
) -> tuple[BulkTarget, Created]:
    size = align_up(size, SECTOR)
    encryption = Encryption(method="luks", luks=luks_params(options.values, prefix=""))
    crypt = new_crypt(encryption, options.secret, by_guest=True)
    mode = str(options.values.get("preallocation", "off"))
    if mode == "full":
        write_zeros(storage, crypt, start=0, length=size)
    elif mode == "falloc":
        preallocate(storage, offset=0, length=len(crypt.area) + size, mode=mode)
    values = {
        key.removeprefix("encrypt."): value
        for key, value in _encryption_values(encryption).items()
        if key != "encrypt.format" and value is not None
    }
    made = Created(format="luks", size=size, values={"size": size, **values})
    return LuksBulkWriter(storage, size=size, crypt=crypt), made


def _raw_target(
    storage: Storage, options: CreateOptions, *, size: int, sparse: int
) -> tuple[BulkTarget, Created]:
    mode = str(options.values.get("preallocation", "off"))
    size = align_up(size, SECTOR) if size % SECTOR else size
    preallocate(storage, offset=0, length=size, mode=mode)
    values: dict[str, OptionValue] = {"size": size}
    if mode != "off":
        values["preallocation"] = mode
    return RawBulkWriter(storage, size=size, unit=sparse), Created(
        format="raw", size=size, values=values
    )


def target_directory(path: str | os.PathLike[str]) -> Path:
    """The directory from which the names in a new image are read."""
    return Path(os.path.abspath(os.fsdecode(path))).parent
