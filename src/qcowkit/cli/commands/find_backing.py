"""`qcow find-backing`: find a backing file that was moved, by its GUID."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from qcowkit.budget import TRUSTED
from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_format,
    add_gate,
    add_output,
    add_quiet,
    refuse_stream,
    warn,
    write_json,
)
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_lines
from qcowkit.errors import StorageError
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import close_layers, open_layers
from qcowkit.operations.backing_index import BackingIndex
from qcowkit.operations.find_backing import find_backing, repair_backing


def configure(parser: Parser) -> None:
    """Operand and flags."""
    parser.add_argument("file", metavar="FILE", help="image whose backing file is looked for")
    parser.add_argument(
        "--scan",
        metavar="DIR",
        action="append",
        default=[],
        help="look through DIR and all below it, and let the image name files there (repeatable); "
        "the image's own directory when not given",
    )
    parser.add_argument(
        "--index",
        metavar="INDEX",
        help="the SQLite database that remembers which file is which disk; by default "
        "qcowkit/images.sqlite in the user's cache directory",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="write the place of the file that was found into the header (qcow2 only)",
    )
    add_format(parser)
    add_output(parser)
    add_quiet(parser)
    add_gate(parser)
    parser.examples(
        "qcow find-backing overlay.qcow2",
        "qcow find-backing --scan /srv/images --repair overlay.qcow2",
    )


def run(args: Namespace) -> int:
    """Scan, look, and with --repair write the name."""
    refuse_stream(args.file)
    places = args.scan or [os.path.dirname(args.file) or "."]
    allowed = [*args.scan, *args.allow]
    gate = ReferenceGate.trusting() if args.trust else ReferenceGate.below_image(allowed)
    layers = open_layers(
        args.file,
        format=args.format,
        gate=gate,
        budget=TRUSTED,
        writable=args.repair,
        follow_backing=False,
        follow_data=False,
    )
    try:
        with BackingIndex(args.index or default_index()) as index:
            scanned = index.scan(places)
            if not scanned.complete:
                warn(args, [f"the scan ended at its limit, after {scanned.files} files"])
            if scanned.unreadable:
                warn(args, [f"{scanned.unreadable} files and directories could not be read"])
            search = find_backing(layers[0], index, gate=gate)
        if args.repair and (search.in_place or search.found):
            search = repair_backing(layers[0], search)
    finally:
        close_layers(layers)
    if args.output == "json":
        write_json(search.as_json())
    elif not args.quiet:
        write_lines(search.render())
    return exits.SUCCESS if search.in_place or search.found else exits.FAILURE


def default_index() -> Path:
    """The index of this user, in a directory that is made where it is missing.

    Source: XDG base directory specification. Raises StorageError."""
    # A relative path there is to be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (base if base.is_absolute() else Path("~/.cache").expanduser()) / "qcowkit"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError.wrap(error, operation="make", path=str(folder)) from error
    return folder / "images.sqlite"
