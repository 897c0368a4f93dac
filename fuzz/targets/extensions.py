"""The header extensions: every type, unknown ones, and the end of the area."""

from __future__ import annotations

from fuzz.images import qcow2_bases
from qcowkit.codecs.qcow2.extensions import decode_extensions


def target(data: bytes) -> None:
    """data: the place of the first extension (1 byte, of 8), then the first cluster."""
    start = data[0] // 8 * 8 if data else 0
    raw = data[1:]
    decode_extensions(raw, start=start, stop=len(raw))
    decode_extensions(raw, start=start, stop=4096)


def seeds() -> list[bytes]:
    """Behind the headers of sound images."""
    return [bytes([112]) + base[:600] for base in qcow2_bases()]
