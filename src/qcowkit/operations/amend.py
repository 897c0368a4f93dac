"""The options of an image changed in place, and what was done in words.

A qcow2 image keeps its disk and its snapshots whatever is changed; every step is wholly there after
a crash or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qcowkit.engine.barriers import Barriers
from qcowkit.engine.options import DEFAULT_OPTIONS, OpenOptions
from qcowkit.engine.qcow2.amend import Amender
from qcowkit.engine.qcow2.amend_plan import Amendment, plan_header
from qcowkit.engine.qcow2.header_writer import HeaderWriter
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.engine.qcow2.recovery import recover_for_writing
from qcowkit.errors import CorruptMetadata, RequestError, UnsupportedFeature
from qcowkit.image.lineage import Layer
from qcowkit.image.qcow2 import Qcow2Image
from qcowkit.image.qcow2_write import WritableQcow2Image
from qcowkit.image.registry import build_chain
from qcowkit.operations.resize import SizeChange, resize

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qcowkit.budget import Budget
    from qcowkit.codecs.qcow2.snapshots import SnapshotEntry
    from qcowkit.engine.crypt import DataCipher
    from qcowkit.engine.executor import ProgressReport
    from qcowkit.engine.qcow2.renewed_data import GuestReader
    from qcowkit.image.chain import Chain


@dataclass(frozen=True, slots=True, kw_only=True)
class AmendOptions:
    """What shall change; None for what stays. size: bytes, at least what the disk has.

    backing_file, backing_fmt: may only say what is there already."""

    amendment: Amendment = field(default_factory=Amendment)
    size: int | None = None
    backing_file: str | None = None
    backing_fmt: str | None = None

    @property
    def needs_content(self) -> bool:
        """Whether the data file, and what lies below the image, may be looked at."""
        return self.size is not None or self.amendment.changes_geometry


@dataclass(frozen=True, slots=True, kw_only=True)
class Amended:
    """What was changed, as `key=value`, in the order of the steps."""

    changes: tuple[str, ...]

    def render(self) -> str:
        """A line to print."""
        return ", ".join(self.changes) if self.changes else "nothing to change"


def amend_image(
    layers: Sequence[Layer],
    options: AmendOptions,
    *,
    budget: Budget,
    opening: OpenOptions = DEFAULT_OPTIONS,
    barriers: Barriers | None = None,
    progress: ProgressReport | None = None,
) -> Amended:
    """Change the options of the top image, which is open for writing.

    layers: with the data file and what lies below where `options.needs_content`. progress: of the
    bytes of tables, as often as all of them are written anew. Raises RequestError before anything
    is written, and as `Amender.run`."""
    top = layers[0]
    if not isinstance(top.metadata, Qcow2Metadata):
        raise UnsupportedFeature(
            "amend", reason=f"{top.metadata.format} images have no options that can be changed"
        )
    data = top.data_storage or top.storage
    # Data first: what the tables name is durable before they are.
    files = (top.storage,) if data is top.storage else (data, top.storage)
    barriers = barriers or Barriers(*files)
    _check_backing(top.metadata, options)
    session = _Session(layers, options, budget=budget, opening=opening)
    # What is refused is refused before recovery writes anything.
    plan_header(top.metadata, options.amendment)
    session.check_size(top.metadata.virtual_size)
    prepare_for_change(top, barriers)
    amender = Amender(
        storage=top.storage,
        data=data,
        barriers=barriers,
        make_reader=session.make_reader,
        progress=progress,
    )
    grows = options.size not in (None, top.metadata.virtual_size)
    changes = amender.run(options.amendment, resize=session.resize if grows else None)
    if grows:
        changes.append(f"size={options.size}")
    return Amended(changes=tuple(changes))


def _check_backing(metadata: Qcow2Metadata, options: AmendOptions) -> None:
    """As qemu: the names that there are may be said again."""
    pairs = (
        ("backing_file", options.backing_file, metadata.backing_name),
        ("backing_fmt", options.backing_fmt, metadata.extensions.backing_format),
    )
    for key, wanted, found in pairs:
        if wanted is not None and wanted != (found or ""):
            raise RequestError(f"{key} cannot be amended: rebase changes the backing file")


def prepare_for_change(top: Layer, barriers: Barriers) -> None:
    """Make the top image sound, without promises that a change of it would break.

    Raises CorruptMetadata for one with its corrupt bit set, and as `recover_for_writing`."""
    metadata = top.metadata
    assert isinstance(metadata, Qcow2Metadata)
    if metadata.header.capsule:
        raise UnsupportedFeature(
            "a change", reason="this is a capsule, a copy of an image without its guest data"
        )
    if metadata.corrupt:
        raise CorruptMetadata(
            "header field incompatible_features",
            host_offset=72,
            reason="the corrupt bit is set: the image has to be repaired (check -r all) before "
            "anything is written",
        )
    metadata = recover_for_writing(top.storage, metadata, barriers=barriers)
    header = HeaderWriter(top.storage, metadata.header)
    if header.has_unknown_autoclear:
        header.clear_unknown_autoclear()
        barriers.pending = True
        barriers.wait("autoclear bits before the first change")


class _Session:
    """The disk and its snapshots as the guest sees them, by the metadata of the moment."""

    def __init__(
        self,
        layers: Sequence[Layer],
        options: AmendOptions,
        *,
        budget: Budget,
        opening: OpenOptions,
    ) -> None:
        self._layers = layers
        self._options = options
        self._budget = budget
        # The tables go away under the images that read them: nothing may run beside.
        self._opening = replace(opening, cache_clean_interval=0)

    def check_size(self, size: int) -> None:
        """Raises RequestError for a size that would lose data."""
        wanted = self._options.size
        if wanted is not None and wanted < size:
            raise RequestError(
                f"size is {wanted}, below the disk's {size}: shrinking loses data, which resize "
                "does where it is asked to"
            )

    def resize(self) -> None:
        """The size that the options ask for."""
        wanted = self._options.size
        assert wanted is not None
        chain = self.chain(load_qcow2_metadata(self._layers[0].storage), writable=True)
        resize(chain, SizeChange(size=wanted))
        image = chain.images[0]
        assert isinstance(image, WritableQcow2Image)
        image.disk.close()

    def make_reader(self, metadata: Qcow2Metadata) -> GuestReader:
        """Reads the disk, or a snapshot, through all layers."""
        return _Reader(lambda snapshot: self.chain(metadata, snapshot=snapshot))

    def chain(
        self, metadata: Qcow2Metadata, *, snapshot: str | None = None, writable: bool = False
    ) -> Chain:
        """The disk by these metadata."""
        top = replace(self._layers[0], metadata=metadata)
        return build_chain(
            [top, *self._layers[1:]],
            budget=self._budget,
            snapshot=snapshot,
            writable=writable,
            options=self._opening,
        )


class _Reader:
    """See `GuestReader`. Nothing is opened before it is asked for."""

    def __init__(self, open_chain: Callable[[str | None], Chain]) -> None:
        self._open = open_chain
        self._chains: dict[str | None, Chain] = {}

    def __call__(
        self, snapshot: SnapshotEntry | None, buffer: npt.NDArray[np.uint8], *, offset: int
    ) -> None:
        self._chain(None if snapshot is None else snapshot.id).read_into(buffer, offset=offset)

    def cipher(self) -> DataCipher | None:
        """That of the top image."""
        image = self._chain(None).images[0]
        assert isinstance(image, Qcow2Image)
        return image.cipher

    def _chain(self, snapshot: str | None) -> Chain:
        if snapshot not in self._chains:
            self._chains[snapshot] = self._open(snapshot)
        return self._chains[snapshot]
