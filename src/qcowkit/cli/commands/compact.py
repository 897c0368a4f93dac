"""`qcow compact`: make the file of an image shorter, in place."""

from __future__ import annotations

from argparse import Namespace

from qcowkit.budget import TRUSTED
from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_format,
    add_gate,
    add_image_opts,
    add_objects,
    add_output,
    add_progress,
    add_quiet,
    image_specs,
    make_gate,
    warn,
    write_json,
)
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_lines
from qcowkit.cli.progress import Progress
from qcowkit.cli.secrets import opening_of
from qcowkit.image.lineage import close_layers, open_layers
from qcowkit.operations.compact import compact_image


def configure(parser: Parser) -> None:
    """Flags of our own."""
    parser.add_argument("file", metavar="FILE", help="qcow2 image, which is changed in place")
    add_format(parser)
    parser.refuse(
        "-U", "--force-share", reason="an image that another process uses must not be compacted"
    )
    add_quiet(parser)
    add_progress(parser)
    add_output(parser)
    add_objects(parser)
    add_image_opts(parser)
    add_gate(parser)
    parser.examples("qcow compact disk.qcow2", "qcow compact --output=json disk.qcow2")


def run(args: Namespace) -> int:
    """Compact the file alone, and say what was gained."""
    (spec,) = image_specs(args, [args.file], format=args.format)
    opening = opening_of(args, spec)
    layers = open_layers(
        spec.path,
        format=spec.format,
        gate=make_gate(args),
        budget=TRUSTED,
        writable=True,
        follow_backing=False,
        follow_data=False,
        locking=opening.locking,
    )
    try:
        warn(args, layers[0].warnings)
        with Progress.of(args, "compact") as progress:
            secret = opening.secrets.at(0)
            result = compact_image(layers[0], secret=secret, progress=progress)
    finally:
        close_layers(layers)
    if args.output == "json":
        write_json(result.as_json())
    elif not args.quiet:
        write_lines([result.render()])
    return exits.SUCCESS
