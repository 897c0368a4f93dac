"""What every writable storage must do. A test class derives from StorageSuite and says how to make
one; pytest collects the tests from there. Uses nothing but plain assertions and the protocol."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable

from qcowkit.errors import StorageError
from qcowkit.storage.protocol import Storage
from qcowkit.units import KiB


def failure_of(call: Callable[[], object]) -> int:
    """The errno of the StorageError that `call` raises. AssertionError if it raises none."""
    try:
        call()
    except StorageError as error:
        return error.errno
    raise AssertionError("no StorageError was raised")


def data_bytes(storage: Storage, *, offset: int, length: int) -> bytes:
    """The range as its reported data alone describes it; zeros everywhere else."""
    found = bytearray(length)
    for start, size in storage.iter_data(offset=offset, length=length):
        found[start - offset : start - offset + size] = storage.pread(size, offset=start)
    return bytes(found)


class StorageSuite(ABC):
    """Conformance of one kind of storage. Derive, name the class Test*, and override `make`."""

    @abstractmethod
    def make(self, content: bytes) -> Storage:
        """A new writable storage with that content; the derived class sees to its clean-up."""

    def test_a_new_storage_holds_its_content(self) -> None:
        storage = self.make(b"abcdef")
        assert storage.size() == 6
        assert storage.pread(6, offset=0) == b"abcdef"

    def test_a_read_ends_where_the_storage_ends(self) -> None:
        storage = self.make(b"abcdef")
        assert storage.pread(10, offset=4) == b"ef"
        assert storage.pread(10, offset=6) == b""
        assert storage.pread(10, offset=1 << 40) == b""

    def test_pread_into_fills_the_buffer_and_says_how_much(self) -> None:
        storage = self.make(b"abcdef")
        buffer = bytearray(b"........")
        assert storage.pread_into(buffer, offset=2) == 4
        assert buffer == b"cdef...."
        assert storage.pread_into(memoryview(buffer)[:3], offset=0) == 3
        assert buffer == b"abcf...."

    def test_a_negative_offset_is_refused(self) -> None:
        storage = self.make(b"abcdef")
        assert failure_of(lambda: storage.pread(1, offset=-1)) == errno.EINVAL
        assert failure_of(lambda: storage.pwrite([b"x"], offset=-1)) == errno.EINVAL

    def test_buffers_are_written_one_behind_the_other(self) -> None:
        storage = self.make(b"..........")
        storage.pwrite([b"ab", b"", bytearray(b"c"), memoryview(b"de")], offset=2)
        assert storage.pread(10, offset=0) == b"..abcde..."

    def test_more_buffers_than_one_system_call_takes_are_all_written(self) -> None:
        storage = self.make(b"")
        parts = [bytes([index % 251]) * (index % 3) for index in range(3000)]
        storage.pwrite(parts, offset=5)
        assert storage.pread(10_000, offset=0) == bytes(5) + b"".join(parts)

    def test_a_write_beyond_the_end_leaves_zeros_before_it(self) -> None:
        storage = self.make(b"ab")
        storage.pwrite([b"z"], offset=10 * KiB)
        assert storage.size() == 10 * KiB + 1
        assert storage.pread(11 * KiB, offset=0) == b"ab" + bytes(10 * KiB - 2) + b"z"

    def test_writing_nothing_changes_nothing(self) -> None:
        storage = self.make(b"ab")
        storage.pwrite([], offset=100)
        storage.pwrite([b"", b""], offset=100)
        assert storage.size() == 2

    def test_zero_clears_exactly_the_range(self) -> None:
        for unmap in (False, True):
            storage = self.make(b"x" * (300 * KiB))
            storage.zero(offset=5, length=200 * KiB, unmap=unmap)
            expected = b"xxxxx" + bytes(200 * KiB) + b"x" * (100 * KiB - 5)
            assert storage.pread(300 * KiB, offset=0) == expected

    def test_zero_beyond_the_end_grows_the_storage(self) -> None:
        for unmap in (False, True):
            storage = self.make(b"abcdef")
            storage.zero(offset=4, length=8 * KiB, unmap=unmap)
            assert storage.pread(20 * KiB, offset=0) == b"abcd" + bytes(8 * KiB)
            storage.zero(offset=20 * KiB, length=1, unmap=unmap)
            assert storage.size() == 20 * KiB + 1

    def test_zero_of_nothing_changes_nothing(self) -> None:
        storage = self.make(b"abcdef")
        storage.zero(offset=100, length=0, unmap=True)
        assert storage.pread(10, offset=0) == b"abcdef"

    def test_discard_leaves_everything_outside_the_range_alone(self) -> None:
        storage = self.make(b"x" * (64 * KiB))
        storage.discard(offset=8 * KiB, length=16 * KiB)
        assert storage.size() == 64 * KiB
        assert storage.pread(8 * KiB, offset=0) == b"x" * (8 * KiB)
        assert storage.pread(64 * KiB, offset=24 * KiB) == b"x" * (40 * KiB)

    def test_discard_never_grows_the_storage(self) -> None:
        storage = self.make(b"abcdef")
        storage.discard(offset=2, length=1 << 30)
        assert storage.size() == 6

    def test_allocate_keeps_the_content(self) -> None:
        storage = self.make(b"abcdef")
        storage.allocate(offset=0, length=4 * KiB)
        assert storage.pread(6, offset=0) == b"abcdef"
        assert storage.allocated() >= 4 * KiB

    def test_truncate_cuts_and_grows_with_zeros(self) -> None:
        storage = self.make(b"abcdef")
        storage.truncate(3)
        storage.truncate(5)
        assert storage.pread(10, offset=0) == b"abc\0\0"

    def test_what_is_no_data_reads_as_zeros(self) -> None:
        storage = self.make(b"")
        storage.truncate(2048 * KiB)
        storage.pwrite([b"x" * (64 * KiB)], offset=512 * KiB)
        storage.pwrite([b"y" * (64 * KiB)], offset=1984 * KiB)
        whole = storage.pread(2048 * KiB, offset=0)
        assert data_bytes(storage, offset=0, length=2048 * KiB) == whole

    def test_data_is_reported_ascending_and_within_the_range(self) -> None:
        storage = self.make(b"x" * (256 * KiB))
        storage.truncate(512 * KiB)
        found = list(storage.iter_data(offset=1000, length=100_000))
        position = 1000
        for start, length in found:
            assert start >= position
            assert length > 0
            position = start + length
        assert position <= 101_000
        assert data_bytes(storage, offset=1000, length=100_000) == b"x" * 100_000

    def test_there_is_no_data_beyond_the_end(self) -> None:
        storage = self.make(b"abcdef")
        assert list(storage.iter_data(offset=6, length=1 << 40)) == []
        assert list(storage.iter_data(offset=2, length=1 << 40)) == [(2, 4)]

    def test_a_copy_within_the_host_is_whole_or_not_begun(self) -> None:
        source, target = self.make(b"x" * (128 * KiB)), self.make(b"y" * (192 * KiB))
        for call in (source.clone_to, source.copy_to):
            done = call(target, offset=0, length=64 * KiB, target_offset=64 * KiB)
            if done:
                assert target.pread(64 * KiB, offset=64 * KiB) == b"x" * (64 * KiB)
            assert target.pread(64 * KiB, offset=0) == b"y" * (64 * KiB)
            assert target.pread(64 * KiB, offset=128 * KiB) == b"y" * (64 * KiB)

    def test_flush_may_be_called_again_and_again(self) -> None:
        storage = self.make(b"abcdef")
        storage.flush()
        storage.flush()

    def test_a_closed_storage_refuses_and_may_be_closed_again(self) -> None:
        storage = self.make(b"abcdef")
        storage.close()
        storage.close()
        calls: tuple[Callable[[], object], ...] = (
            storage.size,
            storage.flush,
            lambda: storage.pread(1, offset=0),
            lambda: storage.pread_into(bytearray(1), offset=0),
            lambda: storage.pwrite([b"x"], offset=0),
            lambda: storage.zero(offset=0, length=1, unmap=True),
            lambda: storage.discard(offset=0, length=1),
            lambda: storage.allocate(offset=0, length=1),
            lambda: storage.truncate(0),
            lambda: list(storage.iter_data(offset=0, length=1)),
        )
        for call in calls:
            assert failure_of(call) == errno.EBADF
