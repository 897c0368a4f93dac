"""A guest with whims: any disk that can be written must agree with an array of bytes."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qcowkit.image.chain import Chain
from qcowkit.testing.model_disk import ModelDisk
from qcowkit.units import SECTOR

LARGEST = 160 * SECTOR
_OFFSETS = st.integers(0, LARGEST)
_LENGTHS = st.one_of(st.integers(0, 3 * SECTOR), st.integers(0, 40 * SECTOR))


class DiskMachine(RuleBasedStateMachine):
    """Derive, say how a disk is opened, and make a TestCase of it.

    size: guest bytes at first. below: what lies under the disk. unit: sizes are multiples of it."""

    size = 24 * SECTOR
    below: bytes | None = None
    unit = SECTOR

    def make(self) -> None:
        """A new file."""
        raise AssertionError("derive this")

    def open(self) -> Chain:
        """The disk of the file, for writing."""
        raise AssertionError("derive this")

    def check_file(self) -> None:
        """What must hold of the file of a disk that is closed."""

    @initialize()
    def begin(self) -> None:
        self.make()
        self.model = ModelDisk(self.size, self.below)
        self.disk = self.open()

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            self.disk.close()

    def _range(self, offset: int, length: int, aligned: bool) -> tuple[int, int]:
        size = self.model.size
        start, stop = min(offset, size), min(offset + length, size)
        if aligned:
            start, stop = start - start % SECTOR, stop - stop % SECTOR
        return start, max(stop - start, 0)

    @rule(offset=_OFFSETS, length=_LENGTHS, aligned=st.booleans(), value=st.integers(1, 255))
    def write(self, offset: int, length: int, aligned: bool, value: int) -> None:
        start, length = self._range(offset, length, aligned)
        data = bytes((value + index) & 0xFF for index in range(length))
        self.disk.write(data, offset=start)
        self.model.write(data, offset=start)

    @rule(offset=_OFFSETS, length=_LENGTHS, aligned=st.booleans(), unmap=st.booleans())
    def write_zeroes(self, offset: int, length: int, aligned: bool, unmap: bool) -> None:
        start, length = self._range(offset, length, aligned)
        self.disk.write_zeroes(offset=start, length=length, unmap=unmap)
        self.model.write_zeroes(offset=start, length=length)

    @rule(offset=_OFFSETS, length=_LENGTHS, aligned=st.booleans())
    def discard(self, offset: int, length: int, aligned: bool) -> None:
        start, length = self._range(offset, length, aligned)
        self.disk.discard(offset=start, length=length)
        self.model.discard(offset=start, length=length)
        assert self.model.settle(self.disk.read(offset=0, length=self.disk.size)) is None

    @rule(size=_OFFSETS)
    def resize(self, size: int) -> None:
        size -= size % self.unit
        self.disk.resize(size, shrink=True)
        self.model.resize(size)
        self.model.resize(self.disk.size)

    @rule()
    def flush(self) -> None:
        self.disk.flush()

    @rule()
    def reopen(self) -> None:
        self.disk.close()
        self.check_file()
        self.disk = self.open()

    @rule(offset=_OFFSETS, length=_LENGTHS)
    def read(self, offset: int, length: int) -> None:
        start, length = self._range(offset, length, False)
        found = self.disk.read(offset=start, length=length)
        assert found == self.model.read(offset=start, length=length)

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "disk"):
            assert self.disk.size == self.model.size
            found: Any = self.disk.read(offset=0, length=self.disk.size)
            assert self.model.find_difference(found) is None
