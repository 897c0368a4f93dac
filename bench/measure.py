"""Run a command and say what it took: wall clock, processor time, peak memory.

The kernel counts the memory of whoever starts a process into the peak of that process, so this
module, and all that runs beside it, must stay slim: no numpy, no large buffers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("qcowkit", "numpy", "isal", "zlib-ng", "zstandard")
_LAST_WORDS = 300
_MOST_WORDS = 40


class CommandFailed(Exception):
    """A command of the benchmark ended with a code that was not expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run. wall, user, system: seconds. memory: peak resident bytes. output: bytes of the file
    that was written, or None."""

    wall: float
    user: float
    system: float
    memory: int
    output: int | None = None

    @property
    def cpu(self) -> float:
        """Seconds of processor time, over all cores."""
        return self.user + self.system

    def as_json(self) -> dict[str, Any]:
        """Keys as the fields; memory and output in bytes."""
        return {
            "wall": round(self.wall, 5),
            "user": round(self.user, 5),
            "system": round(self.system, 5),
            "memory": self.memory,
            "output": self.output,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Runs of two commands that took turns, warm-up left out. Both tuples are equally long."""

    peer: tuple[Run, ...]
    ours: tuple[Run, ...]

    @property
    def ratio(self) -> float:
        """How many times faster ours is: the median over pairs, wall clock."""
        return pair_ratio(self.peer, self.ours, lambda run: run.wall)

    @property
    def cpu_ratio(self) -> float:
        """The same of processor time."""
        return pair_ratio(self.peer, self.ours, lambda run: run.cpu)


def pair_ratio(peer: Sequence[Run], ours: Sequence[Run], value: Callable[[Run], float]) -> float:
    """The median of value(peer) / value(ours) over pairs that ran next to one another."""
    return statistics.median(
        value(one) / max(value(other), 1e-9) for one, other in zip(peer, ours, strict=True)
    )


def median(runs: Sequence[Run], value: Callable[[Run], float]) -> float:
    """The median of one value over runs."""
    return statistics.median(map(value, runs))


def environment() -> dict[str, str]:
    """Messages in English, and nothing that would make Python write into its installation."""
    return {**os.environ, "LC_ALL": "C.UTF-8"}


def run_once(
    argv: Sequence[str],
    *,
    expected: int = 0,
    output: Path | None = None,
    clock: Callable[[str], float] | None = None,
    script: Path | None = None,
) -> Run:
    """Run a command. Raises CommandFailed with its last words.

    output: the file that it writes, whose size is noted. clock: the seconds that are to count, from
    what the command printed, which is discarded otherwise; ValueError from it becomes a failure.
    script: a file for its standard input."""
    with (
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryFile() as printed,
        (script or Path(os.devnull)).open("rb") as given,
    ):
        begun = time.perf_counter()
        process = subprocess.Popen(
            argv,
            stdin=given,
            stdout=subprocess.DEVNULL if clock is None else printed,
            stderr=errors,
            env=environment(),
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall = time.perf_counter() - begun
        process.returncode = code = os.waitstatus_to_exitcode(status)
        if code != expected:
            errors.seek(0)
            raise CommandFailed(_failure(argv, code, errors.read(), expected=expected))
        if clock is not None:
            printed.seek(0)
            wall = _read_clock(argv, clock, printed.read())
    return Run(
        wall=wall,
        user=usage.ru_utime,
        system=usage.ru_stime,
        memory=usage.ru_maxrss * 1024,
        output=output.stat().st_size if output is not None else None,
    )


def run_quietly(*argv: str | os.PathLike[str], expected: int = 0) -> str:
    """Run a command that is not measured; returns what it printed. Raises CommandFailed."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, env=environment())
    if done.returncode != expected:
        words = done.stderr or done.stdout
        raise CommandFailed(_failure(argv, done.returncode, words, expected=expected))
    return done.stdout.decode(errors="replace")


def _read_clock(argv: Sequence[str], clock: Callable[[str], float], printed: bytes) -> float:
    try:
        return clock(printed.decode(errors="replace"))
    except ValueError as error:
        raise CommandFailed(f"{' '.join(argv[:_MOST_WORDS])}: {error}") from error


def _failure(
    argv: Sequence[str | os.PathLike[str]], code: int, words: bytes, *, expected: int
) -> str:
    line = " ".join(map(str, argv[:_MOST_WORDS]))
    last = words.decode(errors="replace").strip()[-_LAST_WORDS:]
    return f"{line}: exit code {code}, expected {expected}: {last or 'no message'}"


def machine_shape(root: Path) -> dict[str, Any]:
    """What a reader must know of the machine and of the software; memory in bytes.

    root: the checkout whose revision is noted, where it has one."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "model": _cpu_model(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": run_quietly("qemu-img", "--version").splitlines()[0].removeprefix("qemu-img "),
        "packages": {name: _version(name) for name in PACKAGES},
        "revision": _revision(root),
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision(root: Path) -> str | None:
    """The commit, with a plus sign when the files differ from it; None outside a checkout."""
    git = ("git", "-c", f"safe.directory={root}", "-C", str(root))
    try:
        commit = run_quietly(*git, "rev-parse", "--short=12", "HEAD").strip()
        changed = run_quietly(*git, "status", "--porcelain", "--", "src").strip()
    except (CommandFailed, OSError):
        return None
    return commit + ("+" if changed else "")
