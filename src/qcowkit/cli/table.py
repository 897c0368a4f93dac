"""The verbs of the command line, and the only place that imports lazily: a verb loads what it
needs, nothing else. `qcow --help` reads this table alone. Numpy-free."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from qcowkit.cli import exits

if TYPE_CHECKING:
    from argparse import Namespace

    from qcowkit.cli.parsing import Parser


class Command(Protocol):
    """What a module of `cli/commands` offers."""

    def configure(self, parser: Parser) -> None:
        """Add the operands and flags of the verb."""

    def run(self, args: Namespace) -> int:
        """Carry it out; returns the exit code."""


class Verb(NamedTuple):
    """One line of `qcow --help`. `usage_exit`: the exit code of bad usage.

    A tuple: the machinery of dataclasses alone takes as long to load as all of this."""

    name: str
    summary: str
    usage_exit: int = exits.FAILURE

    def load(self) -> Command:
        """Import the module of the verb."""
        module = self.name.replace("-", "_")
        return cast("Command", importlib.import_module(f"qcowkit.cli.commands.{module}"))

    def parser(self) -> Parser:
        """The parser of the verb, with its operands and flags."""
        parsing = importlib.import_module("qcowkit.cli.parsing")
        parser: Parser = parsing.Parser(
            prog=f"qcow {self.name}", summary=self.summary, usage_exit=self.usage_exit
        )
        self.load().configure(parser)
        return parser

    def run(self, arguments: list[str]) -> int:
        """Carry the verb out with the arguments behind it; returns the exit code."""
        return self.load().run(self.parser().parse_verb(arguments))


def _own(name: str, summary: str) -> Verb:
    """A verb that qemu-img does not have."""
    return Verb(name=name, summary=summary, usage_exit=exits.USAGE)


VERBS = (
    Verb(name="info", summary="say what an image is: format, sizes, features, snapshots"),
    Verb(name="map", summary="list where the data of a disk lies, or draw it"),
    Verb(name="convert", summary="copy disks into a new image of any format"),
    Verb(name="check", summary="recount references, find leaks and corruptions"),
    Verb(name="compare", summary="tell whether two disks have the same content"),
    Verb(name="measure", summary="say how large an image would become"),
    Verb(name="create", summary="make a new, empty image"),
    Verb(name="resize", summary="change the size of a disk in place"),
    Verb(name="amend", summary="change the options of an image in place"),
    Verb(name="snapshot", summary="list, take, go back to and delete snapshots in an image"),
    Verb(name="bitmap", summary="list and change the dirty bitmaps of an image"),
    Verb(name="commit", summary="put what an overlay holds into its backing file"),
    Verb(name="rebase", summary="put an overlay over another backing file"),
    Verb(name="dd", summary="copy a part of a disk"),
    Verb(name="bench", summary="time the requests of one size that a disk answers"),
    _own("io", "read, write and look with the command language of qemu-io"),
    _own("diff", "list what differs between two disks, or make an overlay of it"),
    _own("compact", "make the file of an image shorter, in place"),
    _own("capsule", "copy the metadata of an image, and no guest data, to show it to others"),
    _own("headers", "list the allocated clusters as JSON"),
    _own("find-backing", "find a backing file that was moved, and repair its name"),
    _own("inspect", "judge whether a file of a stranger is safe to use"),
    _own("completion", "print the completion script of a shell"),
)

BY_NAME = {verb.name: verb for verb in VERBS}
