"""A storage whose content must not be read: what it says of itself is all there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from qcowkit.errors import UnsupportedFeature
from qcowkit.storage.protocol import Storage, StorageCaps

if TYPE_CHECKING:
    from typing_extensions import Buffer


class WithheldStorage:
    """The size of `inner`, and for whoever asks for bytes an UnsupportedFeature that says why."""

    def __init__(self, inner: Storage, *, what: str, reason: str) -> None:
        """inner: is closed with this one."""
        self._inner = inner
        self._what = what
        self._reason = reason

    @property
    def name(self) -> str:
        """The name of the inner storage."""
        return self._inner.name

    @property
    def caps(self) -> StorageCaps:
        """Those of the inner storage, but not writable."""
        return replace(self._inner.caps, writable=False)

    def size(self) -> int:
        """Bytes of the inner storage."""
        return self._inner.size()

    def allocated(self) -> int:
        """Bytes that the host has allocated for it."""
        return self._inner.allocated()

    def _refuse(self) -> NoReturn:
        raise UnsupportedFeature(f"{self.name}: {self._what}", reason=self._reason)

    def pread_into(self, buffer: Buffer, *, offset: int) -> int:
        """Refused."""
        self._refuse()

    def pread(self, length: int, *, offset: int) -> bytes:
        """Refused."""
        self._refuse()

    def pwrite(self, buffers: Sequence[Buffer], *, offset: int) -> None:
        """Refused."""
        self._refuse()

    def zero(self, *, offset: int, length: int, unmap: bool) -> None:
        """Refused."""
        self._refuse()

    def discard(self, *, offset: int, length: int) -> None:
        """Refused."""
        self._refuse()

    def allocate(self, *, offset: int, length: int) -> None:
        """Refused."""
        self._refuse()

    def truncate(self, size: int) -> None:
        """Refused."""
        self._refuse()

    def flush(self) -> None:
        """Nothing was written."""

    def iter_data(self, *, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Anything may be there."""
        yield offset, length

    def clone_to(self, target: Storage, *, offset: int, length: int, target_offset: int) -> bool:
        """Never: blocks that are not there would be zeros elsewhere."""
        return False

    def copy_to(self, target: Storage, *, offset: int, length: int, target_offset: int) -> bool:
        """Never, likewise."""
        return False

    def close(self) -> None:
        """Close the inner storage."""
        self._inner.close()
