"""An image file made shorter in place, and what was done in words."""

from __future__ import annotations

from dataclasses import dataclass

from qcowkit.budget import TRUSTED, Budget
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.executor import ProgressReport
from qcowkit.engine.findings import Effort
from qcowkit.engine.qcow2.compaction import Compacted, compact
from qcowkit.engine.qcow2.crypt import open_cipher
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.errors import UnsupportedFeature
from qcowkit.image.lineage import Layer
from qcowkit.operations.amend import prepare_for_change
from qcowkit.operations.runs import renew_runs
from qcowkit.units import format_size

# Tables are walked over several times in a round.
_FACTOR = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactResult:
    """What was done. filename: for messages."""

    filename: str
    done: Compacted

    def as_json(self) -> dict[str, object]:
        """Sizes in bytes."""
        return {
            "filename": self.filename,
            "size-before": self.done.before,
            "size": self.done.after,
            "moved": self.done.moved,
            "rounds": self.done.rounds,
        }

    def render(self) -> str:
        """A line to read."""
        before, after = format_size(self.done.before), format_size(self.done.after)
        if not self.done.rounds:
            return f"{self.filename}: {after}, nothing to gain"
        return f"{self.filename}: {before} to {after}, {format_size(self.done.moved)} moved"


def compact_image(
    layer: Layer,
    *,
    barriers: Barriers | None = None,
    secret: bytes | None = None,
    budget: Budget = TRUSTED,
    progress: ProgressReport | None = None,
) -> CompactResult:
    """Move what lies at the end of the file into its holes, and cut it. An image with a record of
    contiguous runs gets a new one.

    layer: open for writing; nothing but its file is looked at. secret: the passphrase of an image
    that is encrypted with LUKS. progress: of bytes that move. Raises UnsupportedFeature for other
    formats, RequestError without the passphrase, and as `engine.qcow2.compaction.compact`."""
    if not isinstance(layer.metadata, Qcow2Metadata):
        name = layer.metadata.format
        raise UnsupportedFeature("compact", reason=f"{name} images cannot be, qcow2 images can")
    storage = layer.storage
    barriers = barriers or Barriers(storage)
    cipher = None
    if layer.metadata.encrypted == "luks":
        # By legacy AES data are encrypted for their guest offset, which stays.
        cipher = open_cipher(layer.metadata, storage, secret=secret, budget=budget)
    prepare_for_change(layer, barriers)
    done = compact(
        storage,
        barriers=barriers,
        make_effort=lambda: Effort(stored=storage.allocated(), factor=_FACTOR),
        cipher=cipher,
        progress=progress,
    )
    renew_runs(layer, barriers=barriers)
    filename = storage.name if layer.path is None else str(layer.path)
    return CompactResult(filename=filename, done=done)
