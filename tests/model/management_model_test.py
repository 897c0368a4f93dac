"""An image through its life: written, kept in snapshots, gone back to, amended, compacted, resized,
in any order, beside arrays of bytes. Whatever is refused leaves the file as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from qcowkit.budget import TRUSTED
from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.amend_plan import Amendment
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.errors import RequestError
from qcowkit.image.chain import Chain
from qcowkit.image.lineage import Layer
from qcowkit.image.registry import build_chain
from qcowkit.operations.amend import AmendOptions, amend_image
from qcowkit.operations.check import Verdict, check_image
from qcowkit.operations.compact import compact_image
from qcowkit.operations.runs import amend_runs
from qcowkit.operations.snapshot import apply_snapshot, create_snapshot, delete_snapshot
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import build_qcow2
from qcowkit.units import KiB

pytestmark = pytest.mark.pinned("options of its own, in full")

SIZE = 192 * KiB
NAMES = ("a", "b", "c")
QUIET = OpenOptions(cache_clean_interval=0)
AMENDMENTS: tuple[dict[str, Any], ...] = (
    {"refcount_bits": 8},
    {"refcount_bits": 16},
    {"refcount_bits": 64},
    {"refcount_bits": 1},
    {"extended_l2": True},
    {"extended_l2": True, "cluster_size": 16 * KiB},
    {"extended_l2": False},
    {"cluster_size": 4 * KiB},
    {"cluster_size": 16 * KiB},
    {"cluster_size": 64 * KiB},
    {"cluster_size": 512},
    {"compression_type": "zstd"},
    {"compression_type": "zlib"},
    {"lazy_refcounts": True},
    {"lazy_refcounts": False},
    {"compat": "0.10"},
    {"compat": "1.1"},
)
_offsets = st.integers(0, SIZE - 1)
_lengths = st.integers(1, 40 * KiB)
_names = st.sampled_from(NAMES)


class ImageLife(RuleBasedStateMachine):
    """`raw` is the file between two uses of it; each use has a copy of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = b""
        self.disk = bytearray()
        self.kept: dict[str, bytes] = {}

    @initialize(bits=st.sampled_from([9, 12, 16]))
    def begin(self, bits: int) -> None:
        self.raw = build_qcow2(size=SIZE, cluster_bits=bits).to_bytes()
        self.disk = bytearray(SIZE)

    # The guest

    def open(self, *, writable: bool, snapshot: str | None = None) -> tuple[MemoryStorage, Chain]:
        storage = MemoryStorage(self.raw)
        layer = Layer(storage=storage, metadata=load_qcow2_metadata(storage))
        return storage, build_chain([layer], writable=writable, snapshot=snapshot, options=QUIET)

    def change(self, work: Callable[[Chain], object]) -> None:
        storage, chain = self.open(writable=True)
        work(chain)
        image: Any = chain.images[0]
        image.disk.close()
        self.raw = storage.to_bytes()

    @rule(offset=_offsets, length=_lengths, value=st.integers(1, 255))
    def write(self, offset: int, length: int, value: int) -> None:
        data = bytes([value]) * max(0, min(length, len(self.disk) - offset))
        if data:
            self.change(lambda chain: chain.write(data, offset=offset))
            self.disk[offset : offset + len(data)] = data

    @rule(offset=_offsets, length=_lengths, unmap=st.booleans())
    def zero(self, offset: int, length: int, unmap: bool) -> None:
        count = max(0, min(length, len(self.disk) - offset))
        if count:
            self.change(lambda chain: chain.write_zeroes(offset=offset, length=count, unmap=unmap))
            self.disk[offset : offset + count] = bytes(count)

    @rule(cluster=st.integers(0, 200), value=st.integers(1, 255))
    def compress(self, cluster: int, value: int) -> None:
        size = load_qcow2_metadata(MemoryStorage(self.raw)).cluster_size
        offset = cluster * size % max(size, len(self.disk) // size * size)
        data = bytes([value]) * min(size, len(self.disk) - offset)

        def work(chain: Chain) -> None:
            chain.write_compressed(data, offset=offset)

        try:
            self.change(work)
        except RequestError:
            return
        self.disk[offset : offset + len(data)] = data

    @rule(sectors=st.integers(8, 2 * SIZE // 512))
    def resize(self, sectors: int) -> None:
        size = sectors * 512
        try:
            self.change(lambda chain: chain.resize(size, shrink=True))
        except RequestError:
            # Version 2 does not shrink beside snapshots.
            assert self.kept
            return
        self.disk = self.disk[:size].ljust(size, b"\0")

    # The image

    def manage(self, work: Callable[[Layer], object]) -> bool:
        """Whether it was done; what is refused has written nothing."""
        storage = MemoryStorage(self.raw)
        try:
            work(Layer(storage=storage, metadata=load_qcow2_metadata(storage)))
        except RequestError:
            assert storage.to_bytes() == self.raw
            return False
        self.raw = storage.to_bytes()
        return True

    @rule(name=_names)
    def take(self, name: str) -> None:
        if name not in self.kept and self.manage(lambda layer: create_snapshot(layer, name)):
            self.kept[name] = bytes(self.disk)

    @rule(name=_names)
    def go_back(self, name: str) -> None:
        if name in self.kept and self.manage(lambda layer: apply_snapshot(layer, name)):
            self.disk = bytearray(self.kept[name])

    @rule(name=_names)
    def give_up(self, name: str) -> None:
        if name in self.kept:
            assert self.manage(lambda layer: delete_snapshot(layer, name))
            del self.kept[name]

    @rule(values=st.sampled_from(AMENDMENTS))
    def amend(self, values: dict[str, Any]) -> None:
        self.manage(
            lambda layer: amend_image(
                [layer],
                AmendOptions(amendment=Amendment(**values)),
                budget=TRUSTED,
                opening=QUIET,
            )
        )

    @rule(on=st.booleans())
    def record(self, on: bool) -> None:
        self.manage(lambda layer: amend_runs(layer, on=on))

    @rule()
    def compact(self) -> None:
        assert self.manage(compact_image)

    @invariant()
    def the_image_is_sound(self) -> None:
        if not self.raw:
            return
        storage = MemoryStorage(self.raw)
        layer = Layer(storage=storage, metadata=load_qcow2_metadata(storage))
        result = check_image(layer)
        assert result.verdict is Verdict.CLEAN, result.findings

    @invariant()
    def everything_reads_as_it_should(self) -> None:
        if not self.raw:
            return
        for name, expected in (None, bytes(self.disk)), *self.kept.items():
            _, chain = self.open(writable=False, snapshot=name)
            assert chain.read(offset=0, length=chain.size) == expected, name


def run(*, examples: int, steps: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        ImageLife,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_an_image_is_what_arrays_of_bytes_would_be_through_its_life() -> None:
    run(examples=25, steps=25)


@pytest.mark.soak
def test_an_image_goes_on_being_that() -> None:
    run(examples=2000, steps=50)
