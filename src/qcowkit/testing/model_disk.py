"""A guest disk as an array of bytes: what every image has to agree with."""

from __future__ import annotations

import numpy as np

from qcowkit.errors import RequestError


class ModelDisk:
    """The plainest disk. size: bytes. backing: what lies below, shown where nothing was written;
    beyond its end are zeros.

    A discarded byte may be zero or as before until a reader has seen which (`settle`)."""

    def __init__(self, size: int, backing: bytes | None = None) -> None:
        below = (backing or b"")[:size]
        self._bytes = bytearray(below.ljust(size, b"\0"))
        self._unsure = bytearray(size)

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._bytes)

    def read(self, *, offset: int, length: int) -> bytes:
        """The bytes, discarded ones as before. Raises RequestError outside of the disk."""
        self._check(offset=offset, length=length)
        return bytes(self._bytes[offset : offset + length])

    def write(self, data: bytes, *, offset: int) -> None:
        """Put the bytes."""
        self._check(offset=offset, length=len(data))
        self._bytes[offset : offset + len(data)] = data
        self._unsure[offset : offset + len(data)] = bytes(len(data))

    def write_zeroes(self, *, offset: int, length: int) -> None:
        """Put zeros."""
        self.write(bytes(length), offset=offset)

    def discard(self, *, offset: int, length: int) -> None:
        """Leave open whether the bytes become zeros."""
        self._check(offset=offset, length=length)
        self._unsure[offset : offset + length] = b"\1" * length

    def resize(self, size: int) -> None:
        """Cut, or add zeros, whatever lies below."""
        if size < 0:
            raise RequestError(f"size {size} is negative")
        for part in (self._bytes, self._unsure):
            del part[size:]
            part.extend(bytes(size - len(part)))

    def find_difference(self, content: bytes, *, offset: int = 0) -> int | None:
        """The first guest offset at which `content` cannot be what this disk holds from `offset`
        on; None if there is none."""
        self._check(offset=offset, length=len(content))
        stop = offset + len(content)
        if self._bytes[offset:stop] == content:
            return None
        expected, unsure, found = (
            np.frombuffer(part, dtype=np.uint8)
            for part in (self._bytes[offset:stop], self._unsure[offset:stop], content)
        )
        wrong = np.flatnonzero((expected != found) & ((found != 0) | (unsure == 0)))
        return offset + int(wrong[0]) if len(wrong) else None

    def settle(self, content: bytes, *, offset: int = 0) -> int | None:
        """Take what a reader saw from `offset` on as what was meant by discards; the difference,
        as of `find_difference`, if it cannot be."""
        difference = self.find_difference(content, offset=offset)
        if difference is None:
            self.write(content, offset=offset)
        return difference

    def _check(self, *, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise RequestError(
                f"range {offset:#x} + {length:#x} is outside the disk of {self.size:#x} bytes"
            )
