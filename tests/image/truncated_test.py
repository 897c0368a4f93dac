"""A qcow2 file that lost its end: no zeros in place of what is gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcowkit.errors import CorruptMetadata
from qcowkit.image.registry import open_chain
from qcowkit.operations.convert import ConvertOptions, convert
from qcowkit.units import KiB, MiB


def make_image(folder: Path) -> tuple[Path, bytes]:
    content = os.urandom(4 * MiB - 512)
    (folder / "source.raw").write_bytes(content)
    image = folder / "image.qcow2"
    with open_chain(folder / "source.raw", format="raw") as disk:
        convert([disk], image, options=ConvertOptions(format="qcow2"))
    return image, content


@pytest.mark.pinned("cuts the data with the image", "data_file")
@pytest.mark.parametrize("kept", [MiB, 3 * MiB, 4 * MiB])
def test_a_cluster_beyond_the_end_of_a_cut_file_is_an_error(tmp_path: Path, kept: int) -> None:
    image, _ = make_image(tmp_path)
    os.truncate(image, kept)
    with (
        open_chain(image) as disk,
        pytest.raises(
            CorruptMetadata,
            match=f"data cluster at host offset {kept:#x}: lies beyond the end of the file",
        ),
    ):
        disk.read(offset=0, length=disk.size)


@pytest.mark.pinned("cuts the data with the image", "data_file")
def test_a_conversion_of_a_cut_file_makes_nothing(tmp_path: Path) -> None:
    image, _ = make_image(tmp_path)
    os.truncate(image, 2 * MiB)
    with open_chain(image) as disk, pytest.raises(CorruptMetadata):
        convert([disk], tmp_path / "out.raw", options=ConvertOptions(format="raw"))
    assert not (tmp_path / "out.raw").exists()


@pytest.mark.pinned("cuts the data with the image", "data_file")
def test_what_is_left_of_a_cut_file_can_be_read_and_salvaged(tmp_path: Path) -> None:
    image, content = make_image(tmp_path)
    os.truncate(image, 2 * MiB)
    with open_chain(image) as disk:
        assert disk.read(offset=0, length=MiB) == content[:MiB]
        done = convert(
            [disk], tmp_path / "out.raw", options=ConvertOptions(format="raw", salvage=True)
        )
    assert done.salvaged
    lost = done.salvaged[0][0]
    assert (tmp_path / "out.raw").read_bytes()[:lost] == content[:lost]


@pytest.mark.pinned("clusters of 64 KiB", "cluster_size=512")
def test_a_file_may_end_within_its_last_cluster(tmp_path: Path) -> None:
    image, content = make_image(tmp_path)
    # The last cluster of the disk is half a kilobyte short: its file may be, too.
    os.truncate(image, image.stat().st_size - 64 * KiB + (4 * MiB - 512) % (64 * KiB))
    with open_chain(image) as disk:
        assert disk.read(offset=0, length=disk.size) == content


def test_a_raw_file_that_shrinks_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(MiB))
    with open_chain(path, format="raw") as disk:
        table = disk.extents()
        os.truncate(path, 512 * KiB)
        with pytest.raises(CorruptMetadata, match="beyond the end of the file at 0x80000"):
            disk.read_table(table, memoryview(bytearray(MiB)))


def test_a_raw_file_may_end_within_its_last_sector(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 700)
    with open_chain(path, format="raw") as disk:
        assert disk.read(offset=0, length=disk.size) == b"x" * 700 + bytes(324)
