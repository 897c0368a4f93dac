"""Guest ranges that are asked for."""

from __future__ import annotations

from qcowkit.errors import RequestError


def check_range(*, start: int, length: int, size: int) -> None:
    """Raise RequestError when [start, start + length) leaves the disk."""
    if start < 0 or length < 0 or start + length > size:
        raise RequestError(f"range {start:#x} + {length:#x} is outside the disk of {size:#x} bytes")
