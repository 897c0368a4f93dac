"""`qcow bench`: how fast a disk answers requests of one size."""

from __future__ import annotations

import argparse
from argparse import Namespace

from qcowkit.cli import exits
from qcowkit.cli.common import (
    CACHE_MODES,
    add_access,
    add_format,
    add_output,
    add_quiet,
    count_argument,
    size_argument,
    write_json,
)
from qcowkit.cli.opening import open_disk
from qcowkit.cli.options import parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_lines
from qcowkit.errors import RequestError
from qcowkit.operations.bench import BenchOptions, describe_run, run_bench
from qcowkit.operations.io_language.opening import AIO_MODES
from qcowkit.operations.io_language.requests import parse_pattern

_DEFAULT = BenchOptions()


def configure(parser: Parser) -> None:
    """Flags of qemu-img bench; random offsets, threads, latencies and JSON are ours."""
    parser.add_argument("file", metavar="FILE", help="image; -w overwrites what it holds")
    _add_requests(parser)
    parser.add_argument("-w", "--write", action="store_true", help="write in place of reading")
    parser.add_argument(
        "--pattern",
        metavar="BYTE",
        type=_byte_argument,
        default=0,
        help="with -w: the byte to write (0)",
    )
    parser.add_argument(
        "--flush-interval",
        metavar="COUNT",
        type=count_argument,
        default=0,
        help="with -w: make durable after so many requests; not below the depth",
    )
    parser.add_argument(
        "--no-drain",
        action="store_true",
        help="do not wait for requests under way before a flush: accepted, none ever is",
    )
    parser.add_argument(
        "-t",
        dest="cache",
        metavar="CACHE",
        choices=CACHE_MODES,
        help=f"cache mode: {', '.join(CACHE_MODES)}; with writethrough and directsync every write "
        "is made durable",
    )
    parser.add_argument("-n", dest="native", action="store_true", help="accepted, without effect")
    parser.add_argument("-i", dest="aio", choices=AIO_MODES, help="accepted, without effect")
    parser.add_argument(
        "--latency",
        action="store_true",
        help="time each request too and report percentiles; costs speed itself",
    )
    add_format(parser, "-f")
    add_quiet(parser)
    add_output(parser)
    add_access(parser)
    parser.examples(
        "qcow bench -c 10000 -s 64k disk.qcow2",
        "qcow bench -w --random=7 -f raw scratch.raw        overwrites the disk",
        "qcow bench --output=json --threads 4 disk.qcow2",
    )


def _add_requests(parser: Parser) -> None:
    """How many requests, how large, and where."""
    parser.add_argument(
        "-c",
        dest="count",
        metavar="COUNT",
        type=count_argument,
        default=_DEFAULT.count,
        help=f"requests ({_DEFAULT.count})",
    )
    parser.add_argument(
        "-d",
        dest="depth",
        metavar="DEPTH",
        type=count_argument,
        default=_DEFAULT.depth,
        help=f"requests under way ({_DEFAULT.depth}): checked and reported; those of one thread "
        "follow one another, see --threads",
    )
    parser.add_argument(
        "-s",
        dest="size",
        metavar="SIZE",
        type=size_argument,
        default=_DEFAULT.size,
        help=f"bytes of a request ({_DEFAULT.size})",
    )
    parser.add_argument(
        "-o",
        dest="offset",
        metavar="OFFSET",
        type=size_argument,
        default=0,
        help="guest offset of the first (0)",
    )
    parser.add_argument(
        "-S",
        dest="step",
        metavar="STEP",
        type=size_argument,
        default=0,
        help="bytes from one request to the next (SIZE); offsets count modulo the disk's size",
    )
    parser.add_argument(
        "--random",
        metavar="SEED",
        nargs="?",
        type=count_argument,
        const=0,
        help="pseudo-random multiples of STEP in place of ascending offsets; same SEED, same order",
    )
    parser.add_argument(
        "--threads",
        metavar="COUNT",
        type=count_argument,
        default=1,
        help="threads that share the requests (1)",
    )


def run(args: Namespace) -> int:
    """Send the requests, and say how long they took."""
    parse_objects(args.objects)
    options = BenchOptions(
        count=args.count,
        depth=args.depth,
        size=args.size,
        offset=args.offset,
        step=args.step,
        write=args.write,
        pattern=args.pattern,
        flush_interval=args.flush_interval,
        sync=args.write and args.cache in ("writethrough", "directsync"),
        seed=args.random,
        threads=args.threads,
        latency=args.latency,
    )
    options.check()
    shown = args.output == "human" and not args.quiet
    with open_disk(args, args.file, format=args.format, writable=args.write) as chain:
        if shown:
            write_lines(describe_run(options))
        result = run_bench(chain, options)
    if args.output == "json":
        write_json(result.as_json())
    elif shown:
        write_lines(result.render())
    return exits.SUCCESS


def _byte_argument(text: str) -> int:
    try:
        return parse_pattern(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
