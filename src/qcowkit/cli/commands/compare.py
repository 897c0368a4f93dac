"""`qcow compare`: do two disks have the same content?"""

from __future__ import annotations

from argparse import Namespace

from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_access,
    add_cache,
    add_format,
    add_output,
    add_progress,
    add_quiet,
    add_snapshot,
    write_json,
)
from qcowkit.cli.opening import open_disk
from qcowkit.cli.options import parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_lines
from qcowkit.cli.progress import Progress
from qcowkit.errors import CorruptMetadata, QcowkitError
from qcowkit.operations.compare import compare


def configure(parser: Parser) -> None:
    """Flags of qemu-img compare; JSON is ours."""
    parser.add_argument("first", metavar="FILE1", help="image")
    parser.add_argument("second", metavar="FILE2", help="image to compare it with")
    add_format(parser, "-f", what="FILE1")
    add_format(parser, "-F", dest="second_format", what="FILE2")
    add_snapshot(parser, "-l", "--snapshot", what="FILE1")
    add_snapshot(parser, "-L", "--second-snapshot", dest="second_snapshot", what="FILE2")
    add_cache(parser, "-T", what="source")
    parser.add_argument(
        "-s",
        "--strict",
        action="store_true",
        help="sizes must be equal, and what is allocated in one must be allocated in the other",
    )
    add_quiet(parser)
    add_output(parser)
    add_progress(parser)
    add_access(parser)
    parser.examples(
        "qcow compare disk.raw disk.qcow2   exit code 0: same, 1: different, 2 to 4: failed",
        "qcow compare -l monday -L tuesday disk.qcow2 disk.qcow2",
    )


def run(args: Namespace) -> int:
    """Compare; an image that cannot be opened ends with 2."""
    with exits.failing_as(exits.COMPARE_OPEN):
        parse_objects(args.objects)
        first = open_disk(args, args.first, format=args.format, snapshot=args.snapshot)
    with first:
        with exits.failing_as(exits.COMPARE_OPEN):
            second = open_disk(
                args, args.second, format=args.second_format, snapshot=args.second_snapshot
            )
        with second, Progress.of(args, "compare") as progress:
            try:
                result = compare(first, second, strict=args.strict, progress=progress)
            except QcowkitError as error:
                raise exits.ExitError(failure_code(error), str(error)) from error
    if args.output == "json":
        write_json(result.as_json())
    elif not args.quiet:
        write_lines(result.render())
    return exits.COMPARE_SAME if result.same else exits.COMPARE_DIFFERENT


def failure_code(error: QcowkitError) -> int:
    """3 where the mapping could not be told, 4 where data could not be read or decompressed."""
    if isinstance(error, CorruptMetadata) and "compressed cluster" not in error.structure:
        return exits.COMPARE_STATUS
    return exits.COMPARE_READ
