"""`qcow check`: recount what an image refers to, report what does not add up, and repair it."""

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
from qcowkit.engine.repairs import RepairMode
from qcowkit.errors import RequestError
from qcowkit.image.lineage import Layer
from qcowkit.operations.check import CheckResult, Verdict, check_image, open_for_check
from qcowkit.operations.repair import RepairPlan, RepairResult, plan_repair, repair_image

_CODES = {
    Verdict.CLEAN: exits.SUCCESS,
    Verdict.FAILED: exits.FAILURE,
    Verdict.CORRUPT: exits.CHECK_CORRUPT,
    Verdict.LEAKS: exits.CHECK_LEAKS,
}


def configure(parser: Parser) -> None:
    """Flags of qemu-img check; progress and the dry run are ours."""
    parser.add_argument("file", metavar="FILE", help="image")
    add_format(parser)
    parser.add_argument(
        "-r",
        "--repair",
        metavar="MODE",
        choices=[mode.value for mode in RepairMode],
        help="repair a qcow2 image that nobody else uses, then check it again. leaks: give lost "
        "space back; all: also mend what is corrupt. Data that entries lead to are never given up",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="with -r: show what would be changed, and write nothing; the exit code is that of the "
        "image as it is",
    )
    add_cache(parser, "-T", what="source")
    add_quiet(parser)
    add_output(parser)
    add_progress(parser)
    add_access(parser)
    parser.examples(
        "qcow check disk.qcow2              exit code 0: clean, 2: corrupt, 3: leaks, 1: failed",
        "qcow check --output=json disk.qcow2",
        "qcow check -r all --dry-run disk.qcow2     what a repair would change",
        "qcow check -r leaks disk.qcow2             exit code as above, of the repaired image",
    )


def run(args: Namespace) -> int:
    """Check the image alone: its backing chain and data file are neither opened nor needed."""
    parse_objects(args.objects)
    (spec,) = image_specs(args, [args.file], format=args.format)
    mode = RepairMode(args.repair) if args.repair else None
    if args.dry_run and mode is None:
        raise RequestError("--dry-run: needs -r, a check alone never writes")
    writes = mode is not None and not args.dry_run
    if writes and spec.opening.force_share:
        raise RequestError("-r: excludes -U, nobody may use an image while it is repaired")
    layer = open_for_check(
        spec.path,
        format=spec.format,
        writable=writes,
        for_repair=mode is RepairMode.ALL,
        locking=spec.opening.locking,
        force_share=spec.opening.force_share,
    )
    try:
        warn(args, layer.warnings)
        if layer.metadata.format == "raw":
            raise exits.ExitError(exits.CHECK_UNSUPPORTED, "a raw disk has nothing to check")
        with Progress.of(args, "repair" if writes else "check") as progress:
            result, found = _carry_out(layer, mode, progress, dry=args.dry_run)
    finally:
        layer.storage.close()
    if args.output == "json":
        write_json(result.as_json())
    elif not args.quiet:
        write_lines(result.render())
    return _CODES[found.verdict]


def _carry_out(
    layer: Layer, mode: RepairMode | None, progress: Progress, *, dry: bool
) -> tuple[CheckResult | RepairPlan | RepairResult, CheckResult]:
    """(what to print, the check that decides the exit code)."""
    if mode is None:
        result = check_image(layer, progress=progress)
        return result, result
    if dry:
        plan = plan_repair(layer, mode=mode, progress=progress)
        return plan, plan.before
    repaired = repair_image(layer, mode=mode, progress=progress)
    return repaired, repaired.after
