"""`qcow info`: what images are, without loading a table. Numpy-free."""

from __future__ import annotations

from argparse import Namespace

from qcowkit.budget import TRUSTED
from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_access,
    add_format,
    add_output,
    image_specs,
    make_gate,
    warn,
    write_json,
)
from qcowkit.cli.options import ImageSpec, parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import printable, write_error, write_lines
from qcowkit.errors import QcowkitError
from qcowkit.image.lineage import close_layers, open_layers
from qcowkit.operations.info import Info, describe_images, render_info


def configure(parser: Parser) -> None:
    """Flags of qemu-img info; several files at once are ours."""
    parser.add_argument("files", metavar="FILE", nargs="+", help="image, or several")
    add_format(parser)
    add_output(parser)
    parser.add_argument(
        "--backing-chain",
        action="store_true",
        help="describe the backing images too; JSON is then an array, the top image first",
    )
    add_access(parser)
    parser.examples(
        "qcow info disk.qcow2",
        "qcow info --backing-chain --output=json overlay.qcow2",
        "qcow info *.vhd",
    )


def run(args: Namespace) -> int:
    """Describe every file; one that cannot be opened does not hide the others."""
    parse_objects(args.objects)
    specs = image_specs(args, args.files, format=args.format)
    if len(specs) == 1:
        _show(args, [_describe(args, specs[0])], many=False)
        return exits.SUCCESS
    found: list[list[Info]] = []
    code = exits.SUCCESS
    for spec in specs:
        try:
            found.append(_describe(args, spec))
        except QcowkitError as error:
            write_error(f"qcow info: {printable(str(error))}")
            code = exits.FAILURE
    _show(args, found, many=True)
    return code


def _describe(args: Namespace, spec: ImageSpec) -> list[Info]:
    """The image, and with --backing-chain all below it, top first. Data files stay closed."""
    layers = open_layers(
        spec.path,
        format=spec.format,
        gate=make_gate(args),
        budget=TRUSTED,
        follow_backing=args.backing_chain,
        follow_data=False,
        locking=spec.opening.locking,
        force_share=spec.opening.force_share,
    )
    try:
        for layer in layers:
            warn(args, layer.warnings)
        return describe_images(layers)
    finally:
        close_layers(layers)


def _show(args: Namespace, chains: list[list[Info]], *, many: bool) -> None:
    """JSON as qemu-img has it for one file; an array of that for several."""
    if args.output == "json":
        values = [chain if args.backing_chain else chain[0] for chain in chains]
        write_json(values if many else values[0])
        return
    texts = [render_info(info) for chain in chains for info in chain]
    write_lines(["\n\n".join(texts)] if texts else [])
