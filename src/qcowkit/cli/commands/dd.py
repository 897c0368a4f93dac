"""`qcow dd`: copy a part of a disk into a new image."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_access,
    add_format,
    add_progress,
    add_quiet,
    image_format,
    refuse_stream,
)
from qcowkit.cli.opening import open_disk
from qcowkit.cli.options import parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.cli.progress import Progress
from qcowkit.errors import RequestError
from qcowkit.operations.convert import ConvertOptions, convert
from qcowkit.units import SECTOR, parse_size

_MAX_BLOCK = (1 << 31) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DdOperands:
    """What the operands say. `block_size`: bytes; `count` and `skip` count blocks."""

    source: str
    target: str
    block_size: int
    count: int | None
    skip: int

    def part_of(self, size: int) -> tuple[int, int]:
        """The first guest byte and the length to copy, of a disk of `size` bytes."""
        start = min(self.skip * self.block_size, size)
        length = size - start
        if self.count is not None:
            length = min(length, self.count * self.block_size)
        return start, length


def configure(parser: Parser) -> None:
    """Flags and operands of qemu-img dd."""
    parser.add_argument(
        "operands",
        metavar="if=FILE of=FILE [bs=SIZE] [count=N] [skip=N]",
        nargs="+",
        help="input, output, block size (512), blocks to copy (all), blocks to leave out (0)",
    )
    add_format(parser, "-f", what="the input")
    parser.add_argument(
        "-O",
        dest="target_format",
        metavar="FMT",
        type=image_format,
        default="raw",
        help="format of the output: raw (the default), qcow2, vpc (vhd) or luks",
    )
    add_quiet(parser)
    add_progress(parser)
    add_access(parser)
    parser.examples("qcow dd -O qcow2 bs=1M skip=1 count=512 if=disk.raw of=part.qcow2")


def run(args: Namespace) -> int:
    """Copy the part; the output appears under its name when it is complete."""
    operands = parse_operands(args.operands)
    refuse_stream(operands.target)
    parse_objects(args.objects)
    with open_disk(args, operands.source, format=args.format) as chain:
        start, length = operands.part_of(chain.size)
        options = ConvertOptions(format=args.target_format, start=start, length=length)
        with Progress.of(args, "dd") as progress:
            convert([chain], operands.target, options=options, progress=progress)
    return exits.SUCCESS


def parse_operands(texts: list[str]) -> DdOperands:
    """Raises RequestError that names the operand which is unknown, missing or no number."""
    given: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if key not in ("if", "of", "bs", "count", "skip") or not equals:
            raise RequestError(f"operand {text!r} is unknown; known: if= of= bs= count= skip=")
        given[key] = value
    for key in ("if", "of"):
        if not given.get(key):
            raise RequestError(f"operand {key}= is missing")
    block_size = parse_size(given.get("bs", str(SECTOR)), what="bs")
    if not 1 <= block_size <= _MAX_BLOCK:
        raise RequestError(f"bs is {block_size}, expected 1 to {_MAX_BLOCK}")
    return DdOperands(
        source=given["if"],
        target=given["of"],
        block_size=block_size,
        count=parse_size(given["count"], what="count") if "count" in given else None,
        skip=parse_size(given.get("skip", "0"), what="skip"),
    )
