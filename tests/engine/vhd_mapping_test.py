"""The block map: rows 51 and 52 of the validation list, and the extents that follow."""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.budget import TRUSTED
from qcowkit.engine.vhd.mapping import BlockMap
from qcowkit.engine.vhd.metadata import load_vhd_metadata
from qcowkit.errors import CorruptMetadata
from qcowkit.extents.table import Flag
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.vhd_builder import DIFFERENCING, DYNAMIC, VhdBuilder

BLOCK = 4096
DATA = Flag.DATA | Flag.PRESENT
ZERO = Flag.ZERO | Flag.PRESENT
# The table of every file here is one sector at 1536, so blocks begin at sector 4.
FIRST_SECTOR = 4


def load(image: bytes) -> BlockMap:
    storage = MemoryStorage(image)
    return BlockMap.load(load_vhd_metadata(storage, budget=TRUSTED), storage)


def rows(blocks: BlockMap, **span: Any) -> list[tuple[int, int, int, int]]:
    table = blocks.extents(**{"start": 0, "length": blocks.size, **span})
    table.check()
    assert (table.layer == 0).all()
    assert (table.stored == 0).all()
    return [(row.start, row.length, row.flags, row.host) for row in table]


def three_blocks(**entries: int) -> bytes:
    """Blocks 0 and 1 used, 2 unused; entries e0, e1 and e2 replace the sound ones."""
    image = VhdBuilder(size=3 * BLOCK).block(0, b"zero").block(1, b"one").build()
    for name, sector in entries.items():
        struct.pack_into(">I", image, 1536 + 4 * int(name[1:]), sector)
    return bytes(image)


def test_used_blocks_are_data_behind_their_bitmaps_and_unused_ones_zero() -> None:
    assert rows(load(three_blocks())) == [
        (0, BLOCK, DATA, 2048 + 512),
        (BLOCK, BLOCK, DATA, 2048 + 512 + BLOCK + 512),
        (2 * BLOCK, BLOCK, ZERO, -1),
    ]


def test_unused_blocks_of_a_child_are_left_to_the_parent() -> None:
    builder = VhdBuilder(size=3 * BLOCK, disk_type=DIFFERENCING).block(1, b"one")
    assert rows(load(builder.build())) == [
        (0, BLOCK, Flag.NONE, -1),
        (BLOCK, BLOCK, DATA, 2560),
        (2 * BLOCK, BLOCK, Flag.NONE, -1),
    ]


@pytest.mark.parametrize(("kind", "clear"), [(DYNAMIC, ZERO), (DIFFERENCING, Flag.NONE)])
def test_clear_bits_are_honoured_in_both_types(kind: int, clear: Flag) -> None:
    builder = VhdBuilder(size=2 * BLOCK, disk_type=kind)
    builder.block(0, b"\xee" * BLOCK, bitmap=bytes([0b01100001]))
    builder.block(1, b"\xee" * BLOCK)
    host = builder.block_offset(0) + 512
    assert rows(load(builder.build())) == [
        (0, 512, clear, host),
        (512, 1024, DATA, host + 512),
        (1536, 2048, clear, host + 1536),
        (3584, 512, DATA, host + 3584),
        (BLOCK, BLOCK, DATA, builder.block_offset(1) + 512),
    ]


def test_bits_beyond_the_end_of_the_disk_do_not_count() -> None:
    builder = VhdBuilder(size=BLOCK + 1024).block(1, b"tail", bitmap=bytes([0b11000000]))
    assert rows(load(builder.build()))[-1] == (BLOCK, 1024, DATA, 2560)


def test_the_last_block_ends_where_the_disk_does() -> None:
    builder = VhdBuilder(size=BLOCK + 1024).block(1, b"tail")
    assert rows(load(builder.build()))[-1] == (BLOCK, 1024, DATA, 2560)


def test_a_range_within_a_block_moves_the_host_offset() -> None:
    blocks = load(three_blocks())
    assert rows(blocks, start=700, length=100) == [(700, 100, DATA, 2560 + 700)]


def test_an_empty_range_gives_an_empty_table() -> None:
    assert rows(load(three_blocks()), start=BLOCK, length=0) == []


@pytest.mark.parametrize(("limit", "end"), [(0, BLOCK), (1, BLOCK), (2, 2 * BLOCK), (9, 3 * BLOCK)])
def test_the_limit_counts_blocks_and_lets_at_least_one_through(limit: int, end: int) -> None:
    blocks = load(three_blocks())
    table = blocks.extents(start=100, length=blocks.size - 100, limit=limit)
    assert (table.begin, table.end) == (100, end)


def test_a_disk_of_no_blocks_has_an_empty_table() -> None:
    assert rows(load(VhdBuilder(size=0, entries=1).build())) == []


def test_blocks_above_1_tib_of_file_are_found() -> None:
    storage = HighBlock(VhdBuilder(size=BLOCK).build(), sector=0xC0000000)
    blocks = BlockMap.load(load_vhd_metadata(storage, budget=TRUSTED), storage)
    assert rows(blocks) == [(0, BLOCK, DATA, 0xC0000000 * 512 + 512)]


class HighBlock(MemoryStorage):
    """One block far away, in a file that would not fit into memory; its bitmap is all ones."""

    def __init__(self, image: bytearray, *, sector: int) -> None:
        struct.pack_into(">I", image, 1536, sector)
        super().__init__(image)
        self._sector = sector

    def size(self) -> int:
        return self._sector * 512 + 512 + BLOCK

    def pread(self, length: int, *, offset: int) -> bytes:
        if offset == self._sector * 512:
            return b"\xff" * length
        return super().pread(length, offset=offset)


# Row 51


@pytest.mark.parametrize(
    ("entries", "index", "reason"),
    [
        ({"e2": 0}, 2, "block at sector 0, expected 4 or more, behind the table"),
        ({"e1": 3}, 1, "block at sector 3, expected 4 or more, behind the table"),
        (
            {"e2": 0xFFFFFFFE},
            2,
            "block at sector 4294967294 ends at 0x20000000e00, expected at most 0x2c00",
        ),
        ({"e1": 14}, 1, "block at sector 14 ends at 0x2e00, expected at most 0x2c00"),
        ({"e2": 13}, 2, "block at sector 13 shares sectors with the block at sector 13"),
        ({"e1": 12}, 1, "block at sector 12 shares sectors with the block at sector 4"),
    ],
)
def test_a_table_entry_that_breaks_a_rule_is_refused(
    entries: dict[str, int], index: int, reason: str
) -> None:
    message = f"block allocation table at host offset 0x600, entry {index}: {reason}"
    with pytest.raises(CorruptMetadata, match=re.escape(message)):
        load(three_blocks(**entries))


def test_a_block_over_a_header_behind_the_table_is_refused() -> None:
    image = bytearray(three_blocks())
    header = image[512:1536]
    # The header moves into what is the second block, the entry stays.
    image[2048 + 4608 : 2048 + 4608 + 1024] = header
    for footer in (0, len(image) - 512):
        struct.pack_into(">Q", image, footer + 16, 2048 + 4608)
        struct.pack_into(">I", image, footer + 64, 0)
        total = ~sum(image[footer : footer + 512]) & 0xFFFFFFFF
        struct.pack_into(">I", image, footer + 64, total)
    message = "entry 1: block at sector 13 overlaps the dynamic header at 0x1a00"
    with pytest.raises(CorruptMetadata, match=message):
        load(bytes(image))


def test_entries_beyond_the_disk_are_not_looked_at() -> None:
    image = VhdBuilder(size=BLOCK, entries=4).block(0, b"x").build()
    struct.pack_into(">I", image, 1536 + 12, 1)
    assert len(rows(load(image))) == 1


def test_a_file_that_loses_its_table_after_opening_is_refused() -> None:
    storage = MemoryStorage(three_blocks())
    metadata = load_vhd_metadata(storage, budget=TRUSTED)
    storage.truncate(1536 + 4)
    message = "block allocation table at host offset 0x600, entry 1: the file ends after 4 of 12"
    with pytest.raises(CorruptMetadata, match=message):
        BlockMap.load(metadata, storage)


@given(st.data())
def test_extents_equal_a_walk_sector_by_sector(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([DYNAMIC, DIFFERENCING]))
    sectors = data.draw(st.integers(1, 40))
    builder = VhdBuilder(size=sectors * 512, disk_type=kind)
    used = data.draw(st.lists(st.integers(0, (sectors - 1) // 8), unique=True))
    bitmaps = {index: data.draw(st.sampled_from([255, 0]) | st.integers(0, 255)) for index in used}
    for index, bitmap in bitmaps.items():
        builder.block(index, b"", bitmap=bytes([bitmap]))
    start = data.draw(st.integers(0, builder.size - 1))
    length = data.draw(st.integers(1, builder.size - start))
    expected = []
    for sector in range(sectors):
        present = bitmaps.get(sector // 8, 0) >> (7 - sector % 8) & 1
        absent = ZERO if kind == DYNAMIC else Flag.NONE
        host = -1
        if sector // 8 in bitmaps:
            host = builder.block_offset(sector // 8) + 512 + sector % 8 * 512
        expected.append((int(DATA if present else absent), host))
    table = load(builder.build()).extents(start=start, length=length)
    table.check()
    assert (table.begin, table.end) == (start, start + length)
    for row in table:
        for byte in {row.start, row.start + row.length - 1}:
            flags, host = expected[byte // 512]
            assert row.flags == flags
            found = row.host + byte - row.start if row.host >= 0 else -1
            assert found == (host + byte % 512 if host >= 0 else -1)


def test_neighbouring_unused_blocks_are_one_row() -> None:
    blocks = load(VhdBuilder(size=100 * BLOCK).block(50, b"x").build())
    assert [row[1] // BLOCK for row in rows(blocks)] == [50, 1, 49]
    assert np.count_nonzero(blocks.sectors >= FIRST_SECTOR) == 1
