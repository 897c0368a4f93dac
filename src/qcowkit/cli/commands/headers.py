"""`qcow headers`: the allocated clusters of a disk as JSON, for backup tools."""

from __future__ import annotations

from argparse import Namespace

from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_access,
    add_format,
    count_argument,
)
from qcowkit.cli.opening import open_disk
from qcowkit.cli.options import parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_bytes
from qcowkit.image.chain import Chain
from qcowkit.operations.headers import allocation_json
from qcowkit.units import KiB


def configure(parser: Parser) -> None:
    """One image."""
    parser.add_argument("file", metavar="FILE", help="image")
    add_format(parser)
    parser.add_argument(
        "--legacy",
        action="store_true",
        help="list each cluster by its number, instead of ranges of them",
    )
    parser.add_argument(
        "--cluster-bits",
        metavar="BITS",
        type=count_argument,
        help="count in clusters of 2**BITS bytes, instead of the image's own",
    )
    add_access(parser)
    parser.examples("qcow headers disk.qcow2 | jq .data_clusters")


def run(args: Namespace) -> int:
    """Print the JSON."""
    parse_objects(args.objects)
    with open_disk(args, args.file, format=args.format) as chain:
        bits = cluster_bits(chain) if args.cluster_bits is None else args.cluster_bits
        write_bytes(allocation_json(chain, cluster_bits=bits, legacy=args.legacy))
    return exits.SUCCESS


def cluster_bits(chain: Chain) -> int:
    """Of the image itself; a raw disk, which has no clusters, is counted in 64 KiB."""
    size = chain.cluster_size if chain.format != "raw" else 64 * KiB
    return size.bit_length() - 1
