"""Storage that can be crashed: it is a storage, and its journal tells how it came to be."""

from __future__ import annotations

import errno
import random

from qcowkit.testing.crash_effects import (
    PAGE,
    Content,
    SizeEffect,
    WriteEffect,
    ZeroEffect,
    count_sectors,
    replay,
    tear,
)
from qcowkit.testing.crash_storage import CrashFiles, CrashStorage
from qcowkit.testing.storage_suite import StorageSuite, failure_of


def files_of(*contents: bytes) -> CrashFiles:
    return CrashFiles([Content.of(content) for content in contents])


class TestCrashStorage(StorageSuite):
    def make(self, content: bytes) -> CrashStorage:
        return files_of(content).open()


class TestCrashStorageThatKeepsWhatIsDiscarded(StorageSuite):
    def make(self, content: bytes) -> CrashStorage:
        return CrashFiles([Content.of(content)], discard_clears=False).open()


def test_a_read_only_handle_refuses_every_change() -> None:
    storage = files_of(b"abc").open(writable=False)
    assert failure_of(lambda: storage.pwrite([b"x"], offset=0)) == errno.EBADF
    assert failure_of(lambda: storage.truncate(1)) == errno.EBADF
    assert storage.pread(3, offset=0) == b"abc"


def test_a_write_that_grows_the_file_is_two_effects() -> None:
    files = files_of(b"abc")
    files.open().pwrite([b"x", b"yz"], offset=2)
    data, size = files.effects
    assert data == WriteEffect(sequence=1, file=0, offset=2, data=b"xyz")
    assert size == SizeEffect(sequence=2, file=0, size=5, cut=False)


def test_data_without_their_size_are_not_seen() -> None:
    files = files_of(b"abc")
    files.open().pwrite([b"xyz"], offset=2)
    assert replay(files.bases[0], files.effects[:1]).to_bytes() == b"abx"


def test_a_size_without_its_data_is_zeros() -> None:
    files = files_of(b"abc")
    files.open().pwrite([b"xyz"], offset=2)
    assert replay(files.bases[0], files.effects[1:]).to_bytes() == b"abc\0\0"


def test_what_a_lost_growth_held_is_not_found_by_a_later_one() -> None:
    crashed = files_of(b"abc")
    crashed.open().pwrite([b"secret"], offset=3)
    after = crashed.like([replay(crashed.bases[0], crashed.effects[:1])])
    storage = after.open()
    storage.truncate(9)
    assert storage.pread(9, offset=0) == b"abc" + bytes(6)


def test_a_cut_and_a_growth_leave_zeros() -> None:
    files = files_of(b"abcdef")
    storage = files.open()
    storage.truncate(2)
    storage.truncate(4)
    assert replay(files.bases[0], files.effects).to_bytes() == b"ab\0\0"
    assert storage.pread(9, offset=0) == b"ab\0\0"


def test_a_flush_makes_only_its_own_file_durable() -> None:
    files = files_of(b"aaaa", b"bbbb")
    first, second = files.open(0), files.open(1)
    first.pwrite([b"1"], offset=0)
    second.pwrite([b"2"], offset=0)
    first.flush()
    lost = files.crash(keep=False)
    assert [content.to_bytes() for content in lost.live] == [b"1aaa", b"bbbb"]
    kept = files.crash(keep=True)
    assert [content.to_bytes() for content in kept.live] == [b"1aaa", b"2bbb"]


def test_a_failed_flush_loses_data_that_the_cache_still_shows() -> None:
    files = files_of(b"aaaa")
    storage = files.open()
    storage.pwrite([b"1"], offset=0)
    files.fail_flush(0)
    storage.pwrite([b"2"], offset=1)
    storage.flush()
    assert storage.pread(4, offset=0) == b"12aa"
    assert files.crash().live[0].to_bytes() == b"a2aa"


def test_the_journal_can_begin_anew() -> None:
    files = files_of(b"aaaa")
    files.open().pwrite([b"b"], offset=0)
    files.begin()
    assert files.effects == []
    assert files.bases[0].to_bytes() == b"baaa"


def test_contents_share_pages_and_not_their_changes() -> None:
    base = Content.of(bytes(range(1, 256)) * 100)
    other = base.copy()
    other.write(b"new", offset=PAGE + 7)
    assert other.pages[0] is base.pages[0]
    assert base.to_bytes() == bytes(range(1, 256)) * 100


def test_equal_contents_have_equal_keys_however_they_came_to_be() -> None:
    one, other = Content.of(b"a" * (3 * PAGE)), Content.of(b"a" * PAGE)
    other.write(b"b" * (2 * PAGE), offset=PAGE)
    other.size = 3 * PAGE
    assert one.key() != other.key()
    other.write(b"a" * (2 * PAGE), offset=PAGE)
    assert one.key() == other.key()
    one.clear(offset=0, length=PAGE)
    other.write(bytes(PAGE), offset=0)
    assert one.key() == other.key()


def test_a_torn_write_keeps_whole_host_sectors_only() -> None:
    effect = WriteEffect(sequence=1, file=0, offset=500, data=b"x" * 1000)
    assert count_sectors(effect) == 3
    content = replay(Content.of(bytes(2000)), tear(effect, [0, 2]))
    assert content.to_bytes() == bytes(500) + b"x" * 12 + bytes(512) + b"x" * 476 + bytes(500)


def test_a_torn_hole_keeps_whole_host_sectors_only() -> None:
    effect = ZeroEffect(sequence=1, file=0, offset=0, length=1024)
    content = replay(Content.of(b"x" * 2000), tear(effect, [1]))
    assert content.to_bytes() == b"x" * 512 + bytes(512) + b"x" * 976


def test_random_changes_agree_with_a_plain_array() -> None:
    noise = random.Random(4)
    plain, content = bytearray(5 * PAGE), Content(size=5 * PAGE)
    for _ in range(300):
        offset = noise.randrange(5 * PAGE)
        length = min(noise.choice((1, 511, 512, PAGE, 2 * PAGE)), 5 * PAGE - offset)
        if noise.random() < 0.3:
            content.clear(offset=offset, length=length)
            plain[offset : offset + length] = bytes(length)
        else:
            data = noise.randbytes(length)
            content.write(data, offset=offset)
            plain[offset : offset + length] = data
    assert content.to_bytes() == plain
