"""The rows about single requests: writes and reads of a guest, allocation, growth. Pure.

They time what the tools say that their requests took, not their start. Most pair `qemu-img bench`
with `qcow bench`, and with the same loop over the library. Some pair ours with itself, to show what
an option costs, or the size of an image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench.images import GiB, MiB
from bench.requests import (
    CLUSTER,
    NO_OPTIONS,
    PATTERN,
    Blank,
    KiB,
    Options,
    RequestRow,
    Requests,
    TiB,
    bench,
    in_process,
    io,
    paired,
    scattered,
)

# Images whose clusters all have their place; the second kind is a hole as far as there is no data.
_FULL = Blank(size=GiB, options=("preallocation=falloc",))


def _placed(size: int, *, cluster: int = CLUSTER, grown: int = 0) -> Blank:
    options = ("preallocation=metadata",)
    return Blank(size=size - grown, cluster=cluster, options=options, grown=grown)


_EMPTY = Blank(size=GiB)
_ONE_A_CLUSTER = Requests(count=8000, step=CLUSTER)
_COPIES = Requests(count=4000, step=CLUSTER)

_PLAIN = (
    paired(
        "io-overwrite",
        "overwrite 4 KiB, scattered",
        image=_FULL,
        requests=Requests(count=40_000, step=scattered(GiB, grain=4 * KiB)),
        goal=1.2,
    ),
    paired(
        "io-overwrite-1",
        "the same, one request under way",
        image=_FULL,
        requests=Requests(count=20_000, step=scattered(GiB, grain=4 * KiB), depth=1),
    ),
    paired(
        "io-allocate",
        "allocating, 4 KiB a cluster",
        image=_EMPTY,
        requests=_ONE_A_CLUSTER,
        goal=3.0,
    ),
    paired(
        "io-scattered",
        "the same, scattered over 1 GiB",
        image=_EMPTY,
        requests=replace(_ONE_A_CLUSTER, step=scattered(GiB, grain=CLUSTER)),
    ),
    paired(
        "io-sequential",
        "allocating, 64 KiB in sequence",
        image=_EMPTY,
        requests=Requests(count=8000, step=CLUSTER, size=CLUSTER),
        goal=1.0,
    ),
    paired(
        "io-copy-raw",
        "copy-on-write over raw, 4 KiB a cluster",
        image=Blank(size=256 * MiB, base="raw"),
        requests=_COPIES,
        goal=1.0,
    ),
    paired(
        "io-copy-qcow2",
        "copy-on-write over qcow2, 4 KiB a cluster",
        image=Blank(size=256 * MiB, base="qcow2"),
        requests=_COPIES,
        goal=1.0,
    ),
    paired(
        "io-extended",
        "allocating under extended L2, 4 KiB a cluster",
        image=Blank(size=GiB, options=("extended_l2=on",)),
        requests=_ONE_A_CLUSTER,
        goal=1.5,
    ),
    paired(
        "io-flush",
        "overwrite 4 KiB, scattered, a flush after every 16",
        image=_FULL,
        requests=Requests(count=8000, step=scattered(GiB, grain=4 * KiB), depth=16, flush=16),
    ),
    paired(
        "io-flush-allocate",
        "allocating, 4 KiB a cluster, a flush after every 16",
        image=_EMPTY,
        requests=Requests(count=4000, step=CLUSTER, depth=16, flush=16),
    ),
)


def _script(count: int, *, every: int) -> tuple[str, ...]:
    """Writes to one cluster after another, and flushes, as commands of qemu-io."""
    commands = []
    for index in range(count):
        commands.append(f"write -q -P {PATTERN} {index * CLUSTER} 4k")
        if index % every == every - 1:
            commands.append("flush")
    return tuple(commands)


def _scripted(
    name: str,
    title: str,
    *,
    image: Blank,
    script: tuple[str, ...],
    count: int,
    timed: bool,
    written: Requests | None = None,
) -> RequestRow:
    """The same commands through qemu-io and `qcow io`. timed: the sum of what `-C` prints counts;
    the whole run if not."""
    return RequestRow(
        name=name,
        title=title,
        image=image,
        peer=io("qemu-io", (), "{image}"),
        ours=("{qcow}", *io("io", (), "{image}")),
        count=count,
        fresh=not image.allocated or bool(image.crash),
        pairs=3,
        script=script,
        clock="operations" if timed else "wall",
        peer_label="qemu-io",
        written=written,
        around=0 if written else None,
    )


def _against_itself(
    name: str,
    title: str,
    *,
    image: Blank,
    requests: Requests,
    options: Options = NO_OPTIONS,
    peer_options: Options = NO_OPTIONS,
    peer_label: str,
) -> RequestRow:
    """`qcow bench` on both sides, with other options."""
    return replace(
        paired(name, title, image=image, requests=requests, options=options),
        peer=("{qcow}", *bench(requests, peer_options)),
        peer_label=peer_label,
    )


# The L2 cache covers any disk here: what is compared are disks, not caches.
_COVER: Options = {"l2-cache-size": 128 * MiB}


def _grown(
    name: str, title: str, *, small: Blank, large: Blank, grain: int, requests: Requests
) -> RequestRow:
    """The library on a large disk, against the library on a small one: once tables are known, no
    request should be slower for the size of the disk."""
    few = replace(requests, step=scattered(small.size, grain=grain, most=small.size))
    many = replace(requests, step=scattered(large.size, grain=grain, most=large.size))
    return replace(
        paired(name, title, image=large, requests=many),
        peer=in_process(few, _COVER),
        ours=in_process(many, _COVER),
        api=(),
        peer_image=small,
        peer_label="library, 1 GiB",
    )


def _growing() -> Iterator[RequestRow]:
    writes = Requests(count=20_000, warm=10_000, step=0)
    allocations = Requests(count=6000, warm=6000, step=0)
    for word, shown, size in (("32g", "32 GiB", 32 * GiB), ("1t", "1 TiB", TiB)):
        yield _grown(
            f"io-grow-write-{word}",
            f"library, warm: overwrite 4 KiB, scattered over {shown}",
            small=_placed(GiB),
            large=_placed(size),
            grain=4 * KiB,
            requests=writes,
        )
        yield _grown(
            f"io-grow-alloc-{word}",
            f"library, warm: allocating, 4 KiB a cluster, scattered over {shown}",
            small=_EMPTY,
            large=Blank(size=size),
            grain=CLUSTER,
            requests=allocations,
        )
    for row in _huge():
        yield replace(row, pairs=3)


def _huge() -> Iterator[RequestRow]:
    yield paired(
        "io-1t-write",
        "overwrite 4 KiB, scattered over 1 TiB",
        image=_placed(TiB),
        requests=Requests(count=20_000, step=scattered(TiB, grain=4 * KiB)),
        options=_COVER,
    )
    yield paired(
        "io-1t-alloc",
        "allocating, 4 KiB a cluster, scattered over 1 TiB",
        image=Blank(size=TiB),
        requests=Requests(count=8000, step=scattered(TiB, grain=CLUSTER)),
        options=_COVER,
    )


# A disk of 1 TiB of which only the last clusters have no place yet.
_LEFT = 256 * MiB
_NEARLY_FULL = _placed(TiB, grown=_LEFT)
_LAST = TiB - _LEFT


def _first_allocation() -> tuple[str, ...]:
    """One allocation right after opening, when nothing is known of the refcount blocks."""
    return (f"write -C {_LAST} 4k", f"discard -q {_LAST} 64k", "flush")


def _allocations_after_frees(rounds: int) -> tuple[str, ...]:
    """A cluster near the start is freed; the first allocation takes it, the next has to come all
    the way to the end of the file."""
    second = _LAST + CLUSTER
    # The first search, which reads all blocks, is the row before.
    commands = [f"write -q {_LAST} 4k", f"discard -q {_LAST} 64k", "flush"]
    for index in range(1, rounds + 1):
        low = index * CLUSTER
        commands += [f"discard -q {low} 64k", "flush"]
        commands += [f"write -C {_LAST} 4k", f"write -C {second} 4k"]
        commands += [f"discard -q {_LAST} 64k", f"discard -q {second} 64k", "flush"]
        commands += [f"write -q {low} 64k"]
    return tuple(commands)


_VAST = _placed(256 * GiB)
_READS = Requests(count=20_000, step=scattered(256 * GiB, grain=4 * KiB), write=False)
# 16 L2 tables of 2 MiB; a slice of 4 KiB is for 1 GiB of them.
_WIDE = _placed(8 * TiB, cluster=2 * MiB)
_WIDE_READS = Requests(count=5000, step=scattered(8 * TiB, grain=4 * KiB), write=False)
# Hardly two requests in a row meet the same table.
_FAR = scattered(8 * TiB, grain=4 * KiB, most=8 * TiB)
_SLICES: Options = {"l2-cache-size": 4 * MiB, "l2-cache-entry-size": 4 * KiB}
_WHOLE: Options = {"l2-cache-size": 4 * MiB, "l2-cache-entry-size": 2 * MiB}

_TABLES = (
    paired(
        "io-read-cached",
        "read 4 KiB, scattered over 256 GiB, L2 cache for all of it",
        image=_VAST,
        requests=_READS,
        options={"l2-cache-size": 32 * MiB},
    ),
    paired(
        "io-read-1m",
        "the same, L2 cache of 1 MiB",
        image=_VAST,
        requests=_READS,
        options={"l2-cache-size": MiB},
    ),
    replace(
        _against_itself(
            "io-runs",
            "the same, contiguous runs against L2 tables",
            image=replace(_VAST, options=(*_VAST.options, "contiguous_runs=on")),
            requests=_READS,
            options={"l2-cache-size": MiB},
            peer_options={"l2-cache-size": MiB},
            peer_label="qcow, L2 tables",
        ),
        peer_image=_VAST,
    ),
    paired(
        "io-slices",
        "read 4 KiB, clusters and L2 cache of 2 and 4 MiB, slices of 4 KiB",
        image=_WIDE,
        requests=_WIDE_READS,
        options=_SLICES,
    ),
    _against_itself(
        "io-slices-whole",
        "the same, slices against whole L2 tables",
        image=_WIDE,
        requests=replace(_WIDE_READS, count=500, step=_FAR),
        options=_SLICES,
        peer_options=_WHOLE,
        peer_label="qcow, tables whole",
    ),
    _against_itself(
        "io-overlap",
        "allocating, 4 KiB a cluster: overlap checks against none",
        image=_EMPTY,
        requests=_ONE_A_CLUSTER,
        peer_options={"overlap-check": "none"},
        peer_label="qcow, no checks",
    ),
    _scripted(
        "io-full-first",
        "first allocation in a nearly full image of 1 TiB",
        image=_NEARLY_FULL,
        script=_first_allocation(),
        count=1,
        timed=True,
    ),
    _scripted(
        "io-full-again",
        "allocations in it after clusters were freed",
        image=_NEARLY_FULL,
        script=_allocations_after_frees(3),
        count=6,
        timed=True,
    ),
)

_SCRIPTED = 4000
_SCRIPTS = (
    _scripted(
        "io-script",
        "script of 4000 allocating writes, a flush after every 16, with start",
        image=_EMPTY,
        script=_script(_SCRIPTED, every=16),
        count=_SCRIPTED,
        timed=False,
        written=Requests(count=_SCRIPTED, step=CLUSTER),
    ),
)

# Left by a writer that allocated behind everything else and was killed.
_RECORDED = Blank(
    size=256 * GiB,
    grown=_LEFT,
    options=("preallocation=metadata", "lazy_refcounts=on"),
    crash=(f"write -q {256 * GiB} 4k", "flush"),
)
_OPENED = _scripted(
    "io-recover",
    "open an image of 256 GiB after a crash, lazy refcounts, with start",
    image=_RECORDED,
    script=(),
    count=1,
    timed=False,
)
_RECOVERY = (
    _OPENED,
    replace(
        _OPENED,
        name="io-recover-all",
        title="the same, the record of dirty L2 tables against none",
        peer=_OPENED.ours,
        peer_image=replace(_RECORDED, tool="qemu-img"),
        peer_label="qcow, no record",
    ),
)

REQUEST_ROWS: tuple[RequestRow, ...] = (*_PLAIN, *_SCRIPTS, *_TABLES, *_growing(), *_RECOVERY)
