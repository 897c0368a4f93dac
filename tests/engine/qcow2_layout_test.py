"""Layouts and specifications of new images."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.engine.qcow2.layout import l2_bytes, plan_layout, refcount_clusters
from qcowkit.engine.qcow2.spec import Qcow2Spec, refuse_compressed_data_file
from qcowkit.errors import RequestError, UnsupportedFeature
from qcowkit.units import GiB, KiB, MiB, TiB, ceil_div

geometries = st.builds(Geometry, cluster_bits=st.integers(9, 21), refcount_order=st.integers(0, 6))


def needed(geometry: Geometry, others: int, blocks: int, table: int) -> tuple[int, int]:
    more = ceil_div(others + blocks + table, geometry.refcounts_per_block)
    return more, ceil_div(more * 8, geometry.cluster_size)


@given(geometry=geometries, blocks=st.integers(1, 600), delta=st.integers(-3, 3))
def test_refcount_blocks_count_everything_and_themselves(
    geometry: Geometry, blocks: int, delta: int
) -> None:
    """Around every multiple of what a block counts."""
    others = max(1, blocks * geometry.refcounts_per_block + delta)
    found, table = refcount_clusters(geometry, others)
    assert needed(geometry, others, found, table) == (found, table)


@pytest.mark.parametrize("bits", [9, 10, 12])
@pytest.mark.parametrize("order", [4, 6])
def test_the_fixed_point_is_the_smallest(bits: int, order: int) -> None:
    geometry = Geometry(cluster_bits=bits, refcount_order=order)
    for others in [*range(1, 400), *range(64_000, 64_100)]:
        blocks, table = refcount_clusters(geometry, others)
        smaller = (fewer for fewer in range(1, blocks))
        for fewer in smaller if blocks < 20 else ():
            total = others + fewer + ceil_div(fewer * 8, geometry.cluster_size)
            assert total > fewer * geometry.refcounts_per_block
        assert others + blocks + table <= blocks * geometry.refcounts_per_block


@given(geometry=geometries, size=st.integers(0, 1 * GiB), tables=st.integers(0, 99))
def test_structures_follow_one_another_without_gaps(
    geometry: Geometry, size: int, tables: int
) -> None:
    layout = plan_layout(geometry, size=size, l2_tables=tables, data_clusters=7)
    cluster = geometry.cluster_size
    assert layout.refcount_table_offset == cluster
    assert (
        layout.data_offset
        == (
            1
            + layout.refcount_table_clusters
            + layout.refcount_blocks
            + ceil_div(ceil_div(size, geometry.l2_coverage) * 8, cluster)
            + tables
        )
        * cluster
    )
    assert layout.end == layout.data_offset + 7 * cluster
    assert layout.end // cluster <= layout.refcount_blocks * geometry.refcounts_per_block


def test_a_refcount_table_that_no_reader_takes_is_refused() -> None:
    geometry = Geometry(cluster_bits=9, refcount_order=6)
    with pytest.raises(RequestError, match="choose larger clusters"):
        plan_layout(geometry, size=64 * GiB, l2_tables=1 << 21, data_clusters=1 << 27)


def test_l2_tables_are_whole_clusters() -> None:
    assert l2_bytes(Geometry(cluster_bits=16), 512 * MiB) == 64 * KiB
    assert l2_bytes(Geometry(cluster_bits=16), 512 * MiB + 1) == 128 * KiB
    assert l2_bytes(Geometry(cluster_bits=16, extended_l2=True), 512 * MiB) == 128 * KiB


SMALL = Geometry(cluster_bits=12)
EXTENDED = Geometry(cluster_bits=16, extended_l2=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 513}, "size 513 is not a multiple of 512"),
        ({"size": 64 * TiB, "geometry": Geometry(cluster_bits=9)}, "is above the limit of"),
        ({"size": (1 << 63) - 512, "geometry": Geometry(cluster_bits=21)}, "above the limit of"),
        ({"compression_type": "lzo"}, "compression_type 'lzo' is not one of zlib, zstd"),
        ({"preallocation": "some"}, "preallocation 'some' is not one of off, metadata"),
        (
            {"geometry": Geometry(cluster_bits=13, extended_l2=True)},
            "extended_l2 needs a cluster_size of at least 16384, found 8192",
        ),
        ({"version": 2, "geometry": EXTENDED}, "extended_l2 needs compat=1.1"),
        ({"version": 2, "lazy_refcounts": True}, "lazy_refcounts needs compat=1.1"),
        ({"version": 2, "data_file": "d"}, "data_file needs compat=1.1"),
        ({"version": 2, "compression_type": "zstd"}, "compression_type=zstd needs compat=1.1"),
        (
            {"version": 2, "geometry": Geometry(cluster_bits=16, refcount_order=3)},
            "refcount_bits=8 needs compat=1.1, found compat=0.10",
        ),
        (
            {"preallocation": "metadata", "backing_name": "b"},
            "preallocation with a backing file needs extended_l2=on",
        ),
        ({"data_file_raw": True}, "data_file_raw=on needs data_file"),
        (
            {"data_file_raw": True, "data_file": "d", "backing_name": "b"},
            "data_file_raw=on excludes a backing file",
        ),
    ],
)
def test_options_that_exclude_one_another_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        dataclasses.replace(Qcow2Spec(size=MiB), **changes)  # type: ignore[arg-type]


def test_preallocation_over_a_backing_file_is_allowed_with_subclusters() -> None:
    spec = Qcow2Spec(size=MiB, geometry=EXTENDED, preallocation="metadata", backing_name="b")
    assert spec.preallocated
    assert spec.keeps_zeros


def test_compressed_clusters_need_the_image_itself_and_no_preallocation() -> None:
    with pytest.raises(UnsupportedFeature, match="external data file"):
        refuse_compressed_data_file(Qcow2Spec(size=MiB, data_file="d"))
    with pytest.raises(RequestError, match="compression and preallocation exclude"):
        refuse_compressed_data_file(Qcow2Spec(size=MiB, preallocation="full"))
