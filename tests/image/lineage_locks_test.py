"""What the files of an open chain are held for, and what happens where one is in use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.engine.options import OpenOptions
from qcowkit.errors import ImageBusy, RequestError
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import Layer, close_layers, open_layers
from qcowkit.image.registry import open_chain
from qcowkit.operations.check import open_for_check
from qcowkit.storage.file import FileStorage
from qcowkit.storage.locking import Role, acquire
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import ImageSpec, build_qcow2

GATE = ReferenceGate.below_image()
FILES = ("top", "data", "base")


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_behind() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """An image with a data file and a base; all three are empty disks."""
    spec = ImageSpec(data_file_name="data", backing_name="base", backing_format="raw")
    (tmp_path / "top").write_bytes(build_qcow2(spec).to_bytes())
    (tmp_path / "data").touch()
    (tmp_path / "base").touch()
    return tmp_path / "top"


@pytest.fixture
def opened(top: Path) -> Iterator[Callable[..., tuple[Layer, ...]]]:
    """Opens the layers; they are closed in the end."""
    with ExitStack() as stack:

        def open_them(**options: Any) -> tuple[Layer, ...]:
            layers = open_layers(top, gate=GATE, budget=TRUSTED, **options)
            stack.callback(close_layers, layers)
            return layers

        yield open_them


def roles(layers: tuple[Layer, ...]) -> list[Role | None]:
    """What top, data file and base are held for."""
    first, base = layers
    return [lock and lock.role for lock in (first.lock, first.data_lock, base.lock)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [Role.READER, Role.READER, Role.READER]),
        ({"writable": True}, [Role.WRITER, Role.WRITER, Role.READER]),
        ({"force_share": True}, [Role.SHARED, Role.SHARED, Role.SHARED]),
    ],
)
def test_the_top_and_its_data_file_are_written_and_the_rest_is_read(
    opened: Callable[..., tuple[Layer, ...]], options: dict[str, bool], expected: list[Role]
) -> None:
    assert roles(opened(**options)) == expected


@pytest.mark.parametrize("name", FILES)
def test_a_chain_with_a_file_that_is_written_elsewhere_is_in_use(top: Path, name: str) -> None:
    path = top.with_name(name)
    with FileStorage.open(path, writable=True) as storage:
        acquire(storage, Role.WRITER, name=name)
        with pytest.raises(ImageBusy) as caught:
            open_layers(top, gate=GATE, budget=TRUSTED)
    assert str(caught.value) == (
        f"{path}: is open for writing elsewhere (see -U to read it all the same)"
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("options", [{"force_share": True}, {"locking": "off"}])
def test_what_is_written_elsewhere_is_read_on_request(
    top: Path, name: str, options: dict[str, Any]
) -> None:
    with FileStorage.open(top.with_name(name), writable=True) as storage:
        acquire(storage, Role.WRITER, name=name)
        close_layers(open_layers(top, gate=GATE, budget=TRUSTED, **options))


def test_two_readers_of_a_chain_coexist_and_a_writer_waits_for_both(
    opened: Callable[..., tuple[Layer, ...]],
) -> None:
    opened()
    opened()
    with pytest.raises(ImageBusy, match="top: is open for reading elsewhere"):
        opened(writable=True)


def test_two_writers_of_overlays_share_their_base(top: Path) -> None:
    spec = ImageSpec(backing_name="base", backing_format="raw")
    top.with_name("other").write_bytes(build_qcow2(spec).to_bytes())
    layers = [
        open_layers(path, gate=GATE, budget=TRUSTED, writable=True)
        for path in (top, top.with_name("other"))
    ]
    for one in layers:
        close_layers(one)


def test_what_is_closed_is_free_again(top: Path, opened: Callable[..., tuple[Layer, ...]]) -> None:
    close_layers(open_layers(top, gate=GATE, budget=TRUSTED, writable=True))
    opened(writable=True)


def test_a_reader_can_become_a_writer_while_the_chain_is_open(
    opened: Callable[..., tuple[Layer, ...]],
) -> None:
    lock = opened()[0].lock
    assert lock is not None
    lock.change(Role.WRITER)
    with pytest.raises(ImageBusy):
        opened()


@pytest.mark.parametrize("source", ["file", "memory"])
def test_a_writer_that_shares_is_refused(top: Path, source: str) -> None:
    def storage() -> Path | MemoryStorage:
        return top if source == "file" else MemoryStorage(top.read_bytes())

    with pytest.raises(RequestError, match="force-share is for reading, found writing"):
        open_layers(storage(), gate=GATE, budget=TRUSTED, writable=True, force_share=True)
    with pytest.raises(RequestError, match="force-share is for reading, found writing"):
        open_for_check(storage(), writable=True, force_share=True)


def test_what_is_no_file_is_not_locked(top: Path) -> None:
    storage = MemoryStorage(build_qcow2(ImageSpec()).to_bytes())
    layers = open_layers(storage, gate=GATE, budget=TRUSTED, locking="on")
    close_layers(layers)
    assert layers[0].lock is None


def test_options_of_a_chain_say_how_it_is_locked(top: Path) -> None:
    with FileStorage.open(top, writable=True) as storage:
        acquire(storage, Role.WRITER, name="top")
        with pytest.raises(ImageBusy):
            open_chain(top, gate=GATE)
        for options in (OpenOptions(force_share=True), OpenOptions(locking="off")):
            open_chain(top, gate=GATE, options=options).close()


def test_a_check_reads_alone_or_shares(top: Path) -> None:
    with FileStorage.open(top, writable=True) as storage:
        acquire(storage, Role.WRITER, name="top")
        with pytest.raises(ImageBusy):
            open_for_check(top)
        layer = open_for_check(top, force_share=True)
        layer.storage.close()


def test_a_check_that_repairs_excludes_readers(top: Path) -> None:
    with open_for_check(top, writable=True).storage, pytest.raises(ImageBusy):
        open_for_check(top)
