"""A guest as a state machine: hypothesis chooses what it does, and finds the shortest failure."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from tests.model.driver import Driver, place_range
from tests.model.kinds import ModelKind

_shares = st.integers(0, 0xFFFF)
_ranges = st.fixed_dictionaries(
    {
        "place": _shares,
        "extent": _shares,
        "scale": st.sampled_from([0, 0, 1, 2]),
        "unit": st.integers(0, 3),
    }
)
_preallocation = st.sampled_from(["off", "off", "off", "metadata", "falloc", "full"])


class DiskMachine(RuleBasedStateMachine):
    """A new disk of `kind`, which a subclass names."""

    kind: ModelKind

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(self.kind)

    def _place(self, where: dict[str, int]) -> dict[str, int]:
        offset, length = place_range(self.driver, **where)
        return {"offset": offset, "length": length}

    @rule(where=_ranges, seed=_shares)
    def write(self, where: dict[str, int], seed: int) -> None:
        self.driver.write(**self._place(where), seed=seed)

    @rule(where=_ranges, seed=_shares)
    def write_again(self, where: dict[str, int], seed: int) -> None:
        """Writes are what guests do most."""
        self.driver.write(**self._place(where), seed=seed)

    @rule(where=_ranges, seed=_shares, discard=st.booleans())
    def write_compressed(self, where: dict[str, int], seed: int, discard: bool) -> None:
        self.driver.write_compressed(**self._place(where), seed=seed, discard=discard)

    @rule(where=_ranges, unmap=st.booleans(), fallback=st.booleans())
    def write_zeroes(self, where: dict[str, int], unmap: bool, fallback: bool) -> None:
        self.driver.write_zeroes(**self._place(where), unmap=unmap, fallback=fallback)

    @rule(where=_ranges)
    def discard(self, where: dict[str, int]) -> None:
        self.driver.discard(**self._place(where))

    @rule(where=_ranges)
    def read(self, where: dict[str, int]) -> None:
        self.driver.read(**self._place(where))

    @rule(share=_shares, whole=st.booleans(), preallocation=_preallocation)
    def resize(self, share: int, whole: bool, preallocation: str) -> None:
        size = share * self.kind.capacity >> 16
        size -= size % self.kind.cluster_size if whole else 0
        self.driver.resize(size, preallocation=preallocation)

    @rule()
    def flush(self) -> None:
        self.driver.flush()

    @rule()
    def clean(self) -> None:
        self.driver.clean()

    @rule()
    def reopen(self) -> None:
        self.driver.reopen()

    def teardown(self) -> None:
        if self.driver.sound:
            self.driver.close()


def run_machine(kind: ModelKind, *, examples: int, steps: int) -> None:
    """Let `examples` guests make `steps` requests each."""
    machine: Any = type("Machine", (DiskMachine,), {"kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=list(HealthCheck),
        ),
    )
