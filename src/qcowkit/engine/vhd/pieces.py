"""Plans of changes to a VHD with blocks: which part of a request meets which block. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from qcowkit.units import SECTOR

if TYPE_CHECKING:
    from typing_extensions import Buffer

_ENTRIES_PER_SECTOR = 128


class Part(NamedTuple):
    """Bytes [begin, end) of one block, which are bytes `at` and on of the request."""

    block: int
    begin: int
    end: int
    at: int


def split_range(*, offset: int, length: int, block_size: int) -> Iterator[Part]:
    """The guest range [offset, offset + length) by blocks, ascending."""
    at = 0
    while at < length:
        block, begin = divmod(offset + at, block_size)
        end = min(block_size, begin + length - at)
        yield Part(block=block, begin=begin, end=end, at=at)
        at += end - begin


def gather(writes: Iterable[tuple[int, Buffer]]) -> Iterator[tuple[int, list[Buffer]]]:
    """(host offset, bytes) in ascending order, neighbours joined for one vectored write."""
    begin, reach = 0, -1
    buffers: list[Buffer] = []
    for offset, data in writes:
        if offset != reach and buffers:
            yield begin, buffers
            buffers = []
        if not buffers:
            begin = offset
        buffers.append(data)
        reach = offset + memoryview(data).nbytes
    if buffers:
        yield begin, buffers


def plan_entry_runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Entries [first, end) of the table to be written for ascending block indices: what lies
    within a sector of one another goes out together."""
    first = end = -1
    for block in blocks:
        if end >= 0 and block - end < _ENTRIES_PER_SECTOR:
            end = block + 1
            continue
        if end >= 0:
            yield first, end
        first, end = block, block + 1
    if end >= 0:
        yield first, end


def split_sectors(*, offset: int, length: int) -> tuple[int, int, int]:
    """Lengths of a range's head up to a whole sector, of its whole sectors, and of its tail."""
    head = min(-offset % SECTOR, length)
    tail = (length - head) % SECTOR
    return head, length - head - tail, tail
