"""`qcow headers`: the allocated clusters of a disk as JSON, for backup tools."""

from __future__ import annotations

import sys
from argparse import Namespace

from qcowkit.cli import exits
from qcowkit.cli.common import add_access, add_format
from qcowkit.cli.opening import open_disk
from qcowkit.cli.options import parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.operations.headers import allocation_json


def configure(parser: Parser) -> None:
    """One image."""
    parser.add_argument("file", metavar="FILE", help="image")
    add_format(parser)
    parser.add_argument(
        "--legacy",
        action="store_true",
        help="list each cluster by its number, instead of ranges of them",
    )
    add_access(parser)
    parser.examples("qcow headers disk.qcow2 | jq .data_clusters")


def run(args: Namespace) -> int:
    """Print the JSON."""
    parse_objects(args.objects)
    with open_disk(args, args.file, format=args.format) as chain:
        sys.stdout.writelines(allocation_json(chain, legacy=args.legacy))
    return exits.SUCCESS
