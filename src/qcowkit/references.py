"""The names that an image mentions. A name opens nothing, the gate does. Floor 0, pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ReferenceKind(Enum):
    """What the name stands for, in the words of messages."""

    BACKING = "backing file"
    DATA = "data file"
    PARENT = "parent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A file that an image names. `names`: candidates in order of preference, relative to the
    image's own directory or absolute; qcow2 has one, VHD one a locator. `format`: as declared."""

    kind: ReferenceKind
    names: tuple[str, ...]
    format: str | None = None
