"""A writable qcow2 image in memory under observation: its calls, its events, its verdict."""

from __future__ import annotations

from typing import Any

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.refcount_block import decode_refcounts
from qcowkit.engine.barriers import ignore_event
from qcowkit.engine.options import DEFAULT_OPTIONS, OpenOptions
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.extents.table import Extent, Flag
from qcowkit.image.chain import Chain
from qcowkit.image.metadata import RawMetadata
from qcowkit.image.protocol import Image
from qcowkit.image.qcow2_write import WritableQcow2Image
from qcowkit.image.raw import RawImage
from qcowkit.operations.check import CheckResult, Verdict, check_image, open_for_check
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.qcow2_builder import BuiltImage, build_qcow2
from qcowkit.testing.recording import Call, RecordingStorage


class Rig:
    """An image of the builder, opened for writing.

    file, data, base: what is called of the image file, the data file (itself without one) and the
    layer below. events: barriers and steps by name. chain: the disk as its guest sees it."""

    def __init__(
        self,
        built: BuiltImage | None = None,
        *,
        below: bytes | None = None,
        options: OpenOptions = DEFAULT_OPTIONS,
        storage: Storage | None = None,
        watch: bool = True,
        **spec: Any,
    ) -> None:
        """below: a raw layer under the image. storage: what holds the image, in place of plain
        memory. watch: whether `events` are told; small writes take a shorter way where nobody
        watches. spec: changes to the default image of the builder."""
        self.built = build_qcow2(**spec) if built is None else built
        self.memory = MemoryStorage(self.built.to_bytes(), name="<image>")
        self.file = RecordingStorage(self.memory if storage is None else storage)
        external = self.built.external
        self.data = self.file if external is None else RecordingStorage(MemoryStorage(external))
        self.base = RecordingStorage(MemoryStorage(below or b""))
        self.events: list[str] = []
        self.metadata: Qcow2Metadata = load_qcow2_metadata(self.file, budget=TRUSTED)
        self.image = WritableQcow2Image(
            self.metadata,
            self.file,
            data_storage=None if external is None else self.data,
            budget=TRUSTED,
            options=options,
            observe=self.events.append if watch else ignore_event,
        )
        images: list[Image] = [self.image]
        if below is not None:
            images.append(RawImage(RawMetadata(virtual_size=len(below)), self.base))
        self.chain = Chain(images, top=self.image)
        self.state = self.image.disk.state
        self.forget()

    def forget(self) -> None:
        """Begin to observe anew."""
        for storage in (self.file, self.data, self.base):
            storage.calls.clear()
        self.events.clear()

    def warm(self, offset: int = 0) -> None:
        """Make the L2 table of a guest offset, and begin to observe."""
        self.state.begin()
        self.state.ensure_table(self.state.geometry.l1_index(offset))
        self.state.slice(
            (offset >> self.state.geometry.cluster_bits) // self.state.tables.slice_entries
        )
        self.forget()

    # What was done

    @property
    def writes(self) -> list[Call]:
        """Writes to the guest's data, and to the tables where they share a file."""
        return self.data.of("pwrite")

    def row(self, offset: int) -> Extent:
        """What the image itself says of one guest byte."""
        return next(iter(self.image.extents(start=offset, length=1)))

    def host(self, offset: int) -> int:
        """Where one guest byte lies."""
        return self.row(offset).host

    def flags(self, offset: int) -> Flag:
        return Flag(self.row(offset).flags)

    def word(self, cluster: int) -> int:
        """The L2 entry of a guest cluster, as it is in memory."""
        return self._words(cluster)[0]

    def bitmap(self, cluster: int) -> int:
        return self._words(cluster)[1]

    def _words(self, cluster: int) -> list[int]:
        tables, count = self.state.tables, self.state.geometry.l2_entry_size // 8
        number, index = divmod(cluster, tables.slice_entries)
        return tables.slice(number)[index * count : (index + 1) * count].tolist()

    def read(self, offset: int, length: int) -> bytes:
        return self.chain.read(offset=offset, length=length)

    # What is in the file

    def stored_counts(self) -> list[int]:
        """Refcounts as the file has them, of all clusters that it describes."""
        raw = self.memory.to_bytes()
        header = load_qcow2_metadata(MemoryStorage(raw), budget=TRUSTED).header
        geometry = self.state.geometry
        size, order = geometry.cluster_size, geometry.refcount_order
        place, length = header.refcount_table_offset, header.refcount_table_clusters * size
        table = raw[place : place + length].rstrip(b"\0")
        counts: list[int] = []
        for at in range(0, len(table), 8):
            block = int.from_bytes(table[at : at + 8].ljust(8, b"\0"), "big")
            part = raw[block : block + size].ljust(size, b"\0") if block else bytes(size)
            counts += decode_refcounts(part, order).tolist()
        return counts

    def count(self, host: int) -> int:
        """The refcount of a host offset in the file."""
        return self.stored_counts()[host >> self.state.geometry.cluster_bits]

    def check(self) -> CheckResult:
        """The verdict on the file as it is now."""
        return check_image(open_for_check(MemoryStorage(self.memory.to_bytes()), format="qcow2"))

    def assert_clean(self) -> None:
        """Nothing wrong, nothing leaked."""
        result = self.check()
        assert result.verdict is Verdict.CLEAN, "\n".join(result.render())

    def reopened(self) -> Qcow2Metadata:
        """What the next reader of the file finds."""
        return load_qcow2_metadata(MemoryStorage(self.memory.to_bytes()), budget=TRUSTED)
