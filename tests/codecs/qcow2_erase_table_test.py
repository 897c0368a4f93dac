"""The table of states for discarding and zeroing, row by row. docs/formats/qcow2.md."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from qcowkit.codecs.qcow2.entries import ALL_ALLOCATED, ALL_ZERO, COMPRESSED, COPIED, READS_ZERO
from qcowkit.codecs.qcow2.transitions import EraseRules, erase

HOST = 0x40000
OWN, PACKED = HOST | COPIED, COMPRESSED | HOST | 99


@dataclass(frozen=True, slots=True, kw_only=True)
class After:
    """What becomes of an entry. freed: it lost what it referred to. held: the cluster stays, its
    content does not."""

    word: int
    bitmap: int = 0
    freed: bool = False
    held: bool = False


def gone(word: int, bitmap: int = 0) -> After:
    return After(word=word, bitmap=bitmap, freed=True)


def stays(word: int, bitmap: int = 0) -> After:
    return After(word=word, bitmap=bitmap, held=True)


def same(word: int, bitmap: int = 0) -> After:
    return After(word=word, bitmap=bitmap)


def judge(word: int, bitmap: int | None, rules: EraseRules, expected: After) -> None:
    entries = np.array([word], np.uint64)
    bitmaps = None if bitmap is None else np.array([bitmap], np.uint64)
    old, held = erase(entries, bitmaps, rules)
    found = After(
        word=int(entries[0]),
        bitmap=0 if bitmaps is None else int(bitmaps[0]),
        freed=old.tolist() == [word],
        held=bool(held[0]),
    )
    assert len(old) in (0, 1)
    assert found == expected


DISCARD = EraseRules(version=3, has_base=False)
UNCOVERING = EraseRules(version=3, has_base=True)
KEEPING = EraseRules(version=3, has_base=False, keep=True)
FULL = EraseRules(version=3, has_base=True, full=True)
FULL_KEEPING = EraseRules(version=3, has_base=False, full=True, keep=True)
ZEROES = EraseRules(version=3, has_base=False, zeroes=True)
ZEROES_OVER_BASE = EraseRules(version=3, has_base=True, zeroes=True)
UNMAP = EraseRules(version=3, has_base=False, zeroes=True, unmap=True)
UNMAP_KEEPING = EraseRules(version=3, has_base=True, zeroes=True, unmap=True, keep=True)

PLAIN = [
    # Normal clusters, own and shared.
    (OWN, DISCARD, gone(READS_ZERO)),
    (OWN, UNCOVERING, gone(READS_ZERO)),
    (OWN, KEEPING, stays(OWN | READS_ZERO)),
    (OWN, FULL, gone(0)),
    (OWN, FULL_KEEPING, gone(0)),
    (OWN, ZEROES, stays(OWN | READS_ZERO)),
    (OWN, UNMAP, gone(READS_ZERO)),
    (OWN, UNMAP_KEEPING, stays(OWN | READS_ZERO)),
    (HOST, DISCARD, gone(READS_ZERO)),
    (HOST, ZEROES, stays(HOST | READS_ZERO)),
    # Zeros that have a cluster.
    (OWN | READS_ZERO, DISCARD, gone(READS_ZERO)),
    (OWN | READS_ZERO, KEEPING, stays(OWN | READS_ZERO)),
    (OWN | READS_ZERO, FULL, gone(0)),
    (OWN | READS_ZERO, ZEROES, stays(OWN | READS_ZERO)),
    (OWN | READS_ZERO, UNMAP, gone(READS_ZERO)),
    (OWN | READS_ZERO, UNMAP_KEEPING, stays(OWN | READS_ZERO)),
    # Compressed clusters never keep their place.
    (PACKED, DISCARD, gone(READS_ZERO)),
    (PACKED, KEEPING, gone(READS_ZERO)),
    (PACKED, FULL, gone(0)),
    (PACKED, ZEROES, gone(READS_ZERO)),
    (PACKED, UNMAP, gone(READS_ZERO)),
    (PACKED, UNMAP_KEEPING, gone(READS_ZERO)),
    # Nothing there.
    (0, DISCARD, same(0)),
    (0, UNCOVERING, same(READS_ZERO)),
    (0, FULL, same(0)),
    (0, ZEROES, same(READS_ZERO)),
    (0, ZEROES_OVER_BASE, same(READS_ZERO)),
    (0, UNMAP, same(READS_ZERO)),
    # Zeros without a cluster.
    (READS_ZERO, DISCARD, same(READS_ZERO)),
    (READS_ZERO, UNCOVERING, same(READS_ZERO)),
    (READS_ZERO, FULL, same(0)),
    (READS_ZERO, ZEROES, same(READS_ZERO)),
    (READS_ZERO, UNMAP, same(READS_ZERO)),
]


@pytest.mark.parametrize(("word", "rules", "expected"), PLAIN)
def test_a_row_of_the_table_in_version_3(word: int, rules: EraseRules, expected: After) -> None:
    judge(word, None, rules, expected)


V2 = EraseRules(version=2, has_base=False)
V2_ZEROES = EraseRules(version=2, has_base=False, zeroes=True)
V2_FULL = EraseRules(version=2, has_base=True, full=True)


@pytest.mark.parametrize("rules", [V2, V2_ZEROES, V2_FULL])
@pytest.mark.parametrize(
    ("word", "expected"), [(OWN, gone(0)), (HOST, gone(0)), (PACKED, gone(0)), (0, same(0))]
)
def test_version_2_knows_no_zero_clusters_and_empties_entries(
    word: int, rules: EraseRules, expected: After
) -> None:
    judge(word, None, rules, expected)


@pytest.mark.parametrize("zeroes", [False, True])
def test_version_2_cannot_erase_over_a_base(zeroes: bool) -> None:
    assert not EraseRules(version=2, has_base=True, zeroes=zeroes).possible
    assert EraseRules(version=2, has_base=False, zeroes=zeroes).possible
    assert EraseRules(version=3, has_base=True, zeroes=zeroes).possible
    assert EraseRules(version=2, has_base=True, full=True).possible


SOME = 0b101 << 32 | 0b010
SOME_ZERO = 0b101 << 32

SUBCLUSTERS = [
    (OWN, ALL_ALLOCATED, DISCARD, gone(0, ALL_ZERO)),
    (OWN, SOME, DISCARD, gone(0, ALL_ZERO)),
    (OWN, SOME, KEEPING, stays(OWN, ALL_ZERO)),
    (OWN, SOME, FULL, gone(0)),
    (OWN, SOME, ZEROES, stays(OWN, ALL_ZERO)),
    (OWN, ALL_ZERO, ZEROES, stays(OWN, ALL_ZERO)),
    (OWN, SOME, UNMAP, gone(0, ALL_ZERO)),
    # A cluster that was only preallocated.
    (OWN, 0, DISCARD, gone(0, ALL_ZERO)),
    (OWN, 0, ZEROES, stays(OWN, ALL_ZERO)),
    (PACKED, 0, ZEROES, gone(0, ALL_ZERO)),
    (PACKED, 0, KEEPING, gone(0, ALL_ZERO)),
    (PACKED, 0, FULL, gone(0)),
    (0, 0, DISCARD, same(0, 0)),
    (0, 0, UNCOVERING, same(0, ALL_ZERO)),
    (0, SOME_ZERO, DISCARD, same(0, SOME_ZERO)),
    (0, SOME_ZERO, UNCOVERING, same(0, ALL_ZERO)),
    (0, SOME_ZERO, FULL, same(0, 0)),
    (0, SOME_ZERO, ZEROES, same(0, ALL_ZERO)),
    (0, ALL_ZERO, UNMAP, same(0, ALL_ZERO)),
]


@pytest.mark.parametrize(("word", "bitmap", "rules", "expected"), SUBCLUSTERS)
def test_a_row_of_the_table_with_subclusters(
    word: int, bitmap: int, rules: EraseRules, expected: After
) -> None:
    judge(word, bitmap, rules, expected)


OUTSIDE = EraseRules(version=3, has_base=False, external=True)
OUTSIDE_ZEROES = EraseRules(version=3, has_base=False, external=True, zeroes=True)


@pytest.mark.parametrize(
    ("word", "rules", "expected"),
    [
        # Offset 0, told by COPIED.
        (COPIED, OUTSIDE, gone(READS_ZERO)),
        (COPIED, OUTSIDE_ZEROES, stays(COPIED | READS_ZERO)),
        (OWN, OUTSIDE, gone(READS_ZERO)),
        (OWN, OUTSIDE_ZEROES, stays(OWN | READS_ZERO)),
        (0, OUTSIDE, same(0)),
        (0, OUTSIDE_ZEROES, same(READS_ZERO)),
    ],
)
def test_a_row_of_the_table_with_a_data_file(word: int, rules: EraseRules, expected: After) -> None:
    judge(word, None, rules, expected)


def test_old_words_come_back_in_the_order_of_their_entries() -> None:
    entries = np.array([0, OWN, READS_ZERO, PACKED, HOST], np.uint64)
    old, held = erase(entries, None, DISCARD)
    assert old.tolist() == [OWN, PACKED, HOST]
    assert entries.tolist() == [0, READS_ZERO, READS_ZERO, READS_ZERO, READS_ZERO]
    assert not held.any()


def test_a_bitmap_is_all_or_nothing_after_a_whole_cluster_was_erased() -> None:
    entries, bitmaps = np.full(3, OWN, np.uint64), np.array([SOME, ALL_ALLOCATED, 0], np.uint64)
    erase(entries, bitmaps, DISCARD)
    assert set(bitmaps.tolist()) == {ALL_ZERO}
