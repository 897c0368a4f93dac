"""Repairs that cannot be, or not to the end: nothing is written before that is known."""

from __future__ import annotations

import struct
import threading

import pytest

from qcowkit.engine import findings
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.errors import Cancelled, OperationError, StorageError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.qcow2_builder import (
    BuiltImage,
)
from qcowkit.units import KiB, MiB
from tests.damage import (
    host_of,
    make,
    set_count,
)
from tests.repairing import repair


def test_nothing_is_written_where_a_table_cannot_be_read() -> None:
    image = make()
    set_count(image, host_of(image, 0), 3)
    raw = image.to_bytes()
    quiet = FaultyStorage(MemoryStorage(raw))
    repair(quiet)
    for call in range(1, quiet.calls["pread"] + 1):
        inner = MemoryStorage(raw)
        storage = FaultyStorage(inner, Fault(operation="pread", call=call, sticky=True))
        with pytest.raises((OperationError, StorageError)):
            repair(storage)
        if not storage.calls["pwrite"]:
            assert inner.to_bytes() == raw


def test_an_unread_table_is_told() -> None:
    image = make()
    set_count(image, host_of(image, 0), 3)
    quiet = FaultyStorage(MemoryStorage(image.to_bytes()))
    load_qcow2_metadata(quiet)
    fault = Fault(operation="pread", call=quiet.calls["pread"] + 1)
    storage = FaultyStorage(MemoryStorage(image.to_bytes()), fault)
    with pytest.raises(
        OperationError,
        match=r"a repair needs to read all tables, and some cannot be read: 1 error, the first: L1",
    ):
        repair(storage)
    assert storage.calls["pwrite"] == 0


def test_a_repair_can_be_cancelled() -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        repair(MemoryStorage(make().to_bytes()), cancel=cancel)


def fan_in(count: int) -> BuiltImage:
    """Every L1 entry leads to one L2 table, whose entries lead to one cluster."""
    image = make(size=8 * MiB, clusters={0: b"x"})
    image.patch(image.places["l1"], struct.pack(">Q", image.places["l2"]) * count)
    image.patch(image.places["l2"], bytes(image.data[image.places["l2"] :][:8]) * 64)
    return image


@pytest.mark.pinned("counts up to 256", "refcount_bits=1")
def test_work_out_of_proportion_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = fan_in(256).to_bytes()
    for limit in range(0, 60 * KiB, 4 * KiB):
        monkeypatch.setattr(findings, "FREE_WORK", limit)
        monkeypatch.setattr(findings, "WORK_FACTOR", 0)
        storage = MemoryStorage(raw)
        try:
            repair(storage)
        except OperationError:
            assert storage.to_bytes() == raw
        else:
            assert storage.to_bytes() != raw
            return
    pytest.fail("no limit was enough")


def test_progress_grows_to_its_total() -> None:
    image = make()
    set_count(image, host_of(image, 0), 3)
    seen: list[tuple[int, int]] = []
    repair(MemoryStorage(image.to_bytes()), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0
