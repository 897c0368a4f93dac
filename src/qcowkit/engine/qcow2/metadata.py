"""Everything known of a qcow2 file before its L1 table is read.

Only bounded pieces are read: the first cluster, the snapshot table, the bitmap directory and 592
bytes of a LUKS header. The rows of docs/formats/qcow2.md are judged here, cheap ones first."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcowkit.budget import TRUSTED, Budget
from qcowkit.codecs.qcow2.bitmaps import (
    MAX_BITMAP_ENTRY,
    BitmapEntry,
    check_bitmap,
    decode_bitmap,
    decode_bitmap_table,
)
from qcowkit.codecs.qcow2.extensions import Extensions, decode_extensions, decode_name
from qcowkit.codecs.qcow2.geometry import MAX_CLUSTER_BITS, Geometry
from qcowkit.codecs.qcow2.header import (
    MAX_BACKING_NAME,
    V2_HEADER_LENGTH,
    Autoclear,
    Compatible,
    CompressionType,
    CryptMethod,
    Header,
    Incompatible,
)
from qcowkit.codecs.qcow2.luks_header import LUKS_HEADER_BYTES, LuksHeader
from qcowkit.codecs.qcow2.luks_params import LEGACY_AES
from qcowkit.codecs.qcow2.snapshots import (
    MAX_SNAPSHOT_ENTRY,
    MAX_SNAPSHOT_TABLE_BYTES,
    SnapshotEntry,
    check_snapshot,
    decode_snapshot,
)
from qcowkit.engine.qcow2.placement import Region, check_disjoint, check_inside
from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.references import Reference, ReferenceKind
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, MiB, align_down

if TYPE_CHECKING:
    from uuid import UUID

    from qcowkit.codecs.qcow2.identity import BackingIdentity

_READ = MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2Metadata:
    """A validated image, frozen. Sizes in bytes.

    virtual_size: guest bytes, the header's size cut to whole sectors. bitmaps: empty where their
    extension is to be ignored. luks: only for LUKS. warnings: what was tolerated, one line each."""

    header: Header
    extensions: Extensions
    geometry: Geometry
    virtual_size: int
    backing_name: str | None = None
    snapshots: tuple[SnapshotEntry, ...] = ()
    snapshot_table_bytes: int = 0
    bitmaps: tuple[BitmapEntry, ...] = ()
    luks: LuksHeader | None = None
    warnings: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        """The name of the format, as the command line spells it."""
        return "qcow2"

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return self.geometry.cluster_size

    @property
    def references(self) -> tuple[Reference, ...]:
        """The files that the image names: backing file, then data file. A capsule stands alone."""
        found: list[Reference] = []
        if self.header.capsule:
            return ()
        if self.backing_name is not None:
            declared = self.extensions.backing_format
            found.append(
                Reference(kind=ReferenceKind.BACKING, names=(self.backing_name,), format=declared)
            )
        if self.data_file and self.extensions.data_file is not None:
            names = (self.extensions.data_file,)
            found.append(Reference(kind=ReferenceKind.DATA, names=names, format="raw"))
        return tuple(found)

    @property
    def guid(self) -> UUID | None:
        """Which disk this is, whatever its file is called; None where the image does not say."""
        return None if self.extensions.identity is None else self.extensions.identity.guid

    @property
    def backing_identity(self) -> BackingIdentity | None:
        """Which disk the backing file has to be; None where that is not recorded for its name."""
        identity = self.extensions.identity
        return None if identity is None else identity.backing_of(self.backing_name)

    @property
    def encrypted(self) -> str | None:
        """`aes` or `luks` where guest clusters are encrypted."""
        return {CryptMethod.AES: "aes", CryptMethod.LUKS: "luks"}.get(
            CryptMethod(self.header.crypt_method)
        )

    @property
    def dirty(self) -> bool:
        """True where refcounts may be wrong: repair before writing."""
        return bool(self.header.incompatible_features & Incompatible.DIRTY)

    @property
    def corrupt(self) -> bool:
        """True where only reading and repair are allowed."""
        return bool(self.header.incompatible_features & Incompatible.CORRUPT)

    @property
    def lazy_refcounts(self) -> bool:
        """True where a writer may postpone refcount updates."""
        return bool(self.header.compatible_features & Compatible.LAZY_REFCOUNTS)

    @property
    def data_file(self) -> bool:
        """True where guest clusters lie in another file."""
        return bool(self.header.incompatible_features & Incompatible.DATA_FILE)

    @property
    def data_file_raw(self) -> bool:
        """True where that file alone is a valid raw image of the disk."""
        return bool(self.header.autoclear_features & Autoclear.DATA_FILE_RAW)

    @property
    def compression_type(self) -> str:
        """`zlib` or `zstd`."""
        return CompressionType(self.header.compression_type).name.lower()

    def find_snapshot(self, id_or_name: str) -> SnapshotEntry:
        """The snapshot with that id, else the first with that name. RequestError for none."""
        for entry in self.snapshots:
            if entry.id == id_or_name:
                return entry
        for entry in self.snapshots:
            if entry.name == id_or_name:
                return entry
        raise RequestError(f"there is no snapshot with the id or name {id_or_name!r}")


def load_qcow2_metadata(
    storage: Storage, *, budget: Budget = TRUSTED, for_check: bool = False
) -> Qcow2Metadata:
    """Read and judge all metadata but the mapping and the refcounts. Opens no other file.

    for_check: tolerate a missing refcount table, which a check reports and a repair rebuilds.
    Raises CorruptMetadata, UnsupportedFeature, BudgetExceeded and StorageError."""
    raw = _read_first_cluster(storage)
    header = Header.decode(raw)
    extensions = decode_extensions(
        raw,
        start=header.header_length,
        stop=min(header.backing_file_offset or header.cluster_size, header.cluster_size),
    )
    header.check(extensions.feature_names)
    _check_companions(header, extensions)
    _check_refcount_table(header, for_check=for_check)
    virtual_size = align_down(header.size, SECTOR)
    budget.spend("virtual size", value=virtual_size, limit=budget.virtual_size)
    file_size = storage.size()
    regions = _fixed_regions(header, extensions)
    check_inside(regions, cluster_size=header.cluster_size, file_size=file_size)
    snapshots, table_bytes = _load_snapshots(storage, header, virtual_size, budget)
    if table_bytes:
        regions += (Region("snapshot table", header.snapshots_offset, table_bytes),)
    check_disjoint(regions, cluster_size=header.cluster_size)
    bitmaps = _load_bitmaps(storage, header, extensions, virtual_size, budget)
    _check_lazy_tables(snapshots, bitmaps, header, file_size)
    return Qcow2Metadata(
        header=header,
        extensions=extensions,
        geometry=header.geometry,
        virtual_size=virtual_size,
        backing_name=_decode_backing_name(raw, header),
        snapshots=snapshots,
        snapshot_table_bytes=table_bytes,
        bitmaps=bitmaps,
        luks=_load_luks(storage, extensions),
        warnings=_warnings(header, extensions, virtual_size),
    )


def load_qcow2_guid(storage: Storage) -> UUID | None:
    """The GUID that the first cluster gives; nothing behind it is read or judged. None for a
    capsule, which has the header of the disk but is not the disk.

    Raises CorruptMetadata, UnsupportedFeature and StorageError."""
    raw = _read_first_cluster(storage)
    header = Header.decode(raw)
    stop = min(header.backing_file_offset or header.cluster_size, header.cluster_size)
    identity = decode_extensions(raw, start=header.header_length, stop=stop).identity
    return None if identity is None or header.capsule else identity.guid


def load_bitmap_table(storage: Storage, bitmap: BitmapEntry, *, geometry: Geometry) -> array[int]:
    """The entries of one bitmap's table, judged by row 36. At most 8 MiB are read.

    Raises CorruptMetadata and StorageError."""
    raw = storage.pread(bitmap.table_bytes, offset=bitmap.table_offset)
    # The file may end inside its last cluster.
    raw = raw.ljust(bitmap.table_bytes, b"\0")
    return decode_bitmap_table(raw, geometry=geometry, host_offset=bitmap.table_offset)


def _read_first_cluster(storage: Storage) -> bytes:
    """The first cluster, or what there is of it: the smallest read that cannot be too short."""
    head = storage.pread(SECTOR, offset=0)
    if len(head) < V2_HEADER_LENGTH:
        return head
    bits = min(int.from_bytes(head[20:24], "big"), MAX_CLUSTER_BITS)
    rest = (1 << bits) - len(head)
    if rest <= 0 or head[:4] != b"QFI\xfb":
        return head
    return head + storage.pread(rest, offset=len(head))


def _read_exactly(storage: Storage, length: int, *, offset: int, structure: str) -> bytes:
    raw = storage.pread(length, offset=offset)
    if len(raw) != length:
        reason = f"the file ends after {len(raw)} of its {length} bytes"
        raise CorruptMetadata(structure, host_offset=offset, reason=reason)
    return raw


def _decode_backing_name(raw: bytes, header: Header) -> str | None:
    offset, size = header.backing_file_offset, header.backing_file_size
    if not offset or not size:
        return None
    name = raw[offset : offset + size]
    if len(name) < size:
        reason = f"the file ends after {len(name)} of its {size} bytes"
        raise CorruptMetadata("backing file name", host_offset=offset, reason=reason)
    return decode_name(
        name, structure="backing file name", limit=MAX_BACKING_NAME, host_offset=offset
    )


def _check_companions(header: Header, extensions: Extensions) -> None:
    """Extensions that fields demand or forbid (rows 8, 13, 28 and 30)."""
    luks, crypto = header.crypt_method == CryptMethod.LUKS, extensions.crypto
    if luks and crypto is None:
        raise CorruptMetadata("crypto header extension", reason="missing, expected one for LUKS")
    if crypto is not None and not luks:
        method = header.crypt_method
        reason = f"present with encryption method {method}, expected only with 2 (LUKS)"
        raise CorruptMetadata("crypto header extension", reason=reason)
    if crypto is not None and crypto.length < LUKS_HEADER_BYTES:
        reason = f"{crypto.length} bytes, expected at least {LUKS_HEADER_BYTES}"
        raise CorruptMetadata("crypto header extension", reason=reason)
    external = header.incompatible_features & Incompatible.DATA_FILE
    if external and extensions.data_file is None:
        # Without a name the clusters would be looked for in the wrong file.
        raise CorruptMetadata(
            "data file name extension", reason="missing, expected one with an external data file"
        )
    if header.autoclear_features & Autoclear.BITMAPS and extensions.bitmaps is None:
        raise CorruptMetadata(
            "bitmaps extension", reason="missing, expected one while its autoclear bit is set"
        )


def _check_refcount_table(header: Header, *, for_check: bool) -> None:
    if not header.refcount_table_clusters and not for_check:
        raise CorruptMetadata(
            "header field refcount_table_clusters",
            host_offset=56,
            reason="0, expected at least 1; only a check may open the image",
        )


def _active_bitmaps(header: Header) -> bool:
    """False where the extension is stale: a writer that did not know it has cleared the bit."""
    return header.version >= 3 and bool(header.autoclear_features & Autoclear.BITMAPS)


def _fixed_regions(header: Header, extensions: Extensions) -> tuple[Region, ...]:
    """What must lie inside the file and apart, but for the snapshot table, whose end is unknown."""
    table_bytes = header.refcount_table_clusters << header.cluster_bits
    regions = [
        Region("header", 0, header.header_length),
        Region("L1 table", header.l1_table_offset, header.l1_bytes),
        Region("refcount table", header.refcount_table_offset, table_bytes),
    ]
    if extensions.crypto is not None:
        crypto = extensions.crypto
        regions.append(Region("crypto header", crypto.offset, crypto.length))
    if extensions.bitmaps is not None and _active_bitmaps(header):
        bitmaps = extensions.bitmaps
        regions.append(Region("bitmap directory", bitmaps.directory_offset, bitmaps.directory_size))
    return tuple(region for region in regions if region.length)


def _load_snapshots(
    storage: Storage, header: Header, virtual_size: int, budget: Budget
) -> tuple[tuple[SnapshotEntry, ...], int]:
    """The entries, and the bytes of the table. The first bad entry ends the walk."""
    entries: list[SnapshotEntry] = []
    ids: set[str] = set()
    table, end = header.snapshots_offset, 0
    geometry, limit = header.geometry, min(MAX_SNAPSHOT_TABLE_BYTES, budget.metadata_bytes)
    for index, (entry, end) in enumerate(_iter_snapshots(storage, header, virtual_size)):
        if end > MAX_SNAPSHOT_TABLE_BYTES:
            reason = f"{end} bytes, expected at most {MAX_SNAPSHOT_TABLE_BYTES}"
            raise CorruptMetadata("snapshot table", host_offset=table, index=index, reason=reason)
        budget.spend("snapshot table bytes", value=end, limit=limit)
        if entry.id in ids:
            reason = f"id {ascii(entry.id)} is there twice, expected unique ids"
            raise CorruptMetadata("snapshot table", host_offset=table, index=index, reason=reason)
        check_snapshot(entry, index=index, geometry=geometry, host_offset=table)
        ids.add(entry.id)
        entries.append(entry)
    return tuple(entries), end


def _iter_snapshots(
    storage: Storage, header: Header, virtual_size: int
) -> Iterator[tuple[SnapshotEntry, int]]:
    """Each entry with the byte of the table where it ends. Reads on only as far as they reach."""
    window = _Window(storage, header.snapshots_offset)
    position = 0
    for index in range(header.nb_snapshots):
        raw, offset = window.reach(position, MAX_SNAPSHOT_ENTRY)
        entry, end = decode_snapshot(
            raw,
            offset=offset,
            index=index,
            host_offset=header.snapshots_offset + position,
            version=header.version,
            image_size=virtual_size,
        )
        position += end - offset
        yield entry, position


def _load_bitmaps(
    storage: Storage, header: Header, extensions: Extensions, virtual_size: int, budget: Budget
) -> tuple[BitmapEntry, ...]:
    """Rows 31 to 35: exactly the promised entries, which fill the directory exactly."""
    extension = extensions.bitmaps
    if extension is None or not _active_bitmaps(header):
        return ()
    size, start = extension.directory_size, extension.directory_offset
    budget.spend("bitmap directory bytes", value=size, limit=budget.metadata_bytes)
    window = _Window(storage, start)
    entries: dict[str, BitmapEntry] = {}
    position = 0
    for index in range(extension.bitmap_count):
        raw, offset = window.reach(position, MAX_BITMAP_ENTRY)
        host, left = start + position, size - position
        entry, end = decode_bitmap(raw, offset=offset, left=left, index=index, host_offset=host)
        if entry.name in entries:
            reason = f"name {ascii(entry.name)} is there twice, expected unique names"
            raise CorruptMetadata("bitmap directory", host_offset=host, index=index, reason=reason)
        check_bitmap(
            entry,
            index=index,
            geometry=header.geometry,
            disk_size=virtual_size,
            host_offset=start,
        )
        entries[entry.name] = entry
        position += end - offset
    if position != size:
        reason = f"{len(entries)} entries of {position} bytes, expected to fill {size}"
        raise CorruptMetadata("bitmap directory", host_offset=start, reason=reason)
    return tuple(entries.values())


class _Window:
    """A table of unknown length, read forward in bounded pieces."""

    def __init__(self, storage: Storage, base: int) -> None:
        self._storage, self._base = storage, base
        self._raw, self._begin, self._last = b"", 0, False

    def reach(self, position: int, length: int) -> tuple[bytes, int]:
        """Bytes of the table, and the index in them of `position`; `length` bytes follow there,
        or fewer only where the file ends."""
        if not self._last and position + length > self._begin + len(self._raw):
            self._begin = position
            self._raw = self._storage.pread(_READ, offset=self._base + position)
            self._last = len(self._raw) < _READ
        return self._raw, position - self._begin


def _check_lazy_tables(
    snapshots: tuple[SnapshotEntry, ...],
    bitmaps: tuple[BitmapEntry, ...],
    header: Header,
    file_size: int,
) -> None:
    """Row 20 for the tables that are read only when they are asked for."""
    tables = [Region("snapshot L1 table", one.l1_offset, one.l1_bytes) for one in snapshots]
    tables += [Region("bitmap table", one.table_offset, one.table_bytes) for one in bitmaps]
    regions = tuple(region for region in tables if region.length)
    check_inside(regions, cluster_size=header.cluster_size, file_size=file_size)


def _load_luks(storage: Storage, extensions: Extensions) -> LuksHeader | None:
    crypto = extensions.crypto
    if crypto is None:
        return None
    raw = _read_exactly(storage, LUKS_HEADER_BYTES, offset=crypto.offset, structure="LUKS header")
    return LuksHeader.decode(raw, host_offset=crypto.offset, length=crypto.length)


def _warnings(header: Header, extensions: Extensions, virtual_size: int) -> tuple[str, ...]:
    found = []
    if header.capsule:
        found.append("this is a capsule: metadata of an image without its guest data")
    if header.crypt_method == CryptMethod.AES:
        found.append(LEGACY_AES)
    if header.size != virtual_size:
        found.append(f"the size {header.size} is not a whole number of sectors and is cut")
    if extensions.bitmaps is not None and not _active_bitmaps(header):
        found.append("the bitmaps are stale and ignored: their autoclear bit is clear")
    if (
        extensions.data_file is not None
        and not header.incompatible_features & Incompatible.DATA_FILE
    ):
        found.append("the data file name is ignored: the image has no external data file")
    if header.backing_file_offset and not header.backing_file_size:
        found.append("the backing file name is empty and ignored")
    return tuple(found)
