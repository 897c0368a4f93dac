"""A qcow2 file as a layer that the guest may change."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qcowkit.budget import Budget
from qcowkit.engine.barriers import Barriers, Observer, ignore_event
from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.disk import Qcow2Disk
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.recovery import recover_for_writing
from qcowkit.engine.qcow2.state import Places
from qcowkit.errors import CorruptMetadata, UnsupportedFeature
from qcowkit.extents.bits import GranuleBits
from qcowkit.image.protocol import Below
from qcowkit.image.qcow2 import Qcow2Image
from qcowkit.storage.protocol import Storage

if TYPE_CHECKING:
    from typing_extensions import Buffer


class WritableQcow2Image(Qcow2Image):
    """The active disk of a qcow2 file. See `WritableImage`. An image that was left dirty is made
    sound first.

    Enabled bitmaps record every change. Raises CorruptMetadata for an image with its corrupt bit
    set or a malformed bitmap, and what `recover_for_writing` raises."""

    reads_runs = False

    def __init__(
        self,
        metadata: Qcow2Metadata,
        storage: Storage,
        *,
        data_storage: Storage | None,
        budget: Budget,
        options: OpenOptions,
        observe: Observer = ignore_event,
        secret: bytes | None = None,
    ) -> None:
        """observe: told of barriers and metadata steps by name, before they happen."""
        _check_writable(metadata)
        barriers = Barriers(storage, observe=observe)
        metadata = recover_for_writing(storage, metadata, barriers=barriers)
        super().__init__(
            metadata,
            storage,
            data_storage=data_storage,
            budget=budget,
            options=options,
            secret=secret,
        )
        # Holes that the host reported once are filled by what is written later.
        self._asked_host = True
        self.clusters.lasting = False
        places = Places(
            storage=storage,
            data=self.data_storage,
            metadata=metadata,
            mapping=self.mapping,
            cipher=self.cipher,
        )
        self.disk = Qcow2Disk(
            places, self.clusters, options=options, observe=observe, budget=budget
        )

    @property
    def releases(self) -> int:
        """How often host clusters changed hands; see docs/adr/0010."""
        return self.disk.state.releases

    def attach(self, below: Below | None) -> None:
        """See `WritableImage.attach`."""
        self.disk.attach(below)

    def write(self, data: Buffer, *, offset: int) -> None:
        """See `WritableImage.write`."""
        view = data if type(data) is memoryview else memoryview(data).cast("B")
        self.disk.write(view, offset=offset)

    def write_compressed(self, data: Buffer, *, offset: int) -> None:
        """See `WritableImage.write_compressed`."""
        self.disk.write_compressed(memoryview(data).cast("B"), offset=offset)

    def write_zeroes(
        self, *, offset: int, length: int, unmap: bool = False, fallback: bool = True
    ) -> None:
        """See `WritableImage.write_zeroes`."""
        self.disk.write_zeroes(offset=offset, length=length, unmap=unmap, fallback=fallback)

    def discard(self, *, offset: int, length: int) -> None:
        """See `WritableImage.discard`."""
        self.disk.discard(offset=offset, length=length)

    def bitmap(self, name: str) -> GranuleBits:
        """See `Qcow2Image.bitmap`; what was recorded since the image was opened is among it."""
        return self.disk.bitmap(name)

    def flush(self) -> None:
        """See `WritableImage.flush`."""
        self.disk.flush()

    def resize(
        self,
        size: int,
        *,
        shrink: bool = False,
        preallocation: str = "off",
        expose: bool = False,
    ) -> None:
        """See `WritableImage.resize`. expose: what is added shows the layers below."""
        self.disk.resize(size, shrink=shrink, preallocation=preallocation, expose=expose)
        self.size = self.mapping.size
        header = self.disk.state.header.header
        self.metadata = replace(self.metadata, header=header, virtual_size=self.size)

    def clean(self) -> None:
        """Drop cached tables that were not used since the last time."""
        self.disk.clean()

    def close(self) -> None:
        """Flush and close the files, also where flushing fails."""
        try:
            self.disk.close()
        finally:
            super().close()


def _check_writable(metadata: Qcow2Metadata) -> None:
    if metadata.header.capsule:
        raise UnsupportedFeature(
            "writing", reason="this is a capsule, a copy of an image without its guest data"
        )
    if metadata.encrypted is not None and metadata.data_file_raw:
        raise UnsupportedFeature(
            "encryption with a raw data file",
            reason="a raw disk is in clear, and what is written into this one would not be",
        )
    if metadata.corrupt:
        raise CorruptMetadata(
            "header field incompatible_features",
            host_offset=72,
            reason="the corrupt bit is set: the image can be read, but has to be repaired "
            "(check -r all) before anything is written",
        )
