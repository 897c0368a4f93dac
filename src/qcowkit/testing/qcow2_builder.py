"""Small, sound qcow2 images as bytes, with knobs, and a way to spoil them. Numpy-free.

Everything is laid out one structure after the other and counted as it is referenced; refcounts come
last. Written for clarity and independence from the engine, whose tests rely on it."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from qcowkit.codecs.qcow2.bitmaps import BitmapEntry, BitmapFlag, encode_bitmap_directory
from qcowkit.codecs.qcow2.extensions import (
    BitmapsExtension,
    CryptoExtension,
    Extension,
    Extensions,
    encode_first_cluster,
)
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.codecs.qcow2.header import FIELD_OFFSETS, Autoclear, CryptMethod, Header, new_header
from qcowkit.codecs.qcow2.snapshots import SnapshotEntry, encode_snapshots
from qcowkit.units import align_up, ceil_div

_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_ALL_ALLOCATED = 0xFFFF_FFFF
_ALL_ZERO = _ALL_ALLOCATED << 32
# The fields of the header that are 8 bytes wide; all others have 4, but for the compression type.
_WIDE_FIELDS = frozenset(
    ("backing_file_offset", "size", "l1_table_offset", "refcount_table_offset")
    + ("snapshots_offset", "incompatible_features", "compatible_features", "autoclear_features")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """A cluster with content. `bitmap`: the second word under extended L2 entries."""

    payload: bytes
    bitmap: int = _ALL_ALLOCATED


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero:
    """A cluster that reads as zeros. `payload`: what its host cluster holds, if it has one."""

    payload: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """A compressed cluster. `payload`: the stored bytes, packed behind the previous ones."""

    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Verbatim:
    """An L2 entry as it stands, counted nowhere: for states that only tests want."""

    word: int
    bitmap: int = 0


Cluster = bytes | Data | Zero | Compressed | Verbatim
Clusters = Mapping[int, Cluster]


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotSpec:
    """An internal snapshot. `clusters`: its own content, or None to share the active tables."""

    id: str
    name: str = ""
    clusters: Clusters | None = None
    disk_size: int | None = None
    date_sec: int = 0
    date_nsec: int = 0
    vm_clock_nsec: int = 0
    vm_state_size: int = 0
    icount: int | None = None
    unknown_extra: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapSpec:
    """A persistent bitmap. `bits`: least significant bit first, zeros behind its end."""

    name: str
    bits: bytes = b""
    granularity_bits: int = 16
    flags: int = int(BitmapFlag.AUTO)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """What to build; the defaults give an empty disk of 1 MiB in clusters of 4 KiB.

    clusters: by guest cluster index. l1_size: entries, at least what the disk needs. luks: a whole
    LUKS header area. data_file_name: makes guest clusters external. unknown: extensions verbatim;
    one of a known type may be among them."""

    size: int = 1 << 20
    version: int = 3
    cluster_bits: int = 12
    refcount_order: int = 4
    extended_l2: bool = False
    compression_type: int = 0
    lazy_refcounts: bool = False
    crypt_method: int = 0
    clusters: Clusters = field(default_factory=dict)
    l1_size: int = 0
    snapshots: Sequence[SnapshotSpec] = ()
    bitmaps: Sequence[BitmapSpec] = ()
    luks: bytes | None = None
    backing_name: str | None = None
    backing_format: str | None = None
    data_file_name: str | None = None
    data_file_raw: bool = False
    unknown: Sequence[Extension] = ()
    unknown_fields: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltImage:
    """The bytes of an image and the places of its structures, to be spoiled with `patch`.

    places: host offsets by name: `l1`, `refcount_table`, `refcount_block`, `snapshots`,
    `bitmaps`, `crypto`; also `l2` for the first L2 table and `bitmap_table` for the first bitmap's.
    external: the data file, where there is one."""

    data: bytearray
    header: Header
    places: dict[str, int]
    external: bytearray | None = None

    def to_bytes(self) -> bytes:
        """The file."""
        return bytes(self.data)

    def patch(self, offset: int, value: bytes | int, *, width: int = 8) -> BuiltImage:
        """Overwrite bytes, or a big-endian integer of `width` bytes, at a host offset."""
        raw = value if isinstance(value, bytes) else value.to_bytes(width, "big")
        self.data[offset : offset + len(raw)] = raw
        return self

    def set_field(self, name: str, value: int) -> BuiltImage:
        """Overwrite one header field, by its name in the specification."""
        width = 8 if name in _WIDE_FIELDS else 1 if name == "compression_type" else 4
        return self.patch(FIELD_OFFSETS[name], value, width=width)

    def cut(self, size: int) -> BuiltImage:
        """Cut the file, or extend it with zeros, to `size` bytes."""
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        return self


def build_qcow2(spec: ImageSpec | None = None, **changes: object) -> BuiltImage:
    """The image of `spec`, or of the default one, with the named fields changed."""
    chosen = replace(spec or ImageSpec(), **changes)  # type: ignore[arg-type]
    return _Builder(chosen).build()


def make_luks_area(
    *, key_bytes: int = 64, mode: str = "xts-plain64", active: Sequence[int] = (0,)
) -> bytes:
    """A LUKS1 header with key slots as qemu places them, and nothing in them."""
    slot_bytes = align_up(key_bytes * 4000, 4096)
    total = 4096 + 8 * slot_bytes
    raw = struct.pack(">6sH", b"LUKS\xba\xbe", 1)
    raw += b"aes".ljust(32, b"\0") + mode.encode().ljust(32, b"\0") + b"sha256".ljust(32, b"\0")
    raw += struct.pack(">II", total // 512, key_bytes) + bytes(20 + 32)
    raw += struct.pack(">I", 1000) + b"01234567-89ab-cdef-0123-456789abcdef".ljust(40, b"\0")
    for index in range(8):
        state, iterations = (0x00AC71F3, 1000) if index in active else (0x0000DEAD, 0)
        offset = (4096 + index * slot_bytes) // 512
        raw += struct.pack(">II32sII", state, iterations, b"", offset, 4000)
    return raw.ljust(total, b"\0")


class _Builder:
    """Host clusters in the order of their allocation. `counts`: references by cluster index."""

    def __init__(self, spec: ImageSpec) -> None:
        self.spec = spec
        self.geometry = Geometry(
            cluster_bits=spec.cluster_bits,
            refcount_order=spec.refcount_order,
            extended_l2=spec.extended_l2,
        )
        self.cluster_size = self.geometry.cluster_size
        self.data = bytearray(self.cluster_size)
        self.counts: Counter[int] = Counter({0: 1})
        self.places: dict[str, int] = {}
        # Host offsets of words of the active tables, and the cluster that each refers to.
        self.copied: list[tuple[int, int]] = []
        # References below the active L1, for snapshots that share it.
        self.tree: list[int] = []
        self.packed = 0
        self.external = bytearray(spec.size) if spec.data_file_name is not None else None

    def build(self) -> BuiltImage:
        """Everything in turn; the header last."""
        spec = self.spec
        entries = max(self.geometry.l1_entries(spec.size), spec.l1_size)
        l1 = self._add_l1(spec.clusters, entries, active=True)
        snapshots = self._add_snapshots(l1, entries)
        extensions = Extensions(
            backing_format=spec.backing_format,
            data_file=spec.data_file_name,
            bitmaps=self._add_bitmaps(),
            crypto=self._add_crypto(),
            unknown=tuple(spec.unknown),
        )
        table, table_clusters = self._add_refcounts()
        for place, index in self.copied:
            if self.counts[index] == 1:
                self.data[place] |= 0x80
        header = replace(
            self._new_header(),
            l1_size=entries,
            l1_table_offset=l1,
            nb_snapshots=len(spec.snapshots),
            snapshots_offset=snapshots,
            refcount_table_offset=table,
            refcount_table_clusters=table_clusters,
        )
        first = encode_first_cluster(header, extensions, spec.backing_name)
        self.data[: self.cluster_size] = first
        return BuiltImage(
            data=self.data,
            header=Header.decode(first),
            places=self.places,
            external=self.external,
        )

    def _new_header(self) -> Header:
        spec = self.spec
        header = new_header(
            self.geometry,
            size=spec.size,
            version=spec.version,
            compression_type=spec.compression_type,
            crypt_method=CryptMethod.LUKS if spec.luks is not None else spec.crypt_method,
            lazy_refcounts=spec.lazy_refcounts,
            data_file=spec.data_file_name is not None,
            data_file_raw=spec.data_file_raw,
        )
        if spec.bitmaps:
            bits = header.autoclear_features | Autoclear.BITMAPS
            header = replace(header, autoclear_features=int(bits))
        if spec.unknown_fields:
            header = replace(header, unknown=header.unknown + spec.unknown_fields)
        return header

    def _allocate(self, content: bytes, place: str | None = None) -> int:
        """New clusters at the end of the file, each counted once. The host offset."""
        offset = len(self.data)
        self.data += content.ljust(align_up(len(content), self.cluster_size), b"\0")
        for index in range(offset // self.cluster_size, len(self.data) // self.cluster_size):
            self.counts[index] += 1
        if place is not None:
            self.places.setdefault(place, offset)
        return offset

    def _refer(self, place: int, host: int, *, active: bool) -> None:
        if active:
            self.copied.append((place, host // self.cluster_size))
            self.tree.append(host // self.cluster_size)

    def _write_word(self, offset: int, value: int) -> None:
        self.data[offset : offset + 8] = value.to_bytes(8, "big")

    def _add_l1(self, clusters: Clusters, entries: int, *, active: bool) -> int:
        l1 = self._allocate(bytes(entries * 8), "l1" if active else None)
        per_table = self.geometry.l2_entries
        tables: dict[int, int] = {}
        for index in sorted(clusters):
            which, slot = divmod(index, per_table)
            if which not in tables:
                tables[which] = self._allocate(bytes(self.cluster_size), "l2" if active else None)
                self._write_word(l1 + which * 8, tables[which])
                self._refer(l1 + which * 8, tables[which], active=active)
            place = tables[which] + slot * self.geometry.l2_entry_size
            self._add_cluster(place, index, clusters[index], active=active)
        return l1

    def _add_cluster(self, place: int, index: int, cluster: Cluster, *, active: bool) -> None:
        extended = self.geometry.extended_l2
        bitmap = 0
        match cluster:
            case Compressed(payload=payload):
                word = self._pack(payload, active=active)
            case Verbatim(word=word, bitmap=bitmap):
                pass
            case Zero(payload=None):
                word, bitmap = (0, _ALL_ZERO) if extended else (1, 0)
            case Zero(payload=bytes() as payload):
                host = self._add_content(place, index, payload, active=active)
                word, bitmap = (host, _ALL_ZERO) if extended else (host | 1, 0)
            case Data(payload=payload, bitmap=bitmap):
                word = self._add_content(place, index, payload, active=active)
            case bytes() as payload:
                word = self._add_content(place, index, payload, active=active)
                bitmap = _ALL_ALLOCATED
            case _:
                raise AssertionError(cluster)
        self._write_word(place, word)
        if extended:
            self._write_word(place + 8, bitmap)

    def _add_content(self, place: int, index: int, payload: bytes, *, active: bool) -> int:
        """The word of a host cluster with that content; COPIED is set later, but for data files."""
        if self.external is not None:
            host = index * self.cluster_size
            self.external[host : host + len(payload)] = payload
            return host | _COPIED
        host = self._allocate(payload.ljust(self.cluster_size, b"\0"))
        self._refer(place, host, active=active)
        return host

    def _pack(self, payload: bytes, *, active: bool) -> int:
        """The descriptor of compressed bytes, behind the previous ones where that is possible."""
        if not self.packed or align_up(self.packed, self.cluster_size) != len(self.data):
            self.packed = len(self.data)
        host, end = self.packed, self.packed + len(payload)
        self.data.extend(bytes(max(0, align_up(end, self.cluster_size) - len(self.data))))
        self.data[host:end] = payload
        self.packed = end
        for index in range(host // self.cluster_size, ceil_div(end, self.cluster_size)):
            self.counts[index] += 1
            if active:
                self.tree.append(index)
        sectors = (host % 512 + len(payload) - 1) // 512
        return _COMPRESSED | sectors << self.geometry.compressed_offset_bits | host

    def _add_snapshots(self, active_l1: int, active_entries: int) -> int:
        entries = []
        for spec in self.spec.snapshots:
            size = self.spec.size if spec.disk_size is None else spec.disk_size
            if spec.clusters is None:
                count = active_entries
                l1 = self._allocate(bytes(self.data[active_l1 : active_l1 + count * 8]))
                self.counts.update(self.tree)
            else:
                count = self.geometry.l1_entries(size)
                l1 = self._add_l1(spec.clusters, count, active=False)
            entries.append(
                SnapshotEntry(
                    id=spec.id,
                    name=spec.name,
                    l1_offset=l1,
                    l1_entries=count,
                    date_sec=spec.date_sec,
                    date_nsec=spec.date_nsec,
                    vm_clock_nsec=spec.vm_clock_nsec,
                    vm_state_size=spec.vm_state_size,
                    disk_size=size,
                    icount=spec.icount,
                    unknown_extra=spec.unknown_extra,
                )
            )
        return self._allocate(encode_snapshots(entries), "snapshots") if entries else 0

    def _add_bitmaps(self) -> BitmapsExtension | None:
        entries = []
        for spec in self.spec.bitmaps:
            granularity = 1 << spec.granularity_bits
            needed = ceil_div(ceil_div(self.spec.size, granularity), 8)
            count = max(1, ceil_div(needed, self.cluster_size))
            bits = spec.bits.ljust(count * self.cluster_size, b"\0")
            pieces = [
                bits[start : start + self.cluster_size]
                for start in range(0, len(bits), self.cluster_size)
            ]
            words = [self._allocate(piece) if any(piece) else 0 for piece in pieces]
            table = self._allocate(struct.pack(f">{count}Q", *words), "bitmap_table")
            entries.append(
                BitmapEntry(
                    name=spec.name,
                    table_offset=table,
                    table_entries=count,
                    granularity_bits=spec.granularity_bits,
                    flags=spec.flags,
                )
            )
        if not entries:
            return None
        raw = encode_bitmap_directory(entries)
        offset = self._allocate(raw, "bitmaps")
        return BitmapsExtension(
            bitmap_count=len(entries), directory_size=len(raw), directory_offset=offset
        )

    def _add_crypto(self) -> CryptoExtension | None:
        luks = self.spec.luks
        if luks is None:
            return None
        return CryptoExtension(offset=self._allocate(luks, "crypto"), length=len(luks))

    def _add_refcounts(self) -> tuple[int, int]:
        """Table and blocks, which count themselves: (host offset, clusters) of the table."""
        used, per_block = len(self.data) // self.cluster_size, self.geometry.refcounts_per_block
        blocks = tables = 1
        while True:
            needed = ceil_div(used + blocks + tables, per_block)
            needed_tables = ceil_div(needed * 8, self.cluster_size)
            if (needed, needed_tables) == (blocks, tables):
                break
            blocks, tables = needed, needed_tables
        first_block = (used + tables) * self.cluster_size
        words = [first_block + index * self.cluster_size for index in range(blocks)]
        table = self._allocate(
            struct.pack(f">{blocks}Q", *words).ljust(tables * self.cluster_size, b"\0"),
            "refcount_table",
        )
        place = self._allocate(bytes(blocks * self.cluster_size), "refcount_block")
        assert place == first_block, "the blocks do not follow the table"
        counts = [self.counts[index] for index in range(blocks * per_block)]
        raw = _encode_counts(counts, self.geometry.refcount_bits)
        self.data[place : place + len(raw)] = raw
        return table, tables


def _encode_counts(counts: Sequence[int], bits: int) -> bytes:
    """Narrow counts fill a byte from its least significant bits; wide ones are big-endian."""
    assert max(counts) < 1 << bits, "a refcount does not fit"
    if bits >= 8:
        return b"".join(count.to_bytes(bits // 8, "big") for count in counts)
    per_byte = 8 // bits
    groups = (counts[start : start + per_byte] for start in range(0, len(counts), per_byte))
    return bytes(sum(count << slot * bits for slot, count in enumerate(group)) for group in groups)
