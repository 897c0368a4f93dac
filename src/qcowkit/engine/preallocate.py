"""Host space for a range before anything is written to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcowkit.units import MiB

if TYPE_CHECKING:
    from qcowkit.storage.protocol import Storage

_ZEROS = bytes(1 * MiB)


def preallocate(storage: Storage, *, offset: int, length: int, mode: str) -> None:
    """Give a data area its host space. falloc reserves, full writes zeros, others do nothing.

    The area must read as zeros already, or lie behind the end."""
    if mode == "falloc" and length:
        storage.allocate(offset=offset, length=length)
    elif mode == "full":
        for at in range(offset, offset + length, len(_ZEROS)):
            part = min(len(_ZEROS), offset + length - at)
            storage.pwrite([memoryview(_ZEROS)[:part]], offset=at)
