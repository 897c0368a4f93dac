"""The copier in memory: what it hands to a target, and when."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowkit.engine.executor import Workers
from qcowkit.engine.raw_bulk import RawBulkWriter
from qcowkit.engine.transfer import Chunk, UnitState, Write
from qcowkit.engine.vhd.bulk import VhdBulkWriter
from qcowkit.engine.vhd.target import VhdTarget
from qcowkit.errors import StorageError
from qcowkit.extents.table import ExtentTable, Flag, make_table
from qcowkit.image.chain import Chain
from qcowkit.image.metadata import RawMetadata
from qcowkit.image.raw import RawImage
from qcowkit.operations.copying import Copier, CopyRules, only_top, plan_window
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.strategies import extent_tables, per_byte
from qcowkit.units import KiB, MiB
from tests.image.chain_test import chains


class Listing:
    """A target that records what it is told; `write` makes a write of it."""

    explicit_zeros = True
    direct_limit = MiB

    def __init__(self, *, unit: int = 4 * KiB, grain: int = 4 * KiB) -> None:
        self.unit, self.grain = unit, grain
        self.storage = MemoryStorage()
        self.calls: list[tuple[str, int, int]] = []
        self.states: dict[int, int] = {}

    def place(self, chunk: Chunk) -> list[Write]:
        self.calls.append(("data", chunk.start, chunk.length))
        for index, state in enumerate(chunk.states.tolist()):
            self.states[chunk.start + index * self.grain] = state
        view = chunk.view[: chunk.length]
        return [Write(storage=self.storage, buffers=[view], offset=chunk.start)]

    def place_zeros(self, start: int, length: int) -> None:
        self.calls.append(("zeros", start, length))
        for at in range(start, start + length, self.grain):
            self.states[at] = UnitState.ZERO

    def place_direct(self, start: int, length: int) -> tuple[MemoryStorage, int]:
        self.calls.append(("direct", start, length))
        return self.storage, start

    def finish(self) -> None:
        """Nothing to do."""


def run(disk: Any, target: Any, *, threads: int = 3, **rules: Any) -> None:
    with Workers(threads) as workers:
        Copier(disk, target, rules=CopyRules(**rules), workers=workers).run()


def raw(data: bytes) -> Chain:
    return Chain([RawImage(RawMetadata(virtual_size=len(data)), MemoryStorage(data))])


@settings(max_examples=60, deadline=None)
@given(case=chains(), bits=st.integers(9, 14), threads=st.integers(1, 4))
def test_a_target_hears_of_every_unit_once_and_in_order(case: Any, bits: int, threads: int) -> None:
    chain, content = case
    target = Listing(unit=1 << bits, grain=1 << bits)
    run(chain, target, threads=threads)
    position = 0
    for _, start, length in target.calls:
        assert start == position
        assert start % target.unit == 0
        position = start + length
    assert position == len(content)
    for start, state in target.states.items():
        part = content[start : start + target.unit]
        assert state == (UnitState.DATA if any(part) else UnitState.ZERO)
        if state == UnitState.DATA:
            assert target.storage.pread(len(part), offset=start) == part


@settings(max_examples=60, deadline=None)
@given(case=chains(), bits=st.integers(9, 14))
def test_only_the_top_is_told_to_a_target_over_a_base(case: Any, bits: int) -> None:
    chain, content = case
    target = Listing(unit=1 << bits, grain=1 << bits)
    run(chain, target, top_only=True)
    base = Chain(chain.images[1:]).read if len(chain.images) > 1 else None
    for start in range(0, chain.size, target.unit):
        part = content[start : start + target.unit]
        state = target.states.get(start, UnitState.ABSENT)
        if state == UnitState.ABSENT:
            assert base is not None
            assert base(offset=start, length=len(part)) == part
        elif state == UnitState.ZERO:
            assert not any(part)
        else:
            assert target.storage.pread(len(part), offset=start) == part


def test_zeros_are_data_for_a_target_that_cannot_say_them() -> None:
    target = Listing()
    run(raw(bytes(64 * KiB) + b"x" * 4096), target, zero_as_data=True, top_only=True)
    assert set(target.states.values()) == {UnitState.DATA}
    assert {kind for kind, _, _ in target.calls} == {"data"}


def test_everything_is_data_when_asked() -> None:
    target = Listing()
    run(raw(bytes(8 * KiB)), target, everything=True)
    assert target.states == {0: UnitState.DATA, 4096: UnitState.DATA}


@given(top=extent_tables(layer=0))
def test_what_no_layer_decides_is_zero_in_the_top(top: ExtentTable) -> None:
    facts, shown = per_byte(top), per_byte(only_top(top))
    for at, (flags, *_) in facts.items():
        assert shown[at][0] == (flags if flags & Flag.PRESENT else Flag.ZERO)


def test_deeper_layers_are_left_to_the_base() -> None:
    table = make_table([0, 5, 9], [5, 4, 3], [Flag.DATA | Flag.PRESENT, 0, 0], layer=[1, 1, 0])
    assert only_top(table).flags.tolist() == [0, 0, Flag.ZERO]


@pytest.mark.parametrize("refuse", [False, True])
def test_the_host_copies_whole_units_of_long_runs(refuse: bool) -> None:
    data = bytes(range(1, 256)) * 20_000
    asked: list[tuple[int, int, int]] = []

    def share(source: Any, storage: Any, offset: int, length: int, at: int) -> bool:
        asked.append((offset, length, at))
        if not refuse:
            storage.pwrite([source.pread(length, offset=offset)], offset=at)
        return not refuse

    target = Listing()
    run(raw(data), target, host_copy=share)
    assert target.storage.to_bytes() == data
    assert sum(length for _, length, _ in asked) == len(data) // 4096 * 4096
    assert all(offset == at and length <= MiB for offset, length, at in asked)


def test_a_vhd_takes_one_block_at_a_time_from_the_host() -> None:
    storage = MemoryStorage()
    target = VhdTarget(storage, VhdBulkWriter(storage, size=8 * MiB))
    offsets = []

    def share(source: Any, to: Any, offset: int, length: int, at: int) -> bool:
        offsets.append((length, at))
        to.pwrite([source.pread(length, offset=offset)], offset=at)
        return True

    run(raw(b"v" * 8 * MiB), target, host_copy=share)
    assert [length for length, _ in sorted(offsets)] == [2 * MiB] * 4
    starts = sorted(at for _, at in offsets)
    assert {after - before for before, after in zip(starts, starts[1:], strict=False)} == {
        2 * MiB + 512
    }


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("operation", ["pread", "iter_data"])
def test_a_source_that_fails_ends_the_copy(operation: str, threads: int) -> None:
    for call in (1, 3):
        storage = FaultyStorage(
            MemoryStorage(b"s" * 16 * MiB), Fault(operation=operation, call=call)
        )
        disk = Chain([RawImage(RawMetadata(virtual_size=16 * MiB), storage)])
        if operation == "iter_data" and call > 1:
            continue
        with pytest.raises(StorageError) as caught:
            run(disk, Listing(), threads=threads)
        assert caught.value.errno == errno.EIO


def test_a_target_that_cannot_place_ends_the_copy() -> None:
    class Full(Listing):
        def place(self, chunk: Chunk) -> list[Write]:
            if chunk.start:
                raise StorageError("write", path="t", errno=errno.ENOSPC)
            return super().place(chunk)

    with pytest.raises(StorageError, match="ENOSPC"):
        run(raw(b"s" * 32 * MiB), Full(), threads=4)


def test_progress_counts_guest_bytes() -> None:
    seen: list[tuple[int, int]] = []
    with Workers(2) as workers:
        Copier(
            raw(b"s" * 5 * MiB),
            Listing(),
            rules=CopyRules(rate=1 << 40),
            workers=workers,
            progress=lambda done, total: seen.append((done, total)),
        ).run()
    assert seen == sorted(seen)
    assert seen[-1] == (5 * MiB, 5 * MiB)


def test_a_raw_target_leaves_holes_where_nothing_is() -> None:
    storage = MemoryStorage(b"\xaa" * 1000)
    writer = RawBulkWriter(storage, size=5000, unit=512)
    states = np.array([UnitState.ZERO, UnitState.DATA, UnitState.DATA], np.uint8)
    chunk = Chunk(start=0, length=1300, states=states, view=memoryview(b"d" * 2048))
    for write in writer.place(chunk):
        write.run()
    writer.finish()
    assert storage.to_bytes() == b"\xaa" * 512 + b"d" * 788 + bytes(3700)


def test_a_raw_target_that_is_overwritten_gets_its_zeros() -> None:
    storage = MemoryStorage(b"\xaa" * 3000)
    writer = RawBulkWriter(storage, size=3000, unit=512, overwrite=True)
    states = np.array([UnitState.ZERO, UnitState.DATA, UnitState.ZERO], np.uint8)
    chunk = Chunk(start=512, length=1300, states=states, view=memoryview(b"d" * 2048))
    for write in writer.place(chunk):
        write.run()
    writer.place_zeros(2000, 1000)
    writer.finish()
    assert storage.to_bytes() == (
        b"\xaa" * 512 + bytes(512) + b"d" * 512 + bytes(276) + b"\xaa" * 188 + bytes(1000)
    )


@pytest.mark.parametrize(("threads", "window"), [(1, 4), (2, 4), (16, 4), (17, 2), (64, 1)])
def test_more_workers_take_smaller_batches_once_they_are_many(threads: int, window: int) -> None:
    assert plan_window(threads) == window * MiB


def test_no_number_of_workers_makes_batches_useless() -> None:
    assert plan_window(4096) == MiB // 4
