"""Disks with lazy refcounts and a record of dirty L2 tables, and what a crash leaves of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qcowkit.codecs.qcow2.dirty_tables import DirtyTables
from qcowkit.codecs.qcow2.extensions import encode_first_cluster
from qcowkit.codecs.qcow2.header import Autoclear
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.engine.qcow2.recovery import recover_for_writing
from qcowkit.image.chain import Chain
from qcowkit.image.lineage import Layer
from qcowkit.operations.check import CheckResult, check_image
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.crash_disks import DiskKind
from qcowkit.testing.crash_storage import Content, CrashFiles
from qcowkit.units import KiB, ceil_div

QUIET = OpenOptions(cache_clean_interval=0)
# What an L2 table of clusters of 1 KiB covers.
COVERAGE = 128 * KiB
Use = Callable[[Chain], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordKind(DiskKind):
    """record_bits: of its record of dirty tables, 0 for the one that it is made with."""

    record_bits: int = 0

    def make(self) -> CrashFiles:
        """See `DiskKind.make`."""
        files = DiskKind.make(self)
        if self.record_bits:
            put_record(files.open(), bit_count=self.record_bits)
            files.begin()
        return files


def lazy_kind(name: str = "lazy", *, record_bits: int = 0, **changes: object) -> RecordKind:
    """1 MiB in clusters of 1 KiB: eight L2 tables. options: more of them."""
    fields: dict[str, object] = {
        "size": 8 * COVERAGE,
        "open_options": QUIET,
        **changes,
    }
    more = fields.pop("options", {})
    assert isinstance(more, dict)
    options = {"cluster_size": KiB, "lazy_refcounts": True, **more}
    kind: Any = RecordKind
    made: RecordKind = kind(name=name, record_bits=record_bits, options=options, **fields)
    return made


def put_record(storage: Storage, *, bit_count: int, shift: int = 0) -> None:
    """Give an image another record, an empty one, in its first cluster."""
    metadata = load_qcow2_metadata(storage)
    record = DirtyTables(shift=shift, bit_count=bit_count, bits=bytes(ceil_div(bit_count, 8)))
    extensions = replace(metadata.extensions, dirty_tables=record)
    raw = encode_first_cluster(metadata.header, extensions, metadata.backing_name)
    storage.pwrite([raw], offset=0)


def crash(kind: DiskKind, use: Use, *, files: CrashFiles | None = None) -> bytes:
    """The image after a process that has used a disk, and flushed it, was killed.

    files: of a disk that is there already."""
    files = kind.make() if files is None else files
    chain = kind.open(files, writable=True)
    use(chain)
    chain.flush()
    return files.live[0].to_bytes()


def use_again(kind: DiskKind, raw: bytes, use: Use) -> bytes:
    """The image after another process has used it and was killed."""
    return crash(kind, use, files=CrashFiles([Content.of(raw)]))


def closed(kind: DiskKind, use: Use) -> bytes:
    """The image after a use that has ended well."""
    files = kind.make()
    with kind.open(files, writable=True) as chain:
        use(chain)
    return files.live[0].to_bytes()


def metadata_of(raw: bytes) -> Qcow2Metadata:
    """As the next reader finds them."""
    return load_qcow2_metadata(MemoryStorage(raw), for_check=True)


def recorded(raw: bytes) -> list[int] | None:
    """The L1 entries that a valid record names; None where there is none that holds."""
    metadata = metadata_of(raw)
    record = metadata.extensions.dirty_tables
    if record is None or not metadata.header.autoclear_features & Autoclear.DIRTY_TABLES:
        return None
    return [entry for part in record.iter_entries() for entry in part]


def recover(raw: bytes) -> tuple[bytes, list[str]]:
    """The image when it is ready to be written, and the barriers on the way there."""
    storage, seen = MemoryStorage(raw), list[str]()
    barriers = Barriers(storage, observe=seen.append)
    metadata = recover_for_writing(storage, load_qcow2_metadata(storage), barriers=barriers)
    assert metadata.header == load_qcow2_metadata(storage).header
    return storage.to_bytes(), seen


def check(raw: bytes) -> CheckResult:
    """What a check finds."""
    return check_image(Layer(storage=MemoryStorage(raw), metadata=metadata_of(raw)))


def content(kind: DiskKind, raw: bytes) -> bytes:
    """The whole disk, through handles that refuse to write."""
    with kind.open(CrashFiles([Content.of(raw)]), writable=False) as chain:
        return chain.read(offset=0, length=chain.size)


def full_table() -> bytes:
    """The file is almost as long as its refcount table can count, and most blocks are missing; a
    part of the disk was written before the crash, and counted."""
    kind = lazy_kind(
        size=2304 * KiB, options={"cluster_size": 512, "refcount_bits": 64}, record_bits=80
    )
    limit = 64 * 64 * 512
    files = CrashFiles(
        [Content.of(closed(kind, lambda chain: chain.write(b"1" * 64 * KiB, offset=0)))]
    )

    def use(chain: Chain) -> None:
        offset = 64 * KiB
        while files.open().size() < limit - 16 * KiB:
            chain.write(b"x" * 8 * KiB, offset=offset)
            chain.flush()
            offset += 8 * KiB

    return crash(kind, use, files=files)


def missing_blocks() -> bytes:
    """Refcount blocks are missing for what was written before the crash."""
    kind = lazy_kind(options={"refcount_bits": 64})
    return crash(kind, lambda chain: chain.write(b"x" * 300 * KiB, offset=0))
