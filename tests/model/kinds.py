"""The kinds of disks that are compared with a plain array of bytes, made in memory.

Each is small enough that its tables grow, shrink and wrap within a few dozen requests."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.compression import make_compressor
from qcowkit.engine.options import DEFAULT_OPTIONS, OpenOptions, Secrets
from qcowkit.image.chain import Chain
from qcowkit.image.lineage import Layer
from qcowkit.image.metadata import load_metadata
from qcowkit.image.registry import build_chain
from qcowkit.operations.create import CreateOptions, OptionValue, open_target
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import (
    Cluster,
    Compressed,
    Data,
    ImageSpec,
    SnapshotSpec,
    Zero,
    build_qcow2,
)
from qcowkit.units import KiB, MiB

_BASE_BITS = 12
_COMPRESS = make_compressor("zlib", None)
SNAPSHOT = "1"


class ModelStorage(MemoryStorage):
    """Memory that is opened again and again. hollow: whether a discard leaves zeros behind; a host
    may as well do nothing."""

    def __init__(self, data: bytes = b"", *, name: str = "<image>", hollow: bool = True) -> None:
        super().__init__(data, name=name)
        self._hollow = hollow

    def discard(self, *, offset: int, length: int) -> None:
        if self._hollow:
            super().discard(offset=offset, length=length)

    def close(self) -> None:
        """The next opening takes up where this one ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A backing file: its format and its size in bytes, a multiple of 4 KiB. Every third of its
    clusters has no data."""

    format: str
    size: int

    def content(self) -> bytes:
        """What it holds."""
        return b"".join(self._payload(index) for index in range(self.size >> _BASE_BITS))

    def _payload(self, index: int) -> bytes:
        if index % 3 == 2:
            return bytes(1 << _BASE_BITS)
        return random.Random(index).randbytes(1 << _BASE_BITS)

    def to_bytes(self) -> bytes:
        """The file."""
        if self.format == "raw":
            return self.content()
        clusters: dict[int, Cluster] = {
            index: self._payload(index) for index in range(self.size >> _BASE_BITS)
        }
        for index in range(2, self.size >> _BASE_BITS, 3):
            # Zero clusters and none at all, by turns.
            if index % 2:
                clusters[index] = Zero()
            else:
                del clusters[index]
        return build_qcow2(size=self.size, cluster_bits=_BASE_BITS, clusters=clusters).to_bytes()

    def open(self) -> Layer:
        """A layer of its own."""
        storage = MemoryStorage(self.to_bytes(), name="<base>", writable=False)
        return Layer(storage=storage, metadata=load_metadata(storage, self.format, budget=TRUSTED))


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What one disk consists of, without what lies below it."""

    image: ModelStorage
    data: ModelStorage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelKind:
    """One kind of image. size, capacity: guest bytes at first and at most.

    options: of its creation. spec: an image of the builder in place of a created one. base: what
    lies below. data_file: guest data lie in a second file. open_options: of every opening for
    writing. hollow: see `ModelStorage`. secret: the passphrase where the disk is encrypted."""

    name: str
    size: int
    capacity: int
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    spec: ImageSpec | None = None
    base: Base | None = None
    data_file: bool = False
    open_options: OpenOptions = DEFAULT_OPTIONS
    hollow: bool = True
    secret: bytes | None = None

    @property
    def cluster_size(self) -> int:
        if self.spec is not None:
            return 1 << self.spec.cluster_bits
        return int(self.options.get("cluster_size", 64 * KiB))

    @property
    def extended(self) -> bool:
        """Whether there are subclusters."""
        return bool(self.spec.extended_l2 if self.spec else self.options.get("extended_l2"))

    @property
    def version(self) -> int:
        if self.spec is not None:
            return self.spec.version
        return 2 if self.options.get("compat") == "0.10" else 3

    @property
    def has_snapshot(self) -> bool:
        """Whether there is a snapshot of the disk as it was at first."""
        return self.spec is not None and bool(self.spec.snapshots)

    @property
    def lazy(self) -> bool:
        """Whether counts may be behind until the image is closed."""
        wish = self.open_options.lazy_refcounts
        return bool(self.options.get("lazy_refcounts")) if wish is None else wish

    @property
    def raw_data(self) -> bool:
        """Whether the data file is the disk by itself."""
        return bool(self.options.get("data_file_raw"))

    def make(self) -> Files:
        """A new disk."""
        image = ModelStorage(hollow=self.hollow)
        if self.spec is not None:
            return Files(image=ModelStorage(build_qcow2(self.spec).to_bytes(), hollow=self.hollow))
        data = ModelStorage(name="<data>", hollow=self.hollow) if self.data_file else None
        values = dict(self.options)
        if data is not None:
            values["data_file"] = "data"
        if self.base is not None:
            values |= {"backing_file": "base", "backing_fmt": self.base.format}
        target, _ = open_target(
            image,
            CreateOptions(format="qcow2", values=values, secret=self.secret),
            size=self.size,
            data_storage=data,
        )
        target.finish()
        if data is not None:
            data.truncate(self.size)
        return Files(image=image, data=data)

    def initial(self) -> bytes:
        """What a new disk holds."""
        if self.spec is not None:
            return _content_of(self.spec)
        below = self.base.content() if self.base is not None else b""
        return below[: self.size].ljust(self.size, b"\0")

    def open(self, files: Files, *, writable: bool = True, snapshot: str | None = None) -> Chain:
        """The disk over its files."""
        metadata = load_metadata(files.image, "qcow2", budget=TRUSTED)
        layers = [Layer(storage=files.image, metadata=metadata, data_storage=files.data)]
        if self.base is not None:
            layers.append(self.base.open())
        options = self.open_options if writable else DEFAULT_OPTIONS
        options = replace(options, secrets=Secrets(other=self.secret))
        return build_chain(layers, writable=writable, snapshot=snapshot, options=options)


def _content_of(spec: ImageSpec) -> bytes:
    size = 1 << spec.cluster_bits
    content = bytearray(spec.size)
    for index, cluster in spec.clusters.items():
        if isinstance(cluster, Data):
            cluster = cluster.payload
        if isinstance(cluster, bytes):
            content[index * size : (index + 1) * size] = cluster.ljust(size, b"\0")
        elif isinstance(cluster, Compressed):
            content[index * size : (index + 1) * size] = _PLAIN[cluster.payload]
    return bytes(content[: spec.size])


def _squeeze(content: bytes) -> Compressed:
    packed = _COMPRESS(content)
    _PLAIN[packed] = content
    return Compressed(payload=packed)


_PLAIN: dict[bytes, bytes] = {}


def _with_snapshot(*, bits: int, clusters: int, **changes: object) -> ImageSpec:
    """An image with clusters of every state, and a snapshot that shares them all."""
    size = 1 << bits
    content: dict[int, Cluster] = {}
    for index in range(clusters):
        noise = random.Random(index)
        content[index] = (
            noise.randbytes(size),
            Zero(),
            _squeeze(noise.randbytes(64) * (size // 64)),
            Zero(payload=noise.randbytes(size)),
            noise.randbytes(size // 2),
        )[index % 5]
    for index in range(6, clusters, 7):
        content.pop(index)
    return ImageSpec(
        size=clusters * size,
        cluster_bits=bits,
        clusters=content,
        snapshots=(SnapshotSpec(id=SNAPSHOT, name="first"),),
        **changes,  # type: ignore[arg-type]
    )


def _with_version_2_snapshot() -> ImageSpec:
    """Version 2 has no zero clusters, and its snapshots no size of their own."""
    spec = _with_snapshot(bits=12, clusters=128, version=2)
    kept = {index: one for index, one in spec.clusters.items() if not isinstance(one, Zero)}
    return replace(spec, clusters=kept)


_TIGHT = OpenOptions(l2_cache_size=512, l2_cache_entry_size=512, refcount_cache_size=0)
_EAGER = OpenOptions(discard=True, pass_discard_other=True, overlap_check="all")
_KEEPING = OpenOptions(discard=True, discard_no_unref=True)
_512 = {"cluster_size": 512}
_LUKS: Mapping[str, OptionValue] = {
    "encrypt.format": "luks",
    "encrypt.cipher-alg": "aes-128",
    "encrypt.iter-time": 1,
}

KINDS = {
    kind.name: kind
    for kind in (
        ModelKind(name="clusters of 512", size=96 * KiB, capacity=256 * KiB, options=_512),
        ModelKind(
            name="clusters of 4 KiB, discards passed down",
            size=700 * KiB - 512,
            capacity=2560 * KiB,
            options={"cluster_size": 4 * KiB},
            open_options=_EAGER,
        ),
        ModelKind(name="clusters of 64 KiB", size=2 * MiB + 512, capacity=4 * MiB),
        ModelKind(
            name="clusters of 2 MiB, small slices",
            size=5 * MiB + 1536,
            capacity=11 * MiB,
            options={"cluster_size": 2 * MiB},
            open_options=_TIGHT,
        ),
        *(
            ModelKind(
                name=f"{bits} bits a refcount",
                size=64 * KiB,
                capacity=160 * KiB,
                options={"cluster_size": 512, "refcount_bits": bits},
                open_options=_EAGER if bits in (1, 64) else DEFAULT_OPTIONS,
            )
            for bits in (1, 2, 4, 8, 32, 64)
        ),
        ModelKind(
            name="refcount table grows",
            size=2304 * KiB,
            capacity=3 * MiB,
            options={"cluster_size": 512, "refcount_bits": 64},
        ),
        ModelKind(
            name="subclusters",
            size=384 * KiB + 512,
            capacity=768 * KiB,
            options={"cluster_size": 16 * KiB, "extended_l2": True},
            open_options=_EAGER,
        ),
        ModelKind(
            name="subclusters, shorter base",
            size=512 * KiB,
            capacity=768 * KiB,
            options={"cluster_size": 16 * KiB, "extended_l2": True},
            base=Base(format="qcow2", size=308 * KiB),
        ),
        ModelKind(
            name="subclusters, longer base, least caches",
            size=1 * MiB - 1536,
            capacity=3 * MiB,
            options={"cluster_size": 64 * KiB, "extended_l2": True},
            base=Base(format="raw", size=2 * MiB),
            open_options=_TIGHT,
        ),
        ModelKind(
            name="version 2",
            size=64 * KiB,
            capacity=160 * KiB,
            options={"cluster_size": 512, "compat": "0.10"},
            open_options=OpenOptions(discard=True),
        ),
        ModelKind(
            name="version 2, base",
            size=128 * KiB,
            capacity=256 * KiB,
            options={"cluster_size": 1 * KiB, "compat": "0.10"},
            base=Base(format="raw", size=100 * KiB),
        ),
        ModelKind(
            name="lazy refcounts",
            size=64 * KiB,
            capacity=160 * KiB,
            options={"cluster_size": 512, "lazy_refcounts": True},
        ),
        ModelKind(
            name="lazy refcounts, subclusters, base",
            size=384 * KiB,
            capacity=512 * KiB,
            options={"cluster_size": 16 * KiB, "extended_l2": True, "lazy_refcounts": True},
            base=Base(format="raw", size=500 * KiB),
            open_options=_TIGHT,
        ),
        ModelKind(
            name="data file",
            size=64 * KiB - 512,
            capacity=160 * KiB,
            options={"cluster_size": 1 * KiB},
            data_file=True,
            open_options=OpenOptions(discard=True),
        ),
        ModelKind(
            name="data file, subclusters, base",
            size=256 * KiB,
            capacity=512 * KiB,
            options={"cluster_size": 16 * KiB, "extended_l2": True},
            base=Base(format="qcow2", size=300 * KiB),
            data_file=True,
        ),
        ModelKind(
            name="raw data file",
            size=64 * KiB,
            capacity=160 * KiB,
            options={"cluster_size": 512, "data_file_raw": True},
            data_file=True,
            open_options=OpenOptions(discard=True),
        ),
        ModelKind(
            name="raw data file, subclusters",
            size=384 * KiB + 512,
            capacity=512 * KiB,
            options={"cluster_size": 16 * KiB, "data_file_raw": True, "extended_l2": True},
            data_file=True,
        ),
        ModelKind(
            name="shorter raw base",
            size=192 * KiB + 512,
            capacity=320 * KiB,
            options={"cluster_size": 1 * KiB},
            base=Base(format="raw", size=100 * KiB),
        ),
        ModelKind(
            name="longer raw base, discards that do nothing",
            size=512 * KiB,
            capacity=1280 * KiB,
            options={"cluster_size": 4 * KiB},
            base=Base(format="raw", size=1 * MiB),
            open_options=_EAGER,
            hollow=False,
        ),
        ModelKind(
            name="shorter qcow2 base",
            size=2 * MiB,
            capacity=3 * MiB,
            base=Base(format="qcow2", size=1 * MiB + 4 * KiB),
        ),
        ModelKind(
            name="longer qcow2 base",
            size=64 * KiB + 512,
            capacity=160 * KiB,
            options=_512,
            base=Base(format="qcow2", size=128 * KiB),
            open_options=_TIGHT,
        ),
        ModelKind(
            name="snapshot",
            size=64 * KiB,
            capacity=160 * KiB,
            spec=_with_snapshot(bits=9, clusters=128),
        ),
        ModelKind(
            name="snapshot, subclusters, all checks",
            size=384 * KiB,
            capacity=768 * KiB,
            spec=_with_snapshot(bits=14, clusters=24, extended_l2=True),
            open_options=_EAGER,
        ),
        ModelKind(
            name="snapshot, a table for the VM state, least caches",
            size=120 * KiB,
            capacity=320 * KiB,
            spec=_with_snapshot(bits=10, clusters=120, refcount_order=5, l1_size=7),
            open_options=_TIGHT,
        ),
        ModelKind(
            name="snapshot, version 2",
            size=512 * KiB,
            capacity=768 * KiB,
            spec=_with_version_2_snapshot(),
        ),
        ModelKind(
            name="least caches",
            size=128 * KiB,
            capacity=256 * KiB,
            options=_512,
            open_options=_TIGHT,
        ),
        ModelKind(
            name="discarded clusters keep their place",
            size=96 * KiB,
            capacity=160 * KiB,
            options=_512,
            open_options=_KEEPING,
        ),
        ModelKind(
            name="discarded clusters keep their place and content, subclusters, base",
            size=256 * KiB + 512,
            capacity=512 * KiB,
            options={"cluster_size": 16 * KiB, "extended_l2": True},
            base=Base(format="qcow2", size=200 * KiB),
            open_options=_KEEPING,
            hollow=False,
        ),
        ModelKind(
            name="luks",
            size=256 * KiB,
            capacity=512 * KiB,
            options={"cluster_size": 4 * KiB, **_LUKS},
            open_options=_EAGER,
            secret=b"model",
        ),
        ModelKind(
            name="luks, subclusters, longer base",
            size=384 * KiB + 512,
            capacity=768 * KiB,
            options={"cluster_size": 16 * KiB, "extended_l2": True, **_LUKS},
            base=Base(format="raw", size=500 * KiB),
            open_options=_TIGHT,
            secret=b"model",
        ),
        ModelKind(
            name="luks, data file, cluster by cluster",
            size=2 * MiB + 512,
            capacity=4 * MiB,
            options=_LUKS,
            data_file=True,
            open_options=_KEEPING,
            secret=b"model",
        ),
        ModelKind(
            name="legacy encryption",
            size=64 * KiB,
            capacity=160 * KiB,
            options={"cluster_size": 512, "encrypt.format": "aes"},
            secret=b"model",
        ),
        ModelKind(
            name="legacy encryption, version 2, shorter base",
            size=128 * KiB,
            capacity=256 * KiB,
            options={"cluster_size": 1 * KiB, "compat": "0.10", "encrypt.format": "aes"},
            base=Base(format="qcow2", size=100 * KiB),
            secret=b"model",
        ),
        ModelKind(
            name="zstd, no checks of overlaps",
            size=256 * KiB,
            capacity=512 * KiB,
            options={"cluster_size": 4 * KiB, "compression_type": "zstd"},
            open_options=OpenOptions(overlap_check="none", discard=True),
        ),
    )
}
