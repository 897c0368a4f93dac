"""Where a repair may write what is new: nothing lies there, and nothing leads there."""

from __future__ import annotations

from qcowkit.engine.qcow2.repair_audit import Audit
from qcowkit.engine.qcow2.repair_run import RepairRun
from qcowkit.errors import OperationError
from qcowkit.units import ceil_div


def begin_of_room(run: RepairRun, audit: Audit) -> int:
    """A host cluster: behind the end of a file, or behind the last cluster in use of a device,
    which cannot grow."""
    storage = run.storage
    return (
        audit.used_end if storage.caps.block_device else ceil_div(storage.size(), 1 << audit.bits)
    )


def check_room(run: RepairRun, audit: Audit, *, first: int, count: int) -> None:
    """Raise OperationError where `count` clusters from index `first` may not be written.

    A file must not grow over a place that an entry already refers to: the entry would seem sound,
    and what is new would be taken for its data."""
    if "header" in audit.shared:
        raise _no_room("the header shares its cluster with something else")
    end = (first + count) << audit.bits
    if not run.storage.caps.block_device:
        if end > audit.beyond:
            raise _no_room(
                f"the file would grow over host offset {audit.beyond:#x}, where something is "
                "missing"
            )
        return
    if audit.astray:
        raise _no_room("entries lead nowhere, and free clusters of a device may hold their data")
    if end > run.storage.size():
        raise _no_room(f"the device has no {count} clusters behind the last one in use")


def _no_room(reason: str) -> OperationError:
    return OperationError(f"the repair has no room for new tables: {reason}")
