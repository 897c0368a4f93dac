"""`qcow inspect`: a verdict on a file of a stranger. Opens that file and nothing else. Numpy-free."""

from __future__ import annotations

from argparse import Namespace

from qcowkit.cli import exits
from qcowkit.cli.common import add_format, add_output, write_json, write_lines
from qcowkit.cli.parsing import Parser
from qcowkit.operations.inspect import Verdict, inspect_file

_CODES = {
    Verdict.SAFE: exits.SUCCESS,
    Verdict.UNSAFE: exits.INSPECT_UNSAFE,
    Verdict.NOT_AN_IMAGE: exits.INSPECT_NO_IMAGE,
}


def configure(parser: Parser) -> None:
    """One file, no reference followed, small limits."""
    parser.add_argument("file", metavar="FILE", help="file to judge")
    add_format(parser)
    add_output(parser)
    parser.examples(
        "qcow inspect upload.qcow2              exit code 0: safe, 1: unsafe, 2: not an image",
        "qcow inspect --output=json upload.qcow2",
    )


def run(args: Namespace) -> int:
    """Print the verdict with its reasons."""
    found = inspect_file(args.file, format=args.format)
    if args.output == "json":
        write_json(found.as_json())
    else:
        write_lines(found.render())
    return _CODES[found.verdict]
