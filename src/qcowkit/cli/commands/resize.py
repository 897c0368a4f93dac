"""`qcow resize`: change the size of a guest disk in place."""

from __future__ import annotations

import argparse
from argparse import Namespace

from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_format,
    add_gate,
    add_image_opts,
    add_objects,
    add_quiet,
)
from qcowkit.cli.opening import open_disk
from qcowkit.cli.options import parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_lines
from qcowkit.errors import RequestError
from qcowkit.operations.resize import PREALLOCATIONS, SizeChange, resize


def configure(parser: Parser) -> None:
    """Flags of qemu-img resize."""
    parser.add_argument("file", metavar="FILE", help="image, which is changed in place")
    parser.add_argument(
        "change",
        metavar="[+|-]SIZE",
        type=_change_argument,
        help="new size of the guest disk, or with + or - how much is added or taken away",
    )
    parser.signed_operands = True
    add_format(parser)
    parser.add_argument(
        "--shrink",
        action="store_true",
        help="allow a smaller disk: what lies beyond the new end is lost",
    )
    parser.add_argument(
        "--preallocation",
        metavar="MODE",
        choices=PREALLOCATIONS,
        default="off",
        help="for what is added: off leaves holes, metadata maps every cluster, falloc reserves "
        "space, full writes zeros",
    )
    parser.add_argument(
        "--expose-backing",
        action="store_true",
        help="let what is added show what the backing file holds there, in place of zeros (qcow2)",
    )
    parser.refuse(
        "-U", "--force-share", reason="an image that another process writes must not be resized"
    )
    add_quiet(parser)
    add_objects(parser)
    add_image_opts(parser)
    add_gate(parser)
    parser.examples(
        "qcow resize disk.qcow2 +10G",
        "qcow resize -f raw disk.raw 1.5T",
        "qcow resize --shrink disk.qcow2 -512M",
        "qcow resize --preallocation=metadata disk.qcow2 20G",
    )


def run(args: Namespace) -> int:
    """Resize, and say what is visible now."""
    parse_objects(args.objects)
    with open_disk(args, args.file, format=args.format, writable=True) as chain:
        done = resize(
            chain,
            args.change,
            shrink=args.shrink,
            preallocation=args.preallocation,
            expose=args.expose_backing,
        )
        name = chain.layers[0].path
    if not args.quiet:
        first, *rest = done.render()
        write_lines([f"{name}: {first}", *rest])
    return exits.SUCCESS


def _change_argument(text: str) -> SizeChange:
    try:
        return SizeChange.parse(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
