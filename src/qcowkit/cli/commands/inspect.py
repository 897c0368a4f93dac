"""`qcow inspect`: a verdict on a file of a stranger; nothing else is opened. Numpy-free."""

from __future__ import annotations

from argparse import Namespace

from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_output,
    write_json,
)
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_lines
from qcowkit.operations.inspect import VerdictKind, as_json, as_text, inspect_file

_CODES = {
    VerdictKind.SAFE: exits.SUCCESS,
    VerdictKind.UNSAFE: exits.INSPECT_UNSAFE,
    VerdictKind.NOT_AN_IMAGE: exits.INSPECT_NO_IMAGE,
}


def configure(parser: Parser) -> None:
    """One file, no reference followed, small limits."""
    parser.add_argument("file", metavar="FILE", help="file to judge")
    parser.refuse(
        "-f", "--format", value=True, reason="the content decides, as it would for whoever opens it"
    )
    add_output(parser)
    parser.examples(
        "qcow inspect upload.qcow2              exit code 0: safe, 1: unsafe, 2: not an image",
        "qcow inspect --output=json upload.qcow2",
    )


def run(args: Namespace) -> int:
    """Print the verdict with its reasons."""
    found = inspect_file(args.file)
    if args.output == "json":
        write_json(as_json(found))
    else:
        write_lines([as_text(found)])
    return _CODES[found.kind]
