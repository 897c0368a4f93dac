"""The extent table: the one vocabulary between the floors. Pure.

An extent is a half-open guest range whose bytes share one state. A table is a set of columns of
equal length, ascending and without gaps, so that it always covers exactly one range."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
FlagArray = npt.NDArray[np.uint16]
LayerArray = npt.NDArray[np.int32]

NO_HOST = -1


class Flag(IntFlag):
    """What is known of an extent. PRESENT ends the walk down a backing chain.

    DATA: bytes must be read. ZERO: reads as zeros. PRESENT: this layer decides the content.
    COPIED: the host cluster belongs to this mapping alone. COMPRESSED: `host`/`stored` locate
    compressed bytes. DIRTY: recorded by a bitmap. ENCRYPTED: what lies at `host` is ciphertext,
    which only the layer itself can read."""

    NONE = 0
    DATA = 1
    ZERO = 2
    PRESENT = 4
    COPIED = 8
    COMPRESSED = 16
    DIRTY = 32
    ENCRYPTED = 64


class Hit(IntEnum):
    """What a lookup of one byte found in a layer. NONE: the layers below decide. OTHER: only a
    table can tell, for compressed data and for entries that break a rule."""

    NONE = 0
    DATA = 1
    ZERO = 2
    OTHER = 3


class Extent(NamedTuple):
    """One row of a table, as plain Python integers."""

    start: int
    length: int
    flags: int
    layer: int
    host: int
    stored: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExtentTable:
    """Columns of shape (n,), ascending and contiguous.

    start, length: int64 guest bytes. flags: uint16 of Flag. layer: int32, 0 is the top of a chain.
    host: int64 host offset of the row's first byte, -1 for none. stored: int64 bytes on disk for
    COMPRESSED rows, 0 elsewhere."""

    start: Int64Array
    length: Int64Array
    flags: FlagArray
    layer: LayerArray
    host: Int64Array
    stored: Int64Array

    def __len__(self) -> int:
        return len(self.start)

    @property
    def begin(self) -> int:
        """The first guest byte that is covered; 0 for an empty table."""
        return int(self.start[0]) if len(self.start) else 0

    @property
    def end(self) -> int:
        """One past the last guest byte that is covered; 0 for an empty table."""
        return int(self.start[-1] + self.length[-1]) if len(self.start) else 0

    def __iter__(self) -> Iterator[Extent]:
        return map(Extent._make, self.rows())

    def rows(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Rows as tuples of Python integers: column lists are far cheaper than array items."""
        return zip(
            self.start.tolist(),
            self.length.tolist(),
            self.flags.tolist(),
            self.layer.tolist(),
            self.host.tolist(),
            self.stored.tolist(),
            strict=True,
        )

    def take(self, index: Any) -> ExtentTable:
        """Rows by slice, mask or index array. The caller keeps the rows contiguous."""
        return ExtentTable(
            start=self.start[index],
            length=self.length[index],
            flags=self.flags[index],
            layer=self.layer[index],
            host=self.host[index],
            stored=self.stored[index],
        )

    def to_numpy(self) -> npt.NDArray[Any]:
        """A structured array of the rows, fields in the order of the columns (a copy)."""
        names = ("start", "length", "flags", "layer", "host", "stored")
        dtype = np.dtype([(name, getattr(self, name).dtype) for name in names])
        out = np.empty(len(self), dtype=dtype)
        for name in names:
            out[name] = getattr(self, name)
        return out

    def check(self) -> None:
        """Assert the invariants; a failure is a bug of ours, never the image's fault."""
        assert len({len(column) for column in (self.start, self.length, self.flags)}) == 1
        assert len({len(column) for column in (self.layer, self.host, self.stored)}) == 1
        assert bool((self.length > 0).all()), "an extent is empty"
        assert bool((self.start[1:] == self.start[:-1] + self.length[:-1]).all()), "a gap"


def make_table(
    start: npt.ArrayLike,
    length: npt.ArrayLike,
    flags: npt.ArrayLike,
    *,
    layer: npt.ArrayLike = 0,
    host: npt.ArrayLike = NO_HOST,
    stored: npt.ArrayLike = 0,
) -> ExtentTable:
    """A table from columns or scalars; scalars are repeated to the length of `start`."""
    starts = np.asarray(start, dtype=np.int64)
    shape = starts.shape

    def column(values: npt.ArrayLike, dtype: Any) -> Any:
        array = np.asarray(values, dtype=dtype)
        return array if array.shape == shape else np.full(shape, array, dtype=dtype)

    return ExtentTable(
        start=starts,
        length=column(length, np.int64),
        flags=column(flags, np.uint16),
        layer=column(layer, np.int32),
        host=column(host, np.int64),
        stored=column(stored, np.int64),
    )


def single(start: int, length: int, flags: int, *, host: int = NO_HOST) -> ExtentTable:
    """One extent, or an empty table when length is 0."""
    if length == 0:
        return empty()
    return make_table([start], length, flags, host=host)


def empty() -> ExtentTable:
    """The table that covers nothing."""
    return make_table(np.empty(0, dtype=np.int64), 0, 0)


def concatenate(tables: Sequence[ExtentTable]) -> ExtentTable:
    """Tables that follow one another without a gap, as one."""
    if len(tables) == 1:
        return tables[0]
    if not tables:
        return empty()
    return ExtentTable(
        start=np.concatenate([table.start for table in tables]),
        length=np.concatenate([table.length for table in tables]),
        flags=np.concatenate([table.flags for table in tables]),
        layer=np.concatenate([table.layer for table in tables]),
        host=np.concatenate([table.host for table in tables]),
        stored=np.concatenate([table.stored for table in tables]),
    )
