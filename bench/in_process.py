"""The requests of a row in a program that uses the library: `python -m bench.in_process IMAGE`.

What `qcow bench` times too, but with a flush at the end of writes, as a program would have it."""

from __future__ import annotations

import argparse
import sys
import time

import qcowkit
from qcowkit.engine.options import OpenOptions


def arguments() -> argparse.Namespace:
    """The command line; sizes in bytes. Without a pattern the requests are reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--warm", type=int, default=0)
    parser.add_argument("--flush", type=int, default=0)
    parser.add_argument("--pattern", type=int)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("image")
    return parser.parse_args()


def open_options(pairs: list[str]) -> OpenOptions:
    """Options of the block layer as the library names them."""
    given = (pair.partition("=") for pair in pairs)
    values = {
        name.replace("-", "_"): int(value) if value.isdecimal() else value
        for name, _, value in given
    }
    return OpenOptions(**values)  # type: ignore[arg-type]


def read_all(disk: qcowkit.Chain, offsets: list[int], size: int) -> float:
    """Seconds that the reads take."""
    read = disk.read
    begun = time.perf_counter()
    for offset in offsets:
        read(offset=offset, length=size)
    return time.perf_counter() - begun


def write_all(disk: qcowkit.Chain, offsets: list[int], data: bytes, flush: int) -> float:
    """Seconds that the writes take, a flush after every `flush` of them, 0 for none, and one at the
    end."""
    write = disk.write
    every = flush or max(1, len(offsets))
    begun = time.perf_counter()
    for first in range(0, len(offsets), every):
        for offset in offsets[first : first + every]:
            write(data, offset=offset)
        disk.flush()
    return time.perf_counter() - begun


def main() -> int:
    """Carry the requests out and say how long they took."""
    args = arguments()
    write = args.pattern is not None
    with qcowkit.open(
        args.image,
        format="qcow2",
        writable=write,
        gate=qcowkit.ReferenceGate.trusting(),
        options=open_options(args.option),
    ) as disk:
        total = args.count + args.warm
        offsets = [index * args.step % disk.size for index in range(total)]
        for part in (offsets[args.count :], offsets[: args.count]):
            if write:
                seconds = write_all(disk, part, bytes([args.pattern]) * args.size, args.flush)
            else:
                seconds = read_all(disk, part, args.size)
    print(f"Run completed in {seconds:.4f} seconds.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
