"""Paired benchmarks against qemu-img: `python -m bench.run`, or `make bench`.

Both sides take turns, after one warm-up each; outputs are removed between runs. A whole run is
kept as JSON below bench/results and written into README as a table; a part of it is only kept."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.library import FULL, QUICK, Library, NoRoom, file_system
from bench.measure import (
    CommandFailed,
    Pairs,
    Run,
    machine_shape,
    pair_ratio,
    run_once,
    run_quietly,
)
from bench.report import MB, missed, peak, render, seconds, splice
from bench.requests import RequestRow
from bench.rows import ROWS, Row, fill, needed_later, select
from bench.timing import time_requests
from bench.volumes import NoVolume, mounted_xfs
from bench.write_rows import REQUEST_ROWS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
# Not resolved: the interpreter of a virtual environment is a link.
QCOW = Path(sys.executable).parent / "qcow"
_BUSY = 0.3
# Columns of the longest name of a row.
_NAME = 18
# A script on a command line can have thousands of words.
_SHOWN_WORDS = 32
_HINTS = ("make setup makes it", "Debian has it in qemu-utils; make setup-peers installs it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One run of the harness. folder: for images and outputs. pairs: measured runs of each side."""

    folder: Path
    library: Library
    pairs: int

    def measure(self, row: Row | RequestRow, later: set[str]) -> dict[str, Any]:
        """A row's result as JSON; what cannot be measured says why. later: images to keep."""
        result = _described(row)
        try:
            if isinstance(row, RequestRow):
                return {**result, **self._measure_requests(row)}
            with ExitStack() as stack:
                values = self._prepare(row, later, stack)
                pairs = self._take_turns(row, values)
        except (NoRoom, NoVolume) as reason:
            return {**result, "skipped": str(reason)}
        except (CommandFailed, OSError) as reason:
            return {**result, "failed": str(reason)}
        sizes = None
        if row.writes and "-c" in row.ours:
            sizes = round(pair_ratio(pairs.ours, pairs.peer, lambda run: run.output or 0), 4)
        return {**result, **_figures(pairs), "size_ratio": sizes}

    def _measure_requests(self, row: RequestRow) -> dict[str, Any]:
        pairs, api = time_requests(row, folder=self.folder, qcow=QCOW, pairs=self.pairs)
        return {**_figures(pairs), "api": [run.as_json() for run in api]}

    def _prepare(self, row: Row, later: set[str], stack: ExitStack) -> dict[str, object]:
        """What the words of the commands stand for. Images lie where the row wants them."""
        images = {name: self.library.get(name) for name in row.images}
        # What they were made from may go now.
        self.library.keep_only(set(row.images) | later)
        place = self.folder
        if row.writes:
            self.library.require_room(row.images[0], copies=2 if row.xfs else 1)
        if row.xfs:
            room = 3 * max(path.stat().st_size for path in images.values())
            place = stack.enter_context(mounted_xfs(self.folder, size=room))
            for name, path in images.items():
                images[name] = _moved_in(path, place, allocated=row.allocated)
        return {
            **images,
            "out": place / "out.img",
            "qcow": QCOW,
            "python": sys.executable,
        }

    def _take_turns(self, row: Row, values: Mapping[str, object]) -> Pairs:
        out = Path(str(values["out"])) if row.writes else None
        sides = (fill(row.peer, values), fill(row.ours, values))
        runs: tuple[list[Run], list[Run]] = ([], [])
        for turn in range(self.pairs + 1):
            for side, argv in enumerate(sides):
                try:
                    run = run_once(argv, output=out)
                    if turn:
                        runs[side].append(run)
                    elif side and row.verify:
                        run_quietly(*fill(row.verify, values))
                finally:
                    if out is not None:
                        out.unlink(missing_ok=True)
                if row.xfs and out is not None:
                    # What one side left to be written must not slow the other.
                    run_quietly("sync", "-f", out.parent)
        return Pairs(peer=tuple(runs[0]), ours=tuple(runs[1]))


def _moved_in(path: Path, place: Path, *, allocated: bool) -> Path:
    """A copy on another file system, durable so that nothing is written while others run."""
    copy = place / path.name
    run_quietly("cp", "--sparse=always", path, copy)
    with copy.open("r+b") as file:
        if allocated:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        os.fsync(file.fileno())
    return copy


def _described(row: Row | RequestRow) -> dict[str, Any]:
    """All keys of a result; None where nothing is known yet."""
    own: dict[str, Any] = {"size_limit": None, "memory_limit": None}
    if isinstance(row, RequestRow):
        own |= {"requests": row.count, "peer_label": row.peer_label, "api": []}
    else:
        own |= {"size_limit": row.size_limit, "memory_limit": row.memory_limit}
    return {
        "name": row.name,
        "title": row.title,
        "goal": row.goal,
        **own,
        "peer_command": _words(row.peer),
        "command": _words(row.ours),
        "skipped": None,
        "failed": None,
        "ratio": None,
        "cpu_ratio": None,
        "size_ratio": None,
        "peer": [],
        "ours": [],
    }


def _words(command: Sequence[str]) -> list[str]:
    """A command for people: the project's own tools and the images by their names."""
    shown = [word.replace("{", "").replace("}", "") for word in command[:_SHOWN_WORDS]]
    return shown if len(command) <= _SHOWN_WORDS else [*shown, "..."]


def _figures(pairs: Pairs) -> dict[str, Any]:
    return {
        "ratio": round(pairs.ratio, 3),
        "cpu_ratio": round(pairs.cpu_ratio, 3),
        "peer": [run.as_json() for run in pairs.peer],
        "ours": [run.as_json() for run in pairs.ours],
    }


def summary(result: Mapping[str, Any]) -> str:
    """One line for the terminal: wall clock and processor time of both, ratios, peak memory."""
    name = f"{result['name']:{_NAME}}"
    if result["skipped"] or result["failed"]:
        word = "skipped" if result["skipped"] else "FAILED"
        return f"{name} {word}: {result['skipped'] or result['failed']}"
    cells = []
    for side in ("peer", "ours"):
        wall = statistics.median(run["wall"] for run in result[side])
        cpu = statistics.median(run["user"] + run["system"] for run in result[side])
        memory = peak(result, side) // MB
        cells.append(f"{seconds(wall):>8} (cpu {seconds(cpu):>8}, {memory:4} MB)")
    tail = f"ratio {result['ratio']:6.2f}, cpu {result['cpu_ratio']:6.2f}"
    if result["goal"] is not None:
        tail += f", goal {result['goal']:g}"
    if result.get("api"):
        tail += f", library {seconds(statistics.median(run['wall'] for run in result['api']))}"
    if result["size_ratio"] is not None:
        tail += f", size {result['size_ratio']:.3f}"
    return f"{name} {cells[0]}  {cells[1]}  {tail}"


def run_rows(rows: Sequence[Row | RequestRow], session: Session) -> list[dict[str, Any]]:
    """Measure one row after the other; images go as soon as no row needs them."""
    results = []
    for row, later in zip(rows, needed_later(rows), strict=True):
        result = session.measure(row, later)
        say(summary(result))
        results.append(result)
        session.library.keep_only(later)
    return results


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="measured pairs of each row (5)")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only these rows; * is a wildcard, io-* are single requests",
    )
    parser.add_argument("--list", action="store_true", help="list the rows and end")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small images and 2 pairs, to try the harness; nothing is kept",
    )
    parser.add_argument(
        "--dir", type=Path, default=_default_folder(), help="where images are made (/dev/shm)"
    )
    parser.add_argument(
        "--report", type=Path, metavar="JSON", help="only write README's table from a kept result"
    )
    args = parser.parse_args(given)
    if args.runs < 1:
        parser.error(f"--runs is {args.runs}, expected at least 1")
    try:
        args.chosen = select((*ROWS, *REQUEST_ROWS), args.rows)
    except ValueError as error:
        parser.error(str(error))
    return args


def _default_folder() -> Path:
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def say(line: str) -> None:
    """A line for whoever waits."""
    print(line, flush=True)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen rows; the document that is kept."""
    pairs = min(args.runs, 2) if args.quick else args.runs
    machine = machine_shape(ROOT)
    if machine["load"] > _BUSY * machine["cpus"]:
        say(f"this machine is busy (load {machine['load']}): times will not be worth much")
    when = time.strftime("%Y-%m-%d-%H%M")
    folder = Path(tempfile.mkdtemp(prefix="qcow-bench-", dir=args.dir))
    try:
        library = Library(folder=folder, scale=QUICK if args.quick else FULL, say=say)
        session = Session(folder=folder, library=library, pairs=pairs)
        place = file_system(folder)
        rows = run_rows(args.chosen, session)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "when": when,
        "pairs": pairs,
        "place": place,
        "whole": not (args.quick or args.rows),
        "machine": machine,
        "rows": rows,
    }


def keep(document: Mapping[str, Any]) -> Path:
    """Write the document below bench/results."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{document['when']}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def write_readme(document: Mapping[str, Any]) -> None:
    """Replace README's table. Raises ValueError when the markers are missing."""
    text = splice(README.read_text(encoding="utf-8"), render(document))
    README.write_text(text, encoding="utf-8")


def main(given: Sequence[str] | None = None) -> int:
    """0 when all that ran was correct, whether it was fast or not; 1 otherwise."""
    args = arguments(given)
    if args.list:
        for row in args.chosen:
            say(f"{row.name:{_NAME}} {row.title}")
        return 0
    if args.report:
        write_readme(json.loads(args.report.read_text(encoding="utf-8")))
        return 0
    for tool in ("qemu-img", str(QCOW)):
        if shutil.which(tool) is None:
            say(f"{tool} is missing: {_HINTS[tool == 'qemu-img']}")
            return 1
    signal.signal(signal.SIGTERM, _unwind)
    signal.signal(signal.SIGHUP, _unwind)
    document = benchmark(args)
    if not args.quick:
        say(f"kept: {keep(document).relative_to(ROOT)}")
    if document["whole"]:
        write_readme(document)
    # The goals are about images of full size.
    for line in missed(document["rows"]) if not args.quick else ():
        say(f"not reached: {line}")
    return 1 if any(row["failed"] for row in document["rows"]) else 0


def _unwind(number: int, _frame: object) -> None:
    """A request to end takes the way of an exception, so that nothing stays mounted or behind."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
