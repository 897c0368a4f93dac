"""Diff and delta: against the bytes themselves, and what is not even read."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

import qcowkit
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.findings import Effort
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.engine.qcow2.snapshots import Snapshots
from qcowkit.errors import Cancelled, RequestError
from qcowkit.extents.ranges import RangeSet
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import Layer
from qcowkit.image.registry import build_chain, open_chain
from qcowkit.operations.create import CreateOptions, create_image
from qcowkit.operations.delta import DeltaOptions, write_delta
from qcowkit.operations.diff import Difference, diff
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import build_qcow2
from qcowkit.units import KiB
from tests.chain_disks import (
    EXTENDED,
    QCOW2,
    RAW,
    SMALL,
    TINY,
    VHD,
    Kind,
    content,
    make_chain,
    open_disk,
)

pytestmark = pytest.mark.pinned("its kinds of images are its own")

CHAINS: dict[str, tuple[Kind, ...]] = {
    "qcow2": (QCOW2, RAW),
    "tiny": (Kind(options=TINY),),
    "subclusters": (Kind(options=EXTENDED), QCOW2, RAW),
    "vhd": (VHD,),
    "longer": (Kind(size=200 * KiB, options=SMALL), RAW),
}


def expected(first: bytes, second: bytes, unit: int) -> tuple[RangeSet, RangeSet]:
    """Units that differ, byte by byte: with data and with zeros in the second."""
    size = max(len(first), len(second))
    one, other = first.ljust(size, b"\0"), second.ljust(size, b"\0")
    data, zeros = [], []
    for start in range(0, size, unit):
        stop = min(start + unit, size)
        if one[start:stop] != other[start:stop]:
            (data if any(other[start:stop]) else zeros).append((start, stop))
    return (
        RangeSet.of([low for low, _ in found], [high for _, high in found])
        for found in (data, zeros)
    )  # type: ignore[return-value]


@pytest.mark.parametrize("granularity", [512, 4096, 64 * KiB])
@pytest.mark.parametrize("second", CHAINS)
@pytest.mark.parametrize("first", CHAINS)
def test_what_is_found_is_what_differs(first: str, second: str, granularity: int) -> None:
    one = make_chain(CHAINS[first], seed=1)
    other = make_chain(CHAINS[second], seed=2)
    bytes_of = content(one, CHAINS[first]), content(other, CHAINS[second])
    with open_disk(one, CHAINS[first]) as left, open_disk(other, CHAINS[second]) as right:
        found = diff(left, right, granularity=granularity)
    data, zeros = expected(*bytes_of, granularity)
    assert (found.data, found.zeros) == (data, zeros)
    assert found.sizes == (len(bytes_of[0]), len(bytes_of[1]))


def make_tree(folder: Path) -> tuple[Path, Path]:
    """A base of ones, and an overlay with changes of its own."""
    base, top = folder / "base.raw", folder / "top.qcow2"
    base.write_bytes(b"\1" * 256 * KiB)
    options = CreateOptions.of("qcow2", {"backing_file": "base.raw", "backing_fmt": "raw", **SMALL})
    create_image(top, options, gate=ReferenceGate.below_image())
    with writable(top) as disk:
        disk.write(b"\2" * 8192, offset=4096)
        disk.write_zeroes(offset=64 * KiB, length=4096)
        disk.write(b"\1" * 4096, offset=128 * KiB)
    return base, top


def readable(path: Path) -> Chain:
    format = "raw" if path.suffix == ".raw" else None
    return open_chain(path, format=format, gate=ReferenceGate.below_image())


def writable(path: Path) -> Chain:
    return open_chain(path, gate=ReferenceGate.below_image(), writable=True)


def test_layers_of_one_chain_are_only_read_where_the_upper_one_has_data(tmp_path: Path) -> None:
    base, top = make_tree(tmp_path)
    with readable(base) as first, readable(top) as second:
        found = diff(first, second)
    assert found.as_json() == [
        {"start": 4096, "length": 8192, "zero": False},
        {"start": 65536, "length": 4096, "zero": True},
    ]
    assert found.compared == 8192 + 4096 + 4096


def test_a_disk_and_itself_are_not_read(tmp_path: Path) -> None:
    _, top = make_tree(tmp_path)
    with readable(top) as first, readable(top) as second:
        found = diff(first, second)
    assert found.same
    assert (found.compared, found.render()) == (0, ["nothing differs, 0 B compared"])


def test_snapshots_of_one_image_are_only_read_where_it_was_written(tmp_path: Path) -> None:
    storage = MemoryStorage(build_qcow2(size=1 << 20, cluster_bits=12).to_bytes())

    def disk(*, snapshot: str | None = None, change: bool = False) -> Chain:
        layer = Layer(storage=storage, metadata=load_qcow2_metadata(storage))
        return build_chain([layer], snapshot=snapshot, writable=change)

    noise = random.Random(1)
    for name in ("one", "two"):
        chain = disk(change=True)
        chain.write(noise.randbytes(40960), offset=0 if name == "one" else 20480)
        chain.images[0].disk.close()  # type: ignore[attr-defined]
        Snapshots(
            storage=storage,
            metadata=load_qcow2_metadata(storage),
            barriers=Barriers(storage),
            effort=Effort(stored=storage.allocated()),
        ).create(name)
    found = diff(disk(snapshot="one"), disk(snapshot="two"))
    assert list(found.data) == [(20480, 61440)]
    assert found.compared == 40960


def test_a_longer_disk_with_zeros_at_its_end_shows_the_same(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("short.raw", "long.raw")]
    paths[0].write_bytes(b"x" * 4096)
    paths[1].write_bytes(b"x" * 4096 + bytes(4096))
    with readable(paths[0]) as first, readable(paths[1]) as second:
        found = diff(first, second)
    assert found.same
    assert found.render()[0] == "the sizes differ: 4096 and 8192 bytes"


@pytest.mark.parametrize("granularity", [0, 256, 3000, 4 << 20])
def test_a_granularity_that_cannot_be_is_refused(tmp_path: Path, granularity: int) -> None:
    _, top = make_tree(tmp_path)
    text = f"granularity is {granularity}, expected a power of two from 512 to 2097152"
    with readable(top) as disk, pytest.raises(RequestError, match=text):
        diff(disk, disk, granularity=granularity)


def test_it_can_be_cancelled_and_reports_progress(tmp_path: Path) -> None:
    base, top = make_tree(tmp_path)
    seen: list[tuple[int, int]] = []
    cancel = threading.Event()
    with readable(base) as first, readable(top) as second:
        diff(first, second, progress=lambda done, total: seen.append((done, total)))
        cancel.set()
        with pytest.raises(Cancelled):
            diff(first, second, cancel=cancel)
    assert seen[-1] == (256 * KiB, 256 * KiB)


def made(folder: Path, found: Difference, disk: Chain, **options: object) -> Path:
    path = folder / "delta.qcow2"
    values = {"backing": "one.raw", "backing_format": "raw", **options}
    write_delta(disk, found.changed, path, options=DeltaOptions(**values))  # type: ignore[arg-type]
    return path


def disks(folder: Path, *, sizes: Sequence[int], seed: int) -> tuple[Path, Path, bytes]:
    """Two raw files that share most of their content, and the second one's."""
    noise = random.Random(seed)
    first = bytearray(noise.randbytes(max(sizes)))
    second = bytearray(first)
    for _ in range(6):
        at, length = noise.randrange(max(sizes) - 9000), noise.choice((1, 512, 4096, 9000))
        second[at : at + length] = (
            bytes(length) if noise.random() < 0.5 else noise.randbytes(length)
        )
    paths = folder / "one.raw", folder / "two.raw"
    paths[0].write_bytes(first[: sizes[0]])
    paths[1].write_bytes(second[: sizes[1]])
    return *paths, bytes(second[: sizes[1]])


@pytest.mark.parametrize(
    "sizes", [(512 * KiB,) * 2, (512 * KiB, 200 * KiB), (200 * KiB, 512 * KiB)]
)
@pytest.mark.parametrize("create", [{}, SMALL, EXTENDED, {"compat": "0.10"}])
def test_the_delta_over_the_first_disk_shows_the_second(
    tmp_path: Path, sizes: tuple[int, int], create: dict[str, int]
) -> None:
    one, two, wanted = disks(tmp_path, sizes=sizes, seed=4)
    with readable(one) as first, readable(two) as second:
        found = diff(first, second)
        path = made(tmp_path, found, second, create=create)
    with readable(path) as disk:
        assert disk.size == len(wanted)
        assert disk.read(offset=0, length=disk.size) == wanted
        own = disk.images[0].extents(start=0, length=disk.size)
        unit = create.get("cluster_size", 64 * KiB)
        kept = RangeSet.from_table(own, int(qcowkit.Flag.PRESENT)).total
        assert kept <= found.changed.scale_outward(unit).total * unit


def test_without_a_backing_file_the_delta_holds_the_changes_alone(tmp_path: Path) -> None:
    one, two, wanted = disks(tmp_path, sizes=(512 * KiB,) * 2, seed=5)
    with readable(one) as first, readable(two) as second:
        found = diff(first, second)
        path = made(tmp_path, found, second, standalone=True)
        with pytest.raises(RequestError, match="compat=0.10 has no zero clusters"):
            made(tmp_path, found, second, standalone=True, create={"compat": "0.10"})
    with readable(path) as disk:
        assert len(disk.images) == 1
        for start, stop in found.changed:
            assert disk.read(offset=start, length=stop - start) == wanted[start:stop]
