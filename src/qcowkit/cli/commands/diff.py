"""`qcow diff`: what one disk has that another has not, as a list or as an overlay."""

from __future__ import annotations

import os
from argparse import Namespace

from qcowkit.cli import exits
from qcowkit.cli.commands.compare import failure_code
from qcowkit.cli.common import (
    add_access,
    add_format,
    add_output,
    add_progress,
    add_quiet,
    add_snapshot,
    image_format,
    refuse_stream,
    size_argument,
    write_json,
)
from qcowkit.cli.create_options import parse_create_options
from qcowkit.cli.opening import open_disk
from qcowkit.cli.options import parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_lines
from qcowkit.cli.progress import Progress
from qcowkit.errors import QcowkitError, RequestError
from qcowkit.image.chain import Chain
from qcowkit.operations.delta import DeltaOptions, write_delta
from qcowkit.operations.diff import DEFAULT_GRANULARITY, Difference, diff


def configure(parser: Parser) -> None:
    """Flags of compare, and those of a new image."""
    parser.add_argument("first", metavar="FILE1", help="image")
    parser.add_argument("second", metavar="FILE2", help="image with the changes")
    parser.add_argument(
        "delta", metavar="DELTA", nargs="?", help="with -O: new image that holds the changes"
    )
    add_format(parser, "-f", what="FILE1")
    add_format(parser, "-F", dest="second_format", what="FILE2")
    add_snapshot(parser, "-l", "--snapshot", what="FILE1")
    add_snapshot(parser, "-L", "--second-snapshot", dest="second_snapshot", what="FILE2")
    parser.add_argument(
        "-g",
        "--granularity",
        metavar="SIZE",
        type=size_argument,
        default=DEFAULT_GRANULARITY,
        help="least unit of a change, a power of two from 512 to 2M (4k)",
    )
    _configure_delta(parser)
    add_quiet(parser)
    add_output(parser)
    add_progress(parser)
    add_access(parser)
    parser.examples(
        "qcow diff base.raw disk.qcow2      exit code 0: same, 1: different, 2 to 4: failed",
        "qcow diff --output=json -l monday disk.qcow2 disk.qcow2",
        "qcow diff -O qcow2 old.raw new.raw changes.qcow2",
    )


def _configure_delta(parser: Parser) -> None:
    parser.add_argument(
        "-O",
        dest="target_format",
        metavar="FMT",
        choices=("qcow2",),
        help="write the changes to DELTA, a new image of this format: qcow2. Exit code 0 then",
    )
    parser.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="options of DELTA as key=value,...; those of create",
    )
    parser.add_argument(
        "--backing",
        metavar="NAME",
        help="what DELTA names as its backing file, from its own directory; FILE1 by default",
    )
    parser.add_argument(
        "--backing-format",
        metavar="FMT",
        type=image_format,
        help="format of that backing file; that of FILE1 by default",
    )
    parser.add_argument(
        "--standalone", action="store_true", help="DELTA names no backing file: it is put over one"
    )


def run(args: Namespace) -> int:
    """Find the changes; list them, or write the image that holds them."""
    with exits.failing_as(exits.USAGE):
        _check_flags(args)
    with exits.failing_as(exits.COMPARE_OPEN):
        parse_objects(args.objects)
        first = open_disk(args, args.first, format=args.format, snapshot=args.snapshot)
    with first:
        with exits.failing_as(exits.COMPARE_OPEN):
            second = open_disk(
                args, args.second, format=args.second_format, snapshot=args.second_snapshot
            )
        with second:
            found = _find(args, first, second)
            if args.target_format is not None:
                _write(args, first, second, found)
    if args.output == "json":
        write_json(found.as_json())
    elif not args.quiet:
        write_lines(found.render())
    if found.same or args.target_format is not None:
        return exits.COMPARE_SAME
    return exits.COMPARE_DIFFERENT


def _find(args: Namespace, first: Chain, second: Chain) -> Difference:
    try:
        with Progress.of(args, "diff") as progress:
            return diff(first, second, granularity=args.granularity, progress=progress)
    except RequestError as error:
        raise exits.ExitError(exits.USAGE, str(error)) from error
    except QcowkitError as error:
        raise exits.ExitError(failure_code(error), str(error)) from error


def _write(args: Namespace, first: Chain, second: Chain, found: Difference) -> None:
    options = DeltaOptions(
        backing=args.backing or _name_of(first, args.delta),
        backing_format=args.backing_format or first.format,
        standalone=args.standalone,
        create=parse_create_options("qcow2", args.options),
    )
    with exits.failing_as(exits.COMPARE_OPEN):
        write_delta(second, found.changed, args.delta, options=options)


def _name_of(disk: Chain, delta: str) -> str:
    """The first disk as the delta names it: from its own directory if it lies below that."""
    directory = os.path.dirname(os.path.abspath(delta))
    path = os.path.abspath(os.fspath(disk.layers[0].path or ""))
    below = os.path.commonpath([directory, path]) == directory
    return os.path.relpath(path, directory) if below else path


def _check_flags(args: Namespace) -> None:
    """Refuse flags that need or exclude one another. Raises RequestError."""
    if (args.target_format is None) != (args.delta is None):
        raise RequestError("-O and DELTA need one another: -O qcow2 FILE1 FILE2 DELTA")
    for value, flag in (
        (args.options, "-o"),
        (args.backing, "--backing"),
        (args.backing_format, "--backing-format"),
        (args.standalone, "--standalone"),
    ):
        if value and args.target_format is None:
            raise RequestError(f"{flag} needs -O")
    if args.target_format is None:
        return
    refuse_stream(args.delta)
    if args.standalone and args.backing:
        raise RequestError("--standalone excludes --backing")
    if args.snapshot is not None and not (args.backing or args.standalone):
        raise RequestError(
            "-l with -O needs --backing or --standalone: no name leads to a snapshot of an image"
        )
