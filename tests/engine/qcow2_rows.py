"""What the tables of broken qcow2 files are written with."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qcowkit.codecs.qcow2.extensions import Extension
from qcowkit.errors import CorruptMetadata, QcowkitError
from qcowkit.testing.qcow2_builder import (
    BitmapSpec,
    BuiltImage,
    SnapshotSpec,
    build_qcow2,
    make_luks_area,
)
from qcowkit.units import KiB

CLUSTER = 4 * KiB
SNAPSHOTS = (SnapshotSpec(id="1", name="one"), SnapshotSpec(id="2", name="two"))
BITMAPS = (BitmapSpec(name="b"),)
SMALL_LUKS = make_luks_area(key_bytes=16)


def extension(kind: int, data: bytes) -> Extension:
    return Extension(type=kind, data=data)


def feature_name(kind: int, bit: int, name: bytes) -> bytes:
    return struct.pack(">BB46s", kind, bit, name)


Spoil = Callable[[BuiltImage], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One file that must be refused. `spec`: for the builder; `spoil`: what is done to its file."""

    number: int
    says: str
    spoil: Spoil | None
    error: type[QcowkitError]
    spec: dict[str, Any]


def row(
    number: int,
    says: str,
    spoil: Spoil | None = None,
    error: type[QcowkitError] = CorruptMetadata,
    **spec: Any,
) -> Row:
    return Row(number=number, says=says, spoil=spoil, error=error, spec=spec)


def fields(**values: int) -> Spoil:
    """Header fields set to these values."""

    def spoil(image: BuiltImage) -> None:
        for name, value in values.items():
            image.set_field(name, value)

    return spoil


def patch(place: str, offset: int, value: int, width: int = 8) -> Spoil:
    """An integer at `offset` within the structure called `place`."""
    return lambda image: image.patch(image.places[place] + offset, value, width=width)


def onto(name: str, place: str) -> Spoil:
    """A header field that points at another structure."""
    return lambda image: image.set_field(name, image.places[place])


def extension_field(offset: int, value: int, width: int = 8) -> Spoil:
    """An integer at `offset` within the data of the first extension."""
    return lambda image: image.patch(image.header.header_length + 8 + offset, value, width=width)


def cut(size: int) -> Spoil:
    return lambda image: image.cut(size)


def backing_byte(value: int) -> Spoil:
    return lambda image: image.patch(image.header.backing_file_offset + 1, value, width=1)


def spoiled(case: Row) -> BuiltImage:
    image = build_qcow2(**case.spec)
    if case.spoil is not None:
        case.spoil(image)
    return image
