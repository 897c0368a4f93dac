"""Whatever a guest does to a qcow2 disk, it reads as an array of bytes would, and the image is
sound. Reliability reference, section 5."""

from __future__ import annotations

import pytest

from tests.model.kinds import KINDS
from tests.model.machine import run_machine

EXAMPLES, STEPS = 8, 40
LONG_EXAMPLES, LONG_STEPS = 300, 100


@pytest.mark.parametrize("name", KINDS)
def test_a_disk_is_what_an_array_of_bytes_would_be(name: str) -> None:
    run_machine(KINDS[name], examples=EXAMPLES, steps=STEPS)


@pytest.mark.soak
@pytest.mark.parametrize("name", KINDS)
def test_a_disk_goes_on_being_an_array_of_bytes(name: str) -> None:
    run_machine(KINDS[name], examples=LONG_EXAMPLES, steps=LONG_STEPS)


def test_all_kinds_together_take_as_many_steps_as_were_promised() -> None:
    assert len(KINDS) * EXAMPLES * STEPS >= 10_000
    assert len(KINDS) * LONG_EXAMPLES * LONG_STEPS >= 1_000_000
