"""Run a command again and again, each time killed at a later call into the system.

Started as a process of its own: `kill_points.py TARGET WORD...`. It forks for each run, so that the
command begins from the same state, and writes one JSON line a run: the call at which it was killed
(0 for the run that came to its end), the digest of TARGET or null, and the names of the parts that
lie beside it. TARGET is set back before each run; parts are not."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qcowkit.cli.commands import convert
from qcowkit.cli.main import main

# Loaded here, once, rather than in every child.
PRELOADED = (convert,)
CALLS = (
    "open",
    "pwritev",
    "pwrite",
    "ftruncate",
    "posix_fallocate",
    "copy_file_range",
    "fdatasync",
    "fsync",
    "fchmod",
    "rename",
    "close",
    "unlink",
)


def arm(last: int) -> None:
    """Make the `last`-th of the calls the last thing that this process does."""
    count = 0

    def armed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return run

    for name in CALLS:
        setattr(os, name, armed(getattr(os, name)))


def run_killed(words: list[str], *, at: int) -> bool:
    """Whether the command came to its end before the call at which it was to be killed."""
    child = os.fork()
    if child == 0:
        arm(at)
        os._exit(main(words))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.waitstatus_to_exitcode(status) == 0, "the command failed by itself"
    return True


def observe(target: Path, *, at: int) -> None:
    """Write what lies there now."""
    digest = hashlib.sha256(target.read_bytes()).hexdigest() if target.exists() else None
    parts = [path.name for path in target.parent.iterdir() if path.name.endswith(".part")]
    line = json.dumps({"killed_at": at, "target": digest, "parts": parts})
    sys.stdout.write(line + "\n")
    # The next child must not inherit it.
    sys.stdout.flush()


def loop(target: Path, words: list[str]) -> None:
    """Every point of the command, one after the other."""
    before = target.read_bytes() if target.exists() else None
    at, ended = 0, False
    while not ended:
        if before is None:
            target.unlink(missing_ok=True)
        else:
            target.write_bytes(before)
        at += 1
        ended = run_killed(words, at=at)
        observe(target, at=0 if ended else at)


if __name__ == "__main__":
    loop(Path(sys.argv[1]), sys.argv[2:])
