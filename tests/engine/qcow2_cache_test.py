"""The cache of table parts: bounds, order of last use, changes that stay until they are written."""

from __future__ import annotations

import ast
import inspect
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.engine.qcow2 import cache as cache_module
from qcowkit.engine.qcow2.cache import MetadataCache
from qcowkit.errors import StorageError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.recording import RecordingStorage

ENTRY = 1024


def make_cache(storage: Storage, *, entries: int) -> MetadataCache[bytearray]:
    return MetadataCache(
        storage,
        entry_size=ENTRY,
        limit=entries * ENTRY,
        decode=bytearray,
        encode=lambda value, first, last: bytes(value[first:last]),
    )


def filled(count: int) -> RecordingStorage:
    """Entry n of the file holds bytes n."""
    return RecordingStorage(MemoryStorage(b"".join(bytes([n]) * ENTRY for n in range(count))))


def place(key: int) -> int:
    return key * ENTRY


def get(cache: MetadataCache[bytearray], key: int) -> bytearray:
    return cache.get(key, offset=place(key))


def change(cache: MetadataCache[bytearray], key: int, at: int = 0, value: bytes = b"!") -> None:
    raw = cache.edit(key, offset=place(key), first=at, last=at + len(value))
    raw[at : at + len(value)] = value


def reads(storage: RecordingStorage) -> list[int]:
    """Keys that were read, in order."""
    return [call.offset // ENTRY for call in storage.of("pread")]


def test_the_cache_knows_a_storage_and_sizes_and_no_image() -> None:
    """S003-17."""
    parameters = set(inspect.signature(MetadataCache.__init__).parameters) - {"self"}
    sizes, forms = {"entry_size", "limit", "whole"}, {"decode", "encode"}
    assert parameters == {"storage", *sizes, *forms}
    tree = ast.parse(inspect.getsource(cache_module))
    known = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in known if name and name.startswith("qcowkit")}
    assert ours == {"qcowkit.storage.protocol", "qcowkit.units"}


def test_an_entry_is_read_once_and_then_found() -> None:
    storage = filled(4)
    cache = make_cache(storage, entries=4)
    first = get(cache, 2)
    assert first == bytes([2]) * ENTRY
    assert get(cache, 2) is first
    assert cache.find(2) is first
    assert reads(storage) == [2]


def test_what_the_file_lacks_of_its_last_entry_is_zeros() -> None:
    cache = make_cache(MemoryStorage(b"abc"), entries=2)
    assert get(cache, 0) == b"abc".ljust(ENTRY, b"\0")
    assert get(cache, 1) == bytes(ENTRY)


@pytest.mark.parametrize(("limit", "capacity"), [(0, 2), (ENTRY, 2), (5 * ENTRY + 7, 5)])
def test_there_is_room_for_two_entries_at_least(limit: int, capacity: int) -> None:
    cache = MetadataCache(
        filled(0), entry_size=ENTRY, limit=limit, decode=bytes, encode=lambda *_: b""
    )
    assert cache.capacity == capacity


@given(keys=st.lists(st.integers(0, 19), max_size=60), entries=st.integers(2, 8))
def test_a_cache_never_holds_more_than_it_may(keys: list[int], entries: int) -> None:
    cache = make_cache(filled(20), entries=entries)
    for key in keys:
        assert get(cache, key)[0] == key
        assert len(cache) <= entries


def test_what_is_used_again_outlives_what_was_used_once() -> None:
    storage = filled(40)
    cache = make_cache(storage, entries=4)
    for key in range(1, 30):
        get(cache, 0)
        get(cache, key)
    # Two generations come close to the order of last use, at no cost for what is found.
    assert reads(storage).count(0) <= 2


def test_a_scan_does_not_read_anything_twice_within_its_reach() -> None:
    storage = filled(20)
    cache = make_cache(storage, entries=4)
    for key in range(20):
        get(cache, key)
        get(cache, max(0, key - 1))
    assert reads(storage) == list(range(20))


def test_a_lower_limit_takes_effect_as_room_is_made() -> None:
    cache = make_cache(filled(20), entries=8)
    for key in range(8):
        get(cache, key)
    cache.set_limit(3 * ENTRY, whole=False)
    get(cache, 10)
    assert len(cache) <= 3
    cache.set_limit(8 * ENTRY, whole=True)
    for key in range(8):
        get(cache, key)
    assert len(cache) == 8


# Changes.


def test_changed_entries_stay_though_there_is_no_room_for_them() -> None:
    storage = filled(20)
    cache = make_cache(storage, entries=3)
    for key in range(5):
        change(cache, key)
    for key in range(10, 20):
        get(cache, key)
    storage.calls.clear()
    assert [get(cache, key)[:1] for key in range(5)] == [b"!"] * 5
    assert reads(storage) == []


def test_a_cache_is_crowded_when_more_than_half_of_it_is_changed() -> None:
    cache = make_cache(filled(20), entries=4)
    crowded = []
    for key in range(4):
        change(cache, key)
        crowded.append(cache.crowded)
    assert crowded == [False, False, True, True]
    cache.store(place)
    assert not cache.crowded


def test_a_cache_that_holds_everything_is_never_crowded() -> None:
    cache = make_cache(filled(4), entries=4)
    cache.set_limit(4 * ENTRY, whole=True)
    for key in range(4):
        change(cache, key)
    assert not cache.crowded


def test_stored_changes_are_in_the_file_and_no_longer_pinned() -> None:
    storage = filled(20)
    cache = make_cache(storage, entries=2)
    change(cache, 3, at=700, value=b"new")
    assert (cache.dirty, cache.dirty_keys()) == (True, [3])
    cache.store(place)
    assert (cache.dirty, cache.dirty_keys()) == (False, [])
    assert storage.pread(ENTRY, offset=place(3))[700:703] == b"new"
    for key in range(10, 14):
        get(cache, key)
    assert get(cache, 3)[700:703] == b"new"
    assert reads(storage).count(3) == 3


def test_only_whole_sectors_that_changed_are_written() -> None:
    """A torn write cannot mix two states of one word then."""
    storage = filled(4)
    cache = make_cache(storage, entries=4)
    change(cache, 1, at=510, value=b"abcd")
    change(cache, 2, at=600)
    change(cache, 0, at=8)
    cache.store(place)
    written = [(call.offset, call.length) for call in storage.of("pwrite")]
    assert written == [(0, 512), (place(1), 1024), (place(2) + 512, 512)]


def test_neighbours_are_written_with_one_call_in_the_order_of_the_file() -> None:
    storage = filled(8)
    cache = make_cache(storage, entries=8)
    places = {0: 3, 1: 5, 2: 4, 3: 0}
    for key in places:
        raw = cache.edit(key, offset=place(places[key]), first=0, last=ENTRY)
        raw[:] = bytes([100 + key]) * ENTRY
    cache.store(lambda key: place(places[key]))
    written = [(call.offset, call.length) for call in storage.of("pwrite")]
    assert written == [(0, ENTRY), (place(3), 3 * ENTRY)]
    assert storage.pread(ENTRY, offset=place(4)) == bytes([102]) * ENTRY


def test_parts_of_neighbours_that_do_not_touch_are_written_apart() -> None:
    storage = filled(2)
    cache = make_cache(storage, entries=2)
    change(cache, 0, at=0)
    change(cache, 1, at=0)
    cache.store(place)
    assert [(call.offset, call.length) for call in storage.of("pwrite")] == [(0, 512), (ENTRY, 512)]


def test_a_new_entry_is_written_whole_and_never_read() -> None:
    storage = filled(0)
    cache = make_cache(storage, entries=2)
    cache.put(7, bytearray(ENTRY))
    change(cache, 7, at=3)
    cache.store(place)
    assert reads(storage) == []
    (call,) = storage.of("pwrite")
    assert (call.offset, call.length) == (place(7), ENTRY)


def test_changes_stay_when_storing_fails_even_those_that_were_written() -> None:
    inner = MemoryStorage(bytes(8 * ENTRY))
    cache = make_cache(FaultyStorage(inner, Fault(operation="pwrite", call=2)), entries=8)
    for key in (0, 2, 4):
        change(cache, key)
    stores = cache.stores
    with pytest.raises(StorageError):
        cache.store(place)
    assert cache.dirty_keys() == [0, 2, 4]
    assert cache.stores == stores
    cache.store(place)
    assert [inner.pread(1, offset=place(key)) for key in (0, 2, 4)] == [b"!"] * 3
    assert not cache.dirty


def test_a_failed_read_leaves_nothing_behind() -> None:
    inner = MemoryStorage(b"x" * ENTRY)
    cache = make_cache(FaultyStorage(inner, Fault(operation="pread")), entries=2)
    with pytest.raises(StorageError):
        get(cache, 0)
    assert len(cache) == 0
    assert get(cache, 0) == b"x" * ENTRY


# Leaving.


def test_dropped_entries_are_gone_changed_or_not() -> None:
    """S003-23: what is read next at their place is what the file has."""
    storage = filled(8)
    cache = make_cache(storage, entries=8)
    for key in range(4):
        change(cache, key)
    get(cache, 5)
    cache.drop(range(2, 6))
    assert cache.dirty_keys() == [0, 1]
    storage.calls.clear()
    assert get(cache, 3)[:1] == bytes([3])
    assert reads(storage) == [3]
    cache.drop(iter([0]))
    assert cache.dirty_keys() == [1]


def test_dropping_a_huge_range_costs_no_more_than_what_is_there() -> None:
    cache = make_cache(filled(8), entries=8)
    change(cache, 1)
    cache.drop(range(1 << 60))
    assert len(cache) == 0


def test_what_is_not_used_between_two_cleanings_is_dropped() -> None:
    """S003-01."""
    storage = filled(8)
    cache = make_cache(storage, entries=8)
    get(cache, 0)
    get(cache, 1)
    change(cache, 2)
    cache.clean()
    get(cache, 1)
    cache.clean()
    storage.calls.clear()
    assert get(cache, 1)[:1] == b"\1"
    assert get(cache, 2)[:1] == b"!"
    assert reads(storage) == []
    assert get(cache, 0)[:1] == b"\0"
    assert reads(storage) == [0]


def test_a_changed_entry_outlives_any_number_of_cleanings() -> None:
    cache = make_cache(filled(8), entries=8)
    change(cache, 2)
    for _ in range(4):
        cache.clean()
    assert cache.dirty_keys() == [2]
    cache.store(place)
    cache.clean()
    cache.clean()
    assert len(cache) == 0


# Several threads.


class Overtaken(MemoryStorage):
    """Storage whose first read is overtaken by what `meanwhile` does."""

    meanwhile: object = None

    def pread(self, length: int, *, offset: int) -> bytes:
        data = super().pread(length, offset=offset)
        act, self.meanwhile = self.meanwhile, None
        if callable(act):
            act()
        return data


def test_an_entry_that_was_read_before_a_write_back_is_read_again() -> None:
    """Otherwise the old content would stay in memory for good."""
    storage = Overtaken(bytes(8 * ENTRY))
    cache = make_cache(storage, entries=2)

    def write_back() -> None:
        change(cache, 0, value=b"new")
        cache.store(place)
        # Out of memory again: only the file knows of it.
        cache.drop(range(1))

    storage.meanwhile = write_back
    assert get(cache, 0)[:3] == b"new"


def test_an_entry_that_somebody_else_has_loaded_meanwhile_is_taken() -> None:
    storage = Overtaken(bytes(8 * ENTRY))
    cache = make_cache(storage, entries=2)
    storage.meanwhile = lambda: change(cache, 0, value=b"new")
    assert get(cache, 0)[:3] == b"new"
    assert cache.dirty_keys() == [0]


def test_an_entry_that_was_pushed_out_before_its_change_is_found_again() -> None:
    storage = filled(20)
    cache = make_cache(storage, entries=2)
    value = get(cache, 0)
    assert cache.touch(0, value, first=0, last=8)
    cache.store(place)
    for key in range(5, 10):
        get(cache, key)
    assert not cache.touch(0, value, first=0, last=8)
    assert not cache.dirty


def test_a_touch_marks_all_that_was_touched() -> None:
    storage = filled(4)
    cache = make_cache(storage, entries=4)
    value = get(cache, 0)
    for at in (600, 8, 700):
        cache.touch(0, value, first=at, last=at + 8)
    cache.store(place)
    assert [(call.offset, call.length) for call in storage.of("pwrite")] == [(0, 1024)]


def test_readers_beside_a_writer_never_see_an_old_entry() -> None:
    """Whoever reads after a change was made finds it, whatever was pushed out meanwhile."""
    cache = make_cache(MemoryStorage(bytes(12 * ENTRY)), entries=2)
    written = [0] * 12
    wrong: list[tuple[int, int, int]] = []
    done = threading.Event()

    def read(seed: int) -> None:
        key = seed
        while not done.is_set():
            key = (key * 5 + 3) % 12
            least = written[key]
            found = int.from_bytes(get(cache, key)[:8], "big")
            if found < least:
                wrong.append((key, found, least))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for step in range(1, 1500):
        key = step * 7 % 12
        change(cache, key, value=step.to_bytes(8, "big"))
        written[key] = step
        if cache.crowded:
            cache.store(place)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_entry_whose_place_may_have_changed_while_it_was_read_is_not_kept() -> None:
    storage = filled(4)
    cache = make_cache(storage, entries=4)
    change(cache, 3)
    before = cache.stores
    cache.store(place)
    assert cache.get_if(0, offset=place(0), stores=before) is None
    assert cache.get_if(0, offset=place(0), stores=cache.stores) == bytes([0]) * ENTRY
