"""Contiguous runs: they map as the L2 tables do, and hold no longer than these say the same."""

from __future__ import annotations

import random
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcowkit.codecs.qcow2.runs import ContiguousRuns, Run
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.qcow2.first_cluster import rewrite_first_cluster
from qcowkit.engine.qcow2.mapping import Mapping
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.engine.qcow2.runs import (
    MIN_CLUSTERS,
    RunMapping,
    find_runs,
    plain_mapping,
    record_runs,
    usable_runs,
    with_runs,
)
from qcowkit.errors import RequestError
from qcowkit.extents.algebra import coalesce
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.registry import open_chain
from qcowkit.operations.check import Verdict, check_image, open_for_check
from qcowkit.operations.create import CreateOptions, OptionValue, create_image
from qcowkit.operations.repair import RepairMode, repair_image
from qcowkit.storage.file import FileStorage
from qcowkit.testing.recording import RecordingStorage
from qcowkit.units import KiB, MiB
from tests.command import qcow

pytestmark = pytest.mark.pinned("options of its own, in full")

CLUSTER = 4 * KiB
GATE = ReferenceGate.below_image()
KINDS: dict[str, dict[str, OptionValue]] = {
    "plain": {"cluster_size": CLUSTER},
    "subclusters": {"cluster_size": 16 * KiB, "extended_l2": True},
    "data file": {"cluster_size": CLUSTER, "data_file": "data"},
}


def make(folder: Path, *, size: int = 4 * MiB, runs: bool = True, **values: OptionValue) -> Path:
    """A disk of which every cluster has its place, one behind the other."""
    path = folder / "disk.qcow2"
    given = {"cluster_size": CLUSTER, "preallocation": "metadata", **values}
    options = CreateOptions(format="qcow2", values={"size": size, "contiguous_runs": runs, **given})
    create_image(path, options, gate=GATE)
    return path


def runs_in(path: Path) -> ContiguousRuns | None:
    """What a reader would go by."""
    with FileStorage.open(path) as storage:
        metadata = load_qcow2_metadata(storage)
        return usable_runs(metadata, data_size=1 << 62)


def record(path: Path, *, on: bool = True) -> Qcow2Metadata:
    with FileStorage.open(path, writable=True) as storage:
        metadata = load_qcow2_metadata(storage)
        return record_runs(storage, metadata, on=on, barriers=Barriers(storage))


def lie(path: Path, *runs: Run) -> None:
    """Write runs that are none."""
    with FileStorage.open(path, writable=True) as storage:
        metadata = load_qcow2_metadata(storage)
        header, extensions = with_runs(
            metadata.header, metadata.extensions, ContiguousRuns(runs=runs)
        )
        rewrite_first_cluster(
            storage, metadata, barriers=Barriers(storage), header=header, extensions=extensions
        )


def open_disk(path: Path, *, writable: bool = False) -> Chain:
    return open_chain(path, format="qcow2", gate=GATE, writable=writable)


def rows(mapping: Mapping, start: int, length: int) -> list[tuple[int, ...]]:
    return list(coalesce(mapping.extents(start=start, length=length)).rows())


def verdict(path: Path) -> Verdict:
    layer = open_for_check(path, format="qcow2")
    with layer.storage:
        return check_image(layer).verdict


def test_a_new_disk_in_one_piece_has_one_run(tmp_path: Path) -> None:
    path = make(tmp_path)
    found = runs_in(path)
    assert found is not None
    assert [(run.start, run.length) for run in found.runs] == [(0, 4 * MiB)]
    assert verdict(path) is Verdict.CLEAN


def test_reading_a_run_reads_no_l2_table(tmp_path: Path) -> None:
    path = make(tmp_path)
    with open_disk(path, writable=True) as disk:
        disk.write(b"guest", offset=3 * MiB)
    record(path)
    with open_disk(path) as disk:
        image: Any = disk.images[0]
        recording = RecordingStorage(image.storage)
        image.storage = image.mapping.tables.cache._storage = recording
        assert disk.read(offset=3 * MiB, length=5) == b"guest"
        assert len(image.mapping.extents(start=0, length=4 * MiB)) == 1
        assert recording.of("pread") == []
        assert len(image.mapping.tables.cache) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_runs_map_as_the_tables_do(tmp_path: Path, kind: str, seed: int) -> None:
    noise = random.Random(seed)
    size = 4 * MiB - noise.choice([0, 512, 5 * KiB])
    path = make(tmp_path, size=size, runs=False, **KINDS[kind])
    with open_disk(path, writable=True) as disk:
        for _ in range(noise.randrange(8)):
            offset = noise.randrange(size // 512) * 512
            length = min(size - offset, noise.randrange(1, 400) * 512)
            change = noise.choice([disk.discard, disk.write_zeroes])
            change(offset=offset, length=length)
            disk.write(b"x" * 100, offset=noise.randrange(size - 100))
    record(path)
    with open_disk(path) as disk:
        image: Any = disk.images[0]
        mapping = image.mapping
        assert isinstance(mapping, RunMapping)
        plain = plain_mapping(image.storage, image.metadata)
        for _ in range(50):
            start = noise.randrange(size)
            length = noise.randrange(1, size - start + 1)
            assert rows(mapping, start, length) == rows(plain, start, length)
            part = mapping.extents(start=start, length=length, limit=2)
            expected = rows(plain, start, part.end - start)
            assert list(coalesce(part).rows()) == expected
            kind_of, host, run = mapping.lookup(start)
            assert (kind_of, host) == plain.lookup(start)[:2]
            assert run > 0
    assert verdict(path) is Verdict.CLEAN


def test_short_pieces_are_not_recorded(tmp_path: Path) -> None:
    path = make(tmp_path, size=(MIN_CLUSTERS - 1) * CLUSTER)
    assert runs_in(path) is None


def test_of_many_pieces_the_longest_are_kept(tmp_path: Path) -> None:
    path = make(tmp_path, runs=False)
    with open_disk(path, writable=True) as disk:
        for cluster in (100, 300, 700):
            disk.discard(offset=cluster * CLUSTER, length=CLUSTER)
    with FileStorage.open(path) as storage:
        found = find_runs(plain_mapping(storage, load_qcow2_metadata(storage)), most=2)
    assert found is not None
    assert [run.length // CLUSTER for run in found.runs] == [399, 323]


def test_a_first_change_of_ours_drops_the_runs_and_nothing_else(tmp_path: Path) -> None:
    path = make(tmp_path)
    with open_disk(path, writable=True) as disk:
        assert runs_in(path) is not None
        disk.write(b"new", offset=2 * MiB)
        disk.flush()
        assert runs_in(path) is None
    with open_disk(path) as disk:
        assert disk.read(offset=2 * MiB, length=3) == b"new"
        assert disk.images[0].metadata.virtual_size == 4 * MiB
    assert verdict(path) is Verdict.CLEAN


def test_opening_for_writing_alone_drops_nothing(tmp_path: Path) -> None:
    path = make(tmp_path)
    open_disk(path, writable=True).close()
    assert runs_in(path) is not None


def test_a_snapshot_drops_them_and_a_write_after_it_changes_no_data(tmp_path: Path) -> None:
    path = make(tmp_path)
    with open_disk(path, writable=True) as disk:
        disk.write(b"o" * MiB, offset=MiB)
    record(path)
    qcow("snapshot", "-q", "-c", "old", path)
    assert runs_in(path) is None
    with open_disk(path, writable=True) as disk:
        disk.write(b"n" * CLUSTER, offset=MiB)
        assert disk.snapshot("old").read(offset=MiB, length=CLUSTER) == b"o" * CLUSTER
    # What is shared is not this disk's own.
    record(path)
    assert runs_in(path) is None
    assert verdict(path) is Verdict.CLEAN


def test_the_record_is_taken_away(tmp_path: Path) -> None:
    path = make(tmp_path)
    metadata = record(path, on=False)
    assert metadata.extensions.runs is None
    assert runs_in(path) is None


BELOW_THE_FILE = Run(0, MiB, 1 << 40)
LIES = {
    "another place": Run(0, MiB, 8 * CLUSTER),
    "a hole": Run(3 * MiB, MiB, MiB),
}


@pytest.mark.parametrize("case", LIES)
def test_a_check_finds_runs_that_are_none_and_a_repair_drops_them(
    tmp_path: Path, case: str
) -> None:
    path = make(tmp_path, runs=False)
    with open_disk(path, writable=True) as disk:
        disk.write(b"x" * MiB, offset=0)
        disk.discard(offset=3 * MiB, length=MiB)
    lie(path, LIES[case])
    assert verdict(path) is Verdict.CORRUPT
    assert qcow("check", path, code=2).out.decode().count("contiguous runs extension") == 1
    layer = open_for_check(path, format="qcow2", writable=True)
    with layer.storage:
        repair_image(layer, mode=RepairMode.ALL)
    assert verdict(path) is Verdict.CLEAN
    with open_disk(path) as disk:
        assert disk.read(offset=0, length=MiB) == b"x" * MiB


@pytest.mark.parametrize(
    "run", [BELOW_THE_FILE, Run(8 * MiB, MiB, MiB), Run(512, CLUSTER, CLUSTER)]
)
def test_runs_that_cannot_be_are_not_believed(tmp_path: Path, run: Run) -> None:
    path = make(tmp_path, runs=False)
    with open_disk(path, writable=True) as disk:
        disk.write(b"x" * 512, offset=0)
    lie(path, run)
    with open_disk(path) as disk:
        image: Any = disk.images[0]
        assert not isinstance(image.mapping, RunMapping)
        assert disk.read(offset=0, length=1) == b"x"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"compat": "0.10"}, "needs compat=1.1"),
        ({"cluster_size": 2 * KiB}, "needs clusters of 4096 bytes"),
    ],
)
def test_images_without_room_for_runs_are_refused(
    tmp_path: Path, values: dict[str, OptionValue], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason):
        make(tmp_path, **values)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.peer("qemu-img", "qemu-io")
def test_qemu_reads_the_image_and_drops_the_runs_with_its_first_write(tmp_path: Path) -> None:
    path = make(tmp_path)
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    subprocess.run(["qemu-io", "-r", "-c", "read -P 0 0 4M", path], check=True, capture_output=True)
    assert runs_in(path) is not None
    subprocess.run(["qemu-io", "-c", "write -P 7 1M 64k", path], check=True, capture_output=True)
    assert runs_in(path) is None
    with open_disk(path) as disk:
        assert disk.read(offset=MiB, length=64 * KiB) == b"\7" * 64 * KiB
    record(path)
    assert runs_in(path) is not None


def test_convert_makes_either_form_of_the_other(tmp_path: Path) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(random.Random(1).randbytes(MiB) + bytes(MiB) + b"end".ljust(MiB, b"!"))
    fast, compact, back = (tmp_path / name for name in ("fast", "compact", "back"))
    runs = ("-o", "contiguous_runs=on,preallocation=metadata,cluster_size=4k")
    qcow("convert", "-O", "qcow2", *runs, source, fast)
    qcow("convert", "-c", "-O", "qcow2", fast, compact)
    qcow("convert", "-O", "qcow2", *runs, compact, back)
    for path in (fast, back):
        found = runs_in(path)
        assert found is not None
        assert sum(run.length for run in found.runs) == 3 * MiB
        qcow("compare", "-q", "-f", "raw", source, path)
    assert runs_in(compact) is None


def test_metadata_of_the_runs_survive_a_change_of_other_extensions(tmp_path: Path) -> None:
    path = make(tmp_path)
    before = runs_in(path)
    with FileStorage.open(path, writable=True) as storage:
        metadata = load_qcow2_metadata(storage)
        extensions = replace(metadata.extensions, backing_format="raw")
        rewrite_first_cluster(
            storage,
            metadata,
            barriers=Barriers(storage),
            extensions=extensions,
            backing_name=b"base",
        )
    assert runs_in(path) == before


def test_amend_records_runs_and_takes_them_away(tmp_path: Path) -> None:
    path = make(tmp_path, runs=False)
    assert qcow("amend", "-o", "contiguous_runs=on", path).out.decode().strip() == (
        f"{path}: contiguous runs: 1"
    )
    assert runs_in(path) is not None
    qcow("amend", "-q", "-o", "contiguous_runs=off", path)
    assert runs_in(path) is None
    assert verdict(path) is Verdict.CLEAN


@pytest.mark.parametrize("option", ["compat=0.10", "cluster_size=2k"])
def test_amend_refuses_runs_that_will_have_no_room(tmp_path: Path, option: str) -> None:
    path = make(tmp_path, runs=False)
    before = path.read_bytes()
    failed = qcow("amend", "-o", f"contiguous_runs=on,{option}", path, code=1)
    assert "contiguous_runs needs" in failed.err
    assert path.read_bytes() == before


def test_amend_records_runs_of_the_image_as_it_is_then(tmp_path: Path) -> None:
    path = make(tmp_path, runs=False, compat="0.10")
    qcow("amend", "-q", "-o", "compat=1.1,cluster_size=8k,contiguous_runs=on", path)
    assert runs_in(path) is not None
    assert verdict(path) is Verdict.CLEAN


def test_compacting_finds_runs_anew(tmp_path: Path) -> None:
    path = make(tmp_path)
    with open_disk(path, writable=True) as disk:
        disk.discard(offset=0, length=2 * MiB)
        disk.write(b"x" * MiB, offset=2 * MiB)
    assert runs_in(path) is None
    qcow("compact", "-q", path)
    found = runs_in(path)
    assert found is not None
    # Short pieces, where tables lay in between, are left out.
    assert MiB < sum(run.length for run in found.runs) <= 2 * MiB
    assert verdict(path) is Verdict.CLEAN
    with open_disk(path) as disk:
        assert disk.read(offset=2 * MiB, length=MiB) == b"x" * MiB


def test_an_image_without_a_record_gets_none_by_compacting(tmp_path: Path) -> None:
    path = make(tmp_path, runs=False)
    qcow("compact", "-q", path)
    assert runs_in(path) is None
