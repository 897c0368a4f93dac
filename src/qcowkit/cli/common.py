"""What several verbs share: flags with one meaning, and the gate. Numpy-free."""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from qcowkit.cli.open_options import parse_open_options, take_key_secrets
from qcowkit.cli.options import ImageSpec, parse_image_opts
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import printable, write_error
from qcowkit.errors import RequestError
from qcowkit.image.gate import ReferenceGate
from qcowkit.units import parse_size

FORMATS = ("raw", "qcow2", "vpc", "luks")
_ALIASES = {"vhd": "vpc"}
CACHE_MODES = ("none", "writeback", "writethrough", "directsync", "unsafe")


def write_json(value: Any) -> None:
    """One JSON document on standard output; file names that are not UTF-8 stay escaped."""
    sys.stdout.write(json.dumps(value, indent=4) + "\n")


def warn(args: Namespace, lines: Iterable[str]) -> None:
    """Lines on standard error, unless -q."""
    if not getattr(args, "quiet", False):
        for line in lines:
            write_error(f"warning: {printable(line)}")


def image_format(text: str) -> str:
    """A format name of the command line under its own name."""
    name = _ALIASES.get(text, text)
    if name not in FORMATS:
        raise argparse.ArgumentTypeError(
            f"unknown format {text!r}; known are raw, qcow2, vpc (also called vhd) and luks"
        )
    return name


def size_argument(text: str) -> int:
    """A size such as 512, 10M or 1.5G for a flag or operand."""
    try:
        return parse_size(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def count_argument(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def add_format(parser: Parser, *flags: str, dest: str = "format", what: str = "the image") -> None:
    """`-f FMT`, or another flag for another image."""
    parser.add_argument(
        *(flags or ("-f", "--format")),
        dest=dest,
        metavar="FMT",
        type=image_format,
        help=f"format of {what}: raw, qcow2, vpc (vhd) or luks; by default its content tells",
    )


def add_snapshot(parser: Parser, *flags: str, dest: str = "snapshot", what: str) -> None:
    """`flags SNAPSHOT`: an internal snapshot in place of the current disk."""
    parser.add_argument(
        *flags,
        dest=dest,
        metavar="SNAPSHOT",
        type=snapshot_name,
        help=f"an internal snapshot of {what}, by id or name, in place of its current disk",
    )


def add_output(parser: Parser) -> None:
    """`--output human|json`."""
    parser.add_argument(
        "--output",
        choices=("human", "json"),
        default="human",
        help="text for people (the default) or JSON with the schema of qemu-img",
    )


def add_quiet(parser: Parser) -> None:
    """`-q`."""
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")


def add_progress(parser: Parser) -> None:
    """`-p` and `--progress`."""
    parser.add_argument(
        "-p",
        dest="progress",
        action="store_const",
        const="bar",
        default="none",
        help="show progress on standard error when it is a terminal; SIGUSR1 prints a line always",
    )
    parser.add_argument(
        "--progress",
        choices=("bar", "json", "none"),
        default="none",
        help="bar is -p; json prints objects with done and total (bytes) and rate (bytes a second)",
    )


def add_cache(parser: Parser, flag: str, *, what: str) -> None:
    """`-t` or `-T`: known by name and checked; the content does not depend on it."""
    parser.add_argument(
        flag,
        dest=f"cache_{what}",
        metavar="CACHE",
        choices=CACHE_MODES,
        help=f"cache mode of the {what}: {', '.join(CACHE_MODES)}; accepted for scripts. The page "
        "cache of the host is used, and a written file is always durable at the end",
    )


def add_access(parser: Parser) -> None:
    """What every verb that opens images has: -U, --object, --image-opts, --allow, --trust."""
    parser.add_argument(
        "-U",
        "--force-share",
        action="store_true",
        help="open even while another process writes the image; the content may be inconsistent",
    )
    add_objects(parser)
    add_image_opts(parser)
    add_gate(parser)


def add_image_opts(parser: Parser) -> None:
    """`--image-opts`."""
    parser.add_argument(
        "--image-opts",
        action="store_true",
        help="operands are descriptions such as driver=qcow2,file.filename=disk.qcow2",
    )


def add_objects(parser: Parser) -> None:
    """`--object`."""
    parser.add_argument(
        "--object",
        dest="objects",
        metavar="OBJECT",
        action="append",
        default=[],
        help="secret,id=S,data=TEXT or secret,id=S,file=PATH[,format=base64]",
    )


def add_gate(parser: Parser) -> None:
    """`--allow` and `--trust`."""
    parser.add_argument(
        "--allow",
        metavar="DIR",
        action="append",
        default=[],
        help="let the image name files below DIR too (repeatable); by default only files below "
        "the image's own directory are opened",
    )
    parser.add_argument(
        "--trust", action="store_true", help="let the image name any file on this machine"
    )


def image_specs(args: Namespace, names: Iterable[str], *, format: str | None) -> list[ImageSpec]:
    """What to open for operands: plain names, or with --image-opts their descriptions."""
    names = list(names)
    for name in names:
        refuse_stream(name)
    if args.image_opts and format is not None:
        raise RequestError("--image-opts names the driver itself; it excludes a format flag")
    specs = [
        _read_spec(parse_image_opts(name))
        if args.image_opts
        else ImageSpec(path=name, format=format)
        for name in names
    ]
    if not getattr(args, "force_share", False):
        return specs
    return [replace(spec, opening=replace(spec.opening, force_share=True)) for spec in specs]


def _read_spec(spec: ImageSpec) -> ImageSpec:
    """A description with its driver and options understood."""
    driver = _driver(spec)
    names, options = take_key_secrets(spec.options, flag="--image-opts")
    opening = parse_open_options(options, format=driver)
    return replace(spec, format=driver, options={}, opening=opening, key_secrets=names)


def _driver(spec: ImageSpec) -> str | None:
    if spec.format is None:
        return None
    try:
        return image_format(spec.format)
    except argparse.ArgumentTypeError as error:
        raise RequestError(f"--image-opts: {error}") from error


def refuse_stream(name: str) -> None:
    """Raise RequestError for `-`, which must not become a file of that name."""
    if name == "-":
        raise RequestError("-: standard input and output are not supported as an image yet")


def make_gate(args: Namespace) -> ReferenceGate:
    """The gate that --allow and --trust ask for; by default each image's own directory."""
    if args.trust:
        return ReferenceGate.trusting()
    return ReferenceGate.below_image(args.allow)


def snapshot_name(text: str) -> str:
    """The id or name of `-l ID`, `-l NAME`, `-l snapshot.id=ID` or `-l snapshot.name=NAME`."""
    for key in ("snapshot.id=", "snapshot.name="):
        if text.startswith(key):
            text = text.removeprefix(key)
            break
    if not text:
        raise argparse.ArgumentTypeError("a snapshot's id or name is expected")
    return text
