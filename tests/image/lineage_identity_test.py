"""A backing file is the disk that was recorded: what readers are told, and writers refused."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.extensions import Extension
from qcowkit.codecs.qcow2.identity import IDENTITY_TYPE, BackingIdentity, Identity
from qcowkit.errors import CorruptMetadata, ReferenceDenied, RequestError, StorageError
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import Layer, close_layers, open_layers
from qcowkit.image.registry import open_chain
from qcowkit.operations.backing_index import BackingIndex
from qcowkit.testing.qcow2_builder import build_qcow2
from qcowkit.testing.vhd_builder import DIFFERENCING, PARENT_ID, VhdBuilder

pytestmark = pytest.mark.pinned("builds the headers that it is about")

SIZE = 1 << 20


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_behind() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


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
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(build_qcow2(unknown=own, **options).to_bytes())
    return path


def walk(path: Path, **options: Any) -> tuple[Layer, ...]:
    options = {"format": "qcow2", "gate": ReferenceGate.below_image(), **options}
    layers = open_layers(path, budget=TRUSTED, **options)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A resolver that says the same of every disk."""

    paths: tuple[Path, ...]

    def find(self, guid: UUID) -> Sequence[Path]:
        return self.paths


def knows(*paths: Path) -> Known:
    return Known(paths=paths)


def test_a_missing_backing_file_is_opened_where_the_resolver_knows_it(tmp_path: Path) -> None:
    top, moved = write_overlay(tmp_path / "top"), write_base(tmp_path / "moved")
    with pytest.raises(StorageError, match="'base': open: No such file"):
        walk(top)
    layers = walk(top, resolver=knows(moved))
    assert [layer.path for layer in layers] == [top, moved]
    assert layers[1].warnings == (
        f"backing file 'base': {moved} is the recorded disk and was opened instead",
    )
    assert len(walk(top, resolver=knows(moved), writable=True)) == 2


def test_another_disk_under_the_name_gives_way_to_the_recorded_one(tmp_path: Path) -> None:
    write_base(tmp_path / "base", OTHER)
    top, moved = write_overlay(tmp_path / "top"), write_base(tmp_path / "moved")
    assert [layer.path for layer in walk(top, resolver=knows(moved))] == [top, moved]


def test_the_recorded_disk_under_its_name_is_not_asked_for(tmp_path: Path) -> None:
    base, copy = write_base(tmp_path / "base"), write_base(tmp_path / "copy")
    top = write_overlay(tmp_path / "top")
    assert [layer.path for layer in walk(top, resolver=knows(copy))] == [top, base]


def test_a_lying_resolver_changes_nothing(tmp_path: Path) -> None:
    base, top = write_base(tmp_path / "base", OTHER), write_overlay(tmp_path / "top")
    text = tmp_path / "text"
    text.write_bytes(b"no image")
    lies = knows(text, tmp_path / "none", tmp_path, Path("nbd:x"), base)
    layers = walk(top, resolver=lies)
    assert [layer.path for layer in layers] == [top, base]
    assert layers[1].warnings != ()
    base.unlink()
    with pytest.raises(StorageError, match="'base': open: No such file"):
        walk(top, resolver=lies)


def test_a_resolver_widens_nothing_that_the_gate_allows(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    top = write_overlay(tmp_path / "vm" / "top")
    outside = write_base(tmp_path / "outside")
    with pytest.raises(StorageError):
        walk(top, resolver=knows(outside))
    with pytest.raises(ReferenceDenied):
        walk(top, resolver=knows(outside), gate=ReferenceGate.deny_all())
    wider = ReferenceGate.below_image([tmp_path])
    assert len(walk(top, resolver=knows(outside), gate=wider)) == 2


def test_a_denied_name_may_be_found_where_it_is_allowed(tmp_path: Path) -> None:
    top = write_overlay(tmp_path / "top", backing="/srv/base", recorded_as="/srv/base")
    moved = write_base(tmp_path / "moved")
    with pytest.raises(ReferenceDenied):
        walk(top)
    assert len(walk(top, resolver=knows(moved))) == 2


def test_the_parent_of_a_vhd_is_found_too(tmp_path: Path) -> None:
    child = VhdBuilder(size=8192, disk_type=DIFFERENCING)
    child.locator(b"W2ru", ".\\parent.vhd".encode("utf-16-le"))
    (tmp_path / "child").write_bytes(child.build())
    parent = VhdBuilder(size=8192)
    parent.footer["unique_id"] = PARENT_ID.bytes
    (tmp_path / "moved").write_bytes(parent.build())
    layers = walk(tmp_path / "child", format="vpc", resolver=knows(tmp_path / "moved"))
    assert [layer.path for layer in layers] == [tmp_path / "child", tmp_path / "moved"]


def test_a_disk_that_the_resolver_finds_twice_in_a_chain_is_a_loop(tmp_path: Path) -> None:
    identity = Identity.of(OWN, backing=BackingIdentity(guid=OWN, length=SIZE), backing_name="base")
    top = write(tmp_path / "top", identity, backing_name="base", backing_format="qcow2")
    with pytest.raises(CorruptMetadata, match="a backing chain must not loop"):
        walk(top, resolver=knows(top))


def test_an_index_is_a_resolver(tmp_path: Path) -> None:
    top, moved = write_overlay(tmp_path / "top"), write_base(tmp_path / "deep" / "moved")
    with BackingIndex(tmp_path / "index") as index:
        index.scan([tmp_path])
        with open_chain(top, gate=ReferenceGate.below_image(), resolver=index) as disk:
            assert [layer.path for layer in disk.layers] == [top, moved]
