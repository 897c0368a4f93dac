"""Storage that fails when told to: for loops that fail every call of an operation in turn.

Reliability reference, section 4.1."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcowkit.errors import StorageError
from qcowkit.storage.protocol import Storage, StorageCaps

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Fail the `call`-th (from 1) use of `operation`, or of any operation for `*`.

    operation: the name of a method of Storage; both reading methods count as `pread`. errno: what
    the failure says. sticky: every later use fails as well. written: bytes that a failing pwrite
    leaves behind, as a full disk would. short: a read does not fail but lacks that many bytes."""

    operation: str
    call: int = 1
    errno: int = errno.EIO
    sticky: bool = False
    written: int = 0
    short: int = 0


class FaultyStorage:
    """`inner` with faults. `calls` counts the uses of each operation; `fired` what has failed."""

    def __init__(self, inner: Storage, *faults: Fault) -> None:
        """Wrap `inner`, which is closed with this storage."""
        self._inner = inner
        self._faults = faults
        self.calls: Counter[str] = Counter()
        self.fired: list[Fault] = []

    @property
    def name(self) -> str:
        """The name of the inner storage."""
        return self._inner.name

    @property
    def caps(self) -> StorageCaps:
        """Those of the inner storage."""
        return self._inner.caps

    def _meet(self, operation: str) -> Fault | None:
        """Count the call; the fault that it meets, if any."""
        self.calls[operation] += 1
        self.calls["*"] += 1
        for fault in self._faults:
            if fault.operation not in (operation, "*"):
                continue
            count = self.calls[fault.operation]
            if count == fault.call or (fault.sticky and count > fault.call):
                self.fired.append(fault)
                return fault
        return None

    def _pass(self, operation: str) -> None:
        fault = self._meet(operation)
        if fault is not None:
            raise StorageError(operation, path=self.name, errno=fault.errno)

    def size(self) -> int:
        """As the inner storage, or a fault."""
        self._pass("size")
        return self._inner.size()

    def allocated(self) -> int:
        """As the inner storage, or a fault."""
        self._pass("allocated")
        return self._inner.allocated()

    def pread_into(self, buffer: Buffer, *, offset: int) -> int:
        """As the inner storage, a fault, or a short read."""
        view = memoryview(buffer).cast("B")
        data = self.pread(len(view), offset=offset)
        view[: len(data)] = data
        return len(data)

    def pread(self, length: int, *, offset: int) -> bytes:
        """As the inner storage, a fault, or a short read."""
        fault = self._meet("pread")
        if fault is not None and not fault.short:
            raise StorageError("read", path=self.name, errno=fault.errno)
        data = self._inner.pread(length, offset=offset)
        return data[: max(0, len(data) - fault.short)] if fault is not None else data

    def pwrite(self, buffers: Sequence[Buffer], *, offset: int) -> None:
        """As the inner storage, or a fault behind the first `written` bytes."""
        fault = self._meet("pwrite")
        if fault is None:
            self._inner.pwrite(buffers, offset=offset)
            return
        if fault.written:
            joined = b"".join(memoryview(buffer).cast("B") for buffer in buffers)
            self._inner.pwrite([joined[: fault.written]], offset=offset)
        raise StorageError("write", path=self.name, errno=fault.errno)

    def zero(self, *, offset: int, length: int, unmap: bool) -> None:
        """As the inner storage, or a fault."""
        self._pass("zero")
        self._inner.zero(offset=offset, length=length, unmap=unmap)

    def discard(self, *, offset: int, length: int) -> None:
        """As the inner storage, or a fault."""
        self._pass("discard")
        self._inner.discard(offset=offset, length=length)

    def allocate(self, *, offset: int, length: int) -> None:
        """As the inner storage, or a fault."""
        self._pass("allocate")
        self._inner.allocate(offset=offset, length=length)

    def truncate(self, size: int) -> None:
        """As the inner storage, or a fault."""
        self._pass("truncate")
        self._inner.truncate(size)

    def flush(self) -> None:
        """As the inner storage, or a fault."""
        self._pass("flush")
        self._inner.flush()

    def iter_data(self, *, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """As the inner storage, or a fault."""
        self._pass("iter_data")
        return self._inner.iter_data(offset=offset, length=length)

    def clone_to(self, target: Storage, *, offset: int, length: int, target_offset: int) -> bool:
        """As the inner storage, or a fault."""
        self._pass("clone_to")
        return self._inner.clone_to(
            target, offset=offset, length=length, target_offset=target_offset
        )

    def copy_to(self, target: Storage, *, offset: int, length: int, target_offset: int) -> bool:
        """As the inner storage, or a fault."""
        self._pass("copy_to")
        return self._inner.copy_to(
            target, offset=offset, length=length, target_offset=target_offset
        )

    def close(self) -> None:
        """Close the inner storage; never a fault."""
        self._inner.close()
