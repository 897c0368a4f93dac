"""The map of a guest disk: which bytes come from where, as JSON or as a table to read.

JSON has the schema of `qemu-img map` and its merge rule, so the same runs appear. It is written in
columns: a chunk of rows is one matrix of bytes, filled by whole-column operations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qcowkit.errors import RequestError
from qcowkit.extents.algebra import merge_rows
from qcowkit.extents.table import (
    NO_HOST,
    Extent,
    ExtentTable,
    Flag,
    Int64Array,
    concatenate,
)
from qcowkit.units import ceil_div, format_size

ByteMatrix = npt.NDArray[np.uint8]

# Rows formatted at once: a chunk of text then stays in the second-level cache.
_CHUNK_ROWS = 1 << 14

_SHOWN = int(Flag.DATA | Flag.ZERO | Flag.PRESENT | Flag.COMPRESSED)
# Where there is no guest byte at the host offset, no offset is shown.
_OPAQUE = np.uint16(Flag.COMPRESSED | Flag.ENCRYPTED)
_ALL = np.arange(2 * int(Flag.ENCRYPTED), dtype=np.uint16) & _SHOWN
# Flags to what is shown of them. Without data the disk reads as zeros, recorded or not.
_VIEW = np.where(_ALL & int(Flag.DATA), _ALL, _ALL | int(Flag.ZERO)).astype(np.uint16)


class MappedDisk(Protocol):
    """What map, headers and plot ask of a disk; a Chain is one."""

    @property
    def size(self) -> int:
        """Guest bytes."""

    def iter_extents(self, *, start: int, length: int) -> Iterable[ExtentTable]:
        """Windows in ascending order, without a gap; `layer` is the depth in the chain."""


def iter_rows(
    disk: MappedDisk, *, start: int = 0, length: int | None = None
) -> Iterator[ExtentTable]:
    """The runs that a map shows, as tables of bounded size.

    Flags are reduced to DATA, ZERO, PRESENT and COMPRESSED; what no layer decides is ZERO; the host
    of compressed and of encrypted rows is dropped. Neighbours merge when flags, layer and host
    continue, across windows too. start, length: guest bytes; a length of None, or beyond the end,
    means to the end. Raises RequestError for a start beyond the end of the disk."""
    if not 0 <= start <= disk.size:
        raise RequestError(f"start offset {start} is beyond the disk of {disk.size} bytes")
    if length is not None and length < 0:
        raise RequestError(f"length {length} is negative")
    rest = disk.size - start
    length = rest if length is None else min(length, rest)
    if not length:
        return
    last: ExtentTable | None = None
    for batch in batches(disk.iter_extents(start=start, length=length)):
        rows = _shown(batch)
        rows = _merge(rows if last is None else concatenate((last, rows)))
        # The last run may go on in the next batch.
        last = rows.take(slice(-1, None))
        if len(rows) > 1:
            yield rows.take(slice(0, -1))
    if last is not None:
        yield last


def batches(tables: Iterable[ExtentTable], rows: int = _CHUNK_ROWS) -> Iterator[ExtentTable]:
    """The same rows in tables of about `rows` rows, so that neither many small windows nor a
    large one are dear."""
    waiting: list[ExtentTable] = []
    count = 0
    for table in tables:
        for begin in range(0, len(table), rows):
            part = table.take(slice(begin, begin + rows))
            if count + len(part) > rows:
                yield concatenate(waiting)
                waiting, count = [], 0
            waiting.append(part)
            count += len(part)
    if waiting:
        yield concatenate(waiting)


def _shown(table: ExtentTable) -> ExtentTable:
    flags = _VIEW.take(table.flags)
    host = table.host
    opaque = (table.flags & _OPAQUE) != 0
    if opaque.any():
        host = np.where(opaque, NO_HOST, host)
    return ExtentTable(
        start=table.start,
        length=table.length,
        flags=flags,
        layer=table.layer,
        host=host,
        stored=table.stored,
    )


def _merge(table: ExtentTable) -> ExtentTable:
    """qemu's rule: all that is shown is equal, and the offsets continue or are both missing."""
    host = table.host
    joins = (table.flags[1:] == table.flags[:-1]) & (table.layer[1:] == table.layer[:-1])
    joins &= host[1:] == np.where(host[:-1] < 0, NO_HOST, host[:-1] + table.length[:-1])
    return merge_rows(table, joins)


# JSON


def iter_map_json(
    disk: MappedDisk, *, start: int = 0, length: int | None = None
) -> Iterator[bytes]:
    """The map as one JSON array, an object a line, in pieces of bounded size.

    Keys and merge rule are those of `qemu-img map --output=json` of version 8.2 and later. Numbers
    are right-aligned with blanks, which JSON allows. Raises as `iter_rows`."""
    written = False
    digits = _field(disk.size)
    for rows in iter_rows(disk, start=start, length=length):
        text = _format_rows(rows, size_digits=digits)
        # Each row begins with the comma that parts it from the row before.
        yield text if written else b"[" + text[len(_SEPARATOR) :]
        written = True
    yield b"]\n" if written else b"[]\n"


_SEPARATOR = b",\n "
# Digits that are formatted at once, as one 32-bit word; number fields are multiples of it.
_GROUP = 4
_RADIX = 10**_GROUP
_BLANK = 2 * _RADIX


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """One width of row. `templates`: shape (depths * 32, width), rows without their numbers.

    start, length, offset: the column one past the last digit of each number."""

    templates: ByteMatrix
    start: int
    length: int
    offset: int

    @property
    def width(self) -> int:
        return int(self.templates.shape[1])


_Kind = tuple[bool, bool, bool, bool, bool]


def _kinds() -> list[_Kind]:
    """All combinations of present, zero, data, compressed, offset, in the order of `_kind_of`."""
    return [(bool(i & 1), bool(i & 2), bool(i & 4), bool(i & 8), bool(i & 16)) for i in range(32)]


def _kind_of(rows: ExtentTable) -> npt.NDArray[np.intp]:
    """The index into `_kinds` of each row."""
    kind = (rows.host >= 0).astype(np.intp) << 4
    for bit, flag in enumerate((Flag.PRESENT, Flag.ZERO, Flag.DATA, Flag.COMPRESSED)):
        kind |= ((rows.flags & int(flag)) != 0).astype(np.intp) << bit
    return kind


@lru_cache(maxsize=16)
def _layout(size_digits: int, offset_digits: int, depth_count: int) -> _Layout:
    number, host = b" " * size_digits, b" " * offset_digits
    head = _SEPARATOR + b'{"start": ' + number
    middle = b', "length": ' + number
    depth_digits = len(str(depth_count - 1))
    names = (b"present", b"zero", b"data", b"compressed")
    lines = []
    for depth in range(depth_count):
        for *values, has_offset in _kinds():
            line = head + middle + b', "depth": %*d' % (depth_digits, depth)
            for name, value in zip(names, values, strict=True):
                line += b', "%s": %s' % (name, b" true" if value else b"false")
            tail = b', "offset": ' + host
            end = len(line) + len(tail)
            lines.append(line + (tail if has_offset else b" " * len(tail)) + b"}")
    templates = np.frombuffer(b"".join(lines), dtype=np.uint8).reshape(len(lines), -1)
    return _Layout(templates=templates, start=len(head), length=len(head) + len(middle), offset=end)


def _format_rows(rows: ExtentTable, *, size_digits: int) -> bytes:
    """All rows as lines of one width, each led by the separator."""
    top_offset = int(rows.host.max())
    layout = _layout(
        size_digits,
        max(size_digits, _field(top_offset)),
        int(rows.layer.max()) + 1,
    )
    kinds = _kind_of(rows)
    matrix = layout.templates.take(kinds + (rows.layer.astype(np.intp) << 5), axis=0)
    _write_numbers(matrix, rows.start, end=layout.start)
    _write_numbers(matrix, rows.length, end=layout.length)
    has_offset = rows.host >= 0
    if has_offset.all():
        _write_numbers(matrix, rows.host, end=layout.offset)
    elif has_offset.any():
        _write_numbers(matrix, rows.host, end=layout.offset, shown=has_offset)
    return matrix.tobytes()


def _field(largest: int) -> int:
    """The width of a number field."""
    return ceil_div(len(str(largest)), _GROUP) * _GROUP


def _write_numbers(
    matrix: ByteMatrix,
    values: Int64Array,
    *,
    end: int,
    shown: npt.NDArray[np.bool_] | None = None,
) -> None:
    """Decimal digits of `values`, right-aligned to column `end`; blanks where not `shown`."""
    table, others = _digit_groups()
    rest: npt.NDArray[Any] = values.astype(np.uint64)
    if shown is not None:
        rest[~shown] = 0
    if int(rest.max()) >> 32 == 0:
        rest = rest.astype(np.uint32)
    count, width = matrix.shape
    while True:
        higher = rest // _RADIX
        index = (rest - higher * _RADIX).astype(np.intp)
        index += (higher != 0) * np.intp(_RADIX)
        if shown is not None:
            index[~shown] = _BLANK
        end -= _GROUP
        column: npt.NDArray[np.uint32] = np.ndarray(
            (count,), dtype=np.uint32, buffer=matrix.data, offset=end, strides=(width,)
        )
        column[:] = table.take(index)
        if not higher.any():
            return
        rest, table = higher, others


@lru_cache(maxsize=1)
def _digit_groups() -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Four digits as one 32-bit word, for the last group of a number and for all others.

    Indices below 10000 are led by blanks, since no higher digit exists; those from 10000 on are
    led by zeros; the last is blank. A zero is one digit in the last group and nothing in the
    others."""
    led_by_blanks = [b"%4d" % value for value in range(_RADIX)]
    led_by_zeros = [b"%04d" % value for value in range(_RADIX)]
    last = b"".join((*led_by_blanks, *led_by_zeros, b"    "))
    led_by_blanks[0] = b"    "
    others = b"".join((*led_by_blanks, *led_by_zeros, b"    "))
    return np.frombuffer(last, dtype=np.uint32), np.frombuffer(others, dtype=np.uint32)


# Text

_STATES = {
    Flag.DATA | Flag.PRESENT: "data",
    Flag.DATA | Flag.PRESENT | Flag.COMPRESSED: "compressed",
    Flag.ZERO | Flag.PRESENT: "zero",
    Flag.ZERO: "unallocated",
}


def render_map_text(
    disk: MappedDisk,
    *,
    start: int = 0,
    length: int | None = None,
    files: Sequence[str] = (),
) -> Iterator[str]:
    """The map as lines to read, without line ends: a heading, one line a run, a closing sum.

    All states are listed, compressed runs with the bytes that they take in the file. files: the
    names of the layers, top first; without them the file column is left out. Raises as
    `iter_rows`."""
    digits = max(8, len(f"{disk.size:x}")) + 2
    yield (
        f"{'start':>{digits}}  {'end':>{digits}}  {'size':>9}  {'state':<11}  depth  "
        f"{'host offset':>{digits}}" + ("  file" if files else "")
    )
    sums: dict[str, int] = {}
    runs = 0
    for rows in iter_rows(disk, start=start, length=length):
        runs += len(rows)
        for row in rows:
            state = _STATES.get(Flag(row.flags), "data")
            sums[state] = sums.get(state, 0) + row.length
            yield _text_line(row, state=state, digits=digits, files=files)
    parts = [f"{format_size(size)} {state}" for state, size in sums.items()]
    yield f"{runs} run{'' if runs == 1 else 's'}: {', '.join(parts) or 'the disk is empty'}"


def _text_line(row: Extent, *, state: str, digits: int, files: Sequence[str]) -> str:
    if row.host >= 0:
        place = f"{row.host:#x}"
    elif row.stored:
        place = f"in {format_size(row.stored)}"
    else:
        place = "-"
    line = (
        f"{row.start:#{digits}x}  {row.start + row.length:#{digits}x}  {format_size(row.length):>9}"
        f"  {state:<11}  {row.layer:5}  {place:>{digits}}"
    )
    if files and row.flags & Flag.PRESENT and row.layer < len(files):
        line += f"  {files[row.layer]}"
    return line
