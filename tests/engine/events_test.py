"""The names of barriers and steps: the code uses those that are listed, and lists those it uses."""

from __future__ import annotations

import re
from pathlib import Path

import qcowkit
from qcowkit.engine.events import (
    QCOW2_BARRIERS,
    QCOW2_BITMAP_BARRIERS,
    QCOW2_FIRST_CLUSTER_BARRIERS,
    QCOW2_RECOVERY_BARRIERS,
    QCOW2_REFORM_BARRIERS,
    QCOW2_STEPS,
)

ENGINE = Path(qcowkit.__file__).parent / "engine" / "qcow2"


def used(method: str) -> set[str]:
    """String arguments of a method of Barriers in the modules of the write engine."""
    pattern = re.compile(rf"barriers\.{method}\(\s*\"([^\"]+)\"")
    found: set[str] = set()
    for path in ENGINE.glob("*.py"):
        if not path.name.startswith("repair"):
            found |= set(pattern.findall(path.read_text(encoding="utf-8")))
    return found


def test_every_barrier_of_the_engine_is_listed_and_every_listed_one_is_there() -> None:
    listed = {
        *QCOW2_BARRIERS,
        *QCOW2_BITMAP_BARRIERS,
        *QCOW2_FIRST_CLUSTER_BARRIERS,
        *QCOW2_RECOVERY_BARRIERS,
        *QCOW2_REFORM_BARRIERS,
    }
    assert used("wait") == listed


def test_every_step_of_the_engine_is_listed_and_every_listed_one_is_there() -> None:
    assert used("observe") == set(QCOW2_STEPS)
