"""Map output against a plain rendering of the same rows, a dictionary each."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.errors import RequestError
from qcowkit.extents.algebra import clip, overlay
from qcowkit.extents.table import Extent, ExtentTable, Flag, empty, make_table
from qcowkit.operations.map import batches, iter_map_json, iter_rows, render_map_text
from qcowkit.testing.disks import TableDisk
from qcowkit.testing.strategies import extent_tables

DATA = int(Flag.DATA | Flag.PRESENT)
ZERO = int(Flag.ZERO | Flag.PRESENT)
PACKED = int(Flag.DATA | Flag.PRESENT | Flag.COMPRESSED)

Entry = dict[str, Any]


def load(disk: TableDisk, **limits: int) -> list[Entry]:
    entries: list[Entry] = json.loads(b"".join(iter_map_json(disk, **limits)))
    return entries


def plain_entry(row: Extent) -> Entry:
    packed = bool(row.flags & Flag.COMPRESSED)
    data = bool(row.flags & Flag.DATA)
    entry = {
        "start": row.start,
        "length": row.length,
        "depth": row.layer,
        "present": bool(row.flags & Flag.PRESENT),
        "zero": bool(row.flags & Flag.ZERO) or not data,
        "data": data,
        "compressed": packed,
    }
    return entry if row.host < 0 or packed else entry | {"offset": row.host}


def plain_map(table: ExtentTable) -> list[Entry]:
    entries: list[Entry] = []
    for entry in map(plain_entry, table):
        expected = dict(entries[-1]) if entries else {}
        if expected:
            expected["start"] += expected["length"]
            if "offset" in expected:
                expected["offset"] += expected["length"]
            expected["length"] = entry["length"]
        if expected == entry:
            entries[-1]["length"] += entry["length"]
        else:
            entries.append(entry)
    return entries


@given(
    top=extent_tables(layer=0, unit=512),
    base=extent_tables(layer=1, unit=512),
    window=st.integers(1, 5),
)
def test_json_agrees_with_the_plain_rendering(
    top: ExtentTable, base: ExtentTable, window: int
) -> None:
    table = overlay(top, base)
    assert load(TableDisk(table, window=window)) == plain_map(table)


@given(table=extent_tables(), start=st.integers(0, 40), length=st.integers(0, 60))
def test_a_part_of_the_map_is_the_map_of_that_part(
    table: ExtentTable, start: int, length: int
) -> None:
    start = min(start, table.end)
    found = load(TableDisk(table), start=start, length=length)
    assert found == plain_map(clip(table, start, start + length))


def test_numbers_of_every_width_are_written_in_full() -> None:
    lengths = np.array([*(10**power for power in range(18)), 9999, 10000, 12345, 1 << 56])
    starts = np.cumsum(lengths) - lengths
    hosts = lengths[::-1] * 3 + 7
    table = make_table(starts, lengths, DATA, host=hosts)
    entries = load(TableDisk(table))
    assert [entry["start"] for entry in entries] == starts.tolist()
    assert [entry["length"] for entry in entries] == lengths.tolist()
    assert [entry["offset"] for entry in entries] == hosts.tolist()


def test_depths_of_a_long_chain_are_written_in_full() -> None:
    table = make_table(np.arange(200), 1, DATA, layer=np.arange(200), host=0)
    assert [entry["depth"] for entry in load(TableDisk(table))] == list(range(200))


def test_runs_merge_across_windows_and_batches() -> None:
    count = 50_000
    table = make_table(np.arange(count) * 512, 512, DATA, host=np.arange(count) * 512)
    assert load(TableDisk(table, window=700)) == [
        {
            "start": 0,
            "length": count * 512,
            "depth": 0,
            "present": True,
            "zero": False,
            "data": True,
            "compressed": False,
            "offset": 0,
        }
    ]


def test_many_runs_come_in_pieces_and_one_line_each() -> None:
    count = 40_000
    table = make_table(np.arange(count) * 512, 512, np.where(np.arange(count) % 2, DATA, ZERO))
    pieces = list(iter_map_json(TableDisk(table, window=8192)))
    assert len(pieces) > 3
    lines = b"".join(pieces).decode().splitlines()
    assert len(lines) == count
    assert {len(line) for line in lines[1:-1]} == {len(lines[1])}


def test_neighbouring_compressed_clusters_show_as_one_run_without_an_offset() -> None:
    table = make_table([0, 4096], [4096, 4096], PACKED, host=[70000, 99], stored=[100, 200])
    [entry] = load(TableDisk(table))
    assert entry["compressed"] is True
    assert "offset" not in entry
    assert entry["length"] == 8192


def test_a_byte_that_no_layer_decides_is_zero_and_not_present() -> None:
    [entry] = load(TableDisk(make_table([0], 512, 0)))
    assert (entry["present"], entry["zero"], entry["data"]) == (False, True, False)


def test_a_host_range_without_an_owner_is_shown() -> None:
    [entry] = load(TableDisk(make_table([0], 512, 0, host=8192)))
    assert (entry["present"], entry["offset"]) == (False, 8192)


def test_flags_that_a_map_does_not_show_do_not_part_runs() -> None:
    table = make_table([0, 512], 512, [DATA, DATA | Flag.COPIED], host=[0, 512])
    assert len(load(TableDisk(table))) == 1


def test_the_map_of_an_empty_disk_is_an_empty_array() -> None:
    assert b"".join(iter_map_json(TableDisk(empty()))) == b"[]\n"


def test_a_start_beyond_the_disk_is_refused() -> None:
    disk = TableDisk(make_table([0], 512, 0))
    with pytest.raises(RequestError, match="start offset 513 is beyond the disk of 512 bytes"):
        list(iter_map_json(disk, start=513))


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(RequestError, match="length -1 is negative"):
        list(iter_rows(TableDisk(empty()), length=-1))


@given(table=extent_tables(), rows=st.integers(1, 5), window=st.integers(1, 12))
def test_batches_hold_the_same_rows(table: ExtentTable, rows: int, window: int) -> None:
    disk = TableDisk(table, window=window)
    found = list(batches(disk.iter_extents(start=0, length=disk.size), rows))
    assert [row for batch in found for row in batch] == list(table)
    assert all(0 < len(batch) <= rows for batch in found)


def test_the_text_names_every_state_place_and_file() -> None:
    table = make_table(
        [0, 0x10000, 0x20000, 0x30000],
        0x10000,
        [DATA, PACKED, ZERO, 0],
        layer=[1, 0, 0, 1],
        host=[0x50000, 0x60000, -1, -1],
        stored=[0, 1024, 0, 0],
    )
    lines = list(render_map_text(TableDisk(table), files=("top.qcow2", "base.raw")))
    assert [" ".join(line.split()) for line in lines] == [
        "start end size state depth host offset file",
        "0x0 0x10000 64 KiB data 1 0x50000 base.raw",
        "0x10000 0x20000 64 KiB compressed 0 in 1 KiB top.qcow2",
        "0x20000 0x30000 64 KiB zero 0 - top.qcow2",
        "0x30000 0x40000 64 KiB unallocated 1 -",
        "4 runs: 64 KiB data, 64 KiB compressed, 64 KiB zero, 64 KiB unallocated",
    ]


def test_the_text_of_an_empty_disk_says_so() -> None:
    assert list(render_map_text(TableDisk(empty())))[-1] == "0 runs: the disk is empty"
