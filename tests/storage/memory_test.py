"""Memory as storage: the conformance suite, and what is its own."""

from __future__ import annotations

import errno

import pytest

from qcowkit.errors import StorageError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.storage_suite import StorageSuite, failure_of


class TestMemoryStorage(StorageSuite):
    def make(self, content: bytes) -> MemoryStorage:
        return MemoryStorage(content)


def test_the_content_is_a_copy() -> None:
    original = bytearray(b"abc")
    storage = MemoryStorage(original)
    original[0] = 0
    assert storage.to_bytes() == b"abc"


def test_a_read_only_storage_refuses_every_change() -> None:
    storage = MemoryStorage(b"abc", writable=False)
    assert not storage.caps.writable
    assert failure_of(lambda: storage.pwrite([b"x"], offset=0)) == errno.EBADF
    assert failure_of(lambda: storage.truncate(0)) == errno.EBADF
    assert storage.to_bytes() == b"abc"


def test_a_size_that_memory_cannot_hold_is_a_storage_error() -> None:
    storage = MemoryStorage(name="<small>")
    with pytest.raises(StorageError, match="<small>: truncate: Cannot allocate memory"):
        storage.truncate(1 << 62)
