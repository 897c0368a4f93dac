"""What a check finds in a VHD."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import pytest

from qcowkit.operations.check import CheckResult, Verdict, check_image, open_for_check
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.vhd_builder import DIFFERENCING, FIXED, VhdBuilder

BLOCK = 4096


def check(image: bytearray | bytes) -> CheckResult:
    return check_image(open_for_check(MemoryStorage(image), format="vpc"))


def texts(result: CheckResult) -> list[str]:
    return [f"{finding.severity.value}: {finding}" for finding in result.findings]


def vhd(**changes: Any) -> VhdBuilder:
    return VhdBuilder(size=3 * BLOCK, **changes).block(0, b"zero").block(1, b"one")


def test_a_sound_vhd_is_clean() -> None:
    result = check(vhd().build())
    assert texts(result) == []
    assert (result.total_clusters, result.allocated_clusters, result.fragmented_clusters) == (
        3,
        2,
        0,
    )


def test_a_fixed_vhd_is_clean() -> None:
    image = VhdBuilder(size=BLOCK, disk_type=FIXED).build(b"content")
    assert check(image).verdict is Verdict.CLEAN


def spoil_entries(*entries: int) -> bytes:
    """Three blocks; the table of every file here is one sector at 1536, blocks begin at 2048."""
    image = vhd().block(2, b"two").build()
    for index, sector in enumerate(entries):
        if sector >= 0:
            struct.pack_into(">I", image, 1536 + 4 * index, sector)
    return bytes(image)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ((-1, 4), "entry 1: the block at sector 4 shares sectors with another block"),
        ((-1, 5), "entry 1: the block at sector 5 shares sectors with another block"),
        ((-1, 2), "entry 1: the block at sector 2 lies before sector 4, where the table ends"),
        ((-1, 9000), "entry 1: the block at sector 9000 reaches beyond the last byte for blocks, "
                     "0x3e00"),
    ],
)  # fmt: skip
def test_a_block_in_a_wrong_place_is_reported(entries: Sequence[int], expected: str) -> None:
    result = check(spoil_entries(*entries))
    assert texts(result) == [f"corruption: block allocation table at host offset 0x600, {expected}"]


def test_a_missing_footer_is_reported() -> None:
    image = vhd().build()
    found = texts(check(image[:-512]))
    assert found == [
        f"corruption: VHD footer at host offset {len(image) - 1024:#x}: it is missing or damaged; "
        "the copy at the start counts"
    ]


def test_footers_that_differ_are_reported() -> None:
    image = vhd().build()
    other = vhd()
    other.footer["timestamp"] = 0x0100_0000
    image[-512:] = other.encode_footer()
    (found,) = texts(check(image))
    assert "it differs from the copy at the start, first in byte 24" in found


def test_data_below_clear_bits_of_a_dynamic_disk_are_reported() -> None:
    image = vhd().block(2, b"\1" * BLOCK, bitmap=b"\x0f").build()
    (found,) = texts(check(image))
    assert "block 2 has data in 4 sectors with a clear bit, first in sector 0" in found


def test_zeros_below_clear_bits_are_no_fault() -> None:
    image = vhd().block(2, bytes(2048) + b"\1" * 2048, bitmap=b"\x0f").build()
    assert check(image).verdict is Verdict.CLEAN


def test_clear_bits_of_a_differencing_disk_are_no_fault() -> None:
    builder = vhd(disk_type=DIFFERENCING).block(2, b"\1" * BLOCK, bitmap=b"\x0f")
    image = builder.locator(b"W2ru", ".\\parent.vhd".encode("utf-16-le")).build()
    assert check(image).verdict is Verdict.CLEAN
