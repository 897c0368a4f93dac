"""A scene as SVG, in light or dark as the reader's system prefers. Pure."""

from __future__ import annotations

import re
from xml.sax.saxutils import escape

from qcowkit.operations.plotting.cells import LEVELS, State
from qcowkit.operations.plotting.scene import DARK, LIGHT, Box, Color, Label, Scene, Theme

# Characters that XML 1.0 cannot carry, even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_FONTS = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"


def render_svg(scene: Scene) -> str:
    """A document of its own, without scripts, fonts or references."""
    boxes: dict[str, list[str]] = {}
    for box in scene.boxes:
        boxes.setdefault(_class(box.state, box.level), []).append(_outline(box))
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {scene.width} {scene.height}"'
            f' width="{scene.width}" height="{scene.height}" role="img">',
            f"<title>{_text(scene.title)}</title>",
            f"<desc>{_text(scene.summary)}</desc>",
            f"<style>text{{font:12px {_FONTS}}}.title{{font-size:16px;font-weight:600}}",
            _rules(LIGHT),
            f"@media (prefers-color-scheme:dark){{{_rules(DARK)}}}</style>",
            f'<rect class="back" width="{scene.width}" height="{scene.height}"/>',
            *(f'<path class="{name}" d="{"".join(path)}"/>' for name, path in boxes.items()),
            *map(_label, scene.labels),
            "</svg>\n",
        )
    )


def _rules(theme: Theme) -> str:
    rules = [
        f".back{{fill:{_hex(theme.background)}}}",
        f".title,.text{{fill:{_hex(theme.ink)}}}",
        f".muted{{fill:{_hex(theme.muted)}}}",
    ]
    for state in State:
        for level in range(LEVELS):
            rules.append(f".{_class(state, level)}{{fill:{_hex(theme.fill(state, level))}}}")
    return "".join(rules)


def _class(state: int, level: int) -> str:
    return f"{State(state).name.lower()}{level}"


def _hex(color: Color) -> str:
    return f"#{bytes(color).hex()}"


def _outline(box: Box) -> str:
    return f"M{box.x} {box.y}h{box.width}v{box.height}h{-box.width}z"


def _label(label: Label) -> str:
    anchor = ' text-anchor="end"' if label.to_left else ""
    return (
        f'<text class="{label.ink.value}" x="{label.x}" y="{label.y}"{anchor}>'
        f"{_text(label.text)}</text>"
    )


def _text(text: str) -> str:
    return escape(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text))
