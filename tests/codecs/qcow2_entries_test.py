"""L1 and L2 words: the vector decoder against its scalar twin, faults and descriptors included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.entries import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    BadEntry,
    EntryRules,
    SubclusterState,
    check_l1,
    classify,
    compressed_extent,
    encode_compressed,
    entry_fault,
    l1_host,
    map_entries,
    split_words,
)
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.errors import CorruptMetadata
from qcowkit.extents.table import NO_HOST, ExtentTable, Flag

FLAGS = {
    SubclusterState.UNALLOCATED_PLAIN: Flag.NONE,
    SubclusterState.UNALLOCATED_ALLOC: Flag.NONE,
    SubclusterState.ZERO_PLAIN: Flag.ZERO | Flag.PRESENT,
    SubclusterState.ZERO_ALLOC: Flag.ZERO | Flag.PRESENT,
    SubclusterState.NORMAL: Flag.DATA | Flag.PRESENT,
    SubclusterState.COMPRESSED: Flag.DATA | Flag.PRESENT | Flag.COMPRESSED,
}


@st.composite
def laws(draw: Any) -> EntryRules:
    extended = draw(st.booleans())
    return EntryRules(
        geometry=Geometry(
            cluster_bits=draw(st.integers(14 if extended else 9, 21)), extended_l2=extended
        ),
        version=3 if extended else draw(st.sampled_from([2, 3])),
        external_data=draw(st.booleans()),
        file_size=draw(st.sampled_from([1 << 22, 3 << 21 | 77, 1 << 40])),
    )


bitmap_words = st.one_of(
    st.sampled_from([0, ALL_ALLOCATED, ALL_ALLOCATED << 32, 1, 1 << 63, 0xFFFF]),
    st.integers(0, (1 << 64) - 1),
)


@st.composite
def entry_words(draw: Any, rules: EntryRules, *, sound: bool) -> tuple[int, int]:
    """An entry and its bitmap; `sound` makes most of them legal, and neighbours contiguous."""
    size = rules.geometry.cluster_size
    bitmap = draw(bitmap_words) if rules.geometry.has_subclusters else 0
    if not sound and draw(st.booleans()):
        return draw(st.integers(0, (1 << 64) - 1)), bitmap
    host = draw(st.integers(0, 4)) * size
    if draw(st.integers(0, 4)) == 0:
        length = draw(st.integers(1, size))
        return encode_compressed(host + 512, length, geometry=rules.geometry), 0
    entry = host | (COPIED if draw(st.booleans()) else 0)
    if not rules.geometry.has_subclusters and rules.version > 2:
        entry |= draw(st.integers(0, 1))
    if sound and rules.geometry.has_subclusters:
        allocated, zero = bitmap & ALL_ALLOCATED, bitmap >> 32
        if not host and not (rules.external_data and entry & COPIED):
            allocated = 0
        bitmap = allocated | (zero & ~allocated) << 32
    return entry, bitmap


@st.composite
def tables(draw: Any, *, sound: bool) -> tuple[EntryRules, list[tuple[int, int]], list[int]]:
    rules = draw(laws())
    words = draw(st.lists(entry_words(rules, sound=sound), min_size=1, max_size=12))
    steps = [draw(st.sampled_from([1, 1, 1, 3])) for _ in words]
    starts = [sum(steps[:index]) * rules.geometry.cluster_size for index in range(len(words))]
    return rules, words, starts


def mapped(rules: EntryRules, words: list[tuple[int, int]], starts: list[int]) -> ExtentTable:
    entries = np.array([word[0] for word in words], np.uint64)
    bitmaps = np.array([word[1] for word in words], np.uint64)
    extended = rules.geometry.has_subclusters
    return map_entries(
        entries, bitmaps if extended else None, np.array(starts, np.int64), rules=rules
    )


def oracle(
    rules: EntryRules, words: list[tuple[int, int]], starts: list[int]
) -> dict[int, tuple[int, int, int]]:
    """Guest offset of every subcluster to (flags, host, stored)."""
    geometry = rules.geometry
    found = {}
    for (entry, bitmap), start in zip(words, starts, strict=True):
        for sub in range(geometry.subcluster_count):
            state = classify(entry, bitmap, sub, rules=rules)
            delta = sub * geometry.subcluster_size
            flags, host, stored = int(FLAGS[state]), (entry & OFFSET_MASK) + delta, 0
            if state is SubclusterState.COMPRESSED:
                host, stored = compressed_extent(entry, geometry=geometry)
            elif state in (SubclusterState.UNALLOCATED_PLAIN, SubclusterState.ZERO_PLAIN):
                host = NO_HOST
            elif entry & COPIED:
                flags |= Flag.COPIED
            found[start + delta] = (flags, host, stored)
    return found


@settings(max_examples=300, deadline=None)
@given(case=tables(sound=True))
def test_merged_rows_say_of_every_subcluster_what_its_entry_says(case: Any) -> None:
    rules, words, starts = case
    if any(entry_fault(*word, rules=rules) for word in words):
        return
    part = rules.geometry.subcluster_size
    found = {}
    for row in mapped(rules, words, starts):
        for at in range(0, row.length, part):
            moves = row.host >= 0 and not row.flags & Flag.COMPRESSED
            found[row.start + at] = (row.flags, row.host + at if moves else row.host, row.stored)
    assert found == oracle(rules, words, starts)


@settings(max_examples=300, deadline=None)
@given(case=tables(sound=False))
def test_the_first_entry_that_breaks_a_rule_is_named(case: Any) -> None:
    rules, words, starts = case
    faults = [entry_fault(*word, rules=rules) for word in words]
    if not any(faults):
        mapped(rules, words, starts)
        return
    with pytest.raises(BadEntry) as caught:
        mapped(rules, words, starts)
    index = next(index for index, fault in enumerate(faults) if fault)
    assert (caught.value.index, caught.value.reason) == (index, faults[index])
    with pytest.raises(ValueError):
        classify(*words[index], 0, rules=rules)


@given(
    bits=st.integers(9, 21),
    host=st.integers(0, 1 << 48),
    share=st.floats(0, 1),
    extended=st.booleans(),
)
def test_a_compressed_descriptor_covers_its_bytes(
    bits: int, host: int, share: float, extended: bool
) -> None:
    geometry = Geometry(cluster_bits=bits)
    length = 1 + int(share * (geometry.cluster_size - 1))
    entry = encode_compressed(host, length, geometry=geometry)
    assert entry & COMPRESSED
    assert not entry & COPIED
    found, stored = compressed_extent(entry, geometry=geometry)
    assert found == host
    assert length <= stored < length + 512
    assert (found + stored) % 512 == 0


def test_neighbours_merge_only_where_guest_and_host_follow() -> None:
    rules = EntryRules(
        geometry=Geometry(cluster_bits=16), version=3, external_data=False, file_size=1 << 30
    )
    size = 1 << 16
    hosts = [size, 2 * size, 3 * size, 5 * size, 6 * size, 0, 0]
    table = mapped(
        rules,
        [(host | (COPIED if host else 0), 0) for host in hosts],
        [index * size for index in range(7)],
    )
    assert [(row.start // size, row.length // size) for row in table] == [(0, 3), (3, 2), (5, 2)]
    table.check()


def test_no_entries_are_no_rows() -> None:
    rules = EntryRules(
        geometry=Geometry(cluster_bits=16), version=3, external_data=False, file_size=0
    )
    assert len(mapped(rules, [], [])) == 0


def test_extended_words_come_in_pairs() -> None:
    words = np.arange(6, dtype=np.uint64)
    entries, bitmaps = split_words(words, geometry=Geometry(cluster_bits=14, extended_l2=True))
    assert entries.tolist() == [0, 2, 4]
    assert bitmaps is not None
    assert bitmaps.tolist() == [1, 3, 5]


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (1, "reserved bits 0x1 are set, expected 0"),
        (1 << 62, "reserved bits 0x4000000000000000 are set"),
        (0x200, "L2 table offset 0x200 is not a multiple of the cluster size 0x10000"),
        (0x100000, "L2 table offset 0x100000 is beyond the end of the file at 0x100000"),
    ],
)
def test_a_bad_l1_entry_is_refused_with_its_place(word: int, reason: str) -> None:
    words = np.array([0, 0x10000 | COPIED, word, word], np.uint64)
    with pytest.raises(
        CorruptMetadata, match=f"L1 table at host offset 0x30000, entry 2: {reason}"
    ):
        check_l1(words, geometry=Geometry(cluster_bits=16), host_offset=0x30000, file_size=0x100000)


def test_the_host_of_an_l1_entry_has_no_flags() -> None:
    assert l1_host(COPIED | 0x50000) == 0x50000
