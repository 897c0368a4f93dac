"""Comparing disks: the verdict is that of their bytes."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowkit.errors import Cancelled
from qcowkit.image.chain import Chain
from qcowkit.image.metadata import RawMetadata
from qcowkit.image.qcow2 import Qcow2Image
from qcowkit.image.raw import RawImage
from qcowkit.operations.compare import WINDOW, compare, first_difference
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import Zero
from qcowkit.units import KiB, MiB
from tests.image.chain_test import chains, qcow2_image


def raw(data: bytes) -> Chain:
    return Chain([RawImage(RawMetadata(virtual_size=len(data)), MemoryStorage(data))])


def qcow2(clusters: dict[int, Any], size: int = 16 * KiB) -> Chain:
    image: Qcow2Image = qcow2_image(cluster_bits=12, size=size, clusters=clusters)
    return Chain([image])


@settings(max_examples=100, deadline=None)
@given(case=chains(), change=st.integers(0, 1 << 30), tail=st.integers(0, 2000))
def test_the_first_byte_that_differs_is_found(case: Any, change: int, tail: int) -> None:
    chain, content = case
    assert compare(chain, raw(content), threads=2).same
    longer = compare(raw(content + bytes(tail)), chain, threads=2)
    assert longer.same
    assert longer.render()[-1] == "the disks are identical"
    if not content:
        return
    at = change % len(content)
    other = bytearray(content)
    other[at] ^= 0x80
    found = compare(chain, raw(bytes(other)), threads=2)
    assert (found.same, found.offset) == (False, at)
    assert found.reason == f"the content differs at offset {at}"


def test_what_one_disk_has_beyond_the_other_must_be_zero() -> None:
    found = compare(raw(b"x" * 512), raw(b"x" * 512 + bytes(700) + b"y"))
    assert (found.same, found.offset, found.sizes) == (False, 1212, (512, 1213))
    same = compare(raw(b"x" * 512 + bytes(512)), raw(b"x" * 512))
    assert same.render() == [
        "the sizes differ, 1024 and 512 bytes; the rest is zero",
        "the disks are identical",
    ]
    assert same.as_json() == {
        "identical": True,
        "reason": "the disks are identical",
        "sizes": [1024, 512],
    }


def test_strict_wants_equal_sizes() -> None:
    found = compare(raw(bytes(512)), raw(bytes(1024)), strict=True)
    assert (found.same, found.offset) == (False, None)
    assert found.reason == "the sizes differ: 512 and 1024 bytes"


def test_strict_wants_the_same_ranges_allocated() -> None:
    full = qcow2({0: bytes(4096), 2: Zero()})
    assert compare(full, qcow2({0: bytes(4096), 2: Zero()}), strict=True).same
    assert compare(full, qcow2({0: bytes(4096)})).same
    found = compare(full, qcow2({0: bytes(4096)}), strict=True)
    assert (found.offset, found.reason) == (8192, "the allocation differs at offset 8192")


def test_empty_disks_are_identical() -> None:
    assert compare(raw(b""), raw(b""), strict=True).same
    assert compare(raw(b""), raw(bytes(5))).same


def test_windows_of_any_phase_are_compared() -> None:
    data = bytearray(3 * WINDOW + 5)
    data[WINDOW - 1] = data[WINDOW] = data[-1] = 1
    assert compare(raw(bytes(data)), raw(bytes(data))).same
    for at in (0, WINDOW - 1, WINDOW, 2 * WINDOW, len(data) - 1):
        other = bytearray(data)
        other[at] ^= 1
        assert compare(raw(bytes(data)), raw(bytes(other))).offset == at


@given(data=st.binary(max_size=40), change=st.integers(0, 39))
def test_the_first_difference_of_two_arrays(data: bytes, change: int) -> None:
    left = np.frombuffer(data, np.uint8)
    assert first_difference(left, left.copy()) is None
    if change < len(data):
        right = left.copy()
        right[change] ^= 1
        right[change:] ^= 1
        right[change] = left[change] ^ 1
        assert first_difference(left, right) == change


def test_progress_ends_with_all_of_it() -> None:
    seen: list[tuple[int, int]] = []
    compare(
        raw(bytes(MiB)), raw(bytes(512)), progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (MiB, MiB)


def test_a_comparison_can_be_cancelled() -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        compare(raw(b"x" * MiB), raw(b"x" * MiB), cancel=cancel)
