"""How L2 entries change, against a cluster whose bytes all have names of their own."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.entries import (
    ALL_ALLOCATED,
    ALL_ZERO,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    READS_ZERO,
)
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.codecs.qcow2.transitions import (
    CopyPlan,
    compressed,
    data_entry,
    erase_subclusters,
    host_of,
    hosts_of,
    in_place,
    is_allocated,
    is_compressed,
    keeps_host,
    kept,
    link_data,
    plan_copy,
    preallocate,
    put_entries,
    put_entry,
    slice_columns,
    subcluster_span,
)

PLAIN = Geometry(cluster_bits=9)
# Far smaller than any image may have them, so that every byte can be followed.
EXTENDED = Geometry(cluster_bits=9, extended_l2=True)
PART = EXTENDED.subcluster_size
HOST, OTHER_HOST = 0x40000, 0x80000
JUNK = -1

Names = npt.NDArray[np.int64]


def names(kind: int, geometry: Geometry) -> Names:
    """A cluster of bytes that nothing else has. kind 0: zeros, which are all alike."""
    if not kind:
        return np.zeros(geometry.cluster_size, np.int64)
    return np.arange(geometry.cluster_size, dtype=np.int64) + kind * 1_000_000


def guest_view(
    entry: int, bitmap: int, host: Names, geometry: Geometry, *, external: bool
) -> Names:
    """What the guest reads of a cluster, said as plainly as can be. `host`: its host cluster."""
    below, packed, zeros = (names(kind, geometry) for kind in (1, 2, 0))
    if entry & COMPRESSED:
        return packed
    if not geometry.has_subclusters:
        if entry & READS_ZERO:
            return zeros
        there = entry & OFFSET_MASK or (external and entry & COPIED)
        return host if there else below
    view = below.copy()
    for index in range(32):
        part = slice(index * PART, (index + 1) * PART)
        if bitmap >> index & 1:
            view[part] = host[part]
        elif bitmap >> (index + 32) & 1:
            view[part] = 0
    return view


def follow_plan(
    plan: CopyPlan, before: Names, old_host: Names, geometry: Geometry, *, begin: int, end: int
) -> Names:
    """What the guest reads once a plan was followed for its write of [begin, end)."""
    host = old_host.copy() if plan.keep else np.full_like(old_host, JUNK)
    host[plan.begin : plan.end] = before[plan.begin : plan.end]
    host[begin:end] = names(4, geometry)[begin:end]
    return guest_view(data_entry(OTHER_HOST), plan.bitmap, host, geometry, external=False)


def judge_plan(
    entry: int, bitmap: int, *, begin: int, end: int, geometry: Geometry, external: bool = False
) -> None:
    """A plan leads to the guest's write and nothing else, and no shorter one would."""
    plan = plan_copy(entry, bitmap, begin=begin, end=end, geometry=geometry, external=external)
    host = names(3, geometry)
    before = guest_view(entry, bitmap, host, geometry, external=external)
    expected = before.copy()
    expected[begin:end] = names(4, geometry)[begin:end]
    assert plan.begin <= begin < end <= plan.end
    after = follow_plan(plan, before, host, geometry, begin=begin, end=end)
    assert np.array_equal(after, expected)
    for first, last in ((plan.begin + 1, plan.end), (plan.begin, plan.end - 1)):
        if first <= begin and end <= last:
            less = CopyPlan(keep=plan.keep, begin=first, end=last, bitmap=plan.bitmap)
            after = follow_plan(less, before, host, geometry, begin=begin, end=end)
            assert not np.array_equal(after, expected)


PLAIN_STATES = {
    "unallocated": 0,
    "normal, own": HOST | COPIED,
    "normal, shared": HOST,
    "zero with a cluster, own": HOST | COPIED | READS_ZERO,
    "zero with a cluster, shared": HOST | READS_ZERO,
    "zero": READS_ZERO,
    "compressed": COMPRESSED | HOST | 17,
}
PLAIN_RANGES = [(0, 512), (0, 1), (1, 2), (511, 512), (7, 500), (0, 511), (1, 512)]


@pytest.mark.parametrize("state", PLAIN_STATES)
@pytest.mark.parametrize(("begin", "end"), PLAIN_RANGES)
def test_every_plain_state_is_copied_as_bytes_want_it(state: str, begin: int, end: int) -> None:
    judge_plan(PLAIN_STATES[state], 0, begin=begin, end=end, geometry=PLAIN)


@pytest.mark.parametrize("entry", [COPIED, COPIED | READS_ZERO, 0, READS_ZERO])
@pytest.mark.parametrize(("begin", "end"), PLAIN_RANGES)
def test_offset_0_of_a_data_file_is_a_cluster_like_any_other(
    entry: int, begin: int, end: int
) -> None:
    judge_plan(entry, 0, begin=begin, end=end, geometry=PLAIN, external=True)
    assert keeps_host(entry, external=True) == bool(entry & COPIED)
    assert not keeps_host(entry)


def patterns(*, first: int, last: int, has_host: bool) -> Iterator[int]:
    """Bitmaps of every combination of states before, at, between, at and behind two subclusters."""
    zones = [range(first), range(first, first + 1), range(first + 1, last), range(last, last + 1)]
    zones.append(range(last + 1, 32))
    zones = [
        zone for number, zone in enumerate(zones) if len(zone) and (number != 3 or last > first)
    ]
    states = (0, 1, 1 << 32) if has_host else (0, 1 << 32)
    for chosen in product(states, repeat=len(zones)):
        yield sum(
            state << index for state, zone in zip(chosen, zones, strict=True) for index in zone
        )


EDGES = [(5, 5), (5, 6), (5, 20), (0, 31), (0, 0), (31, 31)]


@pytest.mark.parametrize(("first", "last"), EDGES)
@pytest.mark.parametrize("entry", [0, HOST, HOST | COPIED, HOST | COPIED | READS_ZERO])
def test_every_mix_of_subclusters_is_copied_as_bytes_want_it(
    entry: int, first: int, last: int
) -> None:
    for bitmap in patterns(first=first, last=last, has_host=bool(host_of(entry))):
        for head, tail in product((0, 3), (0, 5)):
            begin, end = first * PART + head, (last + 1) * PART - tail
            judge_plan(entry, bitmap, begin=begin, end=end, geometry=EXTENDED)


@pytest.mark.parametrize(("first", "last"), EDGES)
def test_a_compressed_cluster_with_subclusters_is_copied_whole(first: int, last: int) -> None:
    begin, end = first * PART, (last + 1) * PART
    judge_plan(COMPRESSED | HOST | 1, 0, begin=begin, end=end, geometry=EXTENDED)
    plan = plan_copy(COMPRESSED | HOST, 0, begin=begin, end=end, geometry=EXTENDED)
    expected = CopyPlan(keep=False, begin=0, end=EXTENDED.cluster_size, bitmap=ALL_ALLOCATED)
    assert plan == expected


@st.composite
def extended_words(draw: Any, *, external: bool = False) -> tuple[int, int]:
    """A sound entry with its bitmap."""
    host = draw(st.sampled_from((0, HOST, OTHER_HOST)))
    entry = host | draw(st.sampled_from((0, COPIED)) if host or external else st.just(0))
    if draw(st.integers(0, 5)) == 0 and not external:
        return COMPRESSED | (host or HOST) | draw(st.integers(0, 4095)), 0
    entry |= draw(st.sampled_from((0, READS_ZERO)))
    bits = st.one_of(st.sampled_from((0, ALL_ALLOCATED)), st.integers(0, ALL_ALLOCATED))
    zero = draw(bits)
    there = host or (external and entry & COPIED)
    allocated = draw(bits) & ~zero if there else 0
    return entry, zero << 32 | allocated


@settings(max_examples=200)
@given(word=extended_words(), edges=st.tuples(*[st.integers(0, EXTENDED.cluster_size - 1)] * 2))
def test_any_mix_of_subclusters_is_copied_as_bytes_want_it(
    word: tuple[int, int], edges: tuple[int, int]
) -> None:
    judge_plan(*word, begin=min(edges), end=max(edges) + 1, geometry=EXTENDED)


@given(word=extended_words(), edges=st.tuples(*[st.integers(0, 31)] * 2))
def test_subclusters_beside_the_region_keep_their_state(
    word: tuple[int, int], edges: tuple[int, int]
) -> None:
    begin, end = min(edges) * PART, (max(edges) + 1) * PART
    plan = plan_copy(*word, begin=begin, end=end, geometry=EXTENDED)
    span = subcluster_span(plan.begin // PART, (plan.end - 1) // PART)
    assert plan.bitmap & span == span
    assert plan.bitmap & span << 32 == 0
    outside = ~(span | span << 32)
    assert plan.bitmap & outside == word[1] & outside


def test_a_region_is_widened_to_the_subclusters_at_its_edges_only() -> None:
    begin, end = 3 * PART + 7, 9 * PART + 1
    plan = plan_copy(HOST | COPIED, 0, begin=begin, end=end, geometry=EXTENDED)
    assert (plan.keep, plan.begin, plan.end) == (True, 3 * PART, 10 * PART)
    plan = plan_copy(0, 0, begin=begin, end=end, geometry=EXTENDED)
    assert (plan.keep, plan.begin, plan.end) == (False, 3 * PART, 10 * PART)


def test_a_new_cluster_takes_all_allocated_subclusters_along() -> None:
    plan = plan_copy(HOST, 1 << 2 | 1 << 30, begin=5 * PART, end=6 * PART, geometry=EXTENDED)
    assert (plan.keep, plan.begin, plan.end) == (False, 2 * PART, 31 * PART)


# Scalar and vector twins.


def columns(words: list[tuple[int, int]]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    entries = np.array([word[0] for word in words], np.uint64)
    return entries, np.array([word[1] for word in words], np.uint64)


@given(words=st.lists(extended_words(), max_size=8), external=st.booleans())
def test_the_vector_twins_say_what_the_scalar_ones_say(
    words: list[tuple[int, int]], external: bool
) -> None:
    entries, _ = columns(words)
    plain = [word[0] for word in words]
    assert kept(entries, external=external).tolist() == [
        keeps_host(entry, external=external) for entry in plain
    ]
    assert compressed(entries).tolist() == [is_compressed(entry) for entry in plain]
    assert hosts_of(entries).tolist() == [host_of(entry) for entry in plain]


@given(word=extended_words(external=True), extended=st.booleans())
def test_in_place_means_that_no_request_needs_a_copy(word: tuple[int, int], extended: bool) -> None:
    geometry = EXTENDED if extended else PLAIN
    entry, bitmap = word if extended else (word[0], 0)
    entries, bitmaps = columns([(entry, bitmap)])
    found = in_place(entries, bitmaps if extended else None, external=True)
    edges = range(0, geometry.cluster_size, geometry.cluster_size // 32)
    plans = [
        plan_copy(entry, bitmap, begin=begin, end=begin + 1, geometry=geometry, external=True)
        for begin in edges
    ]
    untouched = [
        CopyPlan(keep=True, begin=begin, end=begin + 1, bitmap=bitmap if extended else 0)
        for begin in edges
    ]
    assert found.tolist() == [plans == untouched]


@pytest.mark.parametrize(
    ("entry", "external", "expected"),
    [
        (0, False, False),
        (READS_ZERO, False, False),
        (HOST, False, True),
        (COMPRESSED | HOST, False, True),
        (COPIED, False, False),
        (COPIED, True, True),
    ],
)
def test_an_entry_is_allocated_when_it_refers_to_a_file(
    entry: int, external: bool, expected: bool
) -> None:
    assert is_allocated(entry, external=external) is expected


# Linking.


def test_linked_clusters_follow_one_another_and_are_their_own() -> None:
    entries, bitmaps = np.array([1, 2, 3], np.uint64), np.zeros(3, np.uint64)
    link_data(entries, bitmaps, host=HOST, cluster_size=0x4000)
    assert entries.tolist() == [HOST | COPIED, HOST + 0x4000 | COPIED, HOST + 0x8000 | COPIED]
    assert bitmaps.tolist() == [ALL_ALLOCATED] * 3


def test_preallocated_clusters_leave_their_subclusters_as_they_were() -> None:
    entries = np.zeros(2, np.uint64)
    bitmaps = np.array([0, 5 << 32], np.uint64)
    preallocate(entries, bitmaps, host=HOST, cluster_size=0x4000)
    assert entries.tolist() == [HOST | COPIED, HOST + 0x4000 | COPIED]
    assert bitmaps.tolist() == [0, 5 << 32]


@given(word=extended_words(), edges=st.tuples(*[st.integers(0, 31)] * 2))
def test_erased_subclusters_read_as_zeros_and_the_others_as_before(
    word: tuple[int, int], edges: tuple[int, int]
) -> None:
    first, last = min(edges), max(edges)
    after = erase_subclusters(word[1], first=first, last=last)
    for index in range(32):
        states = [bitmap >> index & 1 | bitmap >> index + 31 & 2 for bitmap in (word[1], after)]
        assert states[1] == (2 if first <= index <= last else states[0])


def test_columns_of_a_slice_are_views_that_change_it() -> None:
    words = array("Q", range(8))
    entries, bitmaps = slice_columns(words, geometry=EXTENDED)
    assert bitmaps is not None
    entries[1], bitmaps[1] = 20, 30
    assert words.tolist() == [0, 1, 20, 30, 4, 5, 6, 7]
    entries, bitmaps = slice_columns(words, geometry=PLAIN)
    assert bitmaps is None
    entries[7] = 9
    assert words[7] == 9


def test_entries_are_put_with_their_bitmaps_in_one_place() -> None:
    words = array("Q", range(8))
    entries, bitmaps = columns([(20, 30), (21, 31)])
    put_entries(words, first=1, entries=entries, bitmaps=bitmaps)
    assert words.tolist() == [0, 1, 20, 30, 21, 31, 6, 7]
    put_entry(words, 3, entry=40, bitmap=50)
    assert words.tolist() == [0, 1, 20, 30, 21, 31, 40, 50]


def test_entries_without_bitmaps_are_put_one_behind_the_other() -> None:
    words = array("Q", range(4))
    put_entries(words, first=1, entries=np.array([20, 30], np.uint64), bitmaps=None)
    put_entry(words, 3, entry=40, bitmap=None)
    assert words.tolist() == [0, 20, 30, 40]


def test_every_subcluster_of_a_cluster_is_erased_as_the_whole_would_be() -> None:
    assert erase_subclusters(ALL_ALLOCATED, first=0, last=31) == ALL_ZERO
