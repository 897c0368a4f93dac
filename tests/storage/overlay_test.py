"""A storage over another: the conformance suite, and that the base stays as it is."""

from __future__ import annotations

import errno

import pytest

from qcowkit.errors import StorageError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.overlay import OverlayStorage
from qcowkit.testing.storage_suite import StorageSuite
from qcowkit.units import KiB


class TestOverlayOverContent(StorageSuite):
    def make(self, content: bytes) -> OverlayStorage:
        return OverlayStorage(MemoryStorage(content, writable=False))


class TestOverlayOfItsOwnContent(StorageSuite):
    def make(self, content: bytes) -> OverlayStorage:
        storage = OverlayStorage(MemoryStorage(b"\xff" * (len(content) + 5000), writable=False))
        storage.pwrite([content], offset=0)
        storage.truncate(len(content))
        return storage


def test_the_base_is_not_changed() -> None:
    base = MemoryStorage(b"abcdef")
    storage = OverlayStorage(base)
    storage.pwrite([b"X"], offset=2)
    storage.truncate(4)
    storage.zero(offset=10_000, length=3, unmap=True)
    storage.close()
    assert base.to_bytes() == b"abcdef"


def test_changes_lie_over_the_base() -> None:
    storage = OverlayStorage(MemoryStorage(b"a" * 10_000))
    storage.pwrite([b"X" * 5000], offset=4000)
    assert storage.pread(20_000, offset=0) == b"a" * 4000 + b"X" * 5000 + b"a" * 1000


def test_what_was_cut_off_does_not_come_back() -> None:
    storage = OverlayStorage(MemoryStorage(b"a" * 10_000))
    storage.pwrite([b"X" * 100], offset=5000)
    storage.truncate(5050)
    storage.truncate(10_000)
    assert storage.pread(10_000, offset=0) == b"a" * 5000 + b"X" * 50 + bytes(4950)


def test_a_change_above_the_limit_fails_as_on_a_full_disk() -> None:
    storage = OverlayStorage(MemoryStorage(b"a"), limit=8 * KiB)
    storage.pwrite([bytes(8 * KiB)], offset=0)
    with pytest.raises(StorageError) as failure:
        storage.pwrite([b"x"], offset=9 * KiB)
    assert failure.value.errno == errno.ENOSPC
