"""A variant changes what a test leaves open, never what it says, and skips what is pinned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qcowkit.testing.qcow2_builder import Compressed, ImageSpec, SnapshotSpec, Zero
from qcowkit.units import TiB
from tests.variants import VARIANTS, can_be_built, created_with, vary_qemu_img

ROOT = Path(__file__).resolve().parent.parent
TEST = """
from pathlib import Path

import pytest

import qcowkit
from qcowkit.operations.create import CreateOptions, create_image
from qcowkit.testing.qcow2_builder import ImageSpec, build_qcow2
from tests.command import qcow
from tests.peers import run_peer

GATE = qcowkit.ReferenceGate.below_image()

def bits_of(path):
    with qcowkit.open(path) as chain:
        return chain.layers[0].metadata.geometry.refcount_bits

def test_everything_that_makes_an_image_is_varied(tmp_path, image_options):
    assert image_options == {"refcount_bits": 64}
    assert ImageSpec().refcount_order == 6
    assert build_qcow2(size=512).header.refcount_order == 6
    create_image(tmp_path / "a", CreateOptions.of("qcow2", {"size": 512}), gate=GATE)
    assert bits_of(tmp_path / "a") == 64
    qcow("create", "-f", "qcow2", tmp_path / "b", "1M")
    assert bits_of(tmp_path / "b") == 64
    qcow("convert", tmp_path / "b", "-O", "qcow2", tmp_path / "c")
    assert bits_of(tmp_path / "c") == 64

@pytest.mark.peer("qemu-img")
def test_so_is_what_qemu_makes(tmp_path):
    run_peer("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "d", "1M")
    assert bits_of(tmp_path / "d") == 64

def test_what_a_test_says_itself_wins(tmp_path):
    assert ImageSpec(refcount_order=2).refcount_order == 2
    assert ImageSpec(version=2).refcount_order == 4
    assert build_qcow2(version=2).header.refcount_order == 4
    qcow("create", "-f", "qcow2", "-o", "compat=0.10", tmp_path / "old", "1M")
    assert bits_of(tmp_path / "old") == 16

@pytest.mark.pinned("bytes")
def test_pinned_under_all():
    raise AssertionError

@pytest.mark.pinned("bytes", "refcount_bits=64")
def test_pinned_under_this():
    raise AssertionError

@pytest.mark.pinned("bytes", "refcount_bits=1")
def test_pinned_under_another():
    pass
"""


def test_a_run_with_a_variant_makes_its_images_so(tmp_path: Path) -> None:
    for name in ("conftest.py", "pyproject.toml"):
        source = ROOT / ("tests" if name.endswith(".py") else ".") / name
        (tmp_path / name).write_bytes(source.read_bytes())
    (tmp_path / "some_test.py").write_text(TEST, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + ["--image-options=refcount_bits=64", "some_test.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 skipped" in done.stdout
    assert "pinned: bytes" in done.stdout


def test_an_unknown_variant_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--image-options=colour=red", "tests/units_test.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 4
    assert "invalid choice: 'colour=red'" in done.stderr


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("extended_l2", {}, {"extended_l2": True}),
        ("extended_l2", {"cluster_size": 4096}, {"cluster_size": 4096}),
        ("extended_l2", {"compat": "0.10"}, {"compat": "0.10"}),
        ("extended_l2", {"extended_l2": False}, {"extended_l2": False}),
        ("compat=0.10", {"refcount_bits": 1}, {"refcount_bits": 1}),
        ("cluster_size=512", {"extended_l2": True}, {"extended_l2": True}),
        ("refcount_bits=1", {"cluster_size": 512}, {"cluster_size": 512, "refcount_bits": 1}),
    ],
)
def test_what_is_said_wins_and_drops_what_it_excludes(
    name: str, values: dict[str, str | int | bool], expected: dict[str, str | int | bool]
) -> None:
    assert created_with(VARIANTS[name], values) == expected


def test_a_disk_that_is_too_large_for_small_clusters_has_large_ones() -> None:
    assert created_with(VARIANTS["cluster_size=512"], {}, size=TiB) == {}


def test_each_image_has_a_data_file_of_its_own(tmp_path: Path) -> None:
    variant = VARIANTS["data_file"]
    names = [created_with(variant, {}, path=tmp_path / "a")["data_file"] for _ in range(2)]
    assert names[0] != names[1]
    assert str(names[0]).startswith(str(tmp_path / "a-"))
    assert created_with(variant, {}, path="a", compress=True) == {}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("create -f qcow2 a 1M", "create -o refcount_bits=1 -f qcow2 a 1M"),
        ("create -qfqcow2 a 1M", "create -o refcount_bits=1 -qfqcow2 a 1M"),
        ("create -f raw a 1M", "create -f raw a 1M"),
        ("create -f qcow2 -o compat=0.10 a 1M", "create -f qcow2 -o compat=0.10 a 1M"),
        ("convert -c -O qcow2 a b", "convert -o refcount_bits=1 -c -O qcow2 a b"),
        ("convert -n -O qcow2 a b", "convert -n -O qcow2 a b"),
        ("measure -O qcow2 --size 1M", "measure -o refcount_bits=1 -O qcow2 --size 1M"),
        ("info a", "info a"),
    ],
)
def test_a_command_of_qemu_img_gets_the_options(command: str, expected: str) -> None:
    assert vary_qemu_img(VARIANTS["refcount_bits=1"], command.split()) == expected.split()


@pytest.mark.parametrize(
    ("changes", "possible"),
    [
        ({}, True),
        ({"version": 2}, True),
        ({"version": 2, "extended_l2": True, "cluster_bits": 16}, False),
        ({"version": 2, "clusters": {0: Zero()}}, False),
        ({"extended_l2": True, "cluster_bits": 12}, False),
        ({"compression_type": 1, "clusters": {0: Compressed(payload=b"x")}}, False),
        ({"refcount_order": 0, "snapshots": (SnapshotSpec(id="1"),)}, False),
        ({"cluster_bits": 9, "clusters": {0: bytes(513)}}, False),
        ({"cluster_bits": 9, "clusters": {0: bytes(512)}}, True),
    ],
)
def test_a_built_image_is_varied_only_where_that_can_be(
    changes: dict[str, object], possible: bool
) -> None:
    plain = {name: getattr(ImageSpec(), name) for name in ImageSpec.__slots__}
    assert can_be_built({**plain, **changes}) == possible
