"""Allocation JSON: both shapes written and read, and the arithmetic of partial clusters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import ExtentTable, Flag, empty, make_table, single
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.registry import open_chain
from qcowkit.operations.headers import (
    allocation_from_qemu,
    allocation_json,
    iter_clusters,
    parse_allocation,
)
from qcowkit.operations.map import iter_map_json
from qcowkit.testing.disks import TableDisk
from qcowkit.testing.strategies import extent_tables
from tests.corpus import sound_images, unpack

DATA = int(Flag.DATA | Flag.PRESENT)
ZERO = int(Flag.ZERO | Flag.PRESENT)
MIB2 = 1 << 21


def document(disk: TableDisk, *, cluster_bits: int, legacy: bool = False) -> bytes:
    return b"".join(allocation_json(disk, cluster_bits=cluster_bits, legacy=legacy))


def gapped() -> TableDisk:
    lengths = np.array([3 * MIB2, 10 * MIB2, 3 * MIB2, 8192])
    return TableDisk(make_table(np.cumsum(lengths) - lengths, lengths, [DATA, 0, DATA, ZERO]))


def test_intervals_are_compact_inclusive_and_in_order() -> None:
    assert document(gapped(), cluster_bits=21) == (
        b'{"virtual_size":33562624,"cluster_bits":21,"data_clusters":[[0,2],[13,15]]}'
    )


def test_the_older_shape_lists_every_cluster() -> None:
    assert document(gapped(), cluster_bits=21, legacy=True) == (
        b'{"virtual_size":33562624,"cluster_bits":21,"data_clusters":[0,1,2,13,14,15]}'
    )


def test_a_full_disk_is_one_interval() -> None:
    disk = TableDisk(single(0, 16 * MIB2, DATA, host=0))
    assert json.loads(document(disk, cluster_bits=21))["data_clusters"] == [[0, 15]]
    flat = json.loads(document(disk, cluster_bits=21, legacy=True))["data_clusters"]
    assert flat == list(range(16))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_disk_without_data_is_an_empty_list(legacy: bool) -> None:
    disk = TableDisk(single(0, 4 * MIB2, ZERO))
    assert json.loads(document(disk, cluster_bits=21, legacy=legacy))["data_clusters"] == []


@pytest.mark.parametrize("legacy", [False, True])
def test_a_disk_of_no_bytes_is_an_empty_list(legacy: bool) -> None:
    assert document(TableDisk(empty()), cluster_bits=16, legacy=legacy) == (
        b'{"virtual_size":0,"cluster_bits":16,"data_clusters":[]}'
    )


def test_a_partial_last_cluster_is_kept() -> None:
    table = make_table([0, 69632, 70144], [69632, 512, 29856], [0, DATA, 0])
    found = json.loads(document(TableDisk(table), cluster_bits=16))
    assert found["data_clusters"] == [[1, 1]]


def test_an_extent_smaller_than_a_cluster_is_kept() -> None:
    table = make_table([0, 4096], [4096, 61440], [DATA, 0])
    assert json.loads(document(TableDisk(table), cluster_bits=16))["data_clusters"] == [[0, 0]]


@given(
    table=extent_tables(unit=512, max_rows=20),
    window=st.integers(1, 6),
    cluster_bits=st.sampled_from((9, 10, 12)),
)
def test_every_cluster_with_a_byte_of_data_is_listed_once(
    table: ExtentTable, window: int, cluster_bits: int
) -> None:
    expected = sorted(
        {
            index
            for row in table
            if row.flags & Flag.DATA
            for index in range(
                row.start >> cluster_bits, ((row.start + row.length - 1) >> cluster_bits) + 1
            )
        }
    )
    disk = TableDisk(table, window=window)
    assert (
        json.loads(document(disk, cluster_bits=cluster_bits, legacy=True))["data_clusters"]
        == expected
    )
    pairs = json.loads(document(disk, cluster_bits=cluster_bits))["data_clusters"]
    assert [index for first, last in pairs for index in range(first, last + 1)] == expected
    assert all(left[1] + 1 < right[0] for left, right in zip(pairs, pairs[1:], strict=False))


def test_a_terabyte_of_contiguous_data_is_one_short_document() -> None:
    count = 1 << 12
    unit = 1 << 28
    table = make_table(np.arange(count) * unit, unit, DATA, host=np.arange(count) * unit)
    assert len(document(TableDisk(table), cluster_bits=16)) < 100


def test_the_flat_list_of_a_large_run_comes_in_pieces() -> None:
    disk = TableDisk(single(0, 1 << 27, DATA, host=0))
    pieces = list(allocation_json(disk, cluster_bits=9, legacy=True))
    assert len(pieces) > 5
    assert len(json.loads(b"".join(pieces))["data_clusters"]) == 1 << 18


def test_runs_that_touch_between_windows_are_one() -> None:
    table = make_table([0, 512, 1024], [512, 512, 512], [DATA, ZERO, DATA])
    [clusters] = iter_clusters(TableDisk(table, window=1), cluster_bits=10)
    assert clusters == RangeSet.of([0], [2])


def test_a_cluster_size_out_of_range_is_refused() -> None:
    with pytest.raises(RequestError, match="cluster_bits 8 is not between 9 and 30"):
        document(gapped(), cluster_bits=8)


@given(table=extent_tables(unit=512), legacy=st.booleans())
def test_both_shapes_read_back_as_the_same_clusters(table: ExtentTable, legacy: bool) -> None:
    disk = TableDisk(table)
    found = parse_allocation(document(disk, cluster_bits=10, legacy=legacy))
    assert (found.virtual_size, found.cluster_bits) == (disk.size, 10)
    assert found.clusters == RangeSet.from_table(table, Flag.DATA).scale_outward(1024)


def whole(clusters: str, *, size: str = "1000000", bits: str = "16") -> str:
    return f'{{"virtual_size":{size},"cluster_bits":{bits},"data_clusters":{clusters}}}'


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("", "allocation document: not JSON: "),
        ("[" * 100_000, "allocation document: not JSON: "),
        ("[]", "allocation document: an array, expected an object"),
        ("{}", "virtual_size is missing or null, expected an integer"),
        (whole("[]", size="1e3"), "virtual_size is a fraction, expected an integer"),
        (whole("[]", size="-1"), "virtual_size is -1, expected 0 to "),
        (whole("[]", size=str(1 << 63)), "virtual_size is 9223372036854775808, expected 0 to"),
        (whole("[]", bits="8"), "cluster_bits is 8, expected at least 9"),
        (whole("[]", bits="31"), "cluster_bits is 31, expected 0 to 30"),
        (whole("{}"), "data_clusters is an object, expected an array"),
        (whole("[1,[2,3]]"), "data_clusters, entry 1: an array, expected a cluster index"),
        (whole("[[1,2],3]"), "entry 1: an integer, expected an interval \\[first,last\\]"),
        (whole("[[1,2,3]]"), "entry 0: an array of 3, expected an interval"),
        (whole("[[1,null]]"), "entry 0: missing or null, expected a cluster index"),
        (whole("[true]"), "entry 0: a truth value, expected a cluster index"),
        (whole("[[3,2]]"), "entry 0: the interval \\[3,2\\] ends before it begins"),
        (whole("[[1,2],[2,3]]"), "entry 1: cluster 2 is out of order, expected at least 3"),
        (whole("[4,4]"), "entry 1: cluster 4 is out of order, expected at least 5"),
        (whole("[-1]"), "entry 0: cluster -1 is out of order, expected at least 0"),
        (whole("[16]"), "entry 0: cluster 16 is beyond the disk of 16 clusters"),
        (whole(f"[[0,{10**30}]]"), "is beyond the disk of 16 clusters"),
    ],
)
def test_a_malformed_document_is_refused_by_name(raw: str, message: str) -> None:
    with pytest.raises(CorruptMetadata, match=message):
        parse_allocation(raw)


def info(**facts: Any) -> str:
    return json.dumps({"virtual-size": 100_000, "cluster-size": 65536} | facts)


def entries(*rows: tuple[int, int, Any]) -> str:
    return json.dumps(
        [{"start": start, "length": length, "data": data} for start, length, data in rows]
    )


def test_info_and_map_of_qemu_give_the_partial_last_cluster() -> None:
    found = allocation_from_qemu(info(), entries((0, 69632, False), (69632, 30368, True)))
    assert (found.virtual_size, found.cluster_bits) == (100_000, 16)
    assert found.clusters.pairs().tolist() == [[1, 1]]


@given(table=extent_tables(unit=512, max_rows=20))
def test_our_own_map_gives_the_same_clusters_as_the_disk(table: ExtentTable) -> None:
    disk = TableDisk(table)
    facts = json.dumps({"virtual-size": disk.size, "cluster-size": 1024})
    found = allocation_from_qemu(facts, b"".join(iter_map_json(disk)))
    assert found.clusters == parse_allocation(document(disk, cluster_bits=10)).clusters


def test_a_raw_disk_needs_a_cluster_size_to_be_given() -> None:
    facts = json.dumps({"virtual-size": 100_000})
    with pytest.raises(RequestError, match="the info document has no cluster-size"):
        allocation_from_qemu(facts, "[]")
    assert allocation_from_qemu(facts, "[]", cluster_bits=12).cluster_bits == 12


@pytest.mark.parametrize(
    ("facts", "rows", "message"),
    [
        ("7", "[]", "info document: an integer, expected an object"),
        (info(**{"virtual-size": "1"}), "[]", "virtual-size is a string, expected an integer"),
        (info(**{"cluster-size": 1000}), "[]", "cluster-size is 1000, expected a power of two"),
        (info(), "{", "map document: not JSON"),
        (info(), "{}", "map document: an object, expected an array"),
        (info(), "[4]", "map document, entry 0: an integer, expected an object"),
        (info(), entries((0, 100_001, True)), "length is 100001, expected 0 to 100000"),
        (info(), entries((0, 512, True), (0, 512, True)), "entry 1: start 0 is out of order"),
        (info(), entries((0, 512, 1)), "data is an integer, expected true or false"),
    ],
)
def test_malformed_documents_of_qemu_are_refused_by_name(
    facts: str, rows: str, message: str
) -> None:
    with pytest.raises(CorruptMetadata, match=message):
        allocation_from_qemu(facts, rows)


def test_every_block_of_a_dynamic_vhd_counts_whatever_its_sector_bitmap_says(
    tmp_path: Path,
) -> None:
    entry = next(iter(sound_images(name="vhd-grandchild-macx")))
    path = unpack(entry, tmp_path)
    with open_chain(path, format="vpc", gate=ReferenceGate.below_image()) as chain:
        document = b"".join(allocation_json(chain, cluster_bits=21))
    # Its own table has fewer blocks: those of the parents count as well.
    assert parse_allocation(document).clusters == RangeSet.of([0], [3])
