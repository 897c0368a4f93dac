"""The command `qcow`: find the verb, run it, turn every ending into a line and an exit code.

Numpy-free. Exit codes are in `cli/exits.py`; a signal ends with 128 plus its number."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

import qcowkit
from qcowkit.cli import exits
from qcowkit.cli.printing import printable, write_error, write_text
from qcowkit.cli.table import BY_NAME, VERBS
from qcowkit.errors import QcowkitError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

DEBUG_VARIABLE = "QCOW_DEBUG"
# Objects made between two searches for garbage; the default is 700.
_GARBAGE_THRESHOLD = 100_000

_HEAD = """\
usage: qcow VERB [flags] [operands]

Read, inspect, check, map, compare, create and convert disk images: qcow2, VHD (vpc) and raw.

verbs:
"""

_TAIL = """
flags:
  -h, --help     show this text; `qcow VERB --help` tells all of a verb
  -V, --version  show the version
  --debug        show where an error comes from (also: QCOW_DEBUG=1)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; `None` takes the process's own arguments.

    Only the process's own run installs signal handlers, so that tests may call this freely."""
    if arguments is None:
        arguments = sys.argv[1:]
        _install_signals()
        # numpy loads a library that starts a thread a processor for linear algebra: none is used.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        # A file name is bytes: it leaves as it came, whatever the locale.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="surrogateescape")
    try:
        code = _guarded(list(arguments))
        return _finish_output(code)
    except BrokenPipeError:
        # Whoever read our output has enough.
        _abandon_output()
        return exits.SIGNAL_BASE + signal.SIGPIPE


def process() -> NoReturn:
    """The console script: `main`, without what a short process need not do.

    Imports make many objects that live to the end: looking for garbage among them costs more than
    it frees. And at the end the kernel takes memory back faster than the interpreter unwinds it;
    all output was flushed and every file closed by then."""
    gc.set_threshold(_GARBAGE_THRESHOLD)
    code = main()
    sys.stderr.flush()
    os._exit(code)


def _finish_output(code: int) -> int:
    """Flush standard output; where it fails, a success becomes a failure."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        if code == exits.SUCCESS:
            write_error(f"qcow: {_explain(error)[1]}")
            code = exits.FAILURE
        _abandon_output()
    return code


def _abandon_output() -> None:
    """What is still buffered goes nowhere: the interpreter must not complain at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _guarded(arguments: list[str]) -> int:
    """Every ending but a broken output as an exit code."""
    debug = bool(os.environ.get(DEBUG_VARIABLE))
    while arguments and arguments[0] == "--debug":
        debug = True
        del arguments[0]
    name = "qcow"
    if arguments and arguments[0] in BY_NAME:
        name = f"qcow {arguments[0]}"
    try:
        return _dispatch(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else exits.SUCCESS
    except KeyboardInterrupt:
        write_error(f"{name}: interrupted")
        return exits.SIGNAL_BASE + signal.SIGINT
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            raise
        code, message = _explain(error)
        write_error(f"{name}: {printable(message)}")
        return code


def _explain(error: Exception) -> tuple[int, str]:
    """Exit code and message of what ended a command."""
    if isinstance(error, exits.ExitError):
        return error.code, str(error)
    if isinstance(error, QcowkitError):
        return exits.FAILURE, str(error)
    if isinstance(error, MemoryError):
        return exits.FAILURE, "out of memory"
    if isinstance(error, OSError) and error.strerror:
        # The library names its files; what has no name is a stream of ours.
        return exits.FAILURE, f"{error.filename or 'standard output'}: {error.strerror}"
    kind = type(error).__name__
    hint = f"{DEBUG_VARIABLE}=1 shows where"
    return exits.FAILURE, f"internal error: {kind}: {error} ({hint})"


def _dispatch(arguments: list[str]) -> int:
    """Global flags, then the verb."""
    if not arguments:
        raise exits.ExitError(exits.FAILURE, "a verb is missing (see qcow --help)")
    first = arguments[0]
    if first in ("-h", "--help", "help"):
        write_text(help_text())
        return exits.SUCCESS
    if first in ("-V", "--version"):
        write_text(f"qcow {qcowkit.__version__}\n")
        return exits.SUCCESS
    if first in ("-T", "--trace"):
        raise exits.ExitError(exits.FAILURE, f"{first}: there are no trace points here")
    verb = BY_NAME.get(first)
    if verb is None:
        kind = "flag" if first.startswith("-") else "verb"
        raise exits.ExitError(exits.FAILURE, f"unknown {kind} {first!r} (see qcow --help)")
    return verb.run(arguments[1:])


def help_text() -> str:
    """What `qcow --help` prints."""
    width = max(len(verb.name) for verb in VERBS)
    return _HEAD + "".join(f"  {verb.name:{width}}  {verb.summary}\n" for verb in VERBS) + _TAIL


def _install_signals() -> None:
    """Let a request to end unwind the stack, so that part files are removed on the way."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Under nohup the signal is ignored already, and stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _terminate)
    # Asks for a line of progress; a verb without progress has none to give.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _terminate(number: int, frame: FrameType | None) -> None:
    # Cleaning up must not be cut short by the same request again.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(exits.SIGNAL_BASE + number)
