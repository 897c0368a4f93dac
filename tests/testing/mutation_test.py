"""Leaving out a barrier: that one, no other, and no longer than the block."""

from __future__ import annotations

import pytest

from qcowkit.engine.barriers import Barriers
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.mutation import without_barrier
from qcowkit.testing.recording import RecordingStorage


def flushes_of(*names: str) -> int:
    """How often the storage is flushed when something was written before each barrier."""
    storage = RecordingStorage(MemoryStorage())
    barriers = Barriers(storage)
    for name in names:
        barriers.pending = True
        barriers.wait(name)
    return len(storage.of("flush"))


def test_only_the_named_barriers_are_left_out() -> None:
    with without_barrier("a", "b") as skipped:
        assert flushes_of("a", "b", "c") == 1
    assert skipped == ["a", "b"]
    assert flushes_of("a", "b", "c") == 3


def test_what_a_missing_barrier_should_have_flushed_is_flushed_by_the_next() -> None:
    storage = RecordingStorage(MemoryStorage())
    barriers = Barriers(storage)
    with without_barrier("a"):
        barriers.pending = True
        barriers.wait("a")
        barriers.wait("b")
    assert len(storage.of("flush")) == 1


def test_a_barrier_with_nothing_to_flush_is_not_counted() -> None:
    with without_barrier("a") as skipped:
        Barriers(MemoryStorage()).wait("a")
    assert skipped == []


def test_barriers_are_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), without_barrier("a"):
        raise ZeroDivisionError
    assert flushes_of("a") == 1
