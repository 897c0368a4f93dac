"""Writing to the standard streams. Numpy-free, and as light as `qcow --help`."""

from __future__ import annotations

import sys
from collections.abc import Iterable

# Names come from images and file systems: they must not steer a terminal.
_ESCAPES = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"
}


def printable(text: str) -> str:
    """The text with control characters, apart from tab and newline, spelled out."""
    return text.translate(_ESCAPES)


def write_text(text: str) -> None:
    """Text on standard output, as it is."""
    sys.stdout.write(text)


def write_lines(lines: Iterable[str]) -> None:
    """Each line on standard output, made printable."""
    for line in lines:
        sys.stdout.write(printable(line) + "\n")


def write_bytes(chunks: Iterable[bytes]) -> None:
    """Bytes on standard output, behind the text that was written before."""
    sys.stdout.flush()
    for chunk in chunks:
        sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()


def write_error(line: str) -> None:
    """One line on standard error."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
