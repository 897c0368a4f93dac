"""`qcow create`: a new, empty image."""

from __future__ import annotations

from argparse import Namespace

from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_format,
    add_gate,
    add_objects,
    add_quiet,
    image_format,
    make_gate,
    refuse_stream,
    size_argument,
)
from qcowkit.cli.create_options import OptionValue, options_help, parse_create_options
from qcowkit.cli.options import asks_for_help
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import printable, write_text
from qcowkit.cli.secrets import new_secret
from qcowkit.errors import RequestError
from qcowkit.operations.create import CreateOptions, create_image


def configure(parser: Parser) -> None:
    """Flags of qemu-img create."""
    parser.add_argument("file", metavar="FILE", nargs="?", help="image to create")
    parser.add_argument(
        "size",
        metavar="SIZE",
        nargs="?",
        type=size_argument,
        help="size of the guest disk; that of the base image when not given",
    )
    parser.add_argument(
        "-f",
        dest="format",
        metavar="FMT",
        type=image_format,
        default="raw",
        help="format: raw (the default), qcow2, vpc (vhd) or luks",
    )
    parser.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="options of the format as key=value,...; -o help lists them",
    )
    parser.add_argument("-b", dest="backing", metavar="FILE", help="base image; needs -F")
    add_format(parser, "-F", dest="backing_format", what="the base image")
    parser.add_argument(
        "-u",
        dest="unsafe",
        action="store_true",
        help="do not open the base image; SIZE is needed then",
    )
    add_quiet(parser)
    add_objects(parser)
    add_gate(parser)
    parser.examples(
        "qcow create -f qcow2 disk.qcow2 20G",
        "qcow create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2",
        "qcow create -f vpc -o subformat=fixed,force_size=on disk.vhd 10G",
        "qcow create -f qcow2 -o help",
    )


def run(args: Namespace) -> int:
    """Create the image and say what was made."""
    if asks_for_help(args.options):
        write_text(options_help(args.format))
        return exits.SUCCESS
    if args.file is None:
        raise RequestError("FILE is missing")
    refuse_stream(args.file)
    values = merged_options(args)
    secret = new_secret(args, args.format, values)
    made = create_image(
        args.file,
        CreateOptions.of(args.format, values, secret=secret),
        gate=make_gate(args),
        check_backing=not args.unsafe,
    )
    if not args.quiet:
        write_text(printable(formatting_line(args.file, args.format, made.shown())) + "\n")
    return exits.SUCCESS


def merged_options(args: Namespace) -> dict[str, OptionValue]:
    """The keys of -o with what the operands and -b, -F say. Raises RequestError for two answers."""
    values = parse_create_options(args.format, args.options)
    if "compression_level" in values:
        raise RequestError("-o compression_level: an empty image compresses nothing, see convert")
    for key, flag, given in (
        ("size", "SIZE", args.size),
        ("backing_file", "-b", args.backing),
        ("backing_fmt", "-F", args.backing_format),
    ):
        if given is None:
            continue
        if values.get(key, given) != given:
            raise RequestError(f"{flag} and -o {key} differ: {given} and {values[key]}")
        if key != "size" and args.format != "qcow2":
            raise RequestError(f"{flag}: {args.format} images are not created with a base image")
        values[key] = given
    if "backing_file" in values and "backing_fmt" not in values:
        raise RequestError("a base image needs its format: -F raw, -F qcow2 or -F vpc")
    if "backing_fmt" in values and "backing_file" not in values:
        raise RequestError("-F names the format of a base image; -b is missing")
    return values


def formatting_line(path: str, format: str, shown: dict[str, OptionValue]) -> str:
    """What was made, in the words of qemu-img."""

    def word(value: OptionValue) -> str:
        if isinstance(value, bool):
            return "on" if value else "off"
        return str(value)

    keys = "".join(f" {key}={word(value)}" for key, value in shown.items())
    return f"Formatting '{path}', fmt={format}{keys}"
