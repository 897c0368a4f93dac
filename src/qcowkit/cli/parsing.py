"""The parser of one verb: flags before, between or after the operands, long flags by any
unambiguous beginning, messages that name the flag. Numpy-free."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from qcowkit.cli import exits

_NEGATIVE_SIZE = re.compile(r"-\d[\w.]*\Z")


class Parser(argparse.ArgumentParser):
    """An argparse parser whose bad usage ends with the exit code of its verb."""

    def __init__(self, *, prog: str, summary: str, usage_exit: int = exits.FAILURE) -> None:
        super().__init__(
            prog=prog,
            description=summary[:1].upper() + summary[1:] + ".",
            formatter_class=_Formatter,
            add_help=False,
        )
        self.usage_exit = usage_exit
        self.signed_operands = False
        self.add_argument("-h", "--help", action="help", help="show this text")

    def error(self, message: str) -> NoReturn:
        """Bad usage: one line that names the flag."""
        raise exits.ExitError(self.usage_exit, f"{message} (see {self.prog} --help)")

    def actions(self) -> list[argparse.Action]:
        """Every flag and operand, in the order of the help."""
        return list(self._actions)

    def refuse(self, *flags: str, reason: str, value: bool = False) -> None:
        """Know `flags` only to refuse them by name. `value`: the flag takes an argument."""
        self.add_argument(
            *flags,
            action=_Refuse,
            nargs=None if value else 0,
            help=argparse.SUPPRESS,
            dest=argparse.SUPPRESS,
            const=reason,
        )

    def examples(self, *lines: str) -> None:
        """Commands shown at the end of the help."""
        self.epilog = "examples:\n" + "\n".join(f"  {line}" for line in lines)

    def parse_verb(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The arguments after the verb, operands and flags in any order.

        With `signed_operands` a size with a minus, as `-1G`, is an operand."""
        if self.signed_operands:
            # To argparse an argument that begins with a space is no flag; sizes may begin so.
            arguments = [f" {text}" if _NEGATIVE_SIZE.match(text) else text for text in arguments]
        return self.parse_intermixed_args(arguments)


class _Refuse(argparse.Action):
    """A flag that cannot make sense here: it ends the parsing with its reason."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> NoReturn:
        parser.error(f"{option_string}: {self.const}")


class _Formatter(argparse.HelpFormatter):
    """Wrapped texts for flags, but the examples as they were written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)
