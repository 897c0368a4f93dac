"""The command line, run within the test's own process: fast, and debuggable."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

from qcowkit.cli.main import main


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How a command ended. out: standard output, bytes; err: standard error, text."""

    code: int
    out: bytes
    err: str

    def json(self) -> Any:
        """Standard output as one JSON document."""
        return json.loads(self.out)


def qcow(*arguments: object, code: int | None = 0) -> Done:
    """Run `qcow` with these arguments; it must end with `code`, if one is given.

    Whatever it says of a failure must be lines of ours, never a traceback."""
    out, err = io.BytesIO(), io.StringIO()
    text = io.TextIOWrapper(out, encoding="utf-8", errors="surrogateescape", write_through=True)
    with redirect_stdout(text), redirect_stderr(err):
        found = main([str(argument) for argument in arguments])
    done = Done(code=found, out=out.getvalue(), err=err.getvalue())
    words = " ".join(map(str, arguments))
    assert code is None or found == code, f"qcow {words}: {found}: {done.err}"
    assert "internal error" not in done.err, f"qcow {words}: {done.err}"
    return done
