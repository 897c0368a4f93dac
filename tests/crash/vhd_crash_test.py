"""VHDs after a power cut at any moment, and with each of their barriers left out."""

from __future__ import annotations

import pytest

from qcowkit.engine.events import VHD_BARRIERS
from qcowkit.testing.crash_workload import USUAL, Plan
from qcowkit.testing.mutation import without_barrier
from tests.crash.vhd_kinds import KINDS, VhdKind, crash

RESIZING = {**USUAL, "resize": 24}
SPARING = {**USUAL, "flush": 4}
PLANS = (
    Plan(operations=40),
    Plan(operations=40, weights=RESIZING),
    Plan(operations=40, weights=SPARING),
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("seed", range(3))
def test_a_crash_loses_nothing_that_was_flushed(kind: VhdKind, seed: int) -> None:
    assert crash(kind, seed=seed, budget=150, plan=PLANS[seed], again=50) == []


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("seed", range(100, 160))
def test_many_crashes_lose_nothing_that_was_flushed(kind: VhdKind, seed: int) -> None:
    assert crash(kind, seed=seed, budget=600, plan=PLANS[seed % 3], again=40) == []


# Which kind of disk misses a barrier soonest.
MISSED_BY = {
    "one footer before the other": "dynamic without a footer",
    "footer before blocks": "dynamic, whole appends",
    "blocks before what leads to them": "dynamic",
    "bitmaps and table before more changes": "differencing",
    "leading footer before the trailing one": "dynamic",
    "footer before the file is cut": "dynamic, whole appends",
    "table before its header": "name behind the table",
    "added space before the size": "dynamic, whole appends",
    "footer before what relies on it": "fixed",
    "flush": "fixed",
}


@pytest.mark.parametrize("name", VHD_BARRIERS)
def test_without_any_one_barrier_something_is_lost(name: str) -> None:
    """A crash test that does not notice proves nothing."""
    (kind,) = (kind for kind in KINDS if kind.name == MISSED_BY[name])
    plan = Plan(operations=40, weights=RESIZING, look=40)
    for seed in range(12):
        with without_barrier(name) as skipped:
            wrong = crash(kind, seed=seed, budget=400, plan=plan)
        if wrong:
            assert skipped
            return
    pytest.fail(f"nobody noticed that the barrier {name!r} was left out")
