"""What `info`, `map` and `alloc` say of an open disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.extents.table import Flag
from qcowkit.image.chain import Chain
from qcowkit.operations.info import describe_image
from qcowkit.operations.io_language.reports import (
    Allocation,
    AllocationMap,
    Lines,
    exact_size,
)
from qcowkit.units import align_up


def allocated_runs(chain: Chain, *, start: int, length: int) -> Iterator[tuple[int, bool]]:
    """Ascending (length, whether the top image decides the content); neighbours differ."""
    run, held = 0, False
    for table in chain.iter_extents(start=start, length=length):
        for row in table:
            here = row.layer == 0 and bool(row.flags & Flag.PRESENT)
            if run and here != held:
                yield run, held
                run = 0
            run, held = run + row.length, here
    if run:
        yield run, held


def allocation(chain: Chain, *, offset: int, length: int) -> Allocation:
    """How much of a range is held; the range ends where the disk does."""
    length = min(length, max(0, chain.size - offset))
    runs = allocated_runs(chain, start=offset, length=length)
    return Allocation(
        offset=offset, length=length, allocated=sum(size for size, held in runs if held)
    )


def allocation_map(chain: Chain) -> AllocationMap:
    """The whole disk."""
    return AllocationMap(runs=tuple(allocated_runs(chain, start=0, length=chain.size)))


def description(chain: Chain) -> Lines:
    """Format, cluster size, where the VM state begins, and what the format has to say."""
    metadata = chain.images[0].metadata
    state, cluster = 0, 0
    if isinstance(metadata, Qcow2Metadata):
        # The VM state lies behind what the L1 entries of the disk itself can map.
        geometry = metadata.geometry
        span = geometry.cluster_size * geometry.l2_entries
        state, cluster = align_up(chain.size, span), geometry.cluster_size
    elif getattr(metadata, "subformat", "fixed") != "fixed":
        cluster = chain.cluster_size
    lines = [
        f"format name: {chain.format}",
        f"cluster size: {exact_size(cluster)}",
        f"vm state offset: {exact_size(state)}",
    ]
    if chain.layers:
        specific = describe_image(chain.layers[0]).get("format-specific", {}).get("data")
        if specific:
            lines += ["Format specific information:", *_nested(specific, depth=1)]
    return Lines(lines=lines)


def _nested(value: Mapping[str, Any], *, depth: int) -> Iterator[str]:
    indent = "    " * depth
    for key, item in value.items():
        name = key.replace("-", " ")
        if isinstance(item, Mapping):
            yield f"{indent}{name}:"
            yield from _nested(item, depth=depth + 1)
        elif isinstance(item, list):
            yield f"{indent}{name}:"
            for index, one in enumerate(item):
                if isinstance(one, Mapping):
                    yield f"{indent}    [{index}]:"
                    yield from _nested(one, depth=depth + 2)
                else:
                    yield f"{indent}    [{index}]: {_word(one)}"
        else:
            yield f"{indent}{name}: {_word(item)}"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
