"""Crash states: what can be left of a run, all of it where it is little, a fair sample of more."""

from __future__ import annotations

import itertools

from qcowkit.testing.crash_effects import Content
from qcowkit.testing.crash_states import EXHAUSTIVE, iter_crash_states, split_epochs
from qcowkit.testing.crash_storage import CrashFiles


def files_of(*contents: bytes) -> CrashFiles:
    return CrashFiles([Content.of(content) for content in contents])


def outcomes(files: CrashFiles, *, seed: int = 0) -> set[tuple[bytes, ...]]:
    return {
        tuple(content.to_bytes() for content in state.contents)
        for state in iter_crash_states(files, seed=seed)
    }


def test_a_run_without_changes_has_one_state() -> None:
    assert outcomes(files_of(b"abc")) == {(b"abc",)}


def test_writes_that_were_not_flushed_survive_in_any_combination() -> None:
    files = files_of(b"....")
    storage = files.open()
    for index in range(4):
        storage.pwrite([b"%d" % index], offset=index)
    expected = {
        (b"".join(b"%d" % index if kept else b"." for index, kept in enumerate(choice)),)
        for choice in itertools.product((False, True), repeat=4)
    }
    assert outcomes(files) == expected


def test_what_was_flushed_is_always_there() -> None:
    files = files_of(b"....")
    storage = files.open()
    storage.pwrite([b"1"], offset=0)
    storage.flush()
    storage.pwrite([b"2"], offset=1)
    assert outcomes(files) == {(b"....",), (b"1...",), (b"12..",)}


def test_of_two_writes_to_one_place_the_earlier_never_wins_over_the_later() -> None:
    files = files_of(b".")
    storage = files.open()
    storage.pwrite([b"1"], offset=0)
    storage.pwrite([b"2"], offset=0)
    states = [state for state in iter_crash_states(files, seed=0) if "[0-1]" in state.label]
    assert {state.contents[0].to_bytes() for state in states} <= {b"2"}
    assert outcomes(files) == {(b".",), (b"1",), (b"2",)}


def test_each_file_is_as_durable_as_its_own_flushes_make_it() -> None:
    files = files_of(b".", b".")
    image, data = files.open(0), files.open(1)
    data.pwrite([b"d"], offset=0)
    image.pwrite([b"i"], offset=0)
    image.flush()
    # The data file was never flushed: its write may be missing even now.
    assert outcomes(files) == {(b".", b"."), (b".", b"d"), (b"i", b"."), (b"i", b"d")}


def test_sizes_survive_apart_from_data() -> None:
    files = files_of(b"")
    files.open().pwrite([b"ab"], offset=0)
    assert outcomes(files) == {(b"",), (b"\0\0",), (b"ab",)}


def test_a_later_growth_implies_the_cut_before_it() -> None:
    files = files_of(b"abcd")
    storage = files.open()
    storage.truncate(1)
    storage.truncate(4)
    assert outcomes(files) == {(b"abcd",), (b"a",), (b"a\0\0\0",)}


def test_a_write_of_three_sectors_is_torn_in_every_way() -> None:
    files = files_of(b"." * 1536)
    files.open().pwrite([b"x" * 1536], offset=0)
    parts = (b"." * 512, b"x" * 512)
    assert outcomes(files) == {(b"".join(choice),) for choice in itertools.product(parts, repeat=3)}


def test_a_torn_write_at_the_end_of_the_file_shows_its_sectors() -> None:
    files = files_of(b"")
    files.open().pwrite([b"x" * 1024], offset=0)
    assert (b"x" * 512 + bytes(512),) in outcomes(files)
    assert (bytes(512) + b"x" * 512,) in outcomes(files)


def pages(content: bytes) -> list[bytes]:
    return [content[begin : begin + 4096] for begin in range(0, len(content), 4096)]


def test_a_large_write_is_torn_at_prefixes_at_random_and_by_pages() -> None:
    files = files_of(b"." * 65536)
    files.open().pwrite([b"x" * 65536], offset=0)
    torn = [content for (content,) in outcomes(files) if len(set(content)) == 2]
    prefixes = [one for one in torn if b"." not in one.rstrip(b".")]
    by_pages = [one for one in torn if all(len(set(page)) == 1 for page in pages(one))]
    assert len(prefixes) >= 4
    assert len(by_pages) >= 4
    assert len(torn) > len(prefixes) + len(by_pages)


def test_many_writes_are_sampled_with_each_single_omission_and_survivor() -> None:
    files = files_of(bytes(20))
    storage = files.open()
    for index in range(20):
        storage.pwrite([b"x"], offset=index)
    assert EXHAUSTIVE < 20
    found = outcomes(files)
    for index in range(20):
        assert (bytes(index) + b"x" + bytes(19 - index),) in found
        assert (b"x" * index + b"\0" + b"x" * (19 - index),) in found
        assert (b"x" * index + bytes(20 - index),) in found
    assert len(found) > 20 * 3 + 30


def test_states_are_distinct() -> None:
    files = files_of(b"." * 8)
    storage = files.open()
    for index in range(8):
        storage.pwrite([b"x"], offset=index % 4)
        if index == 4:
            storage.flush()
    keys = [state.key() for state in iter_crash_states(files, seed=3)]
    assert len(keys) == len(set(keys))


def test_the_same_content_is_another_state_after_another_promise() -> None:
    files = files_of(b".")
    files.open().pwrite([b"."], offset=0)
    promise = files.tick()
    files.open().flush()
    assert len(list(iter_crash_states(files, seed=0))) == 1
    states = list(iter_crash_states(files, seed=0, marks=[promise]))
    assert sorted(state.last >= promise for state in states) == [True, True]


def test_the_same_seed_gives_the_same_states() -> None:
    def labels(seed: int) -> list[str]:
        files = files_of(bytes(4096))
        storage = files.open()
        for index in range(12):
            storage.pwrite([b"x" * 600], offset=index * 300)
        return [state.label for state in iter_crash_states(files, seed=seed, budget=60)]

    assert labels(1) == labels(1)
    assert labels(1) != labels(2)


def test_a_budget_is_spread_over_all_epochs() -> None:
    files = files_of(bytes(64))
    storage = files.open()
    for index in range(64):
        storage.pwrite([b"x"], offset=index)
        if index % 8 == 7:
            storage.flush()
    states = list(iter_crash_states(files, seed=0, budget=50))
    assert len(states) == 50
    epochs = [state.label.partition(",")[0] for state in states]
    counts = {epoch: epochs.count(epoch) for epoch in epochs}
    assert len(counts) == 9
    # The last epoch is empty and has but one state.
    assert max(counts.values()) - min(count for count in counts.values() if count > 1) <= 1


def test_a_state_knows_between_which_moments_the_cut_came() -> None:
    files = files_of(b"..")
    storage = files.open()
    storage.pwrite([b"1"], offset=0)
    storage.pwrite([b"2"], offset=1)
    middle = files.tick()
    storage.flush()
    by_content = {state.contents[0].to_bytes(): state for state in iter_crash_states(files, seed=0)}
    assert by_content[b".."].first == 0
    assert by_content[b"1."].first == files.effects[0].sequence
    assert by_content[b".2"].first == files.effects[1].sequence
    assert by_content[b"1."].last == middle


def test_epochs_end_at_the_flush_of_any_file() -> None:
    files = files_of(b".", b".")
    image, data = files.open(0), files.open(1)
    data.pwrite([b"d"], offset=0)
    image.flush()
    image.pwrite([b"i"], offset=0)
    data.flush()
    epochs = split_epochs(files)
    assert [len(epoch.effects) for epoch in epochs] == [1, 2, 1]
    assert epochs[2].effects == (files.effects[1],)
