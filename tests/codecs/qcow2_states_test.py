"""Extended and plain L2 entries: the state table, and the fast decoder against its plain twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.entries import (
    COMPRESSED,
    COPIED,
    READS_ZERO,
    BadEntry,
    EntryRules,
    SubclusterState,
    classify,
    map_entries,
)
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.extents.algebra import clip
from qcowkit.extents.table import NO_HOST, Flag
from qcowkit.units import INT64_MAX

HOST = 0x10000
ZERO_BIT = 1 << 32
State = SubclusterState
STATES = {
    State.UNALLOCATED_PLAIN: (Flag.NONE, False),
    State.UNALLOCATED_ALLOC: (Flag.NONE, True),
    State.ZERO_PLAIN: (Flag.ZERO | Flag.PRESENT, False),
    State.ZERO_ALLOC: (Flag.ZERO | Flag.PRESENT, True),
    State.NORMAL: (Flag.DATA | Flag.PRESENT, True),
    State.COMPRESSED: (Flag.DATA | Flag.PRESENT | Flag.COMPRESSED, True),
}


def rules(*, extended: bool, version: int = 3, external: bool = False) -> EntryRules:
    return EntryRules(
        geometry=Geometry(cluster_bits=14, extended_l2=extended),
        version=version,
        external_data=external,
        file_size=1 << 20,
    )


@pytest.mark.parametrize(
    ("entry", "bitmap", "state"),
    [
        (0, 0, State.UNALLOCATED_PLAIN),
        (HOST, 0, State.UNALLOCATED_ALLOC),
        (0, ZERO_BIT, State.ZERO_PLAIN),
        (HOST | COPIED, ZERO_BIT, State.ZERO_ALLOC),
        (HOST | COPIED, 1, State.NORMAL),
        (COMPRESSED | HOST, 0, State.COMPRESSED),
        # The zero flag of plain entries means nothing here.
        (HOST | READS_ZERO, 1, State.NORMAL),
    ],
)
def test_every_row_of_the_extended_state_table(entry: int, bitmap: int, state: State) -> None:
    assert classify(entry, bitmap, 0, rules=rules(extended=True)) is state


@pytest.mark.parametrize(
    ("entry", "state"),
    [
        (0, State.UNALLOCATED_PLAIN),
        (HOST | COPIED, State.NORMAL),
        (READS_ZERO, State.ZERO_PLAIN),
        (HOST | READS_ZERO, State.ZERO_ALLOC),
        (COMPRESSED | HOST, State.COMPRESSED),
    ],
)
def test_every_row_of_the_plain_state_table(entry: int, state: State) -> None:
    assert classify(entry, 0, 0, rules=rules(extended=False)) is state


@pytest.mark.parametrize(
    ("entry", "bitmap", "message"),
    [
        (HOST, ZERO_BIT | 1, "subclusters 0x1 are both allocated and zero"),
        (0, 1, "subclusters 0x1 are allocated without a host cluster"),
        (COMPRESSED | HOST, 1, "subcluster bitmap of a compressed cluster is 0x1, expected 0"),
        (COMPRESSED | COPIED | HOST, 0, "COPIED is set on a compressed cluster"),
        (HOST | 0x200, 1, "data cluster offset 0x10200 is not a multiple"),
        (HOST | 2, 1, "reserved bits 0x2 are set, expected 0"),
    ],
)
def test_an_invalid_row_of_the_state_table_is_refused(
    entry: int, bitmap: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        classify(entry, bitmap, 0, rules=rules(extended=True))
    words, bitmaps = np.array([entry], np.uint64), np.array([bitmap], np.uint64)
    with pytest.raises(BadEntry, match=message):
        map_entries(words, bitmaps, np.zeros(1, np.int64), rules=rules(extended=True))


hosts = st.sampled_from((0, HOST, HOST + 0x4000, 0x40000))
bits = st.integers(0, (1 << 32) - 1)


@given(
    rows=st.lists(
        st.tuples(hosts, bits, bits, st.booleans(), st.booleans()), min_size=1, max_size=6
    ),
    extended=st.booleans(),
)
def test_the_fast_decoder_says_of_every_subcluster_what_its_plain_twin_says(
    rows: list[tuple[int, int, int, bool, bool]], extended: bool
) -> None:
    law = rules(extended=extended)
    size, part = law.geometry.cluster_size, law.geometry.subcluster_size
    words: list[tuple[int, int]] = []
    for host, allocated, zero, copied, packed in rows:
        if packed:
            words.append((COMPRESSED | (host or HOST), 0))
            continue
        entry = host | (COPIED if copied and host else 0)
        if not extended:
            words.append((entry | (READS_ZERO if zero & 1 else 0), 0))
            continue
        words.append((entry, (zero & ~allocated) << 32 | allocated if host else zero << 32))
    entries = np.array([word[0] for word in words], np.uint64)
    bitmaps = np.array([word[1] for word in words], np.uint64) if extended else None
    starts = np.arange(len(words), dtype=np.int64) * size
    found = map_entries(entries, bitmaps, starts, rules=law)
    for index, (entry, bitmap) in enumerate(words):
        for subcluster in range(law.geometry.subcluster_count):
            at = index * size + subcluster * part
            state = classify(entry, bitmap, subcluster, rules=law)
            flags, has_host = STATES[state]
            (row,) = clip(found, at, at + 1)
            host = row.host
            assert row.flags & ~Flag.COPIED == flags
            assert (host != NO_HOST) == has_host
            if has_host and state is not State.COMPRESSED:
                # The final offset of the row's first byte: nobody adds anything to it.
                assert host == (entry & ~COPIED & ~READS_ZERO) + subcluster * part


geometries = st.builds(
    Geometry,
    cluster_bits=st.integers(14, 21),
    refcount_order=st.integers(0, 6),
    extended_l2=st.booleans(),
)


@given(geometry=geometries, offset=st.integers(0, INT64_MAX))
def test_the_indices_of_an_offset_lead_back_to_it(geometry: Geometry, offset: int) -> None:
    inside = offset % geometry.cluster_size
    cluster = geometry.l1_index(offset) * geometry.l2_entries + geometry.l2_index(offset)
    assert cluster * geometry.cluster_size + inside == offset
    part = geometry.subcluster_index(offset) * geometry.subcluster_size
    assert 0 <= inside - part < geometry.subcluster_size
    assert 0 <= geometry.l2_index(offset) < geometry.l2_entries


@given(geometry=geometries)
def test_all_sizes_follow_from_the_geometry(geometry: Geometry) -> None:
    assert geometry.l2_entries * geometry.l2_entry_size == geometry.cluster_size
    assert geometry.subcluster_count * geometry.subcluster_size == geometry.cluster_size
    assert geometry.l2_entry_size == (16 if geometry.has_subclusters else 8)
    assert geometry.subcluster_size >= 512
    assert geometry.refcounts_per_block * geometry.refcount_bits == geometry.cluster_size * 8
