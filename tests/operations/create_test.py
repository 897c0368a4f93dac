"""New images: what their options make of them, and what is refused before a file is touched."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcowkit.budget import TRUSTED
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.errors import QcowkitError, RequestError, StorageError
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.registry import open_chain
from qcowkit.operations.create import (
    Created,
    CreateOptions,
    backing_disk,
    create_image,
    data_path,
    qcow2_spec,
    target_directory,
)
from qcowkit.units import GiB, KiB, MiB, TiB, align_up
from tests.peers import run_peer

GATE = ReferenceGate.below_image()


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def create(path: str, format: str = "qcow2", **values: Any) -> Created:
    checked = values.pop("check_backing", True)
    return create_image(path, CreateOptions.of(format, values), gate=GATE, check_backing=checked)


def content(path: str) -> bytes:
    with open_chain(path, gate=GATE) as disk:
        return disk.read(offset=0, length=disk.size)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    bits=st.integers(9, 21),
    order=st.integers(0, 6),
    size=st.integers(0, 3000),
    preallocation=st.sampled_from(["off", "metadata", "falloc", "full"]),
    extended=st.booleans(),
)
def test_an_empty_image_is_sound_and_reads_as_zeros(
    bits: int, order: int, size: int, preallocation: str, extended: bool
) -> None:
    bits = max(bits, 14) if extended else bits
    made = create(
        "disk.qcow2",
        size=size * 700,
        cluster_size=1 << bits,
        refcount_bits=1 << order,
        preallocation=preallocation,
        extended_l2=extended,
    )
    assert made.size == -(-size * 700 // 512) * 512
    assert content("disk.qcow2") == bytes(made.size)
    run_peer("qemu-img", "check", "-q", "-f", "qcow2", "disk.qcow2")


@pytest.mark.parametrize("format", ["raw", "vpc"])
@pytest.mark.parametrize("size", [0, 512, 1000, 3 * MiB])
def test_other_formats_have_the_size_that_was_asked_for(format: str, size: int) -> None:
    made = create("disk", format, size=size)
    with open_chain("disk", format=format) as disk:
        assert disk.size == made.size == -(-size // 512) * 512


@pytest.mark.pinned("a disk larger than a file may be", "extended_l2", "data_file")
def test_a_sparse_image_of_64_tib_is_small() -> None:
    create("disk.qcow2", size=64 * TiB)
    assert Path("disk.qcow2").stat().st_size < 2 * MiB


def test_a_new_image_takes_the_size_of_its_base() -> None:
    Path("base.raw").write_bytes(b"b" * 64 * KiB)
    made = create("top.qcow2", backing_file="base.raw", backing_fmt="raw")
    assert made.size == 64 * KiB
    assert content("top.qcow2") == b"b" * 64 * KiB
    assert create("top.qcow2", backing_file="base.raw", backing_fmt="raw", size=512).size == 512


def test_a_base_is_found_beside_the_image() -> None:
    os.mkdir("images")
    Path("images/base.raw").write_bytes(b"b" * 1024)
    create("images/top.qcow2", backing_file="base.raw", backing_fmt="raw")
    assert content("images/top.qcow2") == b"b" * 1024
    options = CreateOptions.of("qcow2", {"backing_file": "base.raw", "backing_fmt": "raw"})
    assert backing_disk("images/x", options, gate=GATE, budget=TRUSTED).size == 1024


def test_a_base_that_is_missing_is_named() -> None:
    with pytest.raises(StorageError, match=r"none\.raw: open: No such file"):
        create("top.qcow2", backing_file="none.raw", backing_fmt="raw", size=512)
    create("top.qcow2", backing_file="none.raw", backing_fmt="raw", size=512, check_backing=False)


def test_an_image_without_a_size_is_refused() -> None:
    with pytest.raises(RequestError, match="the size of the new image is missing"):
        create("disk.qcow2")
    assert os.listdir() == []


@pytest.mark.parametrize("check_backing", [False, True])
@pytest.mark.parametrize("name", ["disk.qcow2", "./disk.qcow2", "link", "hard"])
def test_an_image_is_never_its_own_base(name: str, check_backing: bool) -> None:
    create("disk.qcow2", size=MiB)
    os.symlink("disk.qcow2", "link")
    os.link("disk.qcow2", "hard")
    before = Path("disk.qcow2").read_bytes()
    values = {"backing_file": name, "backing_fmt": "qcow2", "size": 512}
    with pytest.raises(RequestError, match=r"disk\.qcow2: is the backing file of the new image"):
        create("disk.qcow2", check_backing=check_backing, **values)
    assert Path("disk.qcow2").read_bytes() == before


def test_an_image_takes_no_place_in_the_chain_of_its_base() -> None:
    """Or else the content of the lowest layer would be gone, and the chain a loop."""
    create("low.qcow2", size=MiB, data_file="low.bin")
    create("middle.qcow2", backing_file="low.qcow2", backing_fmt="qcow2")
    before = Path("low.qcow2").read_bytes()
    for values in ({"path": "low.qcow2"}, {"path": "new", "data_file": "low.bin"}):
        path = values.pop("path")
        with pytest.raises(RequestError, match="is one of the files that are read"):
            create(path, backing_file="middle.qcow2", backing_fmt="qcow2", **values)
    assert Path("low.qcow2").read_bytes() == before
    assert not Path("new").exists()


def test_the_data_file_is_neither_the_image_nor_its_base() -> None:
    Path("base.raw").write_bytes(b"b" * 1024)
    with pytest.raises(RequestError, match="the data file cannot be the new image itself"):
        create(
            "disk.qcow2", size=512, data_file="../" + os.path.basename(os.getcwd()) + "/disk.qcow2"
        )
    with pytest.raises(RequestError, match=r"base\.raw: is the backing file of the new image"):
        create("t", data_file="base.raw", backing_file="base.raw", backing_fmt="raw")
    assert Path("base.raw").read_bytes() == b"b" * 1024


@pytest.mark.parametrize("raw", [False, True])
def test_a_data_file_has_the_size_of_the_disk(raw: bool) -> None:
    create("disk.qcow2", size=MiB + 512, data_file="d.bin", data_file_raw=raw)
    assert Path("d.bin").stat().st_size == MiB + 512
    assert content("disk.qcow2") == bytes(MiB + 512)


def test_every_option_is_kept() -> None:
    create(
        "disk.qcow2",
        size=GiB,
        cluster_size=128 * KiB,
        refcount_bits=8,
        lazy_refcounts=True,
        compression_type="zstd",
        extended_l2=True,
    )
    with open_chain("disk.qcow2") as disk:
        metadata = disk.images[0].metadata
        assert isinstance(metadata, Qcow2Metadata)
        assert metadata.geometry.cluster_size == 128 * KiB
        assert metadata.geometry.refcount_bits == 8
        assert metadata.geometry.extended_l2
        assert (metadata.compression_type, metadata.lazy_refcounts) == ("zstd", True)


@pytest.mark.pinned("the defaults are what is shown", "cluster_size=512")
def test_what_was_made_is_shown_in_order() -> None:
    shown = create("disk.qcow2", size=MiB, preallocation="metadata").shown()
    assert list(shown) == sorted(shown)
    assert (shown["size"], shown["preallocation"], shown["cluster_size"]) == (
        MiB,
        "metadata",
        64 * KiB,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cluster_size": 1000}, "cluster_size 1000 is not a power of two between 512 and 2097152"),
        ({"cluster_size": 256}, "cluster_size 256 is not a power of two"),
        ({"cluster_size": 4 * MiB}, "cluster_size 4194304 is not a power of two"),
        ({"refcount_bits": 3}, "refcount_bits 3 is not one of 1, 2, 4, 8, 16, 32, 64"),
    ],
)
def test_options_that_cannot_be_leave_nothing(values: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        create("disk.qcow2", size=512, **values)
    assert os.listdir() == []


@pytest.mark.parametrize("format", ["qcow2", "raw", "vpc"])
def test_the_largest_number_is_no_size_of_a_disk(format: str) -> None:
    with pytest.raises(QcowkitError):
        create("disk", format, size=(1 << 63) - 1)
    assert os.listdir() == []


def test_names_are_read_from_the_directory_of_the_image() -> None:
    options = CreateOptions.of("qcow2", {"data_file": "d/x"})
    assert data_path("/a/b/disk", options) == "/a/b/d/x"
    assert data_path("/a/b/disk", options.with_values(data_file="/abs")) == "/abs"
    assert data_path("/a/b/disk", CreateOptions.of("qcow2", {})) is None
    assert target_directory("/a/b/disk") == Path("/a/b")


def test_sizes_become_whole_sectors() -> None:
    assert qcow2_spec(CreateOptions.of("qcow2", {}), size=513).size == 1024


def test_a_raw_disk_that_is_there_becomes_the_data_file_with_all_it_holds() -> None:
    Path("disk.raw").write_bytes(b"here" * 50_000)
    made = create("disk.qcow2", data_file="disk.raw", data_file_raw=True, preallocation="metadata")
    assert made.size == align_up(200_000, 512)
    assert content("disk.qcow2") == (b"here" * 50_000).ljust(made.size, b"\0")
    with open_chain("disk.qcow2", gate=GATE, writable=True) as disk:
        disk.write(b"there", offset=100_000)
    assert Path("disk.raw").read_bytes()[100_000:100_008] == b"thereere"


def test_a_raw_disk_is_made_longer_for_its_image_and_never_shorter() -> None:
    Path("disk.raw").write_bytes(b"x" * MiB)
    create("long.qcow2", size=2 * MiB, data_file="disk.raw", data_file_raw=True)
    assert content("long.qcow2") == b"x" * MiB + bytes(MiB)
    with pytest.raises(RequestError, match="more than the disk of 1048576"):
        create("short.qcow2", size=MiB, data_file="disk.raw", data_file_raw=True)
    assert not Path("short.qcow2").exists()


@pytest.mark.parametrize(
    ("content", "values", "reason"),
    [
        (b"QFI\xfb".ljust(512, b"\0"), {}, "a raw data file is a raw disk"),
        (b"x" * 512, {"preallocation": "full"}, "would overwrite the disk that is there"),
    ],
)
def test_what_would_not_stay_as_it_is_does_not_become_a_data_file(
    content: bytes, values: dict[str, Any], reason: str
) -> None:
    Path("disk.raw").write_bytes(content)
    with pytest.raises(RequestError, match=reason):
        create("disk.qcow2", data_file="disk.raw", data_file_raw=True, **values)
    assert Path("disk.raw").read_bytes() == content
    assert not Path("disk.qcow2").exists()


@pytest.mark.peer("qemu-img", "qemu-io")
def test_qemu_reads_a_raw_disk_through_its_new_image() -> None:
    Path("disk.raw").write_bytes(b"\7" * MiB)
    create("disk.qcow2", data_file="disk.raw", data_file_raw=True)
    subprocess.run(["qemu-img", "check", "-q", "disk.qcow2"], check=True)
    subprocess.run(
        ["qemu-io", "-c", "read -P 7 0 1M", "disk.qcow2"], check=True, capture_output=True
    )
