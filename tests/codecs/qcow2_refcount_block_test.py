"""Refcounts of every width, and the order of their bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.refcount_block import (
    count_used,
    decode_refcounts,
    encode_refcounts,
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
