"""Fuzz one target or all: `python -m fuzz.run [--seconds N] [--seed N] [TARGET...]`.

With atheris installed it guides the search by coverage; without it, inputs that end in a way not
seen before are kept and changed further. An input that crashes is written to fuzz/corpus and stays
there, so that every later test run tries it."""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from types import FrameType

from fuzz.mutate import MAX_LENGTH, mutate
from fuzz.registry import CORPUS, TARGETS, Target
from qcowkit.errors import QcowkitError
from qcowkit.units import GiB

try:
    import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]
except ImportError:
    atheris = None

SECONDS_AN_INPUT = 5
_MEMORY = 4 * GiB
_MAX_POOL = 2000


class TooSlowError(Exception):
    """An input took longer than any may."""


class CrashError(Exception):
    """Something else than a QcowkitError left a target. `data`: the input."""

    def __init__(self, target: Target, data: bytes) -> None:
        self.data = data
        super().__init__(f"{target.name}: {len(data)} bytes beginning with {data[:64].hex()}")


def save(target: Target, data: bytes) -> str:
    """Keep an input in the corpus, under its digest."""
    path = CORPUS / target.name / f"{hashlib.sha256(data).hexdigest()[:16]}.hex"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [data.hex()[at : at + 96] for at in range(0, 2 * len(data), 96)]
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    return str(path)


def outcome(target: Target, data: bytes) -> str:
    """How an input ends, in the words of its refusal without the numbers. Raises CrashError."""
    try:
        target.run(data)
    except QcowkitError as error:
        return re.sub(r"0x[0-9a-f]+|\d+|'.*'", "#", f"{type(error).__name__}: {error}")
    except Exception as error:
        raise CrashError(target, data) from error
    return ""


def fuzz(target: Target, *, seconds: float, seed: int) -> int:
    """Try inputs for so long; returns how many. The first that crashes is kept, and raised."""
    noise = random.Random(f"{seed} {target.name}")
    pool = target.corpus()
    seen = {outcome(target, data) for data in pool}
    count, end = len(pool), time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutate(noise.choice(pool), noise=noise, others=pool)
        found = watched(target, data)
        count += 1
        if found not in seen and len(pool) < _MAX_POOL:
            seen.add(found)
            pool.append(data)
    return count


def watched(target: Target, data: bytes) -> str:
    """The outcome, within the time that an input may take; what crashes is kept."""
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(SECONDS_AN_INPUT)
    try:
        return outcome(target, data)
    except CrashError:
        save(target, data)
        raise
    finally:
        signal.alarm(0)


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlowError(f"more than {SECONDS_AN_INPUT} seconds")


def fuzz_by_coverage(target: Target, *, seconds: int) -> None:
    """Hand the process over to atheris, which ends it."""

    def run(data: bytes) -> None:
        watched(target, data)

    atheris.instrument_all()
    limits = [f"-max_total_time={seconds}", f"-max_len={MAX_LENGTH}"]
    atheris.Setup([sys.argv[0], *limits, f"-timeout={SECONDS_AN_INPUT}"], run)
    atheris.Fuzz()


def main() -> int:
    """The exit status: 1 when a target crashed."""
    parser = argparse.ArgumentParser(description="fuzz the decoders")
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], help="all when not given")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    names = args.targets or list(TARGETS)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    if atheris is not None and len(names) == 1:
        fuzz_by_coverage(TARGETS[names[0]], seconds=args.seconds)
    if atheris is not None:
        again = [sys.executable, "-m", "fuzz.run", "--seconds", str(args.seconds)]
        return max(subprocess.run([*again, name], check=False).returncode for name in names)
    status = 0
    for name in names:
        try:
            count = fuzz(TARGETS[name], seconds=args.seconds, seed=args.seed)
        except CrashError as error:
            traceback.print_exception(error)
            status = 1
        else:
            print(f"{name}: {count} inputs")
    return status


if __name__ == "__main__":
    sys.exit(main())
