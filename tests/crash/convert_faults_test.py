"""A conversion in which one call into a storage fails: whichever it is, the error is typed and
keeps its errno, and an existing target stays. Reliability reference, sections 4.1 and 4.3."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.errors import StorageError
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import open_layers
from qcowkit.image.registry import build_chain
from qcowkit.operations.convert import ConvertOptions, convert
from qcowkit.operations.create import CreateOptions, create_image
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.units import KiB, MiB

OLD = b"the old target" * 99
KINDS: dict[str, ConvertOptions] = {
    "raw": ConvertOptions(format="raw"),
    "raw full": ConvertOptions(format="raw", sparse_size=0),
    "raw preallocated": ConvertOptions(format="raw", create={"preallocation": "full"}),
    "qcow2": ConvertOptions(format="qcow2", create={"cluster_size": 4096}),
    "qcow2 compressed": ConvertOptions(format="qcow2", compress=True),
    "qcow2 subclusters": ConvertOptions(
        format="qcow2", create={"extended_l2": True, "cluster_size": 16 * KiB}
    ),
    "qcow2 preallocated": ConvertOptions(format="qcow2", create={"preallocation": "falloc"}),
    "qcow2 data file": ConvertOptions(format="qcow2", create={"data_file": "new.data"}),
    "vhd": ConvertOptions(format="vpc"),
    "vhd fixed": ConvertOptions(format="vpc", create={"subformat": "fixed"}),
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def guest() -> bytes:
    noise = random.Random(6)
    return noise.randbytes(300 * KiB) + bytes(MiB) + noise.randbytes(70 * KiB) + bytes(512)


def memory_source(storage: Storage) -> Chain:
    """The raw disk of a storage, which the chain closes."""
    layers = open_layers(storage, format="raw", gate=ReferenceGate.deny_all(), budget=TRUSTED)
    return build_chain(layers)


class Calls:
    """The calls of the storage into the system: counted, and one of them made to fail.

    names: functions of `os`. Calls are counted only while a descriptor of ours can be their
    object, which all of them take first."""

    NAMES = ("pwritev", "pwrite", "ftruncate", "posix_fallocate", "fdatasync", "fsync", "fchmod")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.fail_at = 0
        self.errno = errno.EIO
        self.log: list[str] = []
        for name in (*self.NAMES, "rename"):
            monkeypatch.setattr(os, name, self._armed(name, getattr(os, name)))

    def _armed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            self.log.append(name)
            if self.count == self.fail_at:
                raise OSError(self.errno, os.strerror(self.errno))
            return call(*arguments, **options)

        return run

    def begin(self, *, fail_at: int, number: int = errno.EIO) -> None:
        """Count from the start again."""
        self.count, self.fail_at, self.errno = 0, fail_at, number
        self.log.clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def run_convert(target: Path, kind: str) -> None:
    with memory_source(MemoryStorage(guest())) as chain:
        convert([chain], target, options=KINDS[kind])


def points(count: int, *, most: int = 24) -> Iterator[int]:
    """Calls to fail: all of a short run, of a long one the first, the last and some between."""
    if count <= most:
        yield from range(1, count + 1)
        return
    half = most // 3
    yield from range(1, half + 1)
    yield from random.Random(count).sample(range(half + 1, count - half + 1), most - 2 * half)
    yield from range(count - half + 1, count + 1)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@every_kind
def test_a_call_that_fails_leaves_the_old_target(
    tmp_path: Path, calls: Calls, kind: str, number: int
) -> None:
    target = tmp_path / "target"
    calls.begin(fail_at=0)
    run_convert(target, kind)
    for at in points(calls.count):
        target.write_bytes(OLD)
        # What a failure between the two renames leaves; an existing data file is never replaced.
        for left in tmp_path.glob("*.data"):
            left.unlink()
        calls.begin(fail_at=at, number=number)
        with pytest.raises(StorageError) as failure:
            run_convert(target, kind)
        assert failure.value.errno == number
        failed = calls.log[at - 1]
        # Only a rename that may not last finds the new file in place: the call before was it.
        if failed == "fsync" and calls.log[at - 2] == "rename":
            continue
        assert target.read_bytes() == OLD, failed
        assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


@every_kind
def test_a_target_that_is_there_has_been_made_durable_first(
    tmp_path: Path, calls: Calls, kind: str
) -> None:
    run_convert(tmp_path / "target", kind)
    renamed = calls.log.index("rename")
    assert "fdatasync" in calls.log[:renamed]
    last_write = max(index for index, name in enumerate(calls.log) if name.startswith("pwrite"))
    assert last_write < calls.log.index("rename", renamed)
    assert calls.log[-1] == "fsync"


@pytest.mark.pinned("counts the files", "data_file")
@pytest.mark.parametrize(
    "options",
    [
        CreateOptions(format="qcow2", values={"size": MiB}),
        CreateOptions(format="qcow2", values={"size": MiB, "preallocation": "full"}),
        CreateOptions(format="vpc", values={"size": MiB}),
        CreateOptions(format="raw", values={"size": MiB, "preallocation": "falloc"}),
    ],
)
def test_a_creation_that_fails_leaves_the_old_target(
    tmp_path: Path, calls: Calls, options: CreateOptions
) -> None:
    target = tmp_path / "target"
    gate = ReferenceGate.deny_all()
    calls.begin(fail_at=0)
    create_image(target, options, gate=gate)
    # The last call makes the rename durable: the new image is in place by then.
    for at in range(1, calls.count):
        target.write_bytes(OLD)
        calls.begin(fail_at=at, number=errno.ENOSPC)
        with pytest.raises(StorageError) as failure:
            create_image(target, options, gate=gate)
        assert failure.value.errno == errno.ENOSPC
        assert target.read_bytes() == OLD
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.pinned("counts the files", "data_file")
@pytest.mark.parametrize("kind", ["raw", "qcow2", "qcow2 compressed", "vhd"])
def test_a_source_that_fails_leaves_the_old_target(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    inner = FaultyStorage(MemoryStorage(guest()))
    with memory_source(inner) as chain:
        convert([chain], target, options=KINDS[kind])
    assert inner.calls["pread"]
    for at in points(inner.calls["pread"]):
        target.write_bytes(OLD)
        fault = Fault(operation="pread", call=at, errno=errno.EIO)
        faulty = FaultyStorage(MemoryStorage(guest()), fault)
        with memory_source(faulty) as chain, pytest.raises(StorageError) as failure:
            convert([chain], target, options=KINDS[kind])
        assert faulty.fired == [fault]
        assert (failure.value.errno, failure.value.operation) == (errno.EIO, "read")
        assert target.read_bytes() == OLD
        assert len(list(tmp_path.iterdir())) == 1


def test_a_source_that_fails_once_can_be_salvaged(tmp_path: Path) -> None:
    fault = Fault(operation="pread", call=3)
    options = ConvertOptions(format="raw", salvage=True)
    with memory_source(FaultyStorage(MemoryStorage(guest()), fault)) as chain:
        done = convert([chain], tmp_path / "target", options=options)
    # Read again, piece by piece, it is all there.
    assert (tmp_path / "target").read_bytes() == guest()
    assert done.salvaged == ()
