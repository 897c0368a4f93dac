"""Rows about single requests: make their images, let the sides take turns, prove what is there."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from bench.images import MiB
from bench.library import NoRoom, free_bytes
from bench.measure import Pairs, Run, run_once, run_quietly
from bench.requests import BASE_BYTE, CLOCKS, Blank, RequestRow, io, probes
from bench.rows import Command, fill


@dataclass(slots=True, kw_only=True)
class Timing:
    """The runs of one row. folder: for its images. qcow: the command of this checkout."""

    row: RequestRow
    folder: Path
    qcow: Path
    _made: set[Path] = field(default_factory=set)

    def run(self, pairs: int) -> tuple[Pairs, tuple[Run, ...]]:
        """Measured runs of peer and ours, and of the library, which take turns; the first turn
        warms up and is verified. Raises CommandFailed and OSError."""
        row = self.row
        peer = "image" if row.peer_image is None else "peer"
        sides = [(row.peer, row.peer_image or row.image, peer), (row.ours, row.image, "image")]
        if row.api:
            sides.append((row.api, row.image, "image"))
        script = self._script()
        runs: tuple[list[Run], ...] = ([], [], [])
        for turn in range(min(pairs, row.pairs or pairs) + 1):
            for side, (command, blank, name) in enumerate(sides):
                image = self._image(blank, self.folder / f"{name}.qcow2")
                run = run_once(self._fill(command, image), clock=CLOCKS[row.clock], script=script)
                if turn:
                    runs[side].append(run)
                elif side == 1:
                    self._verify(image)
        return Pairs(peer=tuple(runs[0]), ours=tuple(runs[1])), tuple(runs[2])

    def _image(self, blank: Blank, path: Path) -> Path:
        """The image, made anew where the row wants that or it is not there yet."""
        if path not in self._made or self.row.fresh:
            path.unlink(missing_ok=True)
            for command in blank.commands():
                run_quietly(*self._fill(command, path, base=self._base(blank)))
            if blank.crash:
                run_quietly(*self._fill(blank.killed(), path), expected=-signal.SIGABRT)
            self._made.add(path)
        return path

    def _base(self, blank: Blank) -> Path:
        """The backing file, as large as the disk and full of one byte."""
        path = self.folder / f"base.{blank.base}"
        if blank.base and path not in self._made:
            raw = self.folder / "base.raw"
            with raw.open("wb") as file:
                for _ in range(blank.size // MiB):
                    file.write(bytes([BASE_BYTE]) * MiB)
            if blank.base != "raw":
                run_quietly("qemu-img", "convert", "-f", "raw", "-O", blank.base, raw, path)
                raw.unlink()
            self._made.add(path)
        return path

    def _script(self) -> Path | None:
        """The lines for standard input, in a file; None where there are none."""
        if not self.row.script:
            return None
        path = self.folder / "script"
        path.write_text("".join(f"{line}\n" for line in self.row.script), encoding="ascii")
        return path

    def _fill(self, command: Command, image: Path, *, base: Path | None = None) -> list[str]:
        values = {"image": image, "base": base, "qcow": self.qcow, "python": sys.executable}
        return fill(command, values)

    def _verify(self, image: Path) -> None:
        """The image is clean, and what was written is there. Raises CommandFailed."""
        run_quietly("qemu-img", "check", "-q", "-f", "qcow2", image)
        commands = probes(self.row)
        if commands:
            run_quietly(*self._fill(io("qemu-io", commands, "{image}"), image))


def time_requests(
    row: RequestRow, *, folder: Path, qcow: Path, pairs: int
) -> tuple[Pairs, tuple[Run, ...]]:
    """See `Timing.run`; in a folder of its own below `folder`. Raises NoRoom as well."""
    found = free_bytes(folder)
    if found < row.room:
        raise NoRoom(f"{row.room >> 20} MiB wanted in {folder}, found {found >> 20} MiB")
    own = Path(tempfile.mkdtemp(prefix="requests-", dir=folder))
    try:
        return Timing(row=row, folder=own, qcow=qcow).run(pairs)
    finally:
        shutil.rmtree(own, ignore_errors=True)
