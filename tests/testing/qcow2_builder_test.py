"""The builder's images are sound, by our own loader and by qemu."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.extensions import Extension
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import (
    BitmapSpec,
    Compressed,
    Data,
    SnapshotSpec,
    Zero,
    build_qcow2,
    make_luks_area,
)
from tests.peers import run_peer

CLUSTER = 4096


def deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(6, zlib.DEFLATED, -12)
    return compressor.compress(data) + compressor.flush()


NOISE = [os.urandom(2000) + bytes(CLUSTER - 2000) for _ in range(12)]
PACKED = {index: Compressed(payload=deflate(data)) for index, data in enumerate(NOISE)}
SHARED = {1: b"1", 200: b"2", 3: PACKED[3]}
KINDS: dict[str, dict[str, Any]] = {
    "empty": {},
    "no bytes": {"size": 0},
    "clusters": {"clusters": {0: b"a" * CLUSTER, 5: b"b", 7: Zero(), 9: Zero(payload=b"x")}},
    "compressed": {"clusters": PACKED},
    "version 2": {"version": 2, "clusters": {3: b"q"}, "backing_name": "base.raw"},
    "shared snapshot": {"clusters": SHARED, "snapshots": [SnapshotSpec(id="1", name="x")]},
    "own snapshot": {"snapshots": [SnapshotSpec(id="1", clusters={4: b"zz"}, disk_size=4608 * 8)]},
    "bitmaps": {"bitmaps": [BitmapSpec(name="a", bits=b"\1"), BitmapSpec(name="b", flags=0)]},
    "subclusters": {
        "cluster_bits": 14,
        "extended_l2": True,
        "clusters": {0: b"a" * 16384, 1: Data(payload=b"x", bitmap=3), 2: Zero()},
    },
    "backing": {"backing_name": "base.raw", "backing_format": "raw"},
    "unknown": {"unknown_fields": b"12345678", "unknown": [Extension(type=77, data=b"x")]},
    "data file": {"data_file_name": "x.data", "clusters": {0: b"a", 9: b"q"}},
    "512 B clusters": {"cluster_bits": 9, "clusters": dict.fromkeys(range(100), b"q")},
    "2 MiB clusters": {"cluster_bits": 21, "size": 5 << 20, "clusters": {1: b"q"}},
    **{
        f"{1 << order}-bit refcounts": {"refcount_order": order, "clusters": {0: b"x", 9: b"y"}}
        for order in range(7)
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_our_loader_finds_nothing_to_say(kind: str) -> None:
    storage = MemoryStorage(build_qcow2(**KINDS[kind]).to_bytes())
    assert load_qcow2_metadata(storage, budget=TRUSTED).warnings == ()


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("kind", KINDS)
def test_qemu_finds_no_error(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # qemu 7.2 looks for the data file in its own working directory.
    monkeypatch.chdir(tmp_path)
    image = build_qcow2(**KINDS[kind])
    path = tmp_path / "x.qcow2"
    path.write_bytes(image.to_bytes())
    (tmp_path / "base.raw").write_bytes(bytes(CLUSTER))
    (tmp_path / "x.data").write_bytes(image.external or b"")
    run_peer("qemu-img", "check", "-f", "qcow2", path)


@pytest.mark.pinned("clusters of 4 KiB", "extended_l2")
@pytest.mark.peer("qemu-img")
def test_qemu_reads_what_was_put_in(tmp_path: Path) -> None:
    clusters = {0: b"a" * CLUSTER, 2: Zero(payload=b"hidden"), 4: PACKED[0], 200: b"end"}
    path, raw = tmp_path / "x.qcow2", tmp_path / "x.raw"
    path.write_bytes(build_qcow2(clusters=clusters).to_bytes())
    run_peer("qemu-img", "convert", "-O", "raw", path, raw)
    expected = bytearray(1 << 20)
    expected[:CLUSTER] = b"a" * CLUSTER
    expected[4 * CLUSTER : 5 * CLUSTER] = NOISE[0]
    expected[200 * CLUSTER : 200 * CLUSTER + 3] = b"end"
    assert raw.read_bytes() == bytes(expected)


@pytest.mark.peer("qemu-img")
def test_qemu_takes_the_luks_header_for_one(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    path.write_bytes(build_qcow2(luks=make_luks_area()).to_bytes())
    assert "cipher alg: aes-256" in run_peer("qemu-img", "info", path)
