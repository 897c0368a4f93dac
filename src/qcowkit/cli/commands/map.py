"""`qcow map`: where the data of a disk lies, as text, JSON or a picture."""

from __future__ import annotations

import os
import shutil
import sys
from argparse import Namespace

from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_access,
    add_format,
    add_output,
    add_snapshot,
    size_argument,
)
from qcowkit.cli.opening import open_disk
from qcowkit.cli.options import parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_bytes, write_lines, write_text
from qcowkit.errors import RequestError
from qcowkit.image.chain import Chain
from qcowkit.operations.bitmap import iter_bitmap_json, render_bitmap_map
from qcowkit.operations.map import iter_map_json, render_map_text
from qcowkit.operations.plot import plot_png, plot_svg, plot_terminal
from qcowkit.storage.atomic import AtomicOutput

_ROWS = 16


def configure(parser: Parser) -> None:
    """Flags of qemu-img map; pictures are ours."""
    parser.add_argument("file", metavar="FILE", help="image")
    add_format(parser)
    parser.add_argument(
        "-s",
        "--start-offset",
        dest="start",
        metavar="OFFSET",
        type=size_argument,
        default=0,
        help="first guest byte (0)",
    )
    parser.add_argument(
        "-l",
        "--max-length",
        dest="length",
        metavar="LENGTH",
        type=size_argument,
        help="guest bytes to list (to the end of the disk)",
    )
    add_snapshot(parser, "--snapshot", what="FILE")
    add_output(parser)
    parser.add_argument(
        "--bitmap",
        metavar="NAME",
        help="list what a persistent bitmap of the image records, dirty or clean",
    )
    parser.add_argument(
        "--plot", action="store_true", help="draw the map of the whole disk in the terminal"
    )
    parser.add_argument(
        "--plot-file",
        metavar="PICTURE",
        help="draw it into a file whose name ends in .svg or .png",
    )
    add_access(parser)
    parser.examples(
        "qcow map disk.qcow2",
        "qcow map --output=json -s 1G -l 64M disk.qcow2",
        "qcow map --bitmap monday --output=json disk.qcow2",
        "qcow map --plot disk.qcow2",
        "qcow map --plot-file disk.svg disk.qcow2",
    )


def run(args: Namespace) -> int:
    """Print or draw the map."""
    kind = _picture_kind(args.plot_file)
    if args.bitmap is not None and (args.plot or kind):
        raise RequestError("--bitmap excludes --plot and --plot-file")
    title = os.path.basename(args.file)
    parse_objects(args.objects)
    with open_disk(args, args.file, format=args.format, snapshot=args.snapshot) as chain:
        if args.bitmap is not None:
            _list_bitmap(args, chain)
            return exits.SUCCESS
        if args.plot:
            write_text(_in_terminal(chain).rstrip("\n") + "\n")
        if kind == "svg":
            _save(plot_svg(chain, title=title).encode(), args.plot_file)
        elif kind == "png":
            _save(plot_png(chain, title=title), args.plot_file)
        if args.plot or kind:
            return exits.SUCCESS
        if args.output == "json":
            write_bytes(iter_map_json(chain, start=args.start, length=args.length))
            return exits.SUCCESS
        names = [str(layer.path) for layer in chain.layers]
        write_lines(render_map_text(chain, start=args.start, length=args.length, files=names))
    return exits.SUCCESS


def _list_bitmap(args: Namespace, chain: Chain) -> None:
    """What a bitmap says of the part of the disk that was asked for."""
    if args.start > chain.size:
        raise RequestError(f"start offset {args.start} is beyond the disk of {chain.size} bytes")
    rest = chain.size - args.start
    length = rest if args.length is None else min(args.length, rest)
    tables = chain.iter_bitmap_extents(args.bitmap, start=args.start, length=length)
    if args.output == "json":
        write_bytes(iter_bitmap_json(tables))
    else:
        write_lines(render_bitmap_map(tables, size=chain.size))


def _picture_kind(name: str | None) -> str | None:
    """svg or png, as the name ends. Raises RequestError for any other."""
    if name is None:
        return None
    kind = name.rpartition(".")[2].lower()
    if kind not in ("svg", "png"):
        raise RequestError(f"--plot-file: {name!r} ends in neither .svg nor .png")
    return kind


def _in_terminal(chain: Chain) -> str:
    """In colour only where a terminal shows it and nobody minds (https://no-color.org)."""
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    columns = shutil.get_terminal_size().columns
    return plot_terminal(chain, columns=columns, rows=_ROWS, color=color)


def _save(picture: bytes, path: str) -> None:
    with AtomicOutput(path) as output:
        output.storage.pwrite([picture], offset=0)
        output.commit()
