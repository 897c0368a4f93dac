"""A whole qcow2 image with a few changed fields: opened, read, mapped, checked and inspected."""

from __future__ import annotations

from fuzz.images import change, exercise, qcow2_bases


def target(data: bytes) -> None:
    """data: which base (1 byte), then changes as `fuzz.images.change` reads them."""
    bases = qcow2_bases()
    base = bases[data[0] % len(bases)] if data else bases[0]
    exercise(change(base, data[1:]), "qcow2")


def seeds() -> list[bytes]:
    """Each base as it is, and with one change."""
    wild = bytes([0x68, 0, 0, 0, 24]) + bytes(8)
    return [bytes([index]) + extra for index in range(len(qcow2_bases())) for extra in (b"", wild)]
