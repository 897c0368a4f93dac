"""Do qcow and qemu-img say the same of an image? `python -m bench.verify map|check QCOW IMAGE`.

A process of its own, so that what it holds does not count as anyone's peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

# What both versions of the map's schema have; the rest came with qemu 8.2.
_MAP_KEYS = ("start", "length", "depth", "present", "zero", "data", "offset")
_CHECK_KEYS = (
    "corruptions",
    "leaks",
    "check-errors",
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
)


def iter_map_rows(tool: str, image: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a map; both tools print an object a line, so that none is held whole."""
    argv = (tool, "map", "-f", "qcow2", "--output=json", image)
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None, "the output is a pipe"
        for line in process.stdout:
            text = line.strip(b"[], \n")
            if text:
                row = json.loads(text)
                yield tuple(row.get(key) for key in _MAP_KEYS)
    if process.returncode:
        sys.exit(f"{' '.join(argv)}: exit code {process.returncode}")


def iter_check_answers(tool: str, image: str) -> Iterator[tuple[Any, ...]]:
    """The one answer of a check: exit code and numbers; what is missing counts as none."""
    argv = (tool, "check", "-f", "qcow2", "--output=json", image)
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=False)
    answer = json.loads(done.stdout)
    yield (done.returncode, *(answer.get(key) or 0 for key in _CHECK_KEYS))


def main(arguments: list[str]) -> int:
    """0 where both say the same, 1 and a line on standard error where they differ."""
    verb, qcow, image = arguments
    answers = iter_map_rows if verb == "map" else iter_check_answers
    pairs = zip_longest(answers(qcow, image), answers("qemu-img", image))
    for count, (ours, peer) in enumerate(pairs):
        if ours != peer:
            sys.stderr.write(f"{verb}, answer {count}: qcow says {ours}, qemu-img says {peer}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
