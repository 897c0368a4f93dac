"""The walk down a backing chain: order, loops, depth, formats, and that nothing stays open."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.errors import (
    BudgetExceeded,
    CorruptMetadata,
    ReferenceDenied,
    RequestError,
    StorageError,
    UnknownFormat,
)
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import Layer, close_layers, open_layers
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.qcow2_builder import ImageSpec, build_qcow2
from qcowkit.testing.vhd_builder import DIFFERENCING, PARENT_ID, VhdBuilder

_VHD_EPOCH = 946_684_800


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_behind() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def qcow2(path: Path, backing: str | None = None, format: str | None = "qcow2") -> Path:
    spec = ImageSpec(backing_name=backing, backing_format=format if backing else None)
    path.write_bytes(build_qcow2(spec).to_bytes())
    return path


def walk(source: Any, **options: Any) -> tuple[Layer, ...]:
    """The layers, closed again: what they say outlives their files."""
    options.setdefault("gate", ReferenceGate.below_image())
    options.setdefault("budget", TRUSTED)
    layers = open_layers(source, **options)
    close_layers(layers)
    return layers


def test_an_image_alone_is_one_layer(tmp_path: Path) -> None:
    (layer,) = walk(qcow2(tmp_path / "top"))
    assert layer.path == tmp_path / "top"
    assert (layer.metadata.format, layer.format_probed, layer.warnings) == ("qcow2", True, ())


def test_a_chain_of_mixed_formats_is_opened_top_first(tmp_path: Path) -> None:
    qcow2(tmp_path / "top", "middle.vhd", "vpc")
    (tmp_path / "middle.vhd").write_bytes(
        VhdBuilder(size=8192, disk_type=DIFFERENCING)
        .locator(b"W2ru", ".\\deep\\parent.vhd".encode("utf-16-le"))
        .build()
    )
    (tmp_path / "deep").mkdir()
    parent = VhdBuilder(size=8192)
    parent.footer["unique_id"] = PARENT_ID.bytes
    (tmp_path / "deep" / "parent.vhd").write_bytes(parent.build())
    layers = walk(tmp_path / "top")
    assert [layer.metadata.format for layer in layers] == ["qcow2", "vpc", "vpc"]
    assert [layer.path for layer in layers] == [
        tmp_path / "top",
        tmp_path / "middle.vhd",
        tmp_path / "deep" / "parent.vhd",
    ]
    assert [layer.format_probed for layer in layers] == [True, False, False]


def test_names_are_looked_up_from_the_image_that_holds_them(tmp_path: Path) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    qcow2(tmp_path / "top", "deep/middle")
    qcow2(tmp_path / "deep" / "middle", "deeper/base")
    qcow2(tmp_path / "deep" / "deeper" / "base")
    assert len(walk(tmp_path / "top")) == 3


def test_a_layer_below_may_not_name_what_lies_above_its_own_directory(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    qcow2(tmp_path / "top", "deep/middle")
    qcow2(tmp_path / "deep" / "middle", "../base")
    qcow2(tmp_path / "base")
    with pytest.raises(ReferenceDenied, match="'../base': not admitted: only files below"):
        walk(tmp_path / "top")
    assert len(walk(tmp_path / "top", gate=ReferenceGate.below_image([tmp_path]))) == 3


def test_without_following_the_top_alone_is_opened(tmp_path: Path) -> None:
    qcow2(tmp_path / "top", "/etc/passwd")
    assert len(walk(tmp_path / "top", follow_backing=False)) == 1


def test_the_default_of_the_library_refuses_every_name(tmp_path: Path) -> None:
    qcow2(tmp_path / "top", "base")
    qcow2(tmp_path / "base")
    with pytest.raises(ReferenceDenied):
        walk(tmp_path / "top", gate=ReferenceGate.deny_all())


def test_an_image_that_names_itself_is_refused(tmp_path: Path) -> None:
    qcow2(tmp_path / "top", "top")
    with pytest.raises(CorruptMetadata) as caught:
        walk(tmp_path / "top")
    assert str(caught.value) == (
        "backing file 'top': the same file as the top image: a backing chain must not loop"
    )


def test_two_images_that_name_each_other_are_refused(tmp_path: Path) -> None:
    qcow2(tmp_path / "a", "b")
    qcow2(tmp_path / "b", "a")
    with pytest.raises(CorruptMetadata, match="'a': the same file as the top image"):
        walk(tmp_path / "a")


@pytest.mark.parametrize("kind", ["hard link", "symbolic link"])
def test_a_loop_is_seen_through_every_name_of_a_file(tmp_path: Path, kind: str) -> None:
    qcow2(tmp_path / "top", "middle")
    qcow2(tmp_path / "middle", "other")
    if kind == "hard link":
        os.link(tmp_path / "middle", tmp_path / "other")
    else:
        (tmp_path / "other").symlink_to("middle")
    with pytest.raises(CorruptMetadata, match="'other': the same file as backing file 'middle'"):
        walk(tmp_path / "top")


def test_a_chain_as_deep_as_allowed_is_opened_and_a_deeper_one_refused(tmp_path: Path) -> None:
    for index in range(4):
        qcow2(tmp_path / f"image{index}", f"image{index + 1}")
    qcow2(tmp_path / "image4")
    assert len(walk(tmp_path / "image0", budget=replace(TRUSTED, depth=5))) == 5
    with pytest.raises(BudgetExceeded, match="backing chain layers: 5 is above the limit of 4"):
        walk(tmp_path / "image0", budget=replace(TRUSTED, depth=4))


def test_depth_is_refused_before_the_file_is_opened(tmp_path: Path) -> None:
    qcow2(tmp_path / "top", "missing")
    with pytest.raises(BudgetExceeded):
        walk(tmp_path / "top", budget=replace(TRUSTED, depth=1))


def test_a_pipe_as_backing_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    qcow2(tmp_path / "top", "pipe", "raw")
    for gate in (ReferenceGate.below_image(), ReferenceGate.trusting()):
        with pytest.raises(StorageError, match="is a pipe"):
            walk(tmp_path / "top", gate=gate)


def test_a_missing_backing_file_is_named(tmp_path: Path) -> None:
    qcow2(tmp_path / "top", "base")
    with pytest.raises(StorageError, match="backing file 'base': open: No such file"):
        walk(tmp_path / "top")


def test_a_backing_file_without_a_declared_format_is_probed_with_a_warning(tmp_path: Path) -> None:
    qcow2(tmp_path / "top", "base", None)
    qcow2(tmp_path / "base")
    _, base = walk(tmp_path / "top")
    assert base.metadata.format == "qcow2"
    assert base.format_probed
    assert base.warnings == ("backing file 'base' has no declared format; qcow2 was probed",)


def test_content_that_contradicts_the_declared_format_is_refused(tmp_path: Path) -> None:
    qcow2(tmp_path / "top", "base", "qcow2")
    (tmp_path / "base").write_bytes(VhdBuilder(size=8192).build())
    with pytest.raises(UnknownFormat) as caught:
        walk(tmp_path / "top")
    assert str(caught.value) == (
        "backing file 'base': the content is vpc, expected qcow2 as declared"
    )


@pytest.mark.parametrize("format", ["qcow2", "vpc"])
def test_a_raw_file_declared_as_something_else_is_refused(tmp_path: Path, format: str) -> None:
    qcow2(tmp_path / "top", "base", format)
    (tmp_path / "base").write_bytes(bytes(8192))
    with pytest.raises((CorruptMetadata, UnknownFormat)):
        walk(tmp_path / "top")


def test_what_is_declared_raw_stays_raw_whatever_the_guest_wrote(tmp_path: Path) -> None:
    qcow2(tmp_path / "top", "base", "raw")
    qcow2(tmp_path / "base", "/etc/passwd")
    layers = walk(tmp_path / "top")
    assert [layer.metadata.format for layer in layers] == ["qcow2", "raw"]


def test_a_data_file_is_opened_through_the_gate(tmp_path: Path) -> None:
    image = build_qcow2(ImageSpec(data_file_name="data"))
    (tmp_path / "top").write_bytes(image.to_bytes())
    (tmp_path / "data").write_bytes(bytes(1 << 20))
    (layer,) = walk(tmp_path / "top")
    assert layer.data_storage is not None
    assert layer.data_storage.name == str(tmp_path / "data")
    with pytest.raises(ReferenceDenied, match="data file 'data': not admitted"):
        walk(tmp_path / "top", gate=ReferenceGate.deny_all())
    (layer,) = walk(tmp_path / "top", gate=ReferenceGate.deny_all(), follow_data=False)
    assert layer.data_storage is None


def test_a_data_file_that_is_the_image_itself_is_refused(tmp_path: Path) -> None:
    image = build_qcow2(ImageSpec(data_file_name="top"))
    (tmp_path / "top").write_bytes(image.to_bytes())
    with pytest.raises(CorruptMetadata, match="data file 'top': the same file as the top image"):
        walk(tmp_path / "top")


def test_only_the_top_and_its_data_file_are_opened_for_writing(tmp_path: Path) -> None:
    spec = ImageSpec(data_file_name="data", backing_name="base", backing_format="raw")
    (tmp_path / "top").write_bytes(build_qcow2(spec).to_bytes())
    (tmp_path / "data").touch()
    (tmp_path / "base").touch()
    top, base = walk(tmp_path / "top", writable=True)
    assert top.storage.caps.writable
    assert top.data_storage is not None
    assert top.data_storage.caps.writable
    assert not base.storage.caps.writable


def vhd_pair(directory: Path, **header: int | bytes) -> Path:
    child = VhdBuilder(size=8192, disk_type=DIFFERENCING)
    child.locator(b"W2ru", ".\\parent.vhd".encode("utf-16-le"))
    child.header.update(header)
    (directory / "child.vhd").write_bytes(child.build())
    parent = VhdBuilder(size=8192)
    parent.footer["unique_id"] = PARENT_ID.bytes
    (directory / "parent.vhd").write_bytes(parent.build())
    return directory / "child.vhd"


def test_the_parent_of_a_vhd_is_known_by_its_identity(tmp_path: Path) -> None:
    child, parent = walk(vhd_pair(tmp_path))
    assert (child.warnings, parent.warnings) == ((), ())
    stranger = VhdBuilder(size=8192)
    (tmp_path / "parent.vhd").write_bytes(stranger.build())
    with pytest.raises(CorruptMetadata) as caught:
        walk(tmp_path / "child.vhd")
    assert str(caught.value) == (
        "parent 'parent.vhd': unique id is 11111111-2222-3333-4444-555555555555, "
        f"expected {PARENT_ID}"
    )


def test_another_modification_time_of_a_vhd_parent_is_a_warning(tmp_path: Path) -> None:
    path = vhd_pair(tmp_path, parent_timestamp=1000)
    os.utime(tmp_path / "parent.vhd", (_VHD_EPOCH + 1000, _VHD_EPOCH + 1000))
    assert walk(path)[1].warnings == ()
    os.utime(tmp_path / "parent.vhd", (_VHD_EPOCH + 1007, _VHD_EPOCH + 1007))
    assert walk(path)[1].warnings == (
        "parent 'parent.vhd' was modified 1007 s after 2000-01-01, expected 1000",
    )


def test_a_storage_takes_the_place_of_a_path(tmp_path: Path) -> None:
    image = build_qcow2(ImageSpec(backing_name="base", backing_format="raw")).to_bytes()
    (tmp_path / "base").touch()
    top, base = walk(MemoryStorage(image), directory=tmp_path)
    assert (top.path, base.path) == (None, tmp_path / "base")
    with pytest.raises(RequestError, match="'base': <memory> lies in no directory"):
        walk(MemoryStorage(image))


@pytest.mark.parametrize("call", range(1, 8))
def test_a_failing_disk_is_reported_and_nothing_stays_open(tmp_path: Path, call: int) -> None:
    (tmp_path / "base").touch()
    inner = MemoryStorage(
        build_qcow2(ImageSpec(backing_name="base", backing_format="raw")).to_bytes()
    )
    storage = FaultyStorage(inner, Fault(operation="*", call=call))
    with contextlib.suppress(StorageError):
        walk(storage, directory=tmp_path)
    assert bool(storage.fired) == (storage.calls["*"] >= call)
    with pytest.raises(StorageError):
        inner.size()


def test_closing_goes_on_behind_a_failure(tmp_path: Path) -> None:
    class Stubborn(MemoryStorage):
        def close(self) -> None:
            super().close()
            raise StorageError("close", path=self.name, errno=errno.EIO)

    qcow2(tmp_path / "base")
    image = build_qcow2(ImageSpec(backing_name="base", backing_format="qcow2")).to_bytes()
    layers = open_layers(
        Stubborn(image),
        gate=ReferenceGate.below_image(),
        budget=TRUSTED,
        directory=tmp_path,
    )
    with pytest.raises(StorageError, match="EIO"):
        close_layers(layers)
