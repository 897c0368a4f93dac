"""The one door: what it opens, what it refuses, and that nothing stays open then."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qcowkit.budget import TRUSTED, Budget
from qcowkit.errors import QcowkitError, RequestError
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import close_layers, open_layers
from qcowkit.image.registry import open_chain
from qcowkit.operations.create import CreateOptions, OptionValue, create_image
from qcowkit.operations.snapshot import create_snapshot
from qcowkit.testing.qcow2_builder import SnapshotSpec, build_qcow2
from qcowkit.units import KiB


def descriptors() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return found


def overlay(folder: Path, **spec: Any) -> Path:
    """top.qcow2 over base.qcow2 over disk.raw."""
    (folder / "disk.raw").write_bytes(b"r" * 64 * KiB)
    base = build_qcow2(backing_name="disk.raw", backing_format="raw", size=64 * KiB)
    (folder / "base.qcow2").write_bytes(base.to_bytes())
    spec = {"backing_name": "base.qcow2", "backing_format": "qcow2", "size": 64 * KiB, **spec}
    (folder / "top.qcow2").write_bytes(build_qcow2(**spec).to_bytes())
    return folder / "top.qcow2"


def test_a_chain_opens_all_layers_and_closes_them(tmp_path: Path) -> None:
    path = overlay(tmp_path)
    before = descriptors()
    with open_chain(path, gate=ReferenceGate.below_image()) as chain:
        assert [image.metadata.format for image in chain.images] == ["qcow2", "qcow2", "raw"]
        assert chain.read(offset=0, length=4) == b"rrrr"
        assert len(descriptors() - before) == 3
    assert descriptors() == before


def test_the_top_alone_needs_no_gate(tmp_path: Path) -> None:
    with open_chain(overlay(tmp_path), follow_backing=False) as chain:
        assert len(chain.images) == 1
        assert chain.read(offset=0, length=4) == bytes(4)


def spoiled(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:50])


CASES: dict[str, Any] = {
    "no gate": lambda folder: {"gate": None},
    "missing base": lambda folder: (folder / "base.qcow2").unlink(),
    "missing disk": lambda folder: (folder / "disk.raw").unlink(),
    "bad base": lambda folder: spoiled(folder, "base.qcow2"),
    "unknown snapshot": lambda folder: {"snapshot": "none"},
    "wrong format": lambda folder: {"format": "vpc"},
    "unknown format": lambda folder: {"format": "vdi"},
    "depth": lambda folder: {"budget": Budget(depth=2)},
    "metadata": lambda folder: {"budget": Budget(metadata_bytes=4)},
    "encrypted": lambda folder: overlay(folder, crypt_method=1) and None,
}


@pytest.mark.pinned("the gate that denies all", "data_file")
@pytest.mark.parametrize("case", CASES)
def test_nothing_stays_open_after_a_refusal(tmp_path: Path, case: str) -> None:
    path = overlay(tmp_path)
    options = {"gate": ReferenceGate.below_image(), **(CASES[case](tmp_path) or {})}
    before = descriptors()
    with pytest.raises(QcowkitError):
        open_chain(path, **options)
    assert descriptors() == before


def test_a_snapshot_is_opened_in_place_of_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    snapshot = SnapshotSpec(id="1", name="old", clusters={0: b"s" * 4096})
    built = build_qcow2(size=8 * KiB, clusters={0: b"n" * 4096}, snapshots=[snapshot])
    path.write_bytes(built.to_bytes())
    for name in ("1", "old"):
        with open_chain(path, snapshot=name) as chain:
            assert chain.read(offset=0, length=1) == b"s"


@pytest.mark.pinned("clusters of 4 KiB, and snapshots")
def test_a_snapshot_is_a_disk_over_the_files_of_another_that_is_being_written(
    tmp_path: Path,
) -> None:
    path = tmp_path / "disk.qcow2"
    clusters: dict[int, bytes] = {0: b"o" * 4096, 1: b"o" * 4096}
    snapshot = SnapshotSpec(id="1", name="old", clusters=clusters, disk_size=8 * KiB)
    path.write_bytes(build_qcow2(size=16 * KiB, clusters=clusters, snapshots=[snapshot]).to_bytes())
    with open_chain(path, format="qcow2", writable=True) as chain:
        old = chain.snapshot("old")
        for _ in range(3):
            chain.write(b"n" * 8192, offset=0)
            chain.flush()
            assert old.read(offset=0, length=8192) == b"o" * 8192
        assert (old.size, old.writable) == (8 * KiB, False)
        with pytest.raises(RequestError, match="read-only"):
            old.write(b"x", offset=0)
        old.close()
        assert chain.read(offset=0, length=1) == b"n"
        with pytest.raises(RequestError, match="'new'"):
            chain.snapshot("new")


@pytest.mark.pinned("snapshots", "data_file", "refcount_bits=1")
def test_an_encrypted_snapshot_needs_no_second_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    values: dict[str, OptionValue] = {
        "size": 64 * KiB,
        "encrypt.format": "luks",
        "encrypt.iter-time": 1,
    }
    options = CreateOptions(format="qcow2", values=values, secret=b"s")
    create_image(path, options, gate=ReferenceGate.deny_all())
    with open_chain(path, writable=True, secrets=b"s") as chain:
        chain.write(b"o" * 512, offset=0)
    layers = open_layers(
        path, format="qcow2", gate=ReferenceGate.deny_all(), budget=TRUSTED, writable=True
    )
    create_snapshot(layers[0], "old")
    close_layers(layers)
    with open_chain(path, writable=True, secrets=b"s") as chain:
        chain.write(b"n" * 512, offset=0)
        old = chain.snapshot("old")
        assert old.read(offset=0, length=1) == b"o"
        old.close()
        assert chain.read(offset=0, length=1) == b"n"


@pytest.mark.parametrize("format", ["raw", "vpc"])
def test_only_qcow2_has_snapshots_to_open(tmp_path: Path, format: str) -> None:
    path = tmp_path / "disk"
    options = CreateOptions(format=format, values={"size": 64 * KiB})
    create_image(path, options, gate=ReferenceGate.deny_all())
    with (
        open_chain(path, format=format) as chain,
        pytest.raises(RequestError, match=f"{format} images have no internal snapshots"),
    ):
        chain.snapshot("a")


def test_only_qcow2_has_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(512))
    with pytest.raises(QcowkitError, match="snapshot 'a': raw images have no internal snapshots"):
        open_chain(path, format="raw", snapshot="a")
