"""What L2 entries refer to and which of them break a rule, a batch of tables at a time.

Bad entries are handed to a reporter and left out where they lead nowhere; nothing is raised.
Rows 38 to 40 of docs/formats/qcow2.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qcowkit.codecs.qcow2.entries import (
    ALL_ALLOCATED,
    COMPRESSED,
    L2_RESERVED,
    MAX_HOST_OFFSET,
    OFFSET_MASK,
    READS_ZERO,
    EntryRules,
    Uint64Array,
)
from qcowkit.errors import CorruptMetadata
from qcowkit.extents.table import Int64Array

BoolArray = npt.NDArray[np.bool_]
_NONE = np.zeros(0, dtype=np.int64)


class Reporter(Protocol):
    """Takes the faults of one rule. where: indices into the batch; text: with one `{:#x}`, for
    the value of each."""

    def __call__(self, where: Int64Array, values: Int64Array, text: str) -> None: ...


def ignore_faults(where: Int64Array, values: Int64Array, text: str) -> None:
    """The reporter of those who have reported already."""


def raise_fault(tables: Int64Array, *, per_table: int) -> Reporter:
    """A reporter that raises CorruptMetadata for the first fault: for those who act on entries.

    tables: host offsets of the tables of a batch, in the order of their entries."""

    def report(where: Int64Array, values: Int64Array, text: str) -> None:
        if len(where):
            table, index = divmod(int(where[0]), per_table)
            reason = text.format(int(values[0]))
            raise CorruptMetadata(
                "L2 table", host_offset=int(tables[table]), index=index, reason=reason
            )

    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """What a batch of entries refers to.

    where: indices of plain entries; host: their host offsets; copied: their flag; all (n,).
    packed_where, packed_host, packed_length: the same of compressed entries, in bytes. packed:
    how many compressed entries there are, with those whose data cannot be there. beyond: host
    offsets of plain clusters behind the end of the file, which are in none of the others."""

    where: Int64Array
    host: Int64Array
    copied: BoolArray
    packed_where: Int64Array
    packed_host: Int64Array
    packed_length: Int64Array
    packed: int
    beyond: Int64Array


def find_links(
    entries: Uint64Array,
    bitmaps: Uint64Array | None,
    *,
    rules: EntryRules,
    starts: Int64Array | None,
    report: Reporter,
) -> Links:
    """Sort entries into plain and compressed links; report what breaks the specification.

    entries, bitmaps: native uint64, shape (n,). starts: guest offsets of the entries, wanted only
    with an external data file, where they must equal the host offsets."""
    where = np.flatnonzero(entries)
    words = entries[where].view(np.int64)
    bits = int(np.bitwise_or.reduce(words)) if len(words) else 0
    packed: tuple[Int64Array, Int64Array, Int64Array, int] = (_NONE, _NONE, _NONE, 0)
    if bitmaps is not None:
        _check_bitmaps(entries, bitmaps, rules, report)
    if bits & COMPRESSED:
        is_packed = (words & np.int64(COMPRESSED)) != 0
        packed = _find_packed(where[is_packed], words[is_packed], bitmaps, rules, report)
        where, words = where[~is_packed], words[~is_packed]
        bits = int(np.bitwise_or.reduce(words)) if len(words) else 0
    if bits & (L2_RESERVED | READS_ZERO):
        _check_flags(where, words, bitmaps, rules, report)
    host = words & np.int64(OFFSET_MASK)
    good, beyond = _sound_hosts(where, words, host, bits, rules, starts, report)
    if good is not None:
        where, words, host = where[good], words[good], host[good]
    return Links(
        where=where,
        host=host,
        copied=words < 0,
        packed_where=packed[0],
        packed_host=packed[1],
        packed_length=packed[2],
        packed=packed[3],
        beyond=beyond,
    )


def _check_flags(
    where: Int64Array,
    words: Int64Array,
    bitmaps: Uint64Array | None,
    rules: EntryRules,
    report: Reporter,
) -> None:
    reserved = words & np.int64(L2_RESERVED)
    mask = reserved != 0
    if mask.any():
        report(where[mask], reserved[mask], "reserved bits {:#x} are set, expected 0")
    if bitmaps is None and rules.version >= 3:
        return
    mask = (words & READS_ZERO) != 0
    if mask.any():
        text = (
            "bit 0 of {:#x} is set, which extended L2 entries reserve"
            if bitmaps is not None
            else "the zero flag of {:#x} is set in a version 2 image"
        )
        report(where[mask], words[mask], text)


def _sound_hosts(
    where: Int64Array,
    words: Int64Array,
    host: Int64Array,
    bits: int,
    rules: EntryRules,
    starts: Int64Array | None,
    report: Reporter,
) -> tuple[BoolArray | None, Int64Array]:
    """Which plain entries refer to a cluster that can be there, None for all of them; and the host
    offsets of those behind the end of the file."""
    if not len(host):
        return None, _NONE
    size = rules.geometry.cluster_size
    end = MAX_HOST_OFFSET if rules.external_data else rules.file_size
    unaligned = bits & OFFSET_MASK & (size - 1)
    if int(host.min()) > 0 and not unaligned and int(host.max()) < end and starts is None:
        return None, _NONE
    good = host != 0
    if rules.external_data:
        # Offset 0 is a cluster there when COPIED is set.
        good |= words < 0
    apart = (host & np.int64(size - 1)) != 0
    if unaligned:
        text = f"data cluster offset {{:#x}} is not a multiple of the cluster size {size:#x}"
        report(where[apart], host[apart], text)
        good &= ~apart
    outside = good & (host >= end)
    if outside.any():
        text = f"data cluster offset {{:#x}} is beyond the end of the file at {end:#x}"
        report(where[outside], host[outside], text)
        good &= ~outside
    if starts is not None:
        moved = good & (host != starts[where])
        if moved.any():
            text = "data cluster offset {:#x} of an external data file differs from the guest's"
            report(where[moved], host[moved], text)
    return good, host[outside]


def _check_bitmaps(
    entries: Uint64Array, bitmaps: Uint64Array, rules: EntryRules, report: Reporter
) -> None:
    """Row 39, for entries that are not compressed."""
    allocated = bitmaps & np.uint64(ALL_ALLOCATED)
    both = (allocated & (bitmaps >> np.uint64(32))).view(np.int64)
    words = entries.view(np.int64)
    plain = (words & np.int64(COMPRESSED)) == 0
    hostless = (words & np.int64(OFFSET_MASK)) == 0
    if rules.external_data:
        hostless &= words >= 0
    bad = np.flatnonzero(plain & (both != 0))
    if len(bad):
        report(bad, both[bad], "subclusters {:#x} are both allocated and zero")
    bad = np.flatnonzero(plain & hostless & (allocated != 0) & (both == 0))
    if len(bad):
        values = allocated[bad].view(np.int64)
        report(bad, values, "subclusters {:#x} are allocated without a host cluster")


def _find_packed(
    where: Int64Array,
    words: Int64Array,
    bitmaps: Uint64Array | None,
    rules: EntryRules,
    report: Reporter,
) -> tuple[Int64Array, Int64Array, Int64Array, int]:
    """(indices, host offsets, bytes) of compressed data that can be there, and the entries in all
    (row 40)."""
    bits, total = rules.geometry.compressed_offset_bits, len(words)
    host = words & np.int64((1 << bits) - 1)
    sectors = (words >> np.int64(bits)) & np.int64((1 << (62 - bits)) - 1)
    length = (sectors + 1) * 512 - host % 512
    if rules.external_data:
        text = "compressed data at {:#x} in an image with an external data file"
        report(where, host, text)
        return _NONE, _NONE, _NONE, total
    flagged = words < 0
    if flagged.any():
        report(where[flagged], host[flagged], "COPIED is set on compressed data at {:#x}")
    if bitmaps is not None:
        second = bitmaps[where].view(np.int64)
        mask = second != 0
        if mask.any():
            text = "subcluster bitmap of a compressed cluster is {:#x}, expected 0"
            report(where[mask], second[mask], text)
    # The last sector may be cut by the end of the file, the data may not begin behind it.
    end = rules.file_size
    outside = (host >= min(end, MAX_HOST_OFFSET)) | (host + length > end + 511)
    if outside.any():
        text = f"compressed data at {{:#x}} reach beyond the end of the file at {end:#x}"
        report(where[outside], host[outside], text)
        where, host, length = where[~outside], host[~outside], length[~outside]
    return where, host, length, total
