"""A backing file is the disk that was recorded: what readers are told, and writers refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.extensions import Extension
from qcowkit.codecs.qcow2.identity import IDENTITY_TYPE, BackingIdentity, Identity
from qcowkit.errors import RequestError
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import Layer, close_layers, open_layers
from qcowkit.image.registry import open_chain
from qcowkit.testing.qcow2_builder import build_qcow2
from qcowkit.testing.vhd_builder import VhdBuilder

pytestmark = pytest.mark.pinned("builds the headers that it is about")

SIZE = 1 << 20
OWN, BASE, OTHER = UUID(int=1), UUID(int=2), UUID(int=3)


def write_base(path: Path, guid: UUID | None = BASE, *, size: int = SIZE) -> Path:
    return write(path, None if guid is None else Identity.of(guid), size=size)


def write_overlay(
    path: Path, *, recorded_as: str = "base", backing: str = "base", **options: Any
) -> Path:
    """An overlay that has recorded BASE as its backing file, under one name or another."""
    record = BackingIdentity(guid=BASE, length=SIZE)
    identity = Identity.of(OWN, backing=record, backing_name=recorded_as)
    options.setdefault("backing_format", "qcow2")
    return write(path, identity, backing_name=backing, **options)


def write(path: Path, identity: Identity | None, **options: Any) -> Path:
    own = () if identity is None else (Extension(type=IDENTITY_TYPE, data=identity.encode()),)
    options.setdefault("size", SIZE)
    path.write_bytes(build_qcow2(unknown=own, **options).to_bytes())
    return path


def walk(path: Path, **options: Any) -> tuple[Layer, ...]:
    layers = open_layers(
        path, gate=ReferenceGate.below_image(), budget=TRUSTED, **{"format": "qcow2", **options}
    )
    close_layers(layers)
    return layers


def warnings(path: Path) -> list[str]:
    return [text for layer in walk(path) for text in layer.warnings]


def test_the_recorded_disk_is_opened_without_a_word(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    top = write_overlay(tmp_path / "top")
    assert warnings(top) == []
    assert len(walk(top, writable=True)) == 2


def test_readers_of_another_disk_are_warned(tmp_path: Path) -> None:
    write_base(tmp_path / "base", OTHER)
    assert warnings(write_overlay(tmp_path / "top")) == [
        f"backing file 'base': the GUID is {OTHER}, expected {BASE} as recorded"
    ]


def test_readers_of_a_disk_that_says_nothing_are_warned(tmp_path: Path) -> None:
    write_base(tmp_path / "base", None)
    assert warnings(write_overlay(tmp_path / "top")) == [
        f"backing file 'base': the GUID is none, expected {BASE} as recorded"
    ]


def test_a_raw_disk_is_not_the_recorded_one(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(SIZE))
    assert warnings(write_overlay(tmp_path / "top", backing_format="raw")) != []


def test_a_vhd_is_known_by_its_unique_id(tmp_path: Path) -> None:
    vhd = VhdBuilder(size=SIZE)
    vhd.footer["unique_id"] = BASE.bytes
    (tmp_path / "base").write_bytes(vhd.build())
    assert warnings(write_overlay(tmp_path / "top", backing_format="vpc")) == []


def test_writers_above_another_disk_are_refused_and_told_the_ways_out(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", OTHER)
    top = write_overlay(tmp_path / "top")
    before = top.read_bytes(), base.read_bytes()
    with pytest.raises(RequestError) as caught:
        open_chain(top, format="qcow2", gate=ReferenceGate.below_image(), writable=True)
    assert str(caught.value) == (
        f"backing file 'base': the GUID is {OTHER}, expected {BASE} as recorded: nothing is "
        "written above another disk; find-backing looks for the right one, rebase -u or amend -o "
        "guid take this one"
    )
    assert (top.read_bytes(), base.read_bytes()) == before


def test_whoever_would_write_into_another_disk_is_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base", OTHER)
    with pytest.raises(RequestError, match="nothing is written above another disk"):
        walk(write_overlay(tmp_path / "top"), writable_below=(1,))


def test_writers_are_refused_for_a_mixture_further_down(tmp_path: Path) -> None:
    write_base(tmp_path / "base", OTHER)
    write_overlay(tmp_path / "middle")
    top = write(tmp_path / "top", None, backing_name="middle", backing_format="qcow2")
    assert len(walk(top)) == 3
    with pytest.raises(RequestError, match="nothing is written above another disk"):
        walk(top, writable=True)


def test_the_overlay_alone_can_be_written(tmp_path: Path) -> None:
    write_base(tmp_path / "base", OTHER)
    assert len(walk(write_overlay(tmp_path / "top"), writable=True, follow_backing=False)) == 1


def test_what_was_recorded_for_another_name_is_not_asked_for(tmp_path: Path) -> None:
    write_base(tmp_path / "base", OTHER)
    top = write_overlay(tmp_path / "top", recorded_as="before")
    assert warnings(top) == []
    assert len(walk(top, writable=True)) == 2


def test_a_disk_of_another_size_than_recorded_is_told_and_not_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base", size=SIZE // 2)
    top = write_overlay(tmp_path / "top")
    assert warnings(top) == [
        f"backing file 'base' has {SIZE // 2} bytes, {SIZE} when it was recorded"
    ]
    assert len(walk(top, writable=True)) == 2
