"""`qcow check`: recount what an image refers to and report what does not add up."""

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
    image_specs,
    warn,
    write_json,
)
from qcowkit.cli.options import parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_lines
from qcowkit.cli.progress import Progress
from qcowkit.operations.check import Verdict, check_image, open_for_check

_CODES = {
    Verdict.CLEAN: exits.SUCCESS,
    Verdict.FAILED: exits.FAILURE,
    Verdict.CORRUPT: exits.CHECK_CORRUPT,
    Verdict.LEAKS: exits.CHECK_LEAKS,
}


def configure(parser: Parser) -> None:
    """Flags of qemu-img check; progress is ours."""
    parser.add_argument("file", metavar="FILE", help="image")
    add_format(parser)
    parser.refuse(
        "-r", "--repair", value=True, reason="repairing is not supported yet; check only reads"
    )
    add_cache(parser, "-T", what="source")
    add_quiet(parser)
    add_output(parser)
    add_progress(parser)
    add_access(parser)
    parser.examples(
        "qcow check disk.qcow2              exit code 0: clean, 2: corrupt, 3: leaks, 1: failed",
        "qcow check --output=json disk.qcow2",
    )


def run(args: Namespace) -> int:
    """Check the image alone: its backing chain and data file are neither opened nor needed."""
    parse_objects(args.objects)
    (spec,) = image_specs(args, [args.file], format=args.format)
    layer = open_for_check(
        spec.path,
        format=spec.format,
        locking=spec.opening.locking,
        force_share=spec.opening.force_share,
    )
    try:
        warn(args, layer.warnings)
        if layer.metadata.format == "raw":
            raise exits.ExitError(exits.CHECK_UNSUPPORTED, "a raw disk has nothing to check")
        with Progress.of(args, "check") as progress:
            result = check_image(layer, progress=progress)
    finally:
        layer.storage.close()
    if args.output == "json":
        write_json(result.as_json())
    elif not args.quiet:
        write_lines(result.render())
    return _CODES[result.verdict]
