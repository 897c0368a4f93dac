"""What travels through a bulk copy: chunks of guest bytes, and the writes that they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from qcowkit.storage.protocol import Storage
from qcowkit.units import MiB

# Where the target sets no bound: what one call into the host may take.
MAX_DIRECT = 256 * MiB


class UnitState(IntEnum):
    """What a unit of the target shall be. ABSENT: whatever lies below shows."""

    ABSENT = 0
    ZERO = 1
    DATA = 2


class Blob(NamedTuple):
    """One compressed cluster. phase: host offset modulo a sector that it must keep, -1 for any.

    A cluster that is copied as stored reaches to the end of its last sector; with its phase kept
    it does so again, and does not grow from one copy to the next."""

    data: bytes
    phase: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A guest range that was read. start, length: bytes; start is a multiple of the target's unit.

    states: UnitState of each grain, uint8, shape (ceil(length / grain),). view: the bytes; what
    follows `length` of them is zero padding up to a cluster when the target compresses, and nothing
    otherwise. blobs: compressed clusters by index, None where one is not compressed; empty when
    the target does not compress."""

    start: int
    length: int
    states: npt.NDArray[np.uint8]
    view: memoryview
    blobs: Sequence[Blob | None] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """Buffers, one behind the other, at a host offset of a storage."""

    storage: Storage
    buffers: Sequence[bytes | bytearray | memoryview]
    offset: int

    def run(self) -> None:
        """Carry it out."""
        self.storage.pwrite(self.buffers, offset=self.offset)


class BulkTarget(Protocol):
    """A new image that is filled in ascending guest order by one thread.

    unit: bytes that are placed as a whole, where chunks begin. grain: bytes of an element of
    `Chunk.states`, a part of a unit. explicit_zeros: zeros must be told from ABSENT. direct_limit:
    bytes that one call of `place_direct` may ask for, whole units."""

    @property
    def unit(self) -> int: ...

    @property
    def grain(self) -> int: ...

    @property
    def explicit_zeros(self) -> bool: ...

    @property
    def direct_limit(self) -> int: ...

    def place(self, chunk: Chunk) -> list[Write]:
        """Decide where the chunk goes. Writes may run later, in any order, on any thread."""

    def place_zeros(self, start: int, length: int) -> None:
        """A range of whole units, or up to the disk's end, that must read as zeros."""

    def place_direct(self, start: int, length: int) -> tuple[Storage, int]:
        """Room for a range of whole units that the host copies: (storage, host offset).

        The range lies in one piece, so it has `direct_limit` bytes at most."""

    def finish(self) -> None:
        """Write the tables, then the header. The caller makes it durable."""
