"""Disk images of virtual machines: read, inspect, check, map and convert qcow2, VHD and raw.

The public names are resolved on first use (PEP 562), so that importing the package costs nothing
and whoever needs no extent table never loads numpy. docs/adr/0004 says why."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcowkit.budget import TRUSTED, UNTRUSTED, Budget
    from qcowkit.errors import (
        BudgetExceeded,
        Cancelled,
        CorruptMetadata,
        ImageBusy,
        OperationError,
        QcowkitError,
        ReferenceDenied,
        RequestError,
        StorageError,
        UnknownFormat,
        UnsupportedFeature,
    )
    from qcowkit.extents.table import Extent, ExtentTable, Flag
    from qcowkit.image.chain import Chain
    from qcowkit.image.gate import ReferenceGate
    from qcowkit.image.registry import open_chain as open

__version__ = "0.1.0"

__all__ = [
    "TRUSTED",
    "UNTRUSTED",
    "Budget",
    "BudgetExceeded",
    "Cancelled",
    "Chain",
    "CorruptMetadata",
    "Extent",
    "ExtentTable",
    "Flag",
    "ImageBusy",
    "OperationError",
    "QcowkitError",
    "ReferenceDenied",
    "ReferenceGate",
    "RequestError",
    "StorageError",
    "UnknownFormat",
    "UnsupportedFeature",
    "__version__",
    "open",
]

# Public name -> module, and the name there when it differs.
_PLACES = {
    "Chain": ("qcowkit.image.chain", None),
    "Extent": ("qcowkit.extents.table", None),
    "ExtentTable": ("qcowkit.extents.table", None),
    "Flag": ("qcowkit.extents.table", None),
    "Budget": ("qcowkit.budget", None),
    "TRUSTED": ("qcowkit.budget", None),
    "UNTRUSTED": ("qcowkit.budget", None),
    "ReferenceGate": ("qcowkit.image.gate", None),
    "open": ("qcowkit.image.registry", "open_chain"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Every public name without a place of its own is a class of errors.
    place, original = _PLACES.get(name, ("qcowkit.errors", None))
    value = getattr(importlib.import_module(place), original or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
