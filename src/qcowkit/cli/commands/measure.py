"""`qcow measure`: the exact size that an image would have."""

from __future__ import annotations

from argparse import Namespace
from contextlib import ExitStack

from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_access,
    add_format,
    add_output,
    image_format,
    size_argument,
    snapshot_name,
    write_json,
)
from qcowkit.cli.create_options import options_help, parse_create_options
from qcowkit.cli.opening import open_disk
from qcowkit.cli.options import asks_for_help, parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_lines, write_text
from qcowkit.errors import RequestError
from qcowkit.operations.measure import measure


def configure(parser: Parser) -> None:
    """Flags of qemu-img measure."""
    parser.add_argument("file", metavar="FILE", nargs="?", help="image whose content is measured")
    parser.add_argument(
        "-O",
        dest="target_format",
        metavar="FMT",
        type=image_format,
        default="raw",
        help="format to measure for: raw (the default), qcow2, vpc (vhd) or luks",
    )
    parser.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="options of that format as for create; -o help lists them",
    )
    add_format(parser)
    parser.add_argument(
        "-l", dest="snapshot", metavar="SNAPSHOT", type=snapshot_name, help="measure a snapshot"
    )
    parser.add_argument(
        "--size", metavar="SIZE", type=size_argument, help="measure a full disk of this size"
    )
    add_output(parser)
    add_access(parser)
    parser.examples(
        "qcow measure -O qcow2 disk.raw",
        "qcow measure -O qcow2 -o cluster_size=2M --size 1T",
    )


def run(args: Namespace) -> int:
    """Print what a target needs at least and at most."""
    if asks_for_help(args.options):
        write_text(options_help(args.target_format))
        return exits.SUCCESS
    options = parse_create_options(args.target_format, args.options)
    parse_objects(args.objects)
    if (args.file is None) == (args.size is None):
        raise RequestError("give either FILE or --size")
    if args.snapshot and args.file is None:
        raise RequestError("-l names a snapshot of FILE; it excludes --size")
    with ExitStack() as stack:
        source = None
        if args.file is not None:
            chain = open_disk(args, args.file, format=args.format, snapshot=args.snapshot)
            source = stack.enter_context(chain)
        found = measure(source, size=args.size, format=args.target_format, options=options)
    if args.output == "json":
        write_json(found.as_json())
    else:
        write_lines(found.render())
    return exits.SUCCESS
