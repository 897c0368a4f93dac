"""The command language of `qemu-io`: words, flags and operands of one line. Pure.

Source: qemu-io's own help of versions 7.2 and 10.0, and what the two do. Words are parted by blanks
and nothing is quoted; flags may stand behind operands, be joined, and touch their values."""

from __future__ import annotations

import getopt
from collections.abc import Iterator
from dataclasses import dataclass, field

from qcowkit.errors import RequestError, UnsupportedFeature

MANY = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command. flags: letters, a colon behind each that takes a value. least, most: how many
    operands it has. changes: it may change the image, so needs one that was opened for writing.
    needs_disk: it is about the open image."""

    name: str
    alias: str = ""
    flags: str = ""
    operands: str = ""
    least: int = 0
    most: int = 0
    changes: bool = False
    needs_disk: bool = True
    summary: str

    @property
    def usage(self) -> str:
        """Name, flags and operands, as `help` shows them."""
        plain = "".join(flag for flag, takes_value in self._letters() if not takes_value)
        parts = [self.name]
        parts += [f"[-{plain}]"] if plain else []
        parts += [f"[-{flag} {_VALUES[flag]}]" for flag, takes in self._letters() if takes]
        return " ".join([*parts, self.operands]).rstrip()

    @property
    def flag_help(self) -> list[tuple[str, str]]:
        """(flag, meaning) of each flag."""
        special = _SPECIAL_FLAGS.get(self.name, {})
        return [(f"-{flag}", special.get(flag) or _FLAGS[flag]) for flag, _ in self._letters()]

    def _letters(self) -> Iterator[tuple[str, bool]]:
        for index, letter in enumerate(self.flags):
            if letter != ":":
                yield letter, self.flags[index + 1 : index + 2] == ":"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One line that was understood. flags: by letter, with their values or an empty text."""

    command: Command
    flags: dict[str, str] = field(default_factory=dict)
    operands: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The command's full name."""
        return self.command.name

    def has(self, flag: str) -> bool:
        """Whether a flag was given."""
        return flag in self.flags

    def value(self, flag: str) -> str | None:
        """The value of a flag, if it was given."""
        return self.flags.get(flag)


_VALUES = {
    "P": "PATTERN",
    "s": "VALUE",
    "l": "LENGTH",
    "m": "MODE",
    "i": "AIO",
    "t": "CACHE",
    "c": "CACHE",
    "d": "DISCARD",
    "o": "OPTIONS",
}

_FLAGS = {
    "b": "the VM state in place of the disk: refused, it cannot be reached here",
    "c": "store the data compressed; whole clusters that are not allocated yet",
    "C": "report as one line of comma-separated numbers",
    "f": "make the write durable before it is reported (FUA)",
    "i": "count an invalid request and do nothing",
    "l": "with -P: how many bytes to verify",
    "n": "with -z: fail where zeros would have to be written as data",
    "p": "accepted, without effect",
    "P": "the byte to write, or to expect: 0 to 255, also octal (017) or hexadecimal (0xff)",
    "q": "report nothing but failures",
    "r": "accepted, without effect (registered buffer)",
    "s": "with -P: the first byte to verify, counted from the start of the read",
    "u": "with -z: the space may be given back",
    "v": "print the bytes",
    "z": "write zeros, without data where the format can",
}

_OPEN_FLAGS = {
    "C": "copy on read: what is read from below is stored in the image",
    "k": "accepted, without effect (kernel AIO)",
    "i": "threads, native or io_uring: accepted, without effect",
    "n": "short for -t none",
    "o": "options: driver, file.filename, and those of the image",
    "r": "read-only",
    "s": "leave the image alone: changes go to a temporary overlay and are lost at the end",
    "t": "cache mode; writethrough and directsync make every write durable",
    "d": "ignore (discards do nothing) or unmap",
    "U": "share with a writer; read-only",
}

_SPECIAL_FLAGS: dict[str, dict[str, str]] = {
    "open": _OPEN_FLAGS,
    "reopen": {
        "r": "read-only",
        "w": "for reading and writing",
        "c": "cache mode",
        "o": "options of the image that may change while it is open",
    },
    "write": {"s": "a file whose bytes are written, again and again as long as needed"},
    "truncate": {"m": "preallocation of what is added: off, metadata, falloc or full"},
}

_RANGE = "OFFSET LENGTH"
_RANGES = "OFFSET LENGTH [LENGTH...]"

COMMANDS = (
    Command(name="abort", needs_disk=False, summary="end the program at once, as a crash would"),
    Command(
        name="aio_discard",
        flags="Cq",
        operands=_RANGE,
        least=2,
        most=2,
        changes=True,
        summary="begin to discard bytes; the result is reported when it is done",
    ),
    Command(name="aio_flush", summary="wait for every request that is under way"),
    Command(
        name="aio_read",
        flags="CiqrvP:",
        operands=_RANGES,
        least=2,
        most=MANY,
        summary="begin to read; the result is reported when it is done, and never fails the run",
    ),
    Command(
        name="aio_write",
        flags="CfiqruzP:",
        operands=_RANGES,
        least=2,
        most=MANY,
        changes=True,
        summary="begin to write; the result is reported when it is done, and never fails the run",
    ),
    Command(
        name="alloc",
        alias="a",
        operands="OFFSET [LENGTH]",
        least=1,
        most=2,
        summary="say how much of a range (512 bytes) the top image holds itself",
    ),
    Command(
        name="break",
        operands="EVENT TAG",
        least=2,
        most=2,
        summary="stop the next request that comes to a metadata event",
    ),
    Command(name="close", alias="c", summary="close the image"),
    Command(
        name="discard",
        alias="d",
        flags="Cq",
        operands=_RANGE,
        least=2,
        most=2,
        changes=True,
        summary="say that bytes are no longer needed",
    ),
    Command(name="flush", alias="f", summary="make durable what was written"),
    Command(
        name="help",
        alias="?",
        operands="[COMMAND]",
        most=1,
        needs_disk=False,
        summary="list the commands, or explain one",
    ),
    Command(name="info", alias="i", summary="describe the image"),
    Command(name="length", alias="l", summary="say how large the disk is"),
    Command(name="map", summary="list what the top image holds itself"),
    Command(
        name="open",
        alias="o",
        flags="rsnCkUi:t:d:o:",
        operands="[FILE]",
        most=1,
        needs_disk=False,
        summary="open an image",
    ),
    Command(name="quit", alias="q", needs_disk=False, summary="end the program"),
    Command(
        name="read",
        alias="r",
        flags="bCpqrvP:s:l:",
        operands=_RANGE,
        least=2,
        most=2,
        summary="read bytes, and verify or print them",
    ),
    Command(
        name="readv",
        flags="CqrvP:",
        operands=_RANGES,
        least=2,
        most=MANY,
        summary="read bytes into several buffers with one request",
    ),
    Command(
        name="remove_break",
        operands="TAG",
        least=1,
        most=1,
        summary="take back a break, and let go on what it stopped",
    ),
    Command(name="reopen", flags="rwc:o:", summary="open the same image with other options"),
    Command(name="resume", operands="TAG", least=1, most=1, summary="let a stopped request go on"),
    Command(
        name="sigraise",
        operands="NUMBER",
        least=1,
        most=1,
        needs_disk=False,
        summary="send a signal to this program",
    ),
    Command(
        name="sleep",
        operands="MILLISECONDS",
        least=1,
        most=1,
        needs_disk=False,
        summary="wait",
    ),
    Command(
        name="truncate",
        alias="t",
        flags="m:",
        operands="SIZE",
        least=1,
        most=1,
        changes=True,
        summary="change the size of the disk",
    ),
    Command(
        name="wait_break",
        operands="TAG",
        least=1,
        most=1,
        summary="wait until a request has been stopped",
    ),
    Command(
        name="write",
        alias="w",
        flags="bcCfnpqruzP:s:",
        operands=_RANGE,
        least=2,
        most=2,
        changes=True,
        summary="write bytes: 0xcd, a pattern, a file or zeros",
    ),
    Command(
        name="writev",
        flags="CfqrP:",
        operands=_RANGES,
        least=2,
        most=MANY,
        changes=True,
        summary="write several buffers with one request",
    ),
)

_BY_NAME = {name: one for one in COMMANDS for name in (one.name, one.alias) if name}

_ZONED = {
    name
    for pair in (
        "zone_report zrp",
        "zone_open zo",
        "zone_close zc",
        "zone_finish zf",
        "zone_reset zrs",
        "zone_append zap",
    )
    for name in pair.split()
}


def find_command(name: str) -> Command:
    """A command by its name or alias. Raises RequestError, UnsupportedFeature for zoned devices."""
    if name in _ZONED:
        raise UnsupportedFeature(name, reason="zoned devices are not supported")
    command = _BY_NAME.get(name)
    if command is None:
        raise RequestError(f"unknown command {name!r} (see help)")
    return command


def parse_line(line: str) -> Call | None:
    """What a line asks for, None for an empty one. Raises RequestError, UnsupportedFeature."""
    words = line.split()
    if not words:
        return None
    command = find_command(words[0])
    try:
        flags, operands = getopt.gnu_getopt(words[1:], command.flags)
    except getopt.GetoptError as error:
        reason = "needs a value" if f"{error.opt}:" in command.flags else "is unknown"
        raise RequestError(f"{command.name}: -{error.opt} {reason} ({command.usage})") from error
    if not command.least <= len(operands) <= command.most:
        raise RequestError(
            f"{command.name}: {_operands(len(operands))}, expected {_expected(command)} "
            f"({command.usage})"
        )
    return Call(
        command=command,
        flags={flag[1:]: value for flag, value in flags},
        operands=tuple(operands),
    )


def _operands(count: int) -> str:
    return f"{count} operand{'' if count == 1 else 's'}"


def _expected(command: Command) -> str:
    if command.most == MANY:
        return f"at least {command.least}"
    if command.least == command.most:
        return str(command.least) if command.most else "none"
    return f"{command.least} to {command.most}"


def help_lines() -> list[str]:
    """The list of all commands."""
    lines = [f"{one.usage} -- {one.summary}" for one in COMMANDS]
    return [*lines, "", "`help COMMAND` explains the flags of one."]


def help_of(name: str) -> list[str]:
    """One command with its flags. Raises RequestError."""
    command = find_command(name)
    head = f"{command.usage} -- {command.summary}"
    if command.alias:
        head += f" (short: {command.alias})"
    return [head, *(f"  {flag}  {meaning}" for flag, meaning in command.flag_help)]
