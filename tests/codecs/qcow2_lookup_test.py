"""The scalar lookups that small requests use, against the decoder of whole tables."""

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
    READS_ZERO,
    BadEntry,
    EntryRules,
    classify_cluster,
    classify_subcluster,
    map_entries,
)
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.extents.algebra import clip
from qcowkit.extents.table import NO_HOST, Extent, Flag, Hit

START = 5 << 21


@st.composite
def cases(draw: Any) -> tuple[EntryRules, int, int]:
    """Rules with an entry and its bitmap, sound or not."""
    extended = draw(st.booleans())
    bits = draw(st.sampled_from([14, 16, 21] if extended else [9, 12, 16, 21]))
    rules = EntryRules(
        geometry=Geometry(cluster_bits=bits, extended_l2=extended),
        version=3 if extended else draw(st.sampled_from([2, 3, 3])),
        external_data=draw(st.booleans()),
        file_size=1 << 40,
    )
    entry = draw(st.integers(0, 5)) << draw(st.sampled_from([9, bits, bits, bits]))
    flags = st.sampled_from([0, 0, COPIED, COPIED, READS_ZERO, COMPRESSED, 1 << 61, 2])
    entry |= draw(flags) | draw(flags)
    if not extended:
        return rules, entry, 0
    words = st.one_of(st.sampled_from([0, ALL_ALLOCATED]), st.integers(0, ALL_ALLOCATED))
    allocated, zero = draw(words), draw(words)
    if draw(st.integers(0, 5)):
        zero &= ~allocated
    return rules, entry, zero << 32 | allocated


def look_up(rules: EntryRules, entry: int, bitmap: int, offset: int) -> tuple[Hit, int, int]:
    if rules.geometry.has_subclusters:
        return classify_subcluster(entry, bitmap, offset=offset, rules=rules)
    return classify_cluster(entry, offset=offset, rules=rules)


def mapped(rules: EntryRules, entry: int, bitmap: int, offset: int) -> Extent | None:
    """The rest of the extent from `offset` on, by the decoder of tables; None for a fault."""
    entries = np.array([entry], np.uint64)
    bitmaps = np.array([bitmap], np.uint64) if rules.geometry.has_subclusters else None
    try:
        table = map_entries(entries, bitmaps, np.array([START], np.int64), rules=rules)
    except BadEntry:
        return None
    return next(iter(clip(table, offset, table.end)))


def kind_of(row: Extent) -> Hit:
    if row.flags & Flag.COMPRESSED:
        return Hit.OTHER
    if row.flags & Flag.ZERO:
        return Hit.ZERO
    return Hit.DATA if row.flags & Flag.DATA else Hit.NONE


@settings(max_examples=500)
@given(case=cases(), share=st.integers(0, 0xFFFF))
def test_one_byte_is_what_the_whole_table_says_of_it(
    case: tuple[EntryRules, int, int], share: int
) -> None:
    rules, entry, bitmap = case
    offset = START + (share * rules.cluster_size >> 16)
    kind, host, run = look_up(rules, entry, bitmap, offset)
    row = mapped(rules, entry, bitmap, offset)
    if row is None:
        # What breaks a rule is for the table to name.
        assert kind is Hit.OTHER
        return
    assert kind is kind_of(row)
    if kind is Hit.OTHER:
        assert offset + run == START + rules.cluster_size
        return
    assert run == row.length
    assert host == (row.host if kind is Hit.DATA else NO_HOST)


@pytest.mark.parametrize("extended", [False, True])
def test_a_run_ends_with_its_cluster(extended: bool) -> None:
    geometry = Geometry(cluster_bits=14, extended_l2=extended)
    rules = EntryRules(geometry=geometry, version=3, external_data=False, file_size=1 << 40)
    bitmap = ALL_ALLOCATED if extended else 0
    for inside in (0, 1, 511, 512, 0x3FFF):
        found = look_up(rules, 0x40000 | COPIED, bitmap, START + inside)
        assert found == (Hit.DATA, 0x40000 + inside, 0x4000 - inside)
