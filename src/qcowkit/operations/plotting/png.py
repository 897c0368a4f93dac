"""A scene as PNG: an indexed image, written with zlib alone. Pure."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

from qcowkit.operations.plotting.cells import LEVELS, State
from qcowkit.operations.plotting.font import BASE_LINE, text_dots
from qcowkit.operations.plotting.scene import Ink, Label, Scene, Theme

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SCALE = 2  # pixels a unit
_DOT = {Ink.TITLE: 3, Ink.TEXT: 2, Ink.MUTED: 2}  # pixels a dot of the font
_BACKGROUND, _INK, _MUTED, _FIRST_FILL = range(4)

Pixels = npt.NDArray[np.uint8]


def render_png(scene: Scene, theme: Theme) -> bytes:
    """A PNG file, two pixels a unit, at most 256 colours."""
    shape = (scene.height * _SCALE, scene.width * _SCALE)
    pixels: Pixels = np.full(shape, _BACKGROUND, dtype=np.uint8)
    for box in scene.boxes:
        x, y = box.x * _SCALE, box.y * _SCALE
        color = _FIRST_FILL + box.state * LEVELS + box.level
        pixels[y : y + box.height * _SCALE, x : x + box.width * _SCALE] = color
    for label in scene.labels:
        _write(pixels, label)
    return encode_png(pixels, _palette(theme))


def _palette(theme: Theme) -> bytes:
    colors = [theme.background, theme.ink, theme.muted]
    colors += [theme.fill(state, level) for state in State for level in range(LEVELS)]
    return bytes(part for color in colors for part in color)


def _write(pixels: Pixels, label: Label) -> None:
    """Draw a label; what lies beyond the right edge is cut off."""
    dot = _DOT[label.ink]
    x = label.x * _SCALE
    dots = text_dots(label.text).repeat(dot, axis=0).repeat(dot, axis=1)
    height, width = dots.shape
    left = max(0, x - width + dot) if label.to_left else x
    top = label.y * _SCALE - BASE_LINE * dot
    area = pixels[top : top + height, left : left + width]
    area[dots[: area.shape[0], : area.shape[1]]] = _MUTED if label.ink is Ink.MUTED else _INK


def encode_png(pixels: Pixels, palette: bytes) -> bytes:
    """PNG of colour indices, shape (height, width); palette: red, green, blue of each colour.

    Source: PNG specification (ISO/IEC 15948), colour type 3, no filter, no interlace."""
    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    # Each line begins with its filter type, 0.
    lines = np.concatenate((np.zeros((height, 1), dtype=np.uint8), pixels), axis=1)
    return b"".join(
        (
            _SIGNATURE,
            _chunk(b"IHDR", header),
            _chunk(b"PLTE", palette),
            _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
