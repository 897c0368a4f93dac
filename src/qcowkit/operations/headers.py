"""Allocation JSON: which clusters of a guest disk hold data, as XAPI's tools exchange it.

One object `{"virtual_size","cluster_bits","data_clusters"}`, compact, in two shapes: intervals
`[first,last]`, inclusive, sorted and maximal, or the older flat list of indices (seeds S000-1, -2).
Bytes are rounded outward to clusters, so that a cluster touched at one byte is listed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import Flag
from qcowkit.image.protocol import Image
from qcowkit.image.vhd import VhdImage
from qcowkit.operations.map import MappedDisk
from qcowkit.units import INT64_MAX, ceil_div, is_power_of_two

# From a sector to far above the largest unit of any format (2 MiB).
MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 30

_CHUNK = 1 << 15  # runs or indices joined at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What an allocation document says. virtual_size: bytes. clusters: indices, not bytes."""

    virtual_size: int
    cluster_bits: int
    clusters: RangeSet


def allocation_json(
    disk: MappedDisk, *, cluster_bits: int, legacy: bool = False
) -> Iterator[bytes]:
    """The document of a disk, in pieces, in memory that does not grow with the disk.

    Clusters with data at any depth of the chain count; of dynamic VHDs every block that is in any
    table of the chain, as XAPI's tools have it. legacy: the flat list. Raises RequestError
    for `cluster_bits` outside 9 to 30, and whatever reading the map raises."""
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise RequestError(
            f"cluster_bits {cluster_bits} is not between {MIN_CLUSTER_BITS} and {MAX_CLUSTER_BITS}"
        )
    head = f'{{"virtual_size":{disk.size},"cluster_bits":{cluster_bits},"data_clusters":['
    yield head.encode()
    separator = b""
    runs = iter_clusters(disk, cluster_bits=cluster_bits)
    for piece in _flat(runs) if legacy else _intervals(runs):
        yield separator + piece
        separator = b","
    yield b"]}"


def iter_clusters(disk: MappedDisk, *, cluster_bits: int) -> Iterator[RangeSet]:
    """Indices of the clusters with data, as ascending sets; a run never continues in the next."""
    if not disk.size:
        return
    last = RangeSet.empty()
    for ranges in _iter_allocated(disk):
        clusters = ranges.scale_outward(1 << cluster_bits)
        if not len(clusters):
            continue
        # Only the last run may touch, or overlap, the first one of the next window.
        merged = RangeSet.of(
            np.concatenate((last.start, clusters.start)), np.concatenate((last.stop, clusters.stop))
        )
        last = RangeSet(start=merged.start[-1:], stop=merged.stop[-1:])
        if len(merged) > 1:
            yield RangeSet(start=merged.start[:-1], stop=merged.stop[:-1])
    if len(last):
        yield last


def _iter_allocated(disk: MappedDisk) -> Iterator[RangeSet]:
    """Guest bytes that count, window by window."""
    blocks = [image for image in getattr(disk, "images", ()) if _has_blocks(image)]
    for table in disk.iter_extents(start=0, length=disk.size):
        found = RangeSet.from_table(table, Flag.DATA)
        for image in blocks:
            found = found.union(_blocks(image, table.begin, min(table.end, image.size)))
        yield found


def _has_blocks(image: Image) -> bool:
    return isinstance(image, VhdImage) and image.metadata.dynamic_header is not None


def _blocks(image: Image, start: int, stop: int) -> RangeSet:
    """Where a VHD has host space, whatever its sector bitmaps say."""
    if start >= stop:
        return RangeSet.empty()
    table = image.extents(start=start, length=stop - start)
    rows = table.take(table.host >= 0)
    return RangeSet.of(rows.start, rows.start + rows.length)


def _intervals(runs: Iterable[RangeSet]) -> Iterator[bytes]:
    for clusters in runs:
        pairs = clusters.pairs()
        for begin in range(0, len(pairs), _CHUNK):
            chunk = pairs[begin : begin + _CHUNK].tolist()
            yield ",".join([f"[{first},{last}]" for first, last in chunk]).encode()


def _flat(runs: Iterable[RangeSet]) -> Iterator[bytes]:
    for clusters in runs:
        for start, stop in clusters:
            for begin in range(start, stop, _CHUNK):
                yield ",".join(map(str, range(begin, min(begin + _CHUNK, stop)))).encode()


# Reading

_DOCUMENT = "allocation document"
_INFO = "info document"
_MAP = "map document"


def parse_allocation(raw: bytes | str) -> Allocation:
    """Read a document of either shape; an empty list is both.

    Raises CorruptMetadata, naming the document and the entry, for anything that is not sorted,
    disjoint and within the disk."""
    document = _load(raw, structure=_DOCUMENT)
    if not isinstance(document, dict):
        raise CorruptMetadata(_DOCUMENT, reason=f"{_kind(document)}, expected an object")
    size = _integer(document, "virtual_size", structure=_DOCUMENT, largest=INT64_MAX)
    bits = _integer(document, "cluster_bits", structure=_DOCUMENT, largest=MAX_CLUSTER_BITS)
    if bits < MIN_CLUSTER_BITS:
        raise CorruptMetadata(
            _DOCUMENT, reason=f"cluster_bits is {bits}, expected at least {MIN_CLUSTER_BITS}"
        )
    entries = document.get("data_clusters")
    if not isinstance(entries, list):
        raise CorruptMetadata(
            _DOCUMENT, reason=f"data_clusters is {_kind(entries)}, expected an array"
        )
    clusters = _read_entries(entries, count=ceil_div(size, 1 << bits))
    return Allocation(virtual_size=size, cluster_bits=bits, clusters=clusters)


def _read_entries(entries: list[Any], *, count: int) -> RangeSet:
    """Indices or pairs, below `count`, as a set; the first entry decides the shape."""
    flat = bool(entries) and not isinstance(entries[0], list)
    starts, stops, end = [], [], 0
    for index, entry in enumerate(entries):
        first, last = (entry, entry) if flat else _pair(entry, index=index)
        if type(first) is not int or type(last) is not int:
            wrong = first if type(first) is not int else last
            raise _entry_error(index, f"{_kind(wrong)}, expected a cluster index")
        if first > last:
            raise _entry_error(index, f"the interval [{first},{last}] ends before it begins")
        if first < end:
            raise _entry_error(index, f"cluster {first} is out of order, expected at least {end}")
        if last >= count:
            raise _entry_error(index, f"cluster {last} is beyond the disk of {count} clusters")
        end = last + 1
        starts.append(first)
        stops.append(end)
    return RangeSet.of(starts, stops)


def _pair(entry: Any, *, index: int) -> tuple[Any, Any]:
    if not isinstance(entry, list) or len(entry) != 2:
        found = f"an array of {len(entry)}" if isinstance(entry, list) else _kind(entry)
        raise _entry_error(index, f"{found}, expected an interval [first,last]")
    return entry[0], entry[1]


def _entry_error(index: int, reason: str) -> CorruptMetadata:
    return CorruptMetadata(f"{_DOCUMENT}, data_clusters", index=index, reason=reason)


def allocation_from_qemu(
    info: bytes | str, map_document: bytes | str, *, cluster_bits: int | None = None
) -> Allocation:
    """The same knowledge from `qemu-img info` and `qemu-img map`, both with `--output=json`.

    Entries with data count, at any depth; partial clusters are kept (seed S000-10). cluster_bits:
    in place of the image's own, and needed for raw disks, which have none. Raises CorruptMetadata
    for malformed documents, RequestError when the cluster size is not known."""
    facts = _load(info, structure=_INFO)
    if not isinstance(facts, dict):
        raise CorruptMetadata(_INFO, reason=f"{_kind(facts)}, expected an object")
    size = _integer(facts, "virtual-size", structure=_INFO, largest=INT64_MAX)
    if cluster_bits is None:
        cluster_bits = _cluster_bits(facts)
    entries = _load(map_document, structure=_MAP)
    if not isinstance(entries, list):
        raise CorruptMetadata(_MAP, reason=f"{_kind(entries)}, expected an array")
    data = _read_map(entries, size=size)
    return Allocation(
        virtual_size=size,
        cluster_bits=cluster_bits,
        clusters=data.scale_outward(1 << cluster_bits),
    )


def _cluster_bits(facts: dict[str, Any]) -> int:
    if "cluster-size" not in facts:
        raise RequestError("the info document has no cluster-size: a cluster size must be given")
    size = _integer(facts, "cluster-size", structure=_INFO, largest=1 << MAX_CLUSTER_BITS)
    if size < 1 << MIN_CLUSTER_BITS or not is_power_of_two(size):
        raise CorruptMetadata(
            _INFO, reason=f"cluster-size is {size}, expected a power of two of at least 512"
        )
    return size.bit_length() - 1


def _read_map(entries: list[Any], *, size: int) -> RangeSet:
    """The bytes of the entries with data; the entries must ascend within the disk."""
    starts, stops, end = [], [], 0
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise CorruptMetadata(_MAP, index=index, reason=f"{_kind(entry)}, expected an object")
        start = _integer(entry, "start", structure=_MAP, index=index, largest=size)
        length = _integer(entry, "length", structure=_MAP, index=index, largest=size - start)
        if start < end:
            reason = f"start {start} is out of order, expected at least {end}"
            raise CorruptMetadata(_MAP, index=index, reason=reason)
        data = entry.get("data")
        if not isinstance(data, bool):
            reason = f"data is {_kind(data)}, expected true or false"
            raise CorruptMetadata(_MAP, index=index, reason=reason)
        end = start + length
        if data:
            starts.append(start)
            stops.append(end)
    return RangeSet.of(starts, stops)


def _load(raw: bytes | str, *, structure: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptMetadata(structure, reason=f"not JSON: {error}") from error


def _integer(
    document: dict[str, Any], key: str, *, structure: str, largest: int, index: int | None = None
) -> int:
    """The value of a key that must be an integer from 0 to `largest`."""
    value = document.get(key)
    if type(value) is not int:
        raise CorruptMetadata(
            structure, index=index, reason=f"{key} is {_kind(value)}, expected an integer"
        )
    if not 0 <= value <= largest:
        raise CorruptMetadata(
            structure, index=index, reason=f"{key} is {value}, expected 0 to {largest}"
        )
    return value


_KINDS = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a truth value",
    int: "an integer",
    float: "a fraction",
    type(None): "missing or null",
}


def _kind(value: Any) -> str:
    """The JSON type of a value, in words."""
    return _KINDS[type(value)]
