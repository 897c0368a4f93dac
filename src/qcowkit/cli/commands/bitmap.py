"""`qcow bitmap`: change and list the persistent dirty bitmaps of an image."""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from qcowkit.budget import TRUSTED
from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_access,
    add_format,
    add_output,
    add_quiet,
    image_specs,
    make_gate,
    size_argument,
    warn,
    write_json,
)
from qcowkit.cli.options import ImageSpec, parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_lines
from qcowkit.errors import RequestError
from qcowkit.image.lineage import Layer, close_layers, open_layers
from qcowkit.operations.bitmap import Action, BitmapAction, edit_bitmap, list_bitmaps

_HELP = {
    Action.ADD: "make it: enabled, and all clean",
    Action.REMOVE: "remove it; all that can be done to an inconsistent one",
    Action.CLEAR: "make all of it clean",
    Action.ENABLE: "let it record changes from now on",
    Action.DISABLE: "let it record nothing from now on",
}


class _Step(argparse.Action):
    """Collects the actions in the order in which they are given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        source = values if isinstance(values, str) else ""
        step = BitmapAction(action=Action(self.const), source=source)
        namespace.actions = [*namespace.actions, step]


def configure(parser: Parser) -> None:
    """Flags of qemu-img bitmap; the list is ours."""
    parser.add_argument("file", metavar="FILE", help="qcow2 image")
    parser.add_argument("name", metavar="NAME", nargs="?", help="bitmap that the actions are about")
    parser.set_defaults(actions=[])
    for action, text in _HELP.items():
        parser.add_argument(
            f"--{action.value}", action=_Step, nargs=0, const=action.value, dest="step", help=text
        )
    parser.add_argument(
        "--merge",
        action=_Step,
        const=Action.MERGE.value,
        dest="step",
        metavar="SRC",
        help="make dirty what is dirty in bitmap SRC, to whole granules (repeatable)",
    )
    parser.add_argument(
        "--autoload",
        action="store_true",
        help="accepted for older scripts, without effect: every enabled bitmap is loaded",
    )
    parser.add_argument(
        "--list", action="store_true", help="list all bitmaps with what is dirty in them"
    )
    parser.add_argument(
        "-g",
        "--granularity",
        metavar="SIZE",
        type=size_argument,
        help="with --add: guest bytes of one bit, a power of two from 512 to 2G (the cluster "
        "size within 4K and 64K)",
    )
    parser.add_argument(
        "-b", "--source-file", dest="source", metavar="FILE", help="with --merge: image of SRC"
    )
    add_format(parser, "-F", "--source-format", dest="source_format", what="that image")
    add_format(parser)
    add_quiet(parser)
    add_output(parser)
    add_access(parser)
    parser.examples(
        "qcow bitmap --add disk.qcow2 monday",
        "qcow bitmap --list disk.qcow2",
        "qcow bitmap --disable --merge monday -b other.qcow2 disk.qcow2 week",
        "qcow bitmap --remove disk.qcow2 monday",
    )


def run(args: Namespace) -> int:
    """Carry out the actions, or list."""
    parse_objects(args.objects)
    _check(args)
    if args.autoload:
        warn(args, ["--autoload has no effect: every enabled bitmap is loaded"])
    with ExitStack() as stack:
        source = None
        (spec,) = image_specs(args, [args.file], format=args.format)
        if args.source is not None:
            (other,) = image_specs(args, [args.source], format=args.source_format)
            if not _is_same(other.path, spec.path):
                source = _open(args, other, stack, writable=False)
        layer = _open(args, spec, stack, writable=not args.list)
        if args.list:
            _list(args, layer)
        else:
            edit_bitmap(layer, args.name, args.actions, granularity=args.granularity, source=source)
    return exits.SUCCESS


def _check(args: Namespace) -> None:
    """Flags that need or exclude one another."""
    kinds = {step.action for step in args.actions}
    if args.list:
        if kinds:
            raise RequestError("--list excludes all actions")
        if args.name is not None:
            raise RequestError("--list lists all bitmaps; it takes no NAME")
    elif not kinds:
        raise RequestError(
            "expected one of --add, --remove, --clear, --enable, --disable, --merge and --list"
        )
    elif args.name is None:
        raise RequestError("expected the NAME of a bitmap behind FILE")
    if args.granularity is not None and Action.ADD not in kinds:
        raise RequestError("-g goes with --add")
    if args.source is not None and Action.MERGE not in kinds:
        raise RequestError("-b goes with --merge")
    if args.source_format is not None and args.source is None:
        raise RequestError("-F goes with -b")
    if kinds and args.force_share:
        raise RequestError("-U: bitmaps are changed only where nobody else uses the image")


def _is_same(first: str, second: str) -> bool:
    """Whether two names lead to one file, which cannot be opened beside its writer."""
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


def _open(args: Namespace, spec: ImageSpec, stack: ExitStack, *, writable: bool) -> Layer:
    """The file alone, closed with the stack."""
    if writable and spec.read_only:
        raise RequestError(f"--image-opts: read-only=on, and {spec.path} would be written")
    layers = open_layers(
        spec.path,
        format=spec.format,
        gate=make_gate(args),
        budget=TRUSTED,
        writable=writable,
        follow_backing=False,
        follow_data=False,
        locking=spec.opening.locking,
        force_share=spec.opening.force_share,
    )
    stack.callback(close_layers, layers)
    warn(args, layers[0].warnings)
    return layers[0]


def _list(args: Namespace, layer: Layer) -> None:
    found = list_bitmaps(layer)
    if args.output == "json":
        write_json(found.as_json())
    elif not args.quiet:
        write_lines(found.render())
