"""`qcow capsule`: a copy of an image without its guest data."""

from __future__ import annotations

from argparse import Namespace

from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_access,
    add_format,
    add_output,
    add_quiet,
    image_specs,
    warn,
    write_json,
)
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_lines
from qcowkit.image.lineage import close_layers
from qcowkit.operations.capsule import make_capsule
from qcowkit.operations.check import open_for_check


def configure(parser: Parser) -> None:
    """Flags of our own."""
    parser.add_argument("file", metavar="FILE", help="qcow2 image, which is only read")
    parser.add_argument("out", metavar="OUT", help="the capsule, a sparse file of the same length")
    add_format(parser)
    add_quiet(parser)
    add_output(parser)
    add_access(parser)
    parser.examples("qcow capsule disk.qcow2 disk.capsule", "qcow check disk.capsule")


def run(args: Namespace) -> int:
    """Make it, and say how much of it is left."""
    (spec,) = image_specs(args, [args.file], format=args.format)
    layer = open_for_check(
        spec.path,
        format=spec.format,
        locking=spec.opening.locking,
        force_share=spec.opening.force_share,
    )
    try:
        warn(args, layer.warnings)
        result = make_capsule(layer, args.out, locking=spec.opening.locking)
    finally:
        close_layers([layer])
    if args.output == "json":
        write_json(result.as_json())
    elif not args.quiet:
        write_lines([result.render()])
    return exits.SUCCESS
