"""`convert -n` into an image that exists: what stays, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcowkit.errors import ImageBusy, QcowkitError, RequestError
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.registry import open_chain
from qcowkit.operations.convert import ConvertOptions, convert
from qcowkit.operations.create import CreateOptions, OptionValue, create_image
from qcowkit.storage.file import FileStorage
from qcowkit.storage.locking import Role, acquire
from qcowkit.units import KiB, MiB

GATE = ReferenceGate.below_image()


def make_target(path: Path, format: str = "qcow2", **values: OptionValue) -> None:
    create_image(path, CreateOptions.of(format, values), gate=GATE)


def write_over(
    path: Path, content: bytes, *, format: str = "qcow2", compress: bool = False
) -> None:
    source = path.with_name("source.raw")
    source.write_bytes(content)
    options = ConvertOptions(format=format, in_place=True, compress=compress)
    with open_chain(source, format="raw") as disk:
        convert([disk], path, options=options)


def read_all(path: Path) -> bytes:
    with open_chain(path, gate=GATE) as disk:
        return disk.read(offset=0, length=disk.size)


@pytest.mark.pinned("-n refuses a data file", "data_file")
@pytest.mark.parametrize(
    "values",
    [
        {"cluster_size": 4 * KiB, "refcount_bits": 1},
        {"compat": "0.10"},
        {"extended_l2": True, "compression_type": "zstd", "lazy_refcounts": True},
    ],
)
def test_a_qcow2_target_keeps_its_options_and_its_size(
    tmp_path: Path, values: dict[str, OptionValue]
) -> None:
    target = tmp_path / "target.qcow2"
    make_target(target, size=2 * MiB, **values)
    with open_chain(target) as disk:
        before = disk.layers[0].metadata
    content = os.urandom(MiB + 512)
    write_over(target, content)
    with open_chain(target) as disk:
        after = disk.layers[0].metadata
        assert disk.size == 2 * MiB
    assert read_all(target) == content.ljust(2 * MiB, b"\0")
    assert after.geometry == before.geometry
    assert after.header.compatible_features == before.header.compatible_features
    assert (after.header.version, after.compression_type) == (
        before.header.version,
        before.compression_type,
    )


@pytest.mark.pinned("-n refuses a data file", "data_file")
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_zeros_of_the_source_hide_a_backing_file_that_stays(tmp_path: Path, compat: str) -> None:
    (tmp_path / "base.raw").write_bytes(b"\xaa" * MiB)
    target = tmp_path / "target.qcow2"
    make_target(target, compat=compat, backing_file="base.raw", backing_fmt="raw")
    content = bytes(256 * KiB) + b"\x55" * (256 * KiB) + bytes(512 * KiB)
    write_over(target, content)
    assert read_all(target) == content


@pytest.mark.pinned("-n refuses a data file", "data_file")
def test_what_the_source_does_not_reach_still_shows_the_backing_file(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"\xaa" * MiB)
    target = tmp_path / "target.qcow2"
    make_target(target, backing_file="base.raw", backing_fmt="raw")
    write_over(target, bytes(128 * KiB))
    assert read_all(target) == bytes(128 * KiB) + b"\xaa" * (MiB - 128 * KiB)


@pytest.mark.pinned("clusters of 64 KiB", "data_file", "cluster_size=512")
def test_a_source_that_ends_within_a_cluster_over_a_backing_file_is_refused(
    tmp_path: Path,
) -> None:
    (tmp_path / "base.raw").write_bytes(b"\xaa" * MiB)
    target = tmp_path / "target.qcow2"
    make_target(target, backing_file="base.raw", backing_fmt="raw")
    with pytest.raises(RequestError, match="ends within a cluster, 512 bytes from its start"):
        write_over(target, bytes(64 * KiB + 512))


def test_a_source_that_does_not_fit_is_refused_and_the_target_stays(tmp_path: Path) -> None:
    target = tmp_path / "target.qcow2"
    make_target(target, size=MiB)
    before = target.read_bytes()
    with pytest.raises(RequestError, match="it does not fit"):
        write_over(target, bytes(2 * MiB))
    assert target.read_bytes() == before


@pytest.mark.pinned("-n refuses a data file", "data_file")
def test_data_beyond_the_end_of_the_source_is_not_thrown_away(tmp_path: Path) -> None:
    target = tmp_path / "target.qcow2"
    make_target(target, size=2 * MiB)
    write_over(target, bytes(MiB) + b"\x11" * MiB)
    with pytest.raises(RequestError, match="holds data at offset 1048576"):
        write_over(target, b"\x22" * MiB)


def test_a_target_with_a_data_file_is_refused_by_name(tmp_path: Path) -> None:
    target = tmp_path / "target.qcow2"
    make_target(target, size=MiB, data_file="data.raw")
    with pytest.raises(RequestError, match="-n would lose the external data file"):
        write_over(target, bytes(MiB))


def test_a_vhd_target_keeps_its_size_and_kind(tmp_path: Path) -> None:
    target = tmp_path / "target.vhd"
    make_target(target, "vpc", size=4 * MiB, subformat="fixed")
    content = os.urandom(MiB)
    write_over(target, content, format="vpc")
    assert target.stat().st_size == 4 * MiB + 512
    assert read_all(target) == content.ljust(4 * MiB, b"\0")


def test_a_target_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QcowkitError, match="No such file"):
        write_over(tmp_path / "nothing.qcow2", bytes(MiB))


def test_an_existing_data_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "data.raw").write_bytes(b"precious")
    with pytest.raises(QcowkitError, match="EEXIST"):
        make_target(tmp_path / "target.qcow2", size=MiB, data_file="data.raw")
    assert (tmp_path / "data.raw").read_bytes() == b"precious"
    assert not (tmp_path / "target.qcow2").exists()


@pytest.mark.pinned("-n refuses a data file", "data_file")
@pytest.mark.parametrize("role", [Role.READER, Role.WRITER])
@pytest.mark.parametrize(("format", "word"), [("qcow2", "replaced"), ("raw", "written")])
def test_a_target_that_is_in_use_is_left_alone(
    tmp_path: Path, role: Role, format: str, word: str
) -> None:
    target = tmp_path / "target"
    make_target(target, format=format, size=MiB)
    before = target.read_bytes()
    with FileStorage.open(target, writable=True) as user:
        acquire(user, role, name="user")
        with pytest.raises(ImageBusy, match=f"elsewhere, so it cannot be {word} until"):
            write_over(target, b"x" * MiB, format=format)
    assert target.read_bytes() == before
    write_over(target, b"x" * MiB, format=format)
    assert target.read_bytes() != before


@pytest.mark.pinned("-n refuses a data file", "data_file")
@pytest.mark.parametrize("format", ["qcow2", "raw"])
@pytest.mark.parametrize("in_place", [True, False])
def test_nobody_can_use_the_target_while_it_is_written(
    tmp_path: Path, format: str, in_place: bool
) -> None:
    target, source = tmp_path / "target", tmp_path / "source.raw"
    make_target(target, format=format, size=MiB)
    source.write_bytes(b"x" * MiB)
    asked = []

    def look(*_: int) -> None:
        with FileStorage.open(target) as user, pytest.raises(ImageBusy):
            acquire(user, Role.READER, name="user")
        asked.append(True)

    options = ConvertOptions(format=format, in_place=in_place)
    with open_chain(source, format="raw") as disk:
        convert([disk], target, options=options, progress=look)
    assert asked


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_a_target_that_is_the_source_is_said_to_be_that_rather_than_in_use(
    tmp_path: Path, format: str
) -> None:
    target = tmp_path / "target"
    make_target(target, format=format, size=MiB)
    options = ConvertOptions(format=format, in_place=True)
    with (
        open_chain(target, format=format) as disk,
        pytest.raises(RequestError, match="is one of the files that are read"),
    ):
        convert([disk], target, options=options)


def test_a_new_image_does_not_replace_one_that_is_in_use(tmp_path: Path) -> None:
    target = tmp_path / "target"
    make_target(target, size=MiB)
    with open_chain(target), pytest.raises(ImageBusy, match="so it cannot be replaced until"):
        make_target(target, size=2 * MiB)
    make_target(target, size=2 * MiB)


def test_a_base_that_is_written_elsewhere_makes_no_overlay(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_target(base, size=MiB)
    with FileStorage.open(base, writable=True) as user:
        acquire(user, Role.WRITER, name="user")
        with pytest.raises(ImageBusy, match="base: is open for writing elsewhere"):
            make_target(tmp_path / "top", backing_file="base", backing_fmt="qcow2")
    assert not (tmp_path / "top").exists()
