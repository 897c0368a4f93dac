"""Sizes of the caches follow the disk and the options, and contradictions are refused by name."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.engine.options import DEFAULT_OPTIONS, OpenOptions
from qcowkit.engine.qcow2.cache_sizes import (
    CacheSizes,
    full_l2_bytes,
    l2_coverage,
    plan_cache_sizes,
    refcount_coverage,
)
from qcowkit.errors import RequestError
from qcowkit.units import GiB, KiB, MiB, TiB, is_power_of_two
from tests.peers import peer, run_peer

DEFAULT = Geometry(cluster_bits=16)
EXTENDED = Geometry(cluster_bits=16, extended_l2=True)
GEOMETRIES = [
    Geometry(cluster_bits=bits, extended_l2=extended)
    for bits in range(9, 22)
    for extended in (False, True)
    if bits >= 14 or not extended
]


def plan(
    geometry: Geometry = DEFAULT, *, virtual_size: int = 10 * GiB, **options: int
) -> CacheSizes:
    chosen = OpenOptions(**options)  # type: ignore[arg-type]
    return plan_cache_sizes(geometry, virtual_size=virtual_size, options=chosen)


def parts(sizes: CacheSizes) -> tuple[int, int, int]:
    return sizes.l2_bytes, sizes.l2_entry_bytes, sizes.refcount_bytes


# What the disk needs: 8 (16) bytes a cluster, in whole clusters; at least 2 slices.
@pytest.mark.parametrize(
    ("geometry", "size", "expected"),
    [
        (DEFAULT, 0, (128 * KiB, 64 * KiB, 256 * KiB)),
        (DEFAULT, MiB, (128 * KiB, 64 * KiB, 256 * KiB)),
        (DEFAULT, GiB, (128 * KiB, 64 * KiB, 256 * KiB)),
        (DEFAULT, 10 * GiB, (1280 * KiB, 64 * KiB, 256 * KiB)),
        (DEFAULT, 10 * GiB + 1, (1344 * KiB, 64 * KiB, 256 * KiB)),
        (DEFAULT, 256 * GiB, (32 * MiB, 64 * KiB, 256 * KiB)),
        (DEFAULT, 256 * GiB + 1, (32 * MiB, 4 * KiB, 256 * KiB)),
        (DEFAULT, 64 * TiB, (32 * MiB, 4 * KiB, 256 * KiB)),
        (EXTENDED, 128 * GiB, (32 * MiB, 64 * KiB, 256 * KiB)),
        (EXTENDED, 128 * GiB + 1, (32 * MiB, 4 * KiB, 256 * KiB)),
        (Geometry(cluster_bits=9), 2 * GiB, (32 * MiB, 512, 2 * KiB)),
        (Geometry(cluster_bits=9), 3 * GiB, (32 * MiB, 512, 2 * KiB)),
        (Geometry(cluster_bits=12), 16 * GiB, (32 * MiB, 4 * KiB, 16 * KiB)),
        (Geometry(cluster_bits=21), 8 * TiB, (32 * MiB, 2 * MiB, 8 * MiB)),
        (Geometry(cluster_bits=21), 9 * TiB, (32 * MiB, 4 * KiB, 8 * MiB)),
        (Geometry(cluster_bits=21, extended_l2=True), 4 * TiB, (32 * MiB, 2 * MiB, 8 * MiB)),
    ],
)
def test_without_options_the_caches_follow_the_disk(
    geometry: Geometry, size: int, expected: tuple[int, int, int]
) -> None:
    assert parts(plan(geometry, virtual_size=size)) == expected


# A disk of 10 GiB in clusters of 64 KiB needs 1280 KiB for L2 entries.
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"l2_cache_size": MiB}, (MiB, 4 * KiB, 256 * KiB)),
        ({"l2_cache_size": 1280 * KiB}, (1280 * KiB, 64 * KiB, 256 * KiB)),
        ({"l2_cache_size": TiB}, (1280 * KiB, 64 * KiB, 256 * KiB)),
        ({"l2_cache_size": 0}, (8 * KiB, 4 * KiB, 256 * KiB)),
        ({"l2_cache_size": MiB + 4095}, (MiB, 4 * KiB, 256 * KiB)),
        ({"refcount_cache_size": MiB}, (1280 * KiB, 64 * KiB, MiB)),
        ({"refcount_cache_size": MiB + 65535}, (1280 * KiB, 64 * KiB, MiB)),
        ({"refcount_cache_size": 0}, (1280 * KiB, 64 * KiB, 256 * KiB)),
        ({"cache_size": 1536 * KiB}, (1280 * KiB, 64 * KiB, 256 * KiB)),
        ({"cache_size": 4 * MiB}, (1280 * KiB, 64 * KiB, 2816 * KiB)),
        ({"cache_size": 1535 * KiB}, (1276 * KiB, 4 * KiB, 256 * KiB)),
        ({"cache_size": MiB}, (768 * KiB, 4 * KiB, 256 * KiB)),
        ({"cache_size": 128 * KiB}, (8 * KiB, 4 * KiB, 256 * KiB)),
        ({"cache_size": 0}, (8 * KiB, 4 * KiB, 256 * KiB)),
        ({"cache_size": 2 * MiB, "l2_cache_size": MiB}, (MiB, 4 * KiB, MiB)),
        ({"cache_size": MiB, "l2_cache_size": MiB}, (MiB, 4 * KiB, 256 * KiB)),
        (
            {"cache_size": 4 * MiB, "l2_cache_size": 4 * MiB},
            (1280 * KiB, 64 * KiB, 2816 * KiB),
        ),
        ({"cache_size": 2 * MiB, "refcount_cache_size": MiB}, (MiB, 4 * KiB, MiB)),
        ({"cache_size": 4 * MiB, "refcount_cache_size": MiB}, (3 * MiB, 64 * KiB, MiB)),
        ({"l2_cache_size": MiB, "refcount_cache_size": MiB}, (MiB, 4 * KiB, MiB)),
        ({"l2_cache_entry_size": 512}, (1280 * KiB, 512, 256 * KiB)),
        ({"l2_cache_entry_size": 64 * KiB, "l2_cache_size": 0}, (128 * KiB, 64 * KiB, 256 * KiB)),
        ({"l2_cache_entry_size": 8 * KiB, "cache_size": MiB}, (768 * KiB, 8 * KiB, 256 * KiB)),
    ],
)
def test_options_bound_the_caches_and_the_rest_goes_to_the_other(
    options: dict[str, int], expected: tuple[int, int, int]
) -> None:
    assert parts(plan(**options)) == expected


@pytest.mark.parametrize("order", range(7))
def test_the_split_does_not_depend_on_the_width_of_refcounts(order: int) -> None:
    geometry = Geometry(cluster_bits=16, refcount_order=order)
    assert parts(plan(geometry, cache_size=4 * MiB)) == (1280 * KiB, 64 * KiB, 2816 * KiB)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=repr)
@pytest.mark.parametrize("size", [MiB, 7 * GiB, 900 * GiB])
def test_every_plan_can_be_carried_out(geometry: Geometry, size: int) -> None:
    sizes = plan(geometry, virtual_size=size)
    assert is_power_of_two(sizes.l2_entry_bytes)
    assert 512 <= sizes.l2_entry_bytes <= geometry.cluster_size
    assert sizes.l2_bytes % sizes.l2_entry_bytes == 0
    assert sizes.l2_entry_count >= 2
    assert sizes.refcount_bytes % geometry.cluster_size == 0
    assert sizes.refcount_bytes >= 4 * geometry.cluster_size
    assert sizes.l2_bytes <= max(32 * MiB, 2 * sizes.l2_entry_bytes)


@given(
    geometry=st.sampled_from(GEOMETRIES),
    virtual_size=st.integers(0, 8 * TiB),
    whole=st.integers(0, 64 * MiB),
)
def test_the_whole_is_kept_but_for_the_least_sizes(
    geometry: Geometry, virtual_size: int, whole: int
) -> None:
    sizes = plan(geometry, virtual_size=virtual_size, cache_size=whole)
    least = 2 * sizes.l2_entry_bytes + 4 * geometry.cluster_size
    assert sizes.l2_bytes + sizes.refcount_bytes <= max(whole, 0) + least


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=repr)
def test_a_cache_of_full_size_covers_the_disk(geometry: Geometry) -> None:
    size = 3 * GiB + 512
    covered = l2_coverage(geometry, l2_bytes=full_l2_bytes(geometry, virtual_size=size))
    assert size <= covered < size + geometry.l2_coverage


# qemu's documentation: 1 MiB of L2 cache serves 8 GiB of disk in clusters of 64 KiB.
@pytest.mark.parametrize(
    ("geometry", "covered"),
    [
        (DEFAULT, 8 * GiB),
        (EXTENDED, 4 * GiB),
        (Geometry(cluster_bits=9), 64 * MiB),
        (Geometry(cluster_bits=14, extended_l2=True), GiB),
        (Geometry(cluster_bits=21), 256 * GiB),
        (Geometry(cluster_bits=21, extended_l2=True), 128 * GiB),
    ],
)
def test_one_mebibyte_of_l2_cache_covers(geometry: Geometry, covered: int) -> None:
    assert l2_coverage(geometry, l2_bytes=MiB) == covered


@pytest.mark.parametrize(
    ("order", "covered"),
    [
        (0, 512 * GiB),
        (1, 256 * GiB),
        (2, 128 * GiB),
        (3, 64 * GiB),
        (4, 32 * GiB),
        (5, 16 * GiB),
        (6, 8 * GiB),
    ],
)
def test_one_mebibyte_of_refcount_cache_covers(order: int, covered: int) -> None:
    for extended in (False, True):
        geometry = Geometry(cluster_bits=16, refcount_order=order, extended_l2=extended)
        assert refcount_coverage(geometry, refcount_bytes=MiB) == covered


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cache_size": MiB, "l2_cache_size": KiB, "refcount_cache_size": KiB},
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
        ),
        (
            {"cache_size": 1000, "l2_cache_size": 1001},
            "l2-cache-size is 1001, which exceeds the cache-size of 1000",
        ),
        (
            {"cache_size": 1000, "refcount_cache_size": 1001},
            "refcount-cache-size is 1001, which exceeds the cache-size of 1000",
        ),
        (
            {"l2_cache_entry_size": 4097},
            "l2-cache-entry-size is 4097, expected a power of two between 512 and the cluster "
            "size 65536",
        ),
        (
            {"l2_cache_entry_size": 256},
            "l2-cache-entry-size is 256, expected a power of two between 512 and the cluster "
            "size 65536",
        ),
        (
            {"l2_cache_entry_size": 128 * KiB},
            "l2-cache-entry-size is 131072, expected a power of two between 512 and the cluster "
            "size 65536",
        ),
        ({"l2_cache_size": -1}, "l2-cache-size is -1, expected a number of bytes"),
        (
            {"refcount_cache_size": 1 << 47},
            "refcount cache: 2147483648 entries, expected at most 2147483647",
        ),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        plan(**options)
    assert str(refused.value) == message


def test_the_default_options_are_always_accepted() -> None:
    for geometry in GEOMETRIES:
        assert plan_cache_sizes(geometry, virtual_size=0, options=DEFAULT_OPTIONS)


SIZES = (None, 0, 100 * KiB, 512 * KiB, 3 * MiB)
NAMES = ("cache-size", "l2-cache-size", "refcount-cache-size")
MATRIX = [
    {
        name: size
        for name, size in zip(NAMES, (whole, l2, refcounts), strict=True)
        if size is not None
    }
    for whole in SIZES
    for l2 in SIZES
    for refcounts in SIZES
] + [{"l2-cache-entry-size": size} for size in (256, 512, 513, 4096, 64 * KiB, 128 * KiB)]


def accepts(options: dict[str, int], *, virtual_size: int) -> bool:
    try:
        plan(virtual_size=virtual_size, **{k.replace("-", "_"): v for k, v in options.items()})
    except RequestError:
        return False
    return True


@pytest.mark.pinned("sizes for clusters of 64 KiB", "cluster_size=512")
@pytest.mark.peer("qemu-io", "qemu-img")
def test_qemu_accepts_and_refuses_the_same_options(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    run_peer("qemu-img", "create", "-q", "-f", "qcow2", disk, 10 * GiB)
    for options in MATRIX:
        words = "".join(f",{name}={size}" for name, size in options.items())
        described = f"driver=qcow2,file.filename={disk}{words}"
        done = subprocess.run(
            [peer("qemu-io"), "-c", "quit", "--image-opts", described],
            capture_output=True,
            check=False,
        )
        expected = accepts(options, virtual_size=10 * GiB)
        assert (done.returncode == 0) == expected, (options, done.stderr)
