"""The guest's log: which values a sector may hold after a crash at each moment."""

from __future__ import annotations

import itertools

import numpy as np

from qcowkit.testing.guest_log import GuestLog, sector_values, values_of
from qcowkit.testing.stamps import make_stamps

OLD, BELOW = 2, 4


def log_of(
    *, size: int = 4, capacity: int = 8, backing: int = 0, durable_sizes: bool = False
) -> GuestLog:
    ticks = itertools.count(1)
    return GuestLog(
        lambda: next(ticks),
        capacity=capacity,
        limit=16,
        initial=sector_values(size, [(0, size, OLD)]),
        backing=sector_values(backing, [(0, backing, BELOW)]),
        durable_sizes=durable_sizes,
    )


def write(log: GuestLog, start: int, stop: int, value: int) -> None:
    log.acknowledge(log.begin_write(start=start, stop=stop, value=value))


def flush(log: GuestLog) -> None:
    log.acknowledge(log.begin_flush())


def allowed(log: GuestLog, sector: int, moment: int | None = None) -> list[int]:
    moment = log.marks[-1] if moment is None else moment
    return [int(value) for value in np.flatnonzero(log.allowed(moment).values[sector, :-1])]


def disk(*values: int) -> bytes:
    sectors = [
        make_stamps(first=index, count=1, value=value) if value else bytes(512)
        for index, value in enumerate(values)
    ]
    return b"".join(sectors)


def test_a_write_that_was_not_flushed_may_be_there_or_not() -> None:
    log = log_of()
    write(log, 0, 2, 6)
    assert allowed(log, 0) == [OLD, 6]
    assert allowed(log, 2) == [OLD]


def test_a_flushed_write_is_there() -> None:
    log = log_of()
    write(log, 0, 2, 6)
    flush(log)
    assert allowed(log, 0) == [6]


def test_all_values_since_the_flush_may_be_there() -> None:
    log = log_of()
    write(log, 0, 1, 6)
    flush(log)
    write(log, 0, 1, 8)
    write(log, 0, 1, 10)
    assert allowed(log, 0) == [6, 8, 10]


def test_a_write_counts_from_its_begin_and_a_flush_from_its_end() -> None:
    log = log_of()
    first = log.begin_write(start=0, stop=1, value=6)
    assert allowed(log, 0, first.begun - 1) == [OLD]
    assert allowed(log, 0, first.begun) == [OLD, 6]
    log.acknowledge(first)
    barrier = log.begin_flush()
    assert allowed(log, 0) == [OLD, 6]
    log.acknowledge(barrier)
    assert allowed(log, 0) == [6]


def test_a_flush_that_failed_promises_nothing() -> None:
    log = log_of()
    write(log, 0, 1, 6)
    log.fail(log.begin_flush())
    assert allowed(log, 0) == [OLD, 6]


def test_a_write_that_failed_may_be_there_ever_after() -> None:
    log = log_of()
    log.fail(log.begin_write(start=0, stop=1, value=6))
    flush(log)
    assert allowed(log, 0) == [OLD, 6]
    write(log, 0, 1, 8)
    flush(log)
    assert allowed(log, 0) == [8]


def test_a_write_that_failed_may_have_been_cut_within_a_sector() -> None:
    log = log_of(size=1)
    log.fail(log.begin_write(start=0, stop=1, value=6))
    flush(log)
    torn = disk(6)[:100] + disk(OLD)[100:]
    moment = log.marks[-1]
    assert log.judge(torn, first=moment, last=moment) == []
    assert log.judge(disk(6)[:100] + disk(8)[100:], first=moment, last=moment) != []
    write(log, 0, 1, 8)
    flush(log)
    moment = log.marks[-1]
    assert log.judge(torn, first=moment, last=moment) != []


def test_a_refused_operation_leaves_no_trace() -> None:
    log = log_of()
    log.withdraw(log.begin_write(start=0, stop=1, value=6))
    flush(log)
    assert allowed(log, 0) == [OLD]


def test_discarded_sectors_are_zeros_or_as_before_and_never_what_lies_below() -> None:
    log = log_of(backing=4)
    log.acknowledge(log.begin_discard(start=0, stop=1))
    assert allowed(log, 0) == [0, OLD]
    flush(log)
    assert allowed(log, 0) == [0, OLD]


def test_what_was_observed_after_a_discard_is_what_a_flush_keeps() -> None:
    log = log_of()
    discard = log.begin_discard(start=0, stop=2)
    log.acknowledge(discard)
    assert log.observe(discard, disk(0, OLD, OLD, OLD)) == []
    assert allowed(log, 0) == [0, OLD]
    flush(log)
    assert (allowed(log, 0), allowed(log, 1)) == ([0], [OLD])


def test_a_discard_that_shows_something_else_is_noticed() -> None:
    log = log_of(backing=4)
    discard = log.begin_discard(start=0, stop=1)
    log.acknowledge(discard)
    assert log.observe(discard, disk(BELOW, OLD, OLD, OLD)) == [
        "sector 0 holds value 4 of sector 0, expected value 0, 2"
    ]


def test_what_a_larger_disk_adds_is_zeros() -> None:
    log = log_of(size=4, backing=8)
    log.acknowledge(log.begin_resize(6))
    last = log.marks[-1]
    assert log.allowed(last).sizes == {4, 6}
    assert log.judge(disk(OLD, OLD, OLD, OLD, 0, 0), first=last, last=last) == []
    assert log.judge(disk(OLD, OLD, OLD, OLD, 0, BELOW), first=last, last=last) != []


def test_a_disk_that_shrinks_shows_its_lost_part_in_any_way_that_is_its_own() -> None:
    log = log_of(size=4, backing=4)
    shrink = log.begin_resize(2)
    for lost in (0, OLD, BELOW):
        assert log.judge(disk(OLD, OLD, lost, OLD), first=shrink.begun, last=shrink.begun) == []
    assert log.judge(disk(OLD, BELOW, OLD, OLD), first=shrink.begun, last=shrink.begun) != []


def test_a_disk_that_shrank_and_grew_holds_zeros_where_it_had_been_cut() -> None:
    log = log_of()
    log.acknowledge(log.begin_resize(2))
    log.acknowledge(log.begin_resize(4))
    flush(log)
    assert (allowed(log, 1), allowed(log, 2)) == ([OLD], [0])
    assert log.size == 4


def test_a_new_size_can_be_promised_to_last_when_it_is_acknowledged() -> None:
    log = log_of(durable_sizes=True)
    write(log, 0, 1, 6)
    resize = log.begin_resize(6)
    assert log.allowed(resize.begun).sizes == {4, 6}
    log.acknowledge(resize)
    assert log.allowed(log.marks[-1]).sizes == {6}
    assert allowed(log, 0) == [OLD, 6]


def test_a_size_that_lasts_shows_zeros_in_what_it_adds() -> None:
    log = log_of(durable_sizes=True)
    log.acknowledge(log.begin_resize(2))
    log.acknowledge(log.begin_resize(4))
    assert (allowed(log, 1), allowed(log, 2)) == ([OLD], [0])


def test_a_wrong_size_is_told() -> None:
    log = log_of()
    assert log.judge(disk(OLD), first=0, last=0) == ["the disk has 1 sectors, expected one of 4"]


def test_data_of_another_sector_are_told_with_their_origin() -> None:
    log = log_of()
    content = disk(OLD, OLD) + disk(OLD, OLD)
    assert log.judge(content, first=0, last=0) == [
        "sector 2 holds value 2 of sector 0, expected value 2",
        "sector 3 holds value 2 of sector 1, expected value 2",
    ]


def test_a_flush_within_the_time_of_the_crash_is_a_promise_of_its_own() -> None:
    log = log_of()
    write(log, 0, 1, 6)
    flush(log)
    flushed = log.marks[-1]
    # Later zeros may not excuse that the flushed value was lost before them.
    log.acknowledge(log.begin_discard(start=0, stop=1))
    last = log.marks[-1]
    lost = disk(0, OLD, OLD, OLD)
    assert log.judge(lost, first=flushed + 1, last=last) == []
    assert log.judge(lost, first=flushed - 1, last=last) != []


def test_values_are_new_and_as_noisy_as_asked() -> None:
    log = log_of()
    assert [log.next_value(noisy=noisy) for noisy in (True, True, False, False)] == [3, 5, 6, 8]


def test_the_content_of_a_disk_can_start_another_log() -> None:
    assert values_of(disk(OLD, 0, 7)).tolist() == [OLD, 0, 7]
