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
from qcowkit.image.lineage import Layer, close_layers, lock_storage
from qcowkit.operations.capsule import CapsuleResult, make_capsule, restore_capsule
from qcowkit.operations.check import open_for_check
from qcowkit.storage.file import FileStorage
from qcowkit.storage.locking import LockMode


def configure(parser: Parser) -> None:
    """Flags of our own."""
    parser.add_argument("file", metavar="FILE", help="qcow2 image, which is only read")
    parser.add_argument("out", metavar="OUT", help="the capsule, a sparse file of the same length")
    parser.add_argument(
        "--restore",
        metavar="IMAGE",
        help="write an image again: FILE is the capsule, IMAGE the file that it was made of, whose "
        "metadata are lost, OUT the new image",
    )
    add_format(parser)
    add_quiet(parser)
    add_output(parser)
    add_access(parser)
    parser.examples(
        "qcow capsule disk.qcow2 disk.capsule",
        "qcow check disk.capsule",
        "qcow capsule --restore damaged.qcow2 disk.capsule mended.qcow2",
    )


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
        if args.restore is None:
            warn(args, layer.warnings)
            result = make_capsule(layer, args.out, locking=spec.opening.locking)
        else:
            result = _restore(layer, args.restore, args.out, locking=spec.opening.locking)
    finally:
        close_layers([layer])
    if args.output == "json":
        write_json(result.as_json())
    elif not args.quiet:
        write_lines([result.render() if args.restore is None else result.render_restored()])
    return exits.SUCCESS


def _restore(capsule: Layer, image: str, out: str, *, locking: LockMode) -> CapsuleResult:
    with FileStorage.open(image) as data:
        lock_storage(data, writable=False, locking=locking, force_share=False)
        return restore_capsule(capsule, data, out, locking=locking)
