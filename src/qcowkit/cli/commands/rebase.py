"""`qcow rebase`: put an overlay over another backing file."""

from __future__ import annotations

from argparse import Namespace

from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_cache,
    add_format,
    add_gate,
    add_image_opts,
    add_objects,
    add_progress,
    add_quiet,
    image_specs,
    make_gate,
)
from qcowkit.cli.options import parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_lines
from qcowkit.cli.progress import Progress
from qcowkit.cli.secrets import opening_of
from qcowkit.errors import RequestError
from qcowkit.operations.rebase import NewBase, RebaseOptions, rebase_image, rename_base


def configure(parser: Parser) -> None:
    """Flags of qemu-img rebase."""
    parser.add_argument("file", metavar="FILE", help="overlay, which is changed in place")
    add_format(parser)
    parser.add_argument(
        "-b",
        dest="base",
        metavar="BACKING",
        help="the new backing file, by the name that the overlay is to hold, which starts at its "
        'directory; "" for none',
    )
    add_format(parser, "-F", dest="base_format", what="the new backing file")
    parser.add_argument(
        "-u",
        dest="unsafe",
        action="store_true",
        help="write name and format only and open neither backing file: the disk shows something "
        "else unless both have the same content",
    )
    parser.add_argument(
        "-c", "--compress", action="store_true", help="compress whole clusters that are copied"
    )
    add_cache(parser, "-t", what="target")
    add_cache(parser, "-T", what="source")
    parser.refuse(
        "-U", "--force-share", reason="an image that another process uses must not be changed"
    )
    add_quiet(parser)
    add_progress(parser)
    add_objects(parser)
    add_image_opts(parser)
    add_gate(parser)
    parser.examples(
        "qcow rebase -b new-base.qcow2 -F qcow2 overlay.qcow2",
        'qcow rebase -b "" overlay.qcow2',
        "qcow rebase -u -b moved/base.raw -F raw overlay.qcow2",
    )


def run(args: Namespace) -> int:
    """Rebase, and say what was copied."""
    parse_objects(args.objects)
    base = _new_base(args)
    (spec,) = image_specs(args, [args.file], format=args.format)
    opening = opening_of(args, spec)
    if args.unsafe:
        done = rename_base(spec.path, base, format=spec.format, opening=opening)
    else:
        with Progress.of(args, "rebase") as progress:
            done = rebase_image(
                spec.path,
                base,
                format=spec.format,
                gate=make_gate(args),
                opening=opening,
                options=RebaseOptions(compress=args.compress),
                progress=progress,
            )
    if not args.quiet:
        lines = done.render()
        write_lines(lines[-1:] if args.unsafe else lines)
    return exits.SUCCESS


def _new_base(args: Namespace) -> NewBase:
    """What the flags say. Raises RequestError that names them."""
    if args.base is None:
        raise RequestError('-b is missing: it names the new backing file, or is "" for none')
    if args.unsafe and args.compress:
        raise RequestError("-u excludes -c: it copies nothing")
    if args.base and args.base_format is None:
        raise RequestError("-b needs -F, the format of the new backing file")
    if args.base_format is not None and not args.base:
        raise RequestError('-F excludes -b "": no backing file has no format')
    return NewBase(name=args.base or None, format=args.base_format)
