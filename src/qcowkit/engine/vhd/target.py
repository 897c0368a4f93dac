"""A new VHD as the target of a bulk copy."""

from __future__ import annotations

import numpy as np

from qcowkit.engine.transfer import Chunk, UnitState, Write
from qcowkit.engine.vhd.bulk import VhdBulkWriter
from qcowkit.storage.protocol import Storage


class VhdTarget:
    """A `BulkTarget` over `VhdBulkWriter`; a unit is a block."""

    explicit_zeros = False

    def __init__(self, storage: Storage, writer: VhdBulkWriter) -> None:
        self._storage = storage
        self._writer = writer
        # A sector bitmap lies before each block: two blocks are never in one piece.
        self.unit = self.grain = self.direct_limit = writer.unit

    def place(self, chunk: Chunk) -> list[Write]:
        """See `BulkTarget.place`."""
        writes = []
        for index in np.flatnonzero(chunk.states == UnitState.DATA).tolist():
            offset = self._writer.place(chunk.start // self.unit + index)
            view = chunk.view[index * self.unit : min((index + 1) * self.unit, chunk.length)]
            writes.append(Write(storage=self._storage, buffers=[view], offset=offset))
        return writes

    def place_zeros(self, start: int, length: int) -> None:
        """Nothing is zero already: what is not written reads so."""

    def place_direct(self, start: int, length: int) -> tuple[Storage, int]:
        """See `BulkTarget.place_direct`."""
        assert length == self.unit, f"{length} bytes are not one block"
        return self._storage, self._writer.place(start // self.unit)

    def finish(self) -> None:
        """See `BulkTarget.finish`."""
        self._writer.finish()
