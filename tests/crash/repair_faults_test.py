"""A repair on a host that fails: every call in turn, once and for good. What fails is told, no
failure makes the image worse, and the next repair ends what was begun."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

import pytest

from qcowkit.engine.findings import Severity
from qcowkit.engine.qcow2.repair import repair_qcow2
from qcowkit.engine.repairs import RepairMode
from qcowkit.errors import OperationError, StorageError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from tests.damage import DAMAGES
from tests.qcow2_oracle import view_of, worsened

REPAIRED = {name: damage for name, damage in DAMAGES.items() if damage.kinds}
KINDS: dict[str, dict[str, Any]] = {
    "error": {"errno": errno.EIO},
    "for good": {"errno": errno.EIO, "sticky": True},
    "full disk": {"errno": errno.ENOSPC, "written": 512},
}


def failing_runs(
    raw: bytes, kind: str, *operations: str
) -> Iterator[tuple[FaultyStorage, MemoryStorage]]:
    """A storage for every call of these operations that a repair makes, which fails there."""
    quiet = FaultyStorage(MemoryStorage(raw))
    repair_qcow2(quiet, mode=RepairMode.ALL)
    for operation in operations:
        for call in range(1, quiet.calls[operation] + 1):
            inner = MemoryStorage(raw)
            fault = Fault(operation=operation, call=call, **KINDS[kind])
            yield FaultyStorage(inner, fault), inner


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", list(REPAIRED))
def test_no_failing_call_makes_the_image_worse(name: str, kind: str) -> None:
    raw = REPAIRED[name].make().to_bytes()
    before = view_of(raw)
    operations = ("pwrite",) if kind == "full disk" else ("pread", "pwrite", "flush")
    for storage, inner in failing_runs(raw, kind, *operations):
        try:
            repaired = repair_qcow2(storage, mode=RepairMode.ALL)
        except (StorageError, OperationError):
            pass
        else:
            # Only the check at the end may go on where it cannot read, and says so.
            assert repaired.after.log.count(Severity.ERROR)
        assert worsened(before, inner.to_bytes(), raw) == [], storage.fired


@pytest.mark.parametrize("name", list(REPAIRED))
def test_after_a_failure_the_next_repair_goes_on(name: str) -> None:
    raw = REPAIRED[name].make().to_bytes()
    before = view_of(raw)
    for storage, inner in failing_runs(raw, "error", "pwrite", "flush"):
        with contextlib.suppress(StorageError, OperationError):
            repair_qcow2(storage, mode=RepairMode.ALL)
        repaired = repair_qcow2(inner, mode=RepairMode.ALL)
        assert repaired.after.log.count(Severity.CORRUPTION) == REPAIRED[name].left
        assert worsened(before, inner.to_bytes(), raw) == [], storage.fired


@pytest.mark.parametrize("name", list(REPAIRED))
def test_a_failed_flush_is_never_taken_for_a_success(name: str) -> None:
    raw = REPAIRED[name].make().to_bytes()
    quiet = FaultyStorage(MemoryStorage(raw))
    repair_qcow2(quiet, mode=RepairMode.ALL)
    for call in range(1, quiet.calls["flush"] + 1):
        storage = FaultyStorage(MemoryStorage(raw), Fault(operation="flush", call=call))
        with pytest.raises(StorageError):
            repair_qcow2(storage, mode=RepairMode.ALL)
        assert storage.calls["flush"] == call
