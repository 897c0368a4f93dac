"""What shows through where a VHD with blocks has nothing of its own."""

from __future__ import annotations

from typing import Protocol

from qcowkit.errors import RequestError


class Below(Protocol):
    """The layers under the image; see `image.protocol.Below`."""

    @property
    def size(self) -> int: ...

    def read_into(self, buffer: bytearray | memoryview, *, offset: int) -> None: ...

    def is_zero(self, *, start: int, length: int) -> bool: ...


class Underneath:
    """Zeros under a dynamic disk, the parent's chain under a differencing one.

    differencing: whether there is a parent. below: None until it is attached; a differencing disk
    may be open without."""

    def __init__(self, *, differencing: bool) -> None:
        self.differencing = differencing
        self.below: Below | None = None

    def read(self, *, start: int, length: int) -> bytes:
        """Guest bytes of the range; zeros beyond the parent's end. Raises RequestError where the
        parent is not open, and what reading it raises."""
        buffer = bytearray(length)
        below = self.below
        if below is None and self.differencing:
            raise RequestError(
                "the parent of this differencing VHD is not open, and the rest of a sector that is "
                "written in part would come from it"
            )
        if below is not None and start < below.size:
            reach = min(length, below.size - start)
            below.read_into(memoryview(buffer)[:reach], offset=start)
        return bytes(buffer)

    def is_zero(self, *, start: int, length: int) -> bool:
        """Whether the range is known to read as zeros; never of a parent that is not open."""
        below = self.below
        if below is None:
            return not self.differencing
        if start >= below.size:
            return True
        return below.is_zero(start=start, length=min(length, below.size - start))
