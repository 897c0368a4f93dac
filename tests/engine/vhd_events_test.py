"""The names of barriers: the code of VHDs uses those that are listed, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import qcowkit
from qcowkit.engine.events import VHD_BARRIERS

ENGINE = Path(qcowkit.__file__).parent / "engine" / "vhd"


def test_every_barrier_is_listed_and_every_listed_one_is_there() -> None:
    used: set[str] = set()
    for path in ENGINE.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        used |= set(re.findall(r"barriers\.wait\(\s*\"([^\"]+)\"", text))
    assert used == set(VHD_BARRIERS)
