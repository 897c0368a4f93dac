"""`qcow snapshot`: list, take, go back to and delete the snapshots inside an image."""

from __future__ import annotations

from argparse import Namespace

from qcowkit.budget import TRUSTED
from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_access,
    add_format,
    add_output,
    add_quiet,
    image_specs,
    make_gate,
    snapshot_name,
    warn,
    write_json,
)
from qcowkit.cli.options import parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_lines
from qcowkit.errors import RequestError
from qcowkit.image.lineage import Layer, close_layers, open_layers
from qcowkit.operations.snapshot import (
    apply_snapshot,
    create_snapshot,
    delete_snapshot,
    list_snapshots,
)


def configure(parser: Parser) -> None:
    """Flags of qemu-img snapshot; JSON is ours."""
    parser.add_argument("file", metavar="FILE", help="qcow2 image")
    parser.add_argument(
        "-l", dest="list", action="store_true", help="list the snapshots (what is done by default)"
    )
    parser.add_argument("-c", dest="create", metavar="NAME", help="take a snapshot of the disk")
    parser.add_argument(
        "-a",
        dest="apply",
        metavar="SNAPSHOT",
        type=snapshot_name,
        help="make the disk, and its size, what they were; an id, or else a name",
    )
    parser.add_argument(
        "-d",
        dest="delete",
        metavar="SNAPSHOT",
        type=snapshot_name,
        help="delete a snapshot by its id, or else its name",
    )
    add_format(parser)
    add_quiet(parser)
    add_output(parser)
    add_access(parser)
    parser.examples(
        "qcow snapshot -c before-upgrade disk.qcow2",
        "qcow snapshot disk.qcow2",
        "qcow snapshot -a before-upgrade disk.qcow2",
        "qcow snapshot -d before-upgrade disk.qcow2",
    )


def run(args: Namespace) -> int:
    """Carry out one action on the file alone."""
    parse_objects(args.objects)
    chosen = [one for one in (args.create, args.apply, args.delete) if one is not None]
    if len(chosen) + args.list > 1:
        raise RequestError("-l, -c, -a and -d exclude one another")
    (spec,) = image_specs(args, [args.file], format=args.format)
    if chosen and spec.opening.force_share:
        raise RequestError("-U: a snapshot changes the image, which nobody else may use meanwhile")
    layers = open_layers(
        spec.path,
        format=spec.format,
        gate=make_gate(args),
        budget=TRUSTED,
        writable=bool(chosen),
        follow_backing=False,
        follow_data=False,
        locking=spec.opening.locking,
        force_share=spec.opening.force_share,
    )
    try:
        warn(args, layers[0].warnings)
        _carry_out(args, layers[0])
    finally:
        close_layers(layers)
    return exits.SUCCESS


def _carry_out(args: Namespace, layer: Layer) -> None:
    name, lines = layer.path, list[str]()
    if args.create is not None:
        entry = create_snapshot(layer, args.create)
        lines = [f"{name}: snapshot {entry.id} taken: {entry.name}"]
    elif args.apply is not None:
        entry, notes = apply_snapshot(layer, args.apply)
        lines = [f"{name}: the disk is what it was in snapshot {entry.id}: {entry.name}", *notes]
    elif args.delete is not None:
        entry = delete_snapshot(layer, args.delete)
        lines = [f"{name}: snapshot {entry.id} deleted: {entry.name}"]
    else:
        found = list_snapshots(layer)
        if args.output == "json":
            write_json(found.as_json())
            return
        lines = list(found.render())
    if not args.quiet:
        write_lines(lines)
