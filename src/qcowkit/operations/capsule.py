"""A capsule: a copy of an image without its guest data, to show others what is wrong with it.

Everything lies where it lay, byte for byte; what is left out is holes. One bit of the version says
what it is: other programs refuse to open it, ours check and map it and refuse to read data. Beside
the file that it was made of it gives the image back, whatever has become of the metadata there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qcowkit.codecs.qcow2.header import CAPSULE, FIELD_OFFSETS
from qcowkit.codecs.qcow2.luks_header import LUKS_HEADER_BYTES
from qcowkit.engine.findings import Effort, FindingLog, Severity
from qcowkit.engine.qcow2.first_cluster import end_of_first_cluster
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.engine.qcow2.recount import recount
from qcowkit.engine.qcow2.references import Survey, survey
from qcowkit.errors import OperationError, RequestError, UnsupportedFeature
from qcowkit.image.lineage import Layer
from qcowkit.storage.atomic import AtomicOutput
from qcowkit.storage.locking import LockMode
from qcowkit.storage.protocol import Storage
from qcowkit.units import MiB, format_size

_COPY = 4 * MiB
# Key slots are not for others.
_SECRET = "crypto header"
# Structures that end within a cluster, of which the rest may be what lay there before.
_EXACT = ("header", "L1 table", "snapshot table", "bitmap directory", "table of bitmap")


@dataclass(frozen=True, slots=True, kw_only=True)
class CapsuleResult:
    """Sizes in bytes: of the file, which is that of the image, and of what was copied."""

    filename: str
    size: int
    copied: int

    def as_json(self) -> dict[str, object]:
        """The same by their names."""
        return {"filename": self.filename, "size": self.size, "copied": self.copied}

    def render(self) -> str:
        """A line to read."""
        copied, size = format_size(self.copied), format_size(self.size)
        return f"{self.filename}: {copied} of metadata, in a file as long as the image, {size}"

    def render_restored(self) -> str:
        """The same of an image that was written again."""
        return f"{self.filename}: {format_size(self.copied)} of metadata restored, and sound"


def make_capsule(
    layer: Layer, path: str | os.PathLike[str], *, locking: LockMode = "auto"
) -> CapsuleResult:
    """Write the capsule of an image, which is only read, and may be damaged.

    It appears under its name when it is complete. Raises UnsupportedFeature for other formats,
    OperationError where tables ask for more work than the file can be worth, StorageError."""
    metadata, source = layer.metadata, layer.storage
    if not isinstance(metadata, Qcow2Metadata):
        reason = f"{metadata.format} images have hardly any metadata, qcow2 images do"
        raise UnsupportedFeature("capsule", reason=reason)
    if metadata.header.capsule:
        raise RequestError(f"{source.name}: is a capsule already")
    effort = Effort(stored=source.allocated())
    # What is wrong with it is what the capsule is for.
    found = survey(source, metadata, log=FindingLog(limit=0), effort=effort)
    copied, size = 0, source.size()
    with AtomicOutput(path, locking=locking) as output:
        output.storage.truncate(size)
        raw = source.pread(metadata.cluster_size, offset=0).ljust(metadata.cluster_size, b"\0")
        for offset, length in iter_pieces(
            found, metadata, header=end_of_first_cluster(raw), size=size
        ):
            copied += _copy(source, output.storage, offset=offset, length=length)
        mark_capsule(output.storage)
        output.commit()
    return CapsuleResult(filename=os.fsdecode(path), size=size, copied=copied)


def restore_capsule(
    capsule: Layer,
    data: Storage,
    path: str | os.PathLike[str],
    *,
    locking: LockMode = "auto",
) -> CapsuleResult:
    """Write an image with the metadata of a capsule and everything else of `data`, the image that
    it was made of, whose own metadata may be lost. Key slots come from `data` too.

    Whether the guest's data still lie where they lay then cannot be known from here. The image
    appears under its name when it is complete and its metadata are sound. Raises RequestError for
    what is no capsule, or of another file, OperationError where the metadata are damaged too,
    StorageError."""
    metadata, source, size = capsule.metadata, capsule.storage, capsule.storage.size()
    if not isinstance(metadata, Qcow2Metadata) or not metadata.header.capsule:
        raise RequestError(f"{source.name}: is not a capsule")
    if data.size() != size:
        raise RequestError(
            f"{data.name}: has {data.size()} bytes, and the capsule is of an image of {size}: its "
            "metadata are not those of this file"
        )
    effort = Effort(stored=source.allocated())
    found = survey(source, metadata, log=FindingLog(limit=0), effort=effort)
    copied = 0
    with AtomicOutput(path, locking=locking) as output:
        target = output.storage
        target.truncate(size)
        for offset, length in data.iter_data(offset=0, length=size):
            if not data.clone_to(target, offset=offset, length=length, target_offset=offset):
                _copy(data, target, offset=offset, length=length)
        raw = source.pread(metadata.cluster_size, offset=0).ljust(metadata.cluster_size, b"\0")
        for offset, length in iter_pieces(
            found, metadata, header=end_of_first_cluster(raw), size=size
        ):
            copied += _copy(source, target, offset=offset, length=length)
        _mark(target, on=False)
        _require_sound(target)
        output.commit()
    return CapsuleResult(filename=os.fsdecode(path), size=size, copied=copied)


def _require_sound(storage: Storage) -> None:
    log, effort = FindingLog(limit=1), Effort(stored=storage.allocated())
    recount(storage, load_qcow2_metadata(storage, for_check=True), log=log, effort=effort)
    if log.count(Severity.CORRUPTION) or log.count(Severity.ERROR):
        raise OperationError(f"the metadata of the capsule are damaged: {log.kept[0]}")


def iter_pieces(
    found: Survey, metadata: Qcow2Metadata, *, header: int, size: int
) -> Iterator[tuple[int, int]]:
    """(host offset, bytes) of metadata, ascending and apart. header: bytes of the first cluster
    that mean anything. size: bytes of the file."""
    bits = metadata.geometry.cluster_bits
    exact = [one for one in found.claims.names if one.startswith(_EXACT)]
    claims = found.claims.without(_SECRET, *exact)
    tables = claims.plus("L2 tables", first=found.tables.offset >> bits, count=1)
    pieces = np.array([(0, header), *_exact_pieces(metadata)], dtype=np.int64)
    begin = np.append(tables.first << bits, pieces[:, 0])
    end = np.append((tables.first + tables.count) << bits, pieces.sum(axis=1))
    order = np.argsort(begin, kind="stable")
    reach = 0
    for index in order.tolist():
        first, last = max(int(begin[index]), reach), min(int(end[index]), size)
        if first < last:
            yield first, last - first
            reach = last


def _exact_pieces(metadata: Qcow2Metadata) -> Iterator[tuple[int, int]]:
    """(host offset, bytes) of structures that are copied to their last byte and no further."""
    header, extensions = metadata.header, metadata.extensions
    yield header.l1_table_offset, header.l1_bytes
    yield header.snapshots_offset, metadata.snapshot_table_bytes
    yield from ((one.l1_offset, one.l1_bytes) for one in metadata.snapshots)
    if extensions.crypto is not None:
        yield extensions.crypto.offset, LUKS_HEADER_BYTES
    if extensions.bitmaps is not None and metadata.bitmaps:
        yield extensions.bitmaps.directory_offset, extensions.bitmaps.directory_size
    yield from ((one.table_offset, one.table_bytes) for one in metadata.bitmaps)


def mark_capsule(storage: Storage) -> None:
    """Set the bit that makes other readers stop."""
    _mark(storage, on=True)


def _mark(storage: Storage, *, on: bool) -> None:
    place = FIELD_OFFSETS["version"]
    version = int.from_bytes(storage.pread(4, offset=place), "big") & ~CAPSULE
    storage.pwrite([(version | CAPSULE * on).to_bytes(4, "big")], offset=place)


def _copy(source: Storage, target: Storage, *, offset: int, length: int) -> int:
    for at in range(offset, offset + length, _COPY):
        raw = source.pread(min(_COPY, offset + length - at), offset=at)
        target.pwrite([raw], offset=at)
    return length
