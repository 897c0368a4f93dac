"""The guest address space of one image file. No image opens or calls another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from qcowkit.extents.table import Extent, ExtentTable, Hit
    from qcowkit.image.metadata import Metadata
    from qcowkit.storage.protocol import Storage


class Image(Protocol):
    """One layer. `size`: guest bytes. `cluster_size`: bytes of its allocation unit."""

    @property
    def metadata(self) -> Metadata: ...

    @property
    def size(self) -> int: ...

    @property
    def cluster_size(self) -> int: ...

    @property
    def data_storage(self) -> Storage:
        """Where the host offsets of plain extents lie."""

    def extents(self, *, start: int, length: int, limit: int | None = None) -> ExtentTable:
        """Map [start, start + length) in this layer only; the backing chain is not consulted.

        The table begins at `start` and covers the range, or less of it (but something) once more
        than `limit` table entries would have to be decoded. Raises RequestError past the disk's
        end, CorruptMetadata for a malformed entry."""

    def lookup(self, offset: int) -> tuple[Hit, int, int]:
        """The scalar twin of `extents`: (what one guest byte is in this layer, its host offset,
        bytes up to which that holds on). Kinds are shown as they are known without a question to
        the host, so a hole may be DATA."""

    def read_runs(self, runs: Sequence[Extent], buffer: memoryview, *, base: int) -> None:
        """Put DATA extents of this layer's own table into the buffer, whose first byte is guest
        offset `base`. The rest of the buffer is left alone."""

    def close(self) -> None: ...


class Below(Protocol):
    """What a writer of the top image sees of the layers under it. `size`: guest bytes."""

    @property
    def size(self) -> int: ...

    def read_into(self, buffer: bytearray | memoryview, *, offset: int) -> None:
        """Fill the buffer with guest bytes; the range lies within `size`."""

    def is_zero(self, *, start: int, length: int) -> bool:
        """True when the range is known to read as zeros without reading data."""

    def read_or_none(self, *, start: int, length: int) -> bytes | bytearray | None:
        """The bytes, or None where they are known to be zeros."""


class Tracker(Protocol):
    """Told of every change of the guest's disk, before it is acknowledged: a dirty bitmap."""

    def mark(self, *, start: int, length: int) -> None: ...


class WritableImage(Image, Protocol):
    """An image that the guest may change. Offsets and lengths in guest bytes, any alignment; the
    caller keeps them inside the disk. Safe from several threads.

    A write is acknowledged when the call returns, and durable after `flush`. Whatever fails raises
    StorageError (the host), CorruptMetadata (the image) or RequestError and leaves the image no
    worse than before."""

    @property
    def releases(self) -> int:
        """Goes up before host space is given to another use: a reader that finds it changed reads
        again (docs/adr/0010)."""

    def attach(self, below: Below | None) -> None:
        """The layers under this image, for copy-on-write; once, before the first change."""

    def write(self, data: Buffer, *, offset: int) -> None: ...

    def write_compressed(self, data: Buffer, *, offset: int) -> None:
        """Whole clusters as compressed ones (the disk's last may be short). RequestError where the
        format has none, where a cluster is allocated already or the range is not aligned."""

    def write_zeroes(
        self, *, offset: int, length: int, unmap: bool = False, fallback: bool = True
    ) -> None:
        """The range reads as zeros; with `unmap` its space may be given back. Without `fallback`
        UnsupportedFeature is raised where zeros would have to be written as data."""

    def discard(self, *, offset: int, length: int) -> None:
        """The content is no longer needed. Only whole clusters are given up."""

    def flush(self) -> None:
        """All that was acknowledged before is durable when this returns."""

    def resize(self, size: int, *, shrink: bool = False, preallocation: str = "off") -> None:
        """Change the disk's size, in bytes. preallocation: off, metadata, falloc or full, for what
        is added. Guest bytes below both sizes stay as they are at every moment; what is added
        reads as zeros. RequestError for a smaller size without `shrink`."""
