"""Disks to be crashed: every kind of image, made in memory and small.

Clusters of 512 bytes make tables that are full after a few writes, so that every growth happens
within a short run. Reliability reference, section 3.4, "Workloads"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.header import FIELD_OFFSETS
from qcowkit.engine.options import DEFAULT_OPTIONS, OpenOptions, Secrets
from qcowkit.image.chain import Chain
from qcowkit.image.lineage import Layer
from qcowkit.image.metadata import load_metadata
from qcowkit.image.registry import build_chain
from qcowkit.operations.create import CreateOptions, OptionValue, open_target
from qcowkit.testing.crash_effects import Content
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.testing.guest_log import Int64Array, sector_values
from qcowkit.testing.stamps import make_stamps
from qcowkit.units import SECTOR, KiB

# What sectors of the backing file hold, and those written before the journal begins. Even: they
# may be compressed.
BACKING_VALUE = 2
FILLED_VALUE = 4
_FILL_STEP = 64 * KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskKind:
    """One kind of image. size, capacity, backing, filled: guest bytes.

    format: raw, qcow2 or vpc. options: of its creation. capacity: the largest size it may get, its
    own size if 0. backing: of the raw file below, 0 for none. filled: written and flushed before
    the journal begins, so that a run starts close to a growth. data_file: guest data lie in a
    second file. open_options: of every opening for writing. discard_clears: see `CrashFiles`.
    autoclear: feature bits of a program that nobody knows, set in the header at the start. secret:
    the passphrase of an encrypted image."""

    name: str
    format: str = "qcow2"
    size: int = 64 * KiB
    capacity: int = 0
    backing: int = 0
    filled: int = 0
    data_file: bool = False
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    open_options: OpenOptions = DEFAULT_OPTIONS
    discard_clears: bool = True
    autoclear: int = 0
    secret: bytes | None = None

    @property
    def cluster_size(self) -> int:
        """Bytes that are given out at once."""
        return int(self.options.get("cluster_size", 64 * KiB)) if self.format == "qcow2" else 512

    @property
    def compresses(self) -> bool:
        """Whether compressed clusters can be written."""
        return self.format == "qcow2" and not self.data_file and self.secret is None

    @property
    def sectors(self) -> int:
        """Guest sectors of the largest size."""
        return max(self.size, self.capacity) // SECTOR

    def backing_values(self) -> Int64Array:
        """What the layer below holds, by sector."""
        count = self.backing // SECTOR
        return sector_values(count, [(0, count, BACKING_VALUE)])

    def initial_values(self) -> Int64Array:
        """What a new disk holds, by sector."""
        below, filled = self.backing // SECTOR, self.filled // SECTOR
        runs = [(0, below, BACKING_VALUE), (0, filled, FILLED_VALUE)]
        return sector_values(self.size // SECTOR, runs)

    def make(self) -> CrashFiles:
        """A new disk, complete and durable; the journal is empty."""
        names = ("<image>", "<data file>") if self.data_file else ("<image>",)
        contents = [Content() for _ in names]
        files = CrashFiles(contents, names=names, discard_clears=self.discard_clears)
        values = dict(self.options)
        if self.data_file:
            values["data_file"] = "data"
        if self.backing:
            values |= {"backing_file": "base", "backing_fmt": "raw"}
        options = CreateOptions(format=self.format, values=values, secret=self.secret)
        data = files.open(1) if self.data_file else None
        target, _ = open_target(files.open(), options, size=self.size, data_storage=data)
        target.finish()
        if data is not None:
            data.truncate(self.size)
        if self.filled:
            self._fill(files)
        if self.autoclear:
            place = FIELD_OFFSETS["autoclear_features"]
            files.open().pwrite([self.autoclear.to_bytes(8, "big")], offset=place)
        files.begin()
        return files

    def _fill(self, files: CrashFiles) -> None:
        with self.open(files, writable=True) as chain:
            for offset in range(0, self.filled, _FILL_STEP):
                count = min(_FILL_STEP, self.filled - offset) // SECTOR
                first = offset // SECTOR
                stamps = make_stamps(first=first, count=count, value=FILLED_VALUE)
                chain.write(stamps, offset=offset)

    def open(self, files: CrashFiles, *, writable: bool) -> Chain:
        """The disk over handles of the files. Raises any QcowkitError."""
        storage = files.open(writable=writable)
        metadata = load_metadata(storage, self.format, budget=TRUSTED)
        data = files.open(1, writable=writable) if self.data_file else None
        layers = [Layer(storage=storage, metadata=metadata, data_storage=data)]
        if self.backing:
            base = self._base().open(writable=False)
            layers.append(Layer(storage=base, metadata=load_metadata(base, "raw", budget=TRUSTED)))
        options = self.open_options if writable else DEFAULT_OPTIONS
        # A disk whose power was cut is never closed: nothing may go on running for it.
        options = replace(options, cache_clean_interval=0, secrets=Secrets.of(self.secret))
        return build_chain(layers, writable=writable, options=options)

    def _base(self) -> CrashFiles:
        stamps = make_stamps(first=0, count=self.backing // SECTOR, value=BACKING_VALUE)
        return CrashFiles([Content.of(stamps)], names=["<base>"])
