"""Byte units, power-of-two alignment, and sizes as people write them. Floor 0, pure."""

from __future__ import annotations

import re

from qcowkit.errors import RequestError

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40
PiB = 1 << 50
EiB = 1 << 60
SECTOR = 512
INT64_MAX = (1 << 63) - 1

_SUFFIXES = {"": 1, "B": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB, "P": PiB, "E": EiB}
_SIZE = re.compile(r"(\d+)(\.\d+)?\s*([bkKmMgGtTpPeE]?)(?:i?B)?\Z")
_HEX = re.compile(r"0[xX][0-9a-fA-F]+\Z")


def ceil_div(value: int, unit: int) -> int:
    """value / unit, rounded towards plus infinity."""
    return -(-value // unit)


def align_up(value: int, unit: int) -> int:
    """The smallest multiple of the power of two `unit` that is >= value. Exact at any size."""
    return (value + unit - 1) & -unit


def align_down(value: int, unit: int) -> int:
    """The largest multiple of the power of two `unit` that is <= value."""
    return value & -unit


def is_power_of_two(value: int) -> bool:
    """True for 1, 2, 4 ..."""
    return value > 0 and value & (value - 1) == 0


def parse_size(text: str, *, what: str = "size") -> int:
    """Bytes of a size such as `512`, `10M`, `1.5G`, `0x200`; suffixes are powers of 1024.

    Raises RequestError that names `what` for anything else, and above 2**63 - 1."""
    text = text.strip()
    if _HEX.match(text):
        value = int(text, 16)
    else:
        found = _SIZE.match(text)
        if not found:
            raise RequestError(
                f"{what} {text!r} is not a number of bytes with an optional suffix "
                "b, k, M, G, T, P or E"
            )
        whole, fraction, suffix = found.groups()
        unit = _SUFFIXES[suffix.upper()]
        value = int(whole) * unit
        if fraction:
            # Integers only: a float would lose bytes above 2**53.
            value += int(fraction[1:]) * unit // 10 ** (len(fraction) - 1)
    if value > INT64_MAX:
        raise RequestError(f"{what} {text!r} is above the largest size, {INT64_MAX} bytes")
    return value


def format_size(size: int) -> str:
    """Bytes as people read them, with three significant digits: `512 B`, `64 KiB`, `2.19 MiB`."""
    value, index = float(size), 0
    names = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    # 1000, not 1024: three digits must be enough for what is printed.
    while value >= 1000 and index < len(names) - 1:
        value /= 1024
        index += 1
    return f"{value:.3g} {names[index]}"
