"""Repairs in one line, for tests."""

from __future__ import annotations

from typing import Any

from qcowkit.engine.findings import Severity
from qcowkit.engine.qcow2.repair import Repaired, repair_qcow2
from qcowkit.engine.repairs import ChangeLog, RepairMode
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage


def repair(
    storage: Storage, mode: RepairMode = RepairMode.ALL, **options: Any
) -> tuple[Repaired, ChangeLog]:
    changes = ChangeLog()
    return repair_qcow2(storage, mode=mode, changes=changes, **options), changes


def repair_bytes(raw: bytes, mode: RepairMode = RepairMode.ALL, **options: Any) -> bytes:
    storage = MemoryStorage(raw)
    repair(storage, mode, **options)
    return storage.to_bytes()


def kinds(changes: ChangeLog) -> set[str]:
    return {group.kind.name for group in changes.groups}


def corruptions(repaired: Repaired) -> list[str]:
    kept = repaired.after.log.kept
    return [str(one) for one in kept if one.severity is Severity.CORRUPTION]
