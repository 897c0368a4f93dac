"""Refcounts of every width, and the order of their bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.refcount_block import (
    BadCount,
    add_to_refcounts,
    add_to_scattered,
    count_used,
    decode_refcounts,
    encode_refcounts,
    find_free,
    last_used,
    raise_refcounts,
    read_count,
    view_refcounts,
)
from qcowkit.errors import RequestError


@given(order=st.integers(0, 6), more=st.data())
def test_counts_of_every_width_come_back(order: int, more: st.DataObject) -> None:
    most = (1 << (1 << order)) - 1
    values = more.draw(st.lists(st.integers(0, most), min_size=8, max_size=64))
    counts = np.array(values[: len(values) & -8], dtype=np.uint64)
    raw = encode_refcounts(counts, order)
    assert len(raw) == len(counts) << order >> 3
    assert decode_refcounts(raw, order).tolist() == counts.tolist()
    assert view_refcounts(raw, order).tolist() == counts.tolist()
    assert count_used(raw, order) == int((counts != 0).sum())


@pytest.mark.parametrize(
    ("order", "counts", "raw"),
    [
        (0, [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1], "0186"),
        (1, [1, 2, 3, 0], "39"),
        (2, [1, 15, 2, 0], "f102"),
        (3, [1, 255], "01ff"),
        (4, [1, 0x1234], "00011234"),
        (5, [0x01020304], "01020304"),
        (6, [0x0102030405060708], "0102030405060708"),
    ],
)
def test_narrow_counts_begin_at_the_low_bits_and_wide_ones_are_big_endian(
    order: int, counts: list[int], raw: str
) -> None:
    assert encode_refcounts(np.array(counts, dtype=np.uint64), order).hex() == raw
    assert decode_refcounts(bytes.fromhex(raw), order).tolist() == counts


@pytest.mark.parametrize("order", range(6))
def test_a_count_that_does_not_fit_is_refused(order: int) -> None:
    counts = np.zeros(8, dtype=np.uint64)
    counts[3] = 1 << (1 << order)
    with pytest.raises(RequestError, match=rf"refcount \d+ does not fit in {1 << order} bits"):
        encode_refcounts(counts, order)


def test_no_counts_are_no_bytes() -> None:
    assert encode_refcounts(np.zeros(0, dtype=np.uint64), 4) == b""


# Counts that change, against a list of integers.

COUNT = 64


def limit_of(order: int) -> int:
    return (1 << (1 << order)) - 1


@st.composite
def blocks(draw: Any) -> tuple[int, list[int]]:
    """A width and the counts of a block, often at the edges of what it can hold."""
    order = draw(st.integers(0, 6))
    most = limit_of(order)
    edges = st.sampled_from(sorted({0, 1, most - 1, most}))
    some = st.one_of(edges, st.integers(0, most))
    return order, draw(st.lists(some, min_size=COUNT, max_size=COUNT))


def encoded(order: int, counts: list[int]) -> bytearray:
    return bytearray(encode_refcounts(np.array(counts, dtype=np.uint64), order))


def change(counts: list[int], entries: list[int], delta: int, most: int) -> list[int] | int:
    """The counts afterwards, or the first entry that cannot change so."""
    after = list(counts)
    for entry in entries:
        after[entry] += delta
    bad = [entry for entry in sorted(set(entries)) if not 0 <= after[entry] <= most]
    return bad[0] if bad else after


def judge_change(
    raw: bytearray,
    order: int,
    counts: list[int],
    entries: list[int],
    delta: int,
    act: Callable[[], npt.NDArray[np.intp]],
) -> None:
    """`act` does to the block what `change` does to the list."""
    expected = change(counts, entries, delta, limit_of(order))
    if isinstance(expected, int):
        with pytest.raises(BadCount) as caught:
            act()
        assert (caught.value.index, caught.value.found) == (expected, counts[expected])
        assert raw == encoded(order, counts)
        return
    zeros = act()
    assert decode_refcounts(raw, order).tolist() == expected
    fallen = [entry for entry in sorted(set(entries)) if not expected[entry]]
    assert zeros.tolist() == (fallen if delta < 0 else [])


@given(
    block=blocks(),
    first=st.integers(0, COUNT - 1),
    count=st.integers(1, COUNT),
    delta=st.sampled_from([1, -1]),
)
def test_a_run_of_counts_changes_as_a_list_would(
    block: tuple[int, list[int]], first: int, count: int, delta: int
) -> None:
    order, counts = block
    count = min(count, COUNT - first)
    raw = encoded(order, counts)
    judge_change(
        raw,
        order,
        counts,
        list(range(first, first + count)),
        delta,
        lambda: add_to_refcounts(raw, order, first=first, count=count, delta=delta),
    )


@given(
    block=blocks(),
    entries=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=12),
    delta=st.sampled_from([1, -1]),
)
def test_scattered_counts_change_as_a_list_would(
    block: tuple[int, list[int]], entries: list[int], delta: int
) -> None:
    order, counts = block
    entries = sorted(entries)
    raw = encoded(order, counts)
    judge_change(
        raw,
        order,
        counts,
        entries,
        delta,
        lambda: add_to_scattered(raw, order, entries=np.array(entries, np.intp), delta=delta),
    )


@given(block=blocks(), more=st.data())
def test_counts_are_raised_as_in_a_list(block: tuple[int, list[int]], more: st.DataObject) -> None:
    order, counts = block
    most = (1 << (1 << order)) - 1
    entries = sorted(more.draw(st.sets(st.integers(0, COUNT - 1), min_size=1)))
    wanted = [more.draw(st.integers(0, most)) for _ in entries]
    raw = encoded(order, counts)
    raise_refcounts(
        raw,
        order,
        entries=np.array(entries, dtype=np.intp),
        counts=np.array(wanted, dtype=np.uint64),
    )
    for entry, count in zip(entries, wanted, strict=True):
        counts[entry] = max(counts[entry], count)
    assert raw == encoded(order, counts)


@given(block=blocks(), first=st.integers(0, COUNT - 1))
def test_the_first_run_of_free_entries_is_found(block: tuple[int, list[int]], first: int) -> None:
    order, counts = block
    found, count = find_free(encoded(order, counts), order, first=first)
    free = [entry for entry in range(first, COUNT) if not counts[entry]]
    if not free:
        assert count == 0
        return
    assert found == free[0]
    assert not any(counts[found : found + count])
    assert found + count == COUNT or counts[found + count]


@given(block=blocks(), keep=st.integers(0, COUNT))
def test_the_last_entry_in_use_is_found(block: tuple[int, list[int]], keep: int) -> None:
    order, counts = block
    counts = counts[:keep] + [0] * (COUNT - keep)
    used = [entry for entry, count in enumerate(counts) if count]
    assert last_used(encoded(order, counts), order) == max(used, default=-1)


@given(block=blocks())
def test_one_entry_is_read_as_all_are(block: tuple[int, list[int]]) -> None:
    order, counts = block
    raw = encoded(order, counts)
    assert [read_count(raw, order, entry) for entry in range(COUNT)] == counts


def test_a_count_that_cannot_change_is_told_with_its_place() -> None:
    error = BadCount(7, found=0, delta=-1)
    assert str(error) == "refcount 0 of entry 7 cannot change by -1"
