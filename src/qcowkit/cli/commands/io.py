"""`qcow io`: the command language of qemu-io on one disk at a time."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace

from qcowkit.cli import exits
from qcowkit.cli.common import (
    CACHE_MODES,
    add_access,
    add_format,
    image_format,
    make_gate,
    refuse_stream,
    warn,
)
from qcowkit.cli.open_options import parse_open_options, take_key_secrets
from qcowkit.cli.options import ImageSpec, parse_image_opts, parse_objects, parse_options
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import printable, write_error, write_lines
from qcowkit.cli.secrets import opening_of
from qcowkit.errors import RequestError
from qcowkit.image.chain import Chain
from qcowkit.image.registry import open_chain
from qcowkit.operations.io_language.opening import AIO_MODES, DISCARD_MODES, OpenRequest
from qcowkit.operations.io_language.reports import Outcome
from qcowkit.operations.io_language.session import IoSession

try:
    # Being loaded, it lets lines be edited and found again. Some builds of Python lack it.
    import readline
except ImportError:
    readline = None  # type: ignore[assignment]

_PROMPT = "qcow> "


def configure(parser: Parser) -> None:
    """Flags of qemu-io, and -o."""
    parser.add_argument("file", metavar="FILE", nargs="?", help="image; without it, see `open`")
    parser.add_argument(
        "-c",
        "--cmd",
        dest="lines",
        metavar="COMMAND",
        action="append",
        help="a command to run (repeatable, in order); without any, they are read from standard "
        "input. `-c help` lists them, `-c 'help read'` explains one",
    )
    add_format(parser)
    parser.add_argument("-r", "--read-only", action="store_true", help="open for reading only")
    parser.add_argument(
        "-s",
        "--snapshot",
        dest="temporary",
        action="store_true",
        help="leave the image alone: changes go to a temporary overlay and are lost at the end",
    )
    parser.add_argument(
        "-C",
        "--copy-on-read",
        action="store_true",
        help="store in the image what is read from the layers below it",
    )
    _add_modes(parser)
    add_access(parser)
    parser.examples(
        "qcow io -c 'write -P 0x5a 64k 128k' -c 'read -P 0x5a 64k 128k' disk.qcow2",
        "qcow io -r -c map disk.qcow2",
        "qcow io disk.qcow2 < commands.txt",
        "qcow io -c 'open -o driver=raw disk.raw' -c 'read -v 0 64'",
    )


def _add_modes(parser: Parser) -> None:
    parser.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="options of the image, as l2-cache-size=1M,lazy-refcounts=on (see qcow --image-opts)",
    )
    parser.add_argument(
        "-t",
        "--cache",
        metavar="CACHE",
        choices=CACHE_MODES,
        help=f"cache mode: {', '.join(CACHE_MODES)}. With writethrough and directsync every write "
        "is durable when it is reported; the others change nothing here",
    )
    parser.add_argument("-n", "--nocache", action="store_true", help="short for -t none")
    parser.add_argument(
        "-d",
        "--discard",
        metavar="MODE",
        choices=tuple(DISCARD_MODES),
        help="ignore (off): discards do nothing; unmap (on, the default): they give space back",
    )
    parser.add_argument(
        "-i", "--aio", metavar="AIO", choices=AIO_MODES, help="accepted, without effect"
    )
    for flags in (("-k", "--native-aio"), ("-m", "--misalign")):
        parser.add_argument(*flags, action="store_true", help="accepted, without effect")
    parser.refuse("-T", "--trace", value=True, reason="there are no trace points here")


def run(args: Namespace) -> int:
    """Run the commands; 1 if any of them failed."""
    parse_objects(args.objects)
    session = IoSession(_Opener(args))
    failed = False
    try:
        if args.file is not None:
            session.open(_first_request(args))
        for line in _lines(args):
            outcome = session.run(line)
            failed = _show(outcome) or failed
            if outcome.crash:
                os.abort()
            if outcome.signal is not None:
                failed = _raise(outcome.signal) or failed
            if outcome.ends:
                break
    finally:
        failed = _show(session.finish()) or failed
    return exits.FAILURE if failed else exits.SUCCESS


def _first_request(args: Namespace) -> OpenRequest:
    """What the command line itself opens."""
    refuse_stream(args.file)
    options = parse_options(args.options)
    path = args.file
    if args.image_opts:
        if args.format is not None:
            raise RequestError("--image-opts names the driver itself; it excludes a format flag")
        options = {**parse_options([args.file], flag="--image-opts"), **options}
        path = None
    elif args.format is not None:
        options["driver"] = args.format
    if args.discard is not None:
        options.setdefault("discard", args.discard)
    return OpenRequest(
        path=path,
        options=options,
        writable=not args.read_only,
        cache=args.cache or ("none" if args.nocache else "writeback"),
        temporary=args.temporary,
        copy_on_read=args.copy_on_read,
        force_share=args.force_share,
    )


def _lines(args: Namespace) -> Iterator[str]:
    """Commands of the command line, of a terminal with a prompt, or of a file."""
    if args.lines is not None:
        yield from args.lines
    elif sys.stdin.isatty():
        try:
            while True:
                yield input(_PROMPT)
        except EOFError:
            write_lines([""])
    else:
        yield from sys.stdin


def _show(outcome: Outcome) -> bool:
    """Print an outcome; returns whether it failed."""
    for report in outcome.reports:
        write_lines(report.render())
    # Both streams may be one file: the order must be that of what happened.
    sys.stdout.flush()
    for error in outcome.errors:
        write_error(f"qcow io: {printable(error)}")
    return outcome.failed


def _raise(number: int) -> bool:
    """Send a signal to this process; returns whether that failed."""
    try:
        signal.raise_signal(number)
    except (ValueError, OSError):
        write_error(f"qcow io: sigraise: there is no signal {number}")
        return True
    return False


class _Opener:
    """Opens disks for a session, with the gate of the command line."""

    def __init__(self, args: Namespace) -> None:
        self._args = args

    def parse(self, text: str) -> dict[str, str]:
        """See `Opener.parse`."""
        return parse_options([text])

    def check(self, request: OpenRequest) -> None:
        """See `Opener.check`."""
        _spec(request)

    def open(self, request: OpenRequest) -> Chain:
        """See `Opener.open`."""
        spec = _spec(request)
        chain = open_chain(
            spec.path,
            format=spec.format,
            gate=make_gate(self._args),
            writable=request.writable and not request.temporary and not spec.read_only,
            options=opening_of(self._args, spec),
        )
        warn(self._args, chain.warnings)
        return chain


def _spec(request: OpenRequest) -> ImageSpec:
    """The file, its format and its options. Raises RequestError."""
    options = dict(request.options)
    # A guest that discards wants space back; qemu-io asks for it too.
    options.setdefault("discard", "unmap")
    named = [key for key in ("filename", "file.filename") if key in options]
    if request.path is not None:
        if named:
            raise RequestError(f"-o {named[0]}= and FILE both name the image")
        options["file.filename"] = request.path
    elif not named:
        raise RequestError("open: FILE is missing, and no option file.filename= names it")
    pairs = (f"{key}={value}".replace(",", ",,") for key, value in options.items())
    spec = parse_image_opts(",".join(pairs))
    try:
        format = None if spec.format is None else image_format(spec.format)
    except argparse.ArgumentTypeError as error:
        raise RequestError(f"-o driver: {error}") from error
    names, rest = take_key_secrets(spec.options, flag="-o")
    opening = parse_open_options(rest, format=format, flag="-o")
    if request.force_share:
        opening = replace(opening, force_share=True)
    return replace(spec, format=format, options={}, opening=opening, key_secrets=names)
