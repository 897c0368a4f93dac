"""`qcow commit`: put what an overlay holds into its backing file."""

from __future__ import annotations

from argparse import Namespace

from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_cache,
    add_format,
    add_gate,
    add_image_opts,
    add_objects,
    add_progress,
    add_quiet,
    image_specs,
    make_gate,
    size_argument,
)
from qcowkit.cli.options import parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_lines
from qcowkit.cli.progress import Progress
from qcowkit.cli.secrets import opening_of
from qcowkit.errors import RequestError
from qcowkit.operations.commit import CommitOptions, commit_image


def configure(parser: Parser) -> None:
    """Flags of qemu-img commit."""
    parser.add_argument("file", metavar="FILE", help="overlay, which is emptied at the end")
    add_format(parser)
    parser.add_argument(
        "-b",
        dest="base",
        metavar="BASE",
        help="commit into this layer of the chain instead of the backing file; implies -d. Layers "
        "between the two, and all other overlays of BASE, show something else then",
    )
    parser.add_argument(
        "-d", dest="keep", action="store_true", help="leave the overlay as it is, do not empty it"
    )
    parser.add_argument(
        "-r", dest="rate", metavar="RATE", type=size_argument, help="at most RATE bytes a second"
    )
    add_cache(parser, "-t", what="target")
    parser.refuse(
        "-U", "--force-share", reason="images that another process uses must not be changed"
    )
    add_quiet(parser)
    add_progress(parser)
    add_objects(parser)
    add_image_opts(parser)
    add_gate(parser)
    parser.examples(
        "qcow commit overlay.qcow2",
        "qcow commit -d -p overlay.qcow2",
        "qcow commit -b base.raw overlay.qcow2",
    )


def run(args: Namespace) -> int:
    """Commit, and say what went where."""
    parse_objects(args.objects)
    if args.rate == 0:
        raise RequestError("-r is 0, expected at least 1 byte a second")
    (spec,) = image_specs(args, [args.file], format=args.format)
    with Progress.of(args, "commit") as progress:
        done = commit_image(
            spec.path,
            base=args.base,
            format=spec.format,
            gate=make_gate(args),
            opening=opening_of(args, spec),
            options=CommitOptions(empty=not args.keep, rate=args.rate),
            progress=progress,
        )
    if not args.quiet:
        write_lines(done.render())
    return exits.SUCCESS
