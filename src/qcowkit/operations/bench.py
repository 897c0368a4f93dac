"""Bench: how fast requests of one size are answered by a disk.

The loop does nothing beside the requests: offsets are made before, and the clock is looked at where
a batch begins and ends. Requests of one thread follow one another: an image answers one at a time
anyway, so a depth above 1 is what `threads` gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from qcowkit.errors import RequestError
from qcowkit.image.chain import Chain
from qcowkit.units import INT64_MAX, KiB, format_size

MAX_SIZE = (1 << 31) - 1
_BATCH = 1 << 16
_PERCENTILES = (50, 90, 99, 99.9, 100)
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is to be done. size, offset, step: bytes; a step of 0 is one request.

    depth: as qemu-img has it; it is checked against flush_interval and reported. write: write bytes
    of `pattern` and not read. flush_interval: a flush after so many writes, 0 for none. sync: a
    flush after each. seed: pseudo-random multiples of the step in place of ascending offsets.
    latency: time each request, which makes the whole slower."""

    count: int = 75_000
    depth: int = 64
    size: int = 4 * KiB
    offset: int = 0
    step: int = 0
    write: bool = False
    pattern: int = 0
    flush_interval: int = 0
    sync: bool = False
    seed: int | None = None
    threads: int = 1
    latency: bool = False

    @property
    def stride(self) -> int:
        """Bytes from one request to the next."""
        return self.step or self.size

    def check(self) -> None:
        """Raise RequestError for what cannot be done on any disk."""
        if not 1 <= self.size <= MAX_SIZE:
            raise RequestError(f"request size {self.size}, expected 1 to {MAX_SIZE} bytes")
        for what, value in (("depth", self.depth), ("threads", self.threads)):
            if value < 1:
                raise RequestError(f"{what} {value}, expected at least 1")
        if not 0 <= self.pattern <= 255:
            raise RequestError(f"pattern {self.pattern}, expected a byte from 0 to 255")
        if self.flush_interval and not self.write:
            raise RequestError("a flush interval needs a write test")
        if self.flush_interval and self.flush_interval < self.depth:
            raise RequestError(
                f"flush interval {self.flush_interval} is below the depth of {self.depth}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """What was done, and in how many seconds. latencies: of each request in nanoseconds."""

    options: BenchOptions
    seconds: float
    latencies: Int64Array | None = None

    @property
    def requests_per_second(self) -> float:
        """The rate of requests."""
        return self.options.count / max(self.seconds, 1e-9)

    @property
    def bytes_per_second(self) -> float:
        """The rate of bytes."""
        return self.requests_per_second * self.options.size

    def percentiles(self) -> dict[str, float]:
        """Seconds within which so many of a hundred requests were answered."""
        if self.latencies is None or not len(self.latencies):
            return {}
        values = np.percentile(self.latencies, _PERCENTILES) / 1e9
        return {f"{p:g}": float(value) for p, value in zip(_PERCENTILES, values, strict=True)}

    def as_json(self) -> dict[str, Any]:
        """The figures by name; rates a second, sizes in bytes, times in seconds."""
        options = self.options
        found: dict[str, Any] = {
            "count": options.count,
            "size": options.size,
            "depth": options.depth,
            "threads": options.threads,
            "offset": options.offset,
            "step": options.stride,
            "write": options.write,
            "seconds": self.seconds,
            "ops-per-second": self.requests_per_second,
            "bytes-per-second": self.bytes_per_second,
        }
        if options.seed is not None:
            found["random"] = options.seed
        if options.latency:
            found["latency"] = self.percentiles()
        return found

    def render(self) -> list[str]:
        """The result as lines to print."""
        requests, rate = self.requests_per_second, format_size(int(self.bytes_per_second))
        lines = [
            f"Run completed in {self.seconds:.3f} seconds.",
            f"{requests:.0f} requests/s, {rate}/s",
        ]
        found = self.percentiles()
        if found:
            parts = [f"{name} % in {value * 1e6:.1f} us" for name, value in found.items()]
            lines.append(f"latency: {', '.join(parts)}")
        return lines


def describe_run(options: BenchOptions) -> list[str]:
    """What is going to be done, as lines to print before it begins."""
    kind = "write" if options.write else "read"
    size, stride = format_size(options.size), format_size(options.stride)
    if options.seed is None:
        order = f"from offset {options.offset} in steps of {stride}"
    else:
        order = f"at random multiples of {stride}, seed {options.seed}"
    lines = [
        f"{options.count} {kind} requests of {size}, {order}; depth {options.depth}, "
        f"{options.threads} thread{'' if options.threads == 1 else 's'}"
    ]
    if options.flush_interval:
        lines.append(f"a flush after every {options.flush_interval} requests")
    return lines


def run_bench(
    chain: Chain, options: BenchOptions, *, clock: Callable[[], float] = time.perf_counter
) -> BenchResult:
    """Send the requests. clock: seconds.

    Raises RequestError for a request that would leave the disk, before any was sent, for a disk of
    no bytes, and for a write test of a disk that was opened read-only; and as the disk does."""
    options.check()
    if options.write and not chain.writable:
        raise RequestError("a write test needs a disk that is open for writing")
    _check_reach(chain.size, options)
    seconds, latencies = 0.0, []
    step = _make_step(chain, options)
    with ThreadPoolExecutor(options.threads, thread_name_prefix="qcowkit-bench") as pool:
        for offsets in iter_offsets(options, disk_size=chain.size):
            parts = [offsets[index :: options.threads] for index in range(options.threads)]
            begun = clock()
            found = [step(parts[0])] if options.threads == 1 else list(pool.map(step, parts))
            if options.flush_interval and len(offsets) == options.flush_interval:
                chain.flush()
            seconds += clock() - begun
            latencies += [one for one in found if one is not None]
    kept = np.concatenate(latencies) if options.latency and latencies else None
    return BenchResult(options=options, seconds=seconds, latencies=kept)


def iter_offsets(options: BenchOptions, *, disk_size: int) -> Iterator[list[int]]:
    """The offsets of all requests in batches, each of which may be followed by a flush.

    Ascending ones begin again at the start once they leave the disk, as those of qemu-img do:
    modulo its size."""
    batch = options.flush_interval or _BATCH
    noise = np.random.default_rng(options.seed)
    slots = max(1, (disk_size - options.size) // options.stride + 1)
    for first in range(0, options.count, batch):
        count = min(batch, options.count - first)
        if options.seed is not None:
            yield (noise.integers(slots, size=count, dtype=np.int64) * options.stride).tolist()
        else:
            yield _ascending(options, first=first, count=count, disk_size=disk_size).tolist()


def _ascending(options: BenchOptions, *, first: int, count: int, disk_size: int) -> Int64Array:
    stride = options.stride % disk_size
    # Integers of Python: the product may be above 63 bits.
    start = (options.offset + first * stride) % disk_size
    if stride and count > INT64_MAX // 2 // stride:
        return np.array([(start + index * stride) % disk_size for index in range(count)])
    return (start + np.arange(count, dtype=np.int64) * stride) % disk_size


def _check_reach(disk_size: int, options: BenchOptions) -> None:
    """Refuse in advance what would fail on the way."""
    if disk_size == 0:
        raise RequestError("the disk has no bytes that could be asked for")
    if not options.count:
        return
    if options.offset >= disk_size:
        raise RequestError(f"offset {options.offset} is beyond the disk of {disk_size} bytes")
    if options.seed is not None:
        worst = 0
    else:
        worst = max(max(batch) for batch in iter_offsets(options, disk_size=disk_size))
    if worst + options.size > disk_size:
        raise RequestError(
            f"the request of {options.size} bytes at offset {worst} leaves the disk of "
            f"{disk_size} bytes"
        )


# The loops. Names are bound before: a look-up in each round would be measured too.

_Step = Callable[[Sequence[int]], Int64Array | None]


def _make_step(chain: Chain, options: BenchOptions) -> _Step:
    if options.write:
        data = bytes([options.pattern]) * options.size
        if options.sync:
            one: Callable[[int], object] = partial(_write_through, chain, data)
            return partial(_timed if options.latency else _plain, one)
        if not options.latency:
            return partial(_write_all, chain, data)
        return partial(_timed, lambda offset: chain.write(data, offset=offset))
    if not options.latency:
        return partial(_read_all, chain, options.size)
    size = options.size
    return partial(_timed, lambda offset: chain.read(offset=offset, length=size))


def _read_all(chain: Chain, length: int, offsets: Sequence[int]) -> None:
    read = chain.read
    for offset in offsets:
        read(offset=offset, length=length)


def _write_all(chain: Chain, data: bytes, offsets: Sequence[int]) -> None:
    write = chain.write
    for offset in offsets:
        write(data, offset=offset)


def _write_through(chain: Chain, data: bytes, offset: int) -> None:
    chain.write(data, offset=offset)
    chain.flush()


def _plain(one: Callable[[int], object], offsets: Sequence[int]) -> None:
    for offset in offsets:
        one(offset)


def _timed(one: Callable[[int], object], offsets: Sequence[int]) -> Int64Array:
    clock = time.perf_counter_ns
    moments = [clock()]
    note = moments.append
    for offset in offsets:
        one(offset)
        note(clock())
    found = np.array(moments, dtype=np.int64)
    return found[1:] - found[:-1]
