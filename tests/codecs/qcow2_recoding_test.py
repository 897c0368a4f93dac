"""Entries said anew mean the same, unit by unit, as the scalar classifier reads them."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from qcowkit.codecs.qcow2.entries import (
    COPIED,
    EntryRules,
    SubclusterState,
    classify,
    encode_compressed,
)
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.codecs.qcow2.recoding import RecodeRules, recode
from qcowkit.codecs.qcow2.transitions import host_of
from qcowkit.units import KiB

pytestmark = pytest.mark.pinned("geometries of its own")

UNIT = 512
STATE = SubclusterState
Meaning = tuple[str, int]
GEOMETRIES = [
    Geometry(cluster_bits=bits, extended_l2=extended)
    for bits, extended in ((14, False), (14, True), (15, False), (16, True), (12, False))
]


def some_entries(geometry: Geometry, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Entries and bitmaps of clusters of all kinds, some of them side by side in the file."""
    rng, size = random.Random(seed), geometry.cluster_size
    entries, bitmaps = [], []
    for number in range(count):
        host = (4 * count + number) * size if rng.random() < 0.7 else rng.randrange(1, 99) * size
        kind, bitmap = rng.randrange(6), 0
        entry = (0, host | COPIED, host, host | COPIED, 0, host | COPIED)[kind]
        if not geometry.extended_l2:
            entry |= int(kind in (3, 4))
        elif kind in (1, 2, 3):
            allocated, zero = rng.getrandbits(32), rng.getrandbits(32)
            bitmap = rng.choice((0xFFFF_FFFF, allocated | (zero & ~allocated) << 32))
        elif kind == 4:
            bitmap = rng.choice((0xFFFF_FFFF << 32, rng.getrandbits(32) << 32))
        entries.append(entry)
        bitmaps.append(bitmap)
    return entries, bitmaps


def meanings(
    entries: list[int], bitmaps: list[int], geometry: Geometry, *, base: bool
) -> list[Meaning]:
    """What each unit of the guest is, and where."""
    rules = EntryRules(geometry=geometry, version=3, external_data=False, file_size=1 << 40)
    found = []
    for entry, bitmap in zip(entries, bitmaps, strict=True):
        for at in range(0, geometry.cluster_size, UNIT):
            state = classify(entry, bitmap, at // geometry.subcluster_size, rules=rules)
            if state is STATE.NORMAL:
                found.append(("data", host_of(entry) + at))
            elif state in (STATE.ZERO_PLAIN, STATE.ZERO_ALLOC) or not base:
                found.append(("zero", 0))
            else:
                found.append(("nothing", 0))
    return found


@pytest.mark.parametrize("base", [False, True], ids=["alone", "over a base"])
@pytest.mark.parametrize(("old", "new"), list(itertools.product(GEOMETRIES, GEOMETRIES)), ids=str)
def test_every_unit_means_what_it_meant(old: Geometry, new: Geometry, base: bool) -> None:
    for seed in range(6):
        entries, bitmaps = some_entries(old, 64, seed)
        before = meanings(entries, bitmaps, old, base=base)
        found = recode(
            np.array(entries, dtype=np.uint64),
            np.array(bitmaps, dtype=np.uint64) if old.extended_l2 else None,
            rules=RecodeRules(old=old, new=new, has_base=base),
        )
        masks = [0] * len(found.entries) if found.bitmaps is None else found.bitmaps.tolist()
        after = meanings(found.entries.tolist(), masks, new, base=base)
        per_cluster = new.cluster_size // UNIT
        for number in found.rewrite.tolist():
            part = slice(number * per_cluster, (number + 1) * per_cluster)
            # Only what holds data, or hides a base in part, has to be written anew.
            assert any(kind == "data" for kind, _ in before[part]) or base
            assert int(found.entries[number]) == 0
            after[part] = before[part]
        assert after == before


def test_smaller_clusters_and_subclusters_write_nothing_anew() -> None:
    old = Geometry(cluster_bits=16)
    entries, _ = some_entries(old, 64, 1)
    for new in (Geometry(cluster_bits=12), Geometry(cluster_bits=16, extended_l2=True)):
        rules = RecodeRules(old=old, new=new, has_base=True)
        assert not len(recode(np.array(entries, dtype=np.uint64), None, rules=rules).rewrite)


@pytest.mark.parametrize(
    ("new", "same", "kept"),
    [
        (Geometry(cluster_bits=16), True, True),
        (Geometry(cluster_bits=16), False, False),
        (Geometry(cluster_bits=16, extended_l2=True), True, True),
        (Geometry(cluster_bits=15), True, False),
        (Geometry(cluster_bits=17), True, False),
    ],
    ids=str,
)
def test_compressed_clusters_stay_only_as_what_they_are(
    new: Geometry, same: bool, kept: bool
) -> None:
    old = Geometry(cluster_bits=16)
    word = encode_compressed(300 * KiB + 7, 999, geometry=old)
    rules = RecodeRules(old=old, new=new, same_packed=same)
    found = recode(np.array([word, word], dtype=np.uint64), None, rules=rules)
    if kept:
        assert found.entries.tolist() == [word, word]
        assert found.bitmaps is None or not found.bitmaps.any()
        assert not len(found.rewrite)
    else:
        assert not found.entries.any()
        assert len(found.rewrite) == len(found.entries)
        assert found.packed.all()


def test_without_zero_clusters_zeros_are_nothing_or_written() -> None:
    geometry = Geometry(cluster_bits=12)
    words = np.array([1, 4096 * 5 | COPIED | 1, 4096 * 6 | COPIED, 0], dtype=np.uint64)
    alone = RecodeRules(old=geometry, new=geometry, has_zeros=False)
    assert recode(words, None, rules=alone).entries.tolist() == [0, 0, 4096 * 6, 0]
    over = RecodeRules(old=geometry, new=geometry, has_zeros=False, has_base=True)
    assert recode(words, None, rules=over).rewrite.tolist() == [0, 1]


def test_a_data_file_has_a_cluster_at_offset_zero() -> None:
    old, new = Geometry(cluster_bits=14), Geometry(cluster_bits=15)
    words = np.array([COPIED, COPIED | 1 << 14, 0, 0], dtype=np.uint64)
    found = recode(words, None, rules=RecodeRules(old=old, new=new, external=True))
    assert found.entries.tolist() == [COPIED, 0]
    assert not len(found.rewrite)
