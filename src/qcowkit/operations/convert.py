"""Convert: any disk, or several behind one another, to a new image or into an existing one."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.compression import make_compressor
from qcowkit.engine.batches import rows_of
from qcowkit.engine.executor import ProgressReport, Workers, ignore_progress
from qcowkit.engine.qcow2.spec import Qcow2Spec, refuse_compressed_data_file
from qcowkit.engine.raw_bulk import RawBulkWriter
from qcowkit.engine.transfer import BulkTarget
from qcowkit.errors import RequestError
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import Flag
from qcowkit.image.chain import Chain
from qcowkit.image.qcow2 import Qcow2Image
from qcowkit.image.views import Concatenation, Disk, Padded, Salvaged, Window
from qcowkit.operations.bitmap import CopiedBitmaps, collect_bitmaps
from qcowkit.operations.copying import Copier, CopyRules, HostCopy, only_top
from qcowkit.operations.create import (
    DEFAULT_SPARSE,
    CreateOptions,
    OptionValue,
    backing_disk,
    data_path,
    open_target,
    qcow2_spec,
    refuse_overlap,
)
from qcowkit.operations.encryption import encrypts, require_new_secret
from qcowkit.operations.existing import existing_options, hold_existing
from qcowkit.storage.atomic import AtomicOutput
from qcowkit.storage.file import FileStorage
from qcowkit.storage.locking import LockMode, Role, acquire
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, align_up


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """Options of a conversion, named as the flags of the command line; sizes in bytes.

    create: options of the new image. secret: its passphrase where it shall be encrypted.
    sparse_size: shortest hole of a raw target, 0 allocates everything. copy_range: let the host
    copy, without looking for zeros. bitmaps: take over those of the source; skip_broken_bitmaps:
    but for inconsistent ones. start, length: the part of the source to copy. size: of the target's
    disk, larger than the source's or None."""

    format: str
    create: Mapping[str, OptionValue] = field(default_factory=dict)
    secret: bytes | None = field(default=None, repr=False)
    compress: bool = False
    backing: str | None = None
    backing_format: str | None = None
    in_place: bool = False
    target_is_zero: bool = False
    sparse_size: int | None = None
    copy_range: bool = False
    salvage: bool = False
    bitmaps: bool = False
    skip_broken_bitmaps: bool = False
    rate: int | None = None
    threads: int | None = None
    start: int = 0
    length: int | None = None
    size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What came of it. size: guest bytes. salvaged: (start, length, reason) of spots that could
    not be read and are zeros now. skipped_bitmaps: names of those that were inconsistent."""

    size: int
    salvaged: tuple[tuple[int, int, str], ...] = ()
    skipped_bitmaps: tuple[str, ...] = ()


def convert(
    sources: Sequence[Disk],
    path: str | os.PathLike[str],
    *,
    options: ConvertOptions,
    progress: ProgressReport = ignore_progress,
    cancel: threading.Event | None = None,
) -> Converted:
    """Copy the sources, one behind the other, to `path`.

    A new file appears under its name when it is complete; an existing one survives any failure.
    With `in_place` a raw target, and block devices always, are written directly; a qcow2 or VHD
    target is replaced by a new image with its options. Raises any QcowkitError."""
    bad: list[tuple[int, int, str]] = []
    bitmaps = _bitmaps(sources, options)
    disk = _source(sources, options, bad)
    with Workers(options.threads, cancel=cancel) as workers:
        if _is_device(path) or (options.in_place and options.format == "raw"):
            _into_existing(disk, path, options, workers, progress)
            return Converted(size=disk.size, salvaged=tuple(sorted(bad)))
        with ExitStack() as stack:
            if options.in_place:
                stack.enter_context(hold_existing(path, options.format, read=_storages(disk)))
            size = _into_new(disk, path, options, workers, progress, bitmaps)
    return Converted(size=size, salvaged=tuple(sorted(bad)), skipped_bitmaps=bitmaps.skipped)


def _bitmaps(sources: Sequence[Disk], options: ConvertOptions) -> CopiedBitmaps:
    """What has to be taken over, before anything is copied."""
    if not options.bitmaps:
        return CopiedBitmaps(bitmaps=())
    (source,) = sources if len(sources) == 1 else (None,)
    if not isinstance(source, Chain):
        raise RequestError("bitmaps are taken over from a single disk image")
    if options.format != "qcow2":
        raise RequestError(f"{options.format} images hold no bitmaps, only qcow2 ones do")
    if options.start or options.length is not None:
        raise RequestError("bitmaps are of a whole disk, and a part of one is copied")
    return collect_bitmaps(source.layers[0], skip_broken=options.skip_broken_bitmaps)


def _source(
    sources: Sequence[Disk], options: ConvertOptions, bad: list[tuple[int, int, str]]
) -> Disk:
    disk = sources[0] if len(sources) == 1 else Concatenation(sources)
    if options.start or options.length is not None:
        length = disk.size - options.start if options.length is None else options.length
        disk = Window(disk, start=options.start, length=length)
    if options.salvage:
        disk = Salvaged(disk, report=lambda start, length, why: bad.append((start, length, why)))
    return disk


def _storages(disk: Disk) -> Iterator[Storage]:
    """Every file that reading the disk may touch."""
    for image in disk.images:
        yield image.data_storage
        if isinstance(image, Qcow2Image):
            yield image.storage


def _is_device(path: str | os.PathLike[str]) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def _into_new(
    disk: Disk,
    path: str | os.PathLike[str],
    options: ConvertOptions,
    workers: Workers,
    progress: ProgressReport,
    bitmaps: CopiedBitmaps,
) -> int:
    create = _create_options(path, disk, options)
    require_new_secret(create.format, create.values, create.secret)
    size = max(disk.size, options.size or 0, create.size or 0)
    if create.size is not None and create.size < disk.size:
        raise RequestError(
            f"size {create.size} of the target is less than the source's {disk.size} bytes"
        )
    refuse_overlap(path, create, read=_storages(disk))
    spec = qcow2_spec(create, size=size) if options.format == "qcow2" else None
    if spec is not None and spec.backing_name is not None and not options.in_place:
        if isinstance(disk, Concatenation):
            raise RequestError("a backing file excludes several sources")
        # What the source does not reach must not show the backing file either.
        disk = Padded(disk, size=spec.size)
    if spec is not None and spec.version < 3 and bitmaps.bitmaps:
        raise RequestError("version 2 images (compat=0.10) hold no bitmaps, version 3 ones do")
    if options.backing is not None:
        # A base that is missing, or of another format, would make an image that cannot be read.
        base = backing_disk(path, create, gate=None, budget=TRUSTED)
        create = replace(create, base=base)
    if options.compress:
        assert spec is not None, "only qcow2 compresses"
        refuse_compressed_data_file(spec)
    with ExitStack() as stack:
        # With -n the target is held already.
        locking: LockMode = "off" if options.in_place else "auto"
        output = stack.enter_context(AtomicOutput(path, locking=locking))
        data_name = data_path(path, create)
        data = stack.enter_context(AtomicOutput(data_name, replace=False)) if data_name else None
        tables, clusters = (0, 0) if spec is None else count_clusters(disk, spec, options)
        target, made = open_target(
            output.storage,
            create,
            size=size,
            data_storage=data.storage if data else None,
            l2_tables=tables,
            data_clusters=clusters,
            sparse=_sparse_unit(options),
        )
        rules = _rules(disk, options, spec, _host_copy(disk, data or output, options, create))
        Copier(disk, target, rules=rules, workers=workers, progress=progress).run()
        target.finish()
        bitmaps.store(output.storage)
        if data is not None:
            data.storage.truncate(made.size)
            data.commit()
        output.commit()
    return made.size


def _into_existing(
    disk: Disk,
    path: str | os.PathLike[str],
    options: ConvertOptions,
    workers: Workers,
    progress: ProgressReport,
) -> None:
    if options.format != "raw":
        raise RequestError(
            f"{os.fsdecode(path)}: a device takes a raw disk, found -O {options.format}"
        )
    refuse_overlap(path, CreateOptions.of(options.format, {}), read=_storages(disk))
    with FileStorage.open(path, writable=True) as storage:
        acquire(storage, Role.WRITER, name=storage.name)
        # A raw disk has whole sectors, its file may end within the last one.
        if align_up(storage.size(), SECTOR) < disk.size:
            raise RequestError(
                f"{storage.name}: the target has {storage.size()} bytes, "
                f"the source {disk.size}: it does not fit"
            )
        keep_zeros = not options.target_is_zero
        target: BulkTarget = RawBulkWriter(
            storage, size=storage.size(), unit=_sparse_unit(options), overwrite=keep_zeros
        )
        share = _copy_to if options.copy_range else None
        rules = _rules(disk, options, None, share)
        Copier(disk, target, rules=rules, workers=workers, progress=progress).run()
        target.finish()
        storage.flush()


def _create_options(
    path: str | os.PathLike[str], disk: Disk, options: ConvertOptions
) -> CreateOptions:
    if options.in_place:
        return existing_options(path, options.format, source_size=disk.size)
    create = CreateOptions.of(options.format, options.create, secret=options.secret)
    return create.with_values(backing_file=options.backing, backing_fmt=options.backing_format)


def _sparse_unit(options: ConvertOptions) -> int:
    """The grain of holes in a raw target: a power of two of at least a sector."""
    wanted = DEFAULT_SPARSE if options.sparse_size is None else options.sparse_size
    return max(SECTOR, 1 << max(0, wanted.bit_length() - 1)) if wanted else DEFAULT_SPARSE


def _rules(
    disk: Disk, options: ConvertOptions, spec: Qcow2Spec | None, host_copy: HostCopy | None
) -> CopyRules:
    based = spec is not None and spec.backing_name is not None
    compress = None
    if options.compress and spec is not None:
        compress = make_compressor(spec.compression_type, spec.compression_level)
    return CopyRules(
        compress=compress,
        cluster_size=spec.geometry.cluster_size if spec is not None else 0,
        verbatim=_verbatim(disk, options, spec),
        top_only=based and not options.in_place,
        zero_as_data=based and spec is not None and spec.version < 3,
        # Holes of an encrypted disk would read as noise.
        everything=options.sparse_size == 0 or options.format == "luks",
        host_copy=host_copy,
        rate=options.rate,
    )


def _verbatim(disk: Disk, options: ConvertOptions, spec: Qcow2Spec | None) -> frozenset[int]:
    """The images whose compressed clusters have the target's type and size."""
    if not options.compress or spec is None or options.start or options.salvage:
        return frozenset()
    if isinstance(disk, Concatenation) or spec.compression_level is not None:
        # Clusters of a later disk begin anywhere; a level asks for compressing anew.
        return frozenset()
    return frozenset(
        layer
        for layer, image in enumerate(disk.images)
        if isinstance(image, Qcow2Image)
        and image.metadata.compression_type == spec.compression_type
        and image.cluster_size == spec.geometry.cluster_size
    )


def _share(source: Storage, target: Storage, offset: int, length: int, target_offset: int) -> bool:
    return source.clone_to(target, offset=offset, length=length, target_offset=target_offset)


def _copy_to(
    source: Storage, target: Storage, offset: int, length: int, target_offset: int
) -> bool:
    return source.copy_to(target, offset=offset, length=length, target_offset=target_offset)


def _host_copy(
    disk: Disk, output: AtomicOutput, options: ConvertOptions, create: CreateOptions
) -> HostCopy | None:
    """How the host may copy for us: sharing blocks where its file system can, else only on demand.

    Sharing keeps allocated zeros, which cost nothing there; -S asks to look at the data."""
    if options.compress or options.salvage or options.sparse_size is not None:
        return None
    if create.values.get("preallocation", "off") != "off":
        return None
    if encrypts(create.format, create.values):
        return None
    if _can_share(disk, output.storage):
        return _share
    return _copy_to if options.copy_range else None


def _can_share(disk: Disk, target: FileStorage) -> bool:
    """Try one block, then take it back. The target is still empty."""
    sources = [image.data_storage for image in disk.images]
    block = target.caps.block_size
    if any(source.size() < block or source.caps.block_device for source in sources):
        return False
    shared = all(
        source.clone_to(target, offset=0, length=block, target_offset=0) for source in sources
    )
    target.truncate(0)
    return shared


def count_clusters(disk: Disk, spec: Qcow2Spec, options: ConvertOptions) -> tuple[int, int]:
    """Upper bounds for the layout: (L2 tables, data clusters) that the disk may need."""
    geometry = spec.geometry
    based = spec.backing_name is not None and not options.in_place
    # Over a backing file that stays, every zero must be said.
    all_tables = spec.backing_name is not None and options.in_place
    if options.sparse_size == 0 or (all_tables and spec.version < 3):
        return geometry.l1_entries(spec.size), geometry.clusters(spec.size)
    wanted = Flag.DATA | Flag.ZERO if based else Flag.DATA
    clusters = tables = 0
    last_cluster = last_table = -1
    for table in disk.iter_extents():
        if based:
            table = only_top(table)
        touched = rows_of(table, wanted).scale_outward(geometry.cluster_size)
        below = rows_of(table, wanted).scale_outward(geometry.l2_coverage)
        # Windows may share a unit at their edges: it counts once.
        clusters += touched.difference(_upto(last_cluster)).total
        tables += below.difference(_upto(last_table)).total
        if len(touched):
            last_cluster, last_table = int(touched.stop[-1]) - 1, int(below.stop[-1]) - 1
    return geometry.l1_entries(spec.size) if all_tables else tables, clusters


def _upto(last: int) -> RangeSet:
    return RangeSet.of([0], [last + 1])
