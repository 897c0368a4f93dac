"""Storage that logs what is done to it: for tests of order, amount and place of access."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcowkit.storage.protocol import Storage, StorageCaps

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One use of a storage. Bytes; `size` is the argument of truncate in `length`.

    operation: the method's name, both reading methods as `pread`. data: what was written."""

    operation: str
    offset: int = 0
    length: int = 0
    data: bytes = b""


class RecordingStorage:
    """`inner` with a log in `calls`, in the order in which the calls began."""

    def __init__(self, inner: Storage) -> None:
        """Wrap `inner`, which is closed with this storage."""
        self._inner = inner
        self.calls: list[Call] = []

    def of(self, *operations: str) -> list[Call]:
        """The logged calls of these operations."""
        return [call for call in self.calls if call.operation in operations]

    def _log(self, operation: str, *, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        self.calls.append(Call(operation=operation, offset=offset, length=length, data=data))

    @property
    def name(self) -> str:
        """The name of the inner storage."""
        return self._inner.name

    @property
    def caps(self) -> StorageCaps:
        """Those of the inner storage."""
        return self._inner.caps

    def size(self) -> int:
        """As the inner storage; not logged, it changes and costs nothing."""
        return self._inner.size()

    def allocated(self) -> int:
        """As the inner storage; not logged, it changes and costs nothing."""
        return self._inner.allocated()

    def pread_into(self, buffer: Buffer, *, offset: int) -> int:
        """As the inner storage."""
        self._log("pread", offset=offset, length=memoryview(buffer).nbytes)
        return self._inner.pread_into(buffer, offset=offset)

    def pread(self, length: int, *, offset: int) -> bytes:
        """As the inner storage."""
        self._log("pread", offset=offset, length=length)
        return self._inner.pread(length, offset=offset)

    def pwrite(self, buffers: Sequence[Buffer], *, offset: int) -> None:
        """As the inner storage."""
        data = b"".join(memoryview(buffer).cast("B") for buffer in buffers)
        self._log("pwrite", offset=offset, length=len(data), data=data)
        self._inner.pwrite(buffers, offset=offset)

    def zero(self, *, offset: int, length: int, unmap: bool) -> None:
        """As the inner storage."""
        self._log("zero", offset=offset, length=length)
        self._inner.zero(offset=offset, length=length, unmap=unmap)

    def discard(self, *, offset: int, length: int) -> None:
        """As the inner storage."""
        self._log("discard", offset=offset, length=length)
        self._inner.discard(offset=offset, length=length)

    def allocate(self, *, offset: int, length: int) -> None:
        """As the inner storage."""
        self._log("allocate", offset=offset, length=length)
        self._inner.allocate(offset=offset, length=length)

    def truncate(self, size: int) -> None:
        """As the inner storage."""
        self._log("truncate", length=size)
        self._inner.truncate(size)

    def flush(self) -> None:
        """As the inner storage."""
        self._log("flush")
        self._inner.flush()

    def iter_data(self, *, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """As the inner storage."""
        self._log("iter_data", offset=offset, length=length)
        return self._inner.iter_data(offset=offset, length=length)

    def clone_to(self, target: Storage, *, offset: int, length: int, target_offset: int) -> bool:
        """As the inner storage."""
        self._log("clone_to", offset=offset, length=length)
        return self._inner.clone_to(
            target, offset=offset, length=length, target_offset=target_offset
        )

    def copy_to(self, target: Storage, *, offset: int, length: int, target_offset: int) -> bool:
        """As the inner storage."""
        self._log("copy_to", offset=offset, length=length)
        return self._inner.copy_to(
            target, offset=offset, length=length, target_offset=target_offset
        )

    def close(self) -> None:
        """Close the inner storage."""
        self._log("close")
        self._inner.close()
