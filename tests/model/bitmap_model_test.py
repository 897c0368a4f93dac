"""Whatever a guest does to a disk, and whatever is done to its bitmaps in between, each bitmap is a
set of granules: exactly those that were touched while it recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.extents.bits import GranuleBits
from qcowkit.image.chain import Chain
from qcowkit.image.lineage import Layer
from qcowkit.image.registry import build_chain
from qcowkit.operations.bitmap import (
    Action,
    BitmapAction,
    edit_bitmap,
    list_bitmaps,
)
from qcowkit.operations.check import Verdict, check_image, open_for_check
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import build_qcow2
from qcowkit.units import KiB

CAPACITY = 1024 * KiB
KINDS: dict[str, dict[str, Any]] = {
    "clusters of 512 bytes": {"cluster_bits": 9},
    "clusters of 4 KiB, narrow refcounts": {"cluster_bits": 12, "refcount_order": 0},
    "clusters of 64 KiB": {"cluster_bits": 16},
    "subclusters": {"cluster_bits": 14, "extended_l2": True},
    "lazy refcounts": {"cluster_bits": 9, "lazy_refcounts": True, "refcount_order": 6},
}
_names = st.sampled_from(["one", "two", "three"])
_shifts = st.sampled_from([9, 12, 13, 17])
_places = st.tuples(st.integers(0, 0xFFFF), st.integers(1, 20000))


@dataclass(kw_only=True)
class Model:
    """One bitmap: the dirty granules of 2 ** shift bytes, and whether it records."""

    shift: int
    enabled: bool = True
    dirty: set[int] = field(default_factory=set)

    def mark(self, start: int, stop: int) -> None:
        if start < stop:
            self.dirty |= set(range(start >> self.shift, ((stop - 1) >> self.shift) + 1))


class BitmapMachine(RuleBasedStateMachine):
    """A disk of `options`, which a subclass names, with bitmaps by name."""

    options: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.size = 256 * KiB
        self.storage = MemoryStorage(build_qcow2(size=self.size, **self.options).to_bytes())
        self.models: dict[str, Model] = {}
        self.disk: Chain | None = None

    def _open(self) -> Chain:
        if self.disk is None:
            metadata = load_qcow2_metadata(self.storage)
            layer = Layer(storage=self.storage, metadata=metadata)
            self.disk = build_chain([layer], writable=True)
        return self.disk

    def _close(self) -> None:
        if self.disk is not None:
            # Memory that was closed would be gone.
            self.disk.images[0].disk.close()  # type: ignore[attr-defined]
            self.disk = None

    def _range(self, place: tuple[int, int]) -> dict[str, int]:
        offset = place[0] * self.size >> 16
        length = min(place[1], self.size - offset)
        for model in self.models.values():
            if model.enabled:
                model.mark(offset, offset + length)
        return {"offset": offset, "length": length}

    # The guest

    @rule(place=_places)
    def write(self, place: tuple[int, int]) -> None:
        where = self._range(place)
        self._open().write(b"w" * where["length"], offset=where["offset"])

    @rule(place=_places, unmap=st.booleans())
    def write_zeroes(self, place: tuple[int, int], unmap: bool) -> None:
        self._open().write_zeroes(**self._range(place), unmap=unmap)

    @rule(place=_places)
    def discard(self, place: tuple[int, int]) -> None:
        self._open().discard(**self._range(place))

    @rule(share=st.integers(1, 0xFFFF))
    def resize(self, share: int) -> None:
        before, self.size = self.size, max(512, (share * CAPACITY >> 16) // 512 * 512)
        self._open().resize(self.size, shrink=True)
        for model in self.models.values():
            end = -(-self.size // (1 << model.shift))
            model.dirty = {one for one in model.dirty if one < end}
            if model.enabled:
                model.mark(before, self.size)

    @rule()
    def flush(self) -> None:
        self._open().flush()

    @rule(name=_names)
    def look(self, name: str) -> None:
        """What is told of an open disk is what will be stored."""
        if name in self.models:
            table = self._open().bitmap_extents(name)
            dirty = [(row.start, row.start + row.length) for row in table if row.flags]
            assert dirty == self._ranges(name)

    # The bitmaps, while nobody has the disk open

    def _edit(self, name: str, action: Action, source: str = "", shift: int = 9) -> None:
        self._close()
        layer = Layer(storage=self.storage, metadata=load_qcow2_metadata(self.storage))
        step = BitmapAction(action=action, source=source)
        size = 1 << shift if action is Action.ADD else None
        edit_bitmap(layer, name, [step], granularity=size)

    @rule(name=_names, shift=_shifts)
    def add(self, name: str, shift: int) -> None:
        if name not in self.models:
            self._edit(name, Action.ADD, shift=shift)
            self.models[name] = Model(shift=shift)

    @precondition(lambda self: self.models)
    @rule(name=_names, enabled=st.booleans())
    def enable(self, name: str, enabled: bool) -> None:
        if name in self.models:
            self._edit(name, Action.ENABLE if enabled else Action.DISABLE)
            self.models[name].enabled = enabled

    @precondition(lambda self: self.models)
    @rule(name=_names, remove=st.booleans())
    def clear_or_remove(self, name: str, remove: bool) -> None:
        if name in self.models:
            self._edit(name, Action.REMOVE if remove else Action.CLEAR)
            self.models[name].dirty.clear()
            if remove:
                del self.models[name]

    @precondition(lambda self: self.models)
    @rule(name=_names, source=_names)
    def merge(self, name: str, source: str) -> None:
        if name in self.models and source in self.models:
            self._edit(name, Action.MERGE, source)
            for start, stop in self._ranges(source):
                self.models[name].mark(start, stop)

    @rule()
    def close(self) -> None:
        self._close()
        result = check_image(open_for_check(self.storage, format="qcow2"))
        assert result.verdict is Verdict.CLEAN, "\n".join(result.render())
        layer = Layer(storage=self.storage, metadata=load_qcow2_metadata(self.storage))
        listed = {one.entry.name: one for one in list_bitmaps(layer).bitmaps}
        assert set(listed) == set(self.models)
        for name, model in self.models.items():
            assert listed[name].entry.auto is model.enabled
            bits = listed[name].bits
            assert isinstance(bits, GranuleBits)
            assert list(bits.ranges()) == self._ranges(name)

    def _ranges(self, name: str) -> list[tuple[int, int]]:
        model = self.models[name]
        bits = GranuleBits(size=self.size, granularity_bits=model.shift)
        for granule in model.dirty:
            bits.mark(start=granule << model.shift, length=1)
        return list(bits.ranges())

    def teardown(self) -> None:
        self.close()


def run(options: dict[str, Any], *, examples: int, steps: int) -> None:
    machine: Any = type("Machine", (BitmapMachine,), {"options": options})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.pinned("its kinds of images are its own")
@pytest.mark.parametrize("name", KINDS)
def test_a_bitmap_is_a_set_of_granules(name: str) -> None:
    run(KINDS[name], examples=25, steps=30)


@pytest.mark.soak
@pytest.mark.parametrize("name", KINDS)
def test_a_bitmap_goes_on_being_a_set_of_granules(name: str) -> None:
    run(KINDS[name], examples=1000, steps=80)
