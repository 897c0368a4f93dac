"""The bulk writers on a storage that fails: every failure surfaces, and what a failed write left
behind is never taken for an image."""

from __future__ import annotations

import errno
import random
from collections.abc import Mapping

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.engine.executor import Workers
from qcowkit.errors import QcowkitError, StorageError
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import open_layers
from qcowkit.image.registry import build_chain
from qcowkit.operations.copying import Copier, CopyRules
from qcowkit.operations.create import CreateOptions, OptionValue, open_target
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.units import KiB

TARGETS: dict[str, tuple[str, Mapping[str, OptionValue]]] = {
    "raw": ("raw", {}),
    "qcow2": ("qcow2", {"cluster_size": 4096}),
    "subclusters": ("qcow2", {"extended_l2": True, "cluster_size": 16 * KiB}),
    "preallocated": ("qcow2", {"preallocation": "metadata"}),
    "vhd": ("vpc", {}),
    "fixed": ("vpc", {"subformat": "fixed"}),
}
SIZE = 600 * KiB


def guest() -> bytes:
    noise = random.Random(7)
    return (noise.randbytes(150 * KiB) + bytes(100 * KiB)).ljust(SIZE, b"\x05")


def open_storage(storage: Storage, format: str) -> Chain:
    layers = open_layers(storage, format=format, gate=ReferenceGate.deny_all(), budget=TRUSTED)
    return build_chain(layers)


def write_image(storage: Storage, name: str) -> None:
    """A bulk copy of the guest disk to the storage, as convert does it."""
    format, values = TARGETS[name]
    options = CreateOptions(format=format, values=values)
    cluster = int(values.get("cluster_size", 64 * KiB))
    with open_storage(MemoryStorage(guest()), "raw") as disk, Workers(2) as workers:
        target, _ = open_target(
            storage, options, size=SIZE, l2_tables=4, data_clusters=SIZE // cluster + 1
        )
        Copier(disk, target, rules=CopyRules(), workers=workers).run()
        target.finish()
    storage.flush()


@pytest.mark.parametrize("name", list(TARGETS))
def test_without_a_fault_the_image_holds_the_disk(name: str) -> None:
    storage = MemoryStorage()
    write_image(storage, name)
    with open_storage(storage, TARGETS[name][0]) as chain:
        assert chain.read(offset=0, length=SIZE) == guest()


@pytest.mark.parametrize(
    "fault",
    [
        {"errno": errno.EIO},
        {"errno": errno.ENOSPC, "written": 512},
        {"errno": errno.ENOSPC, "written": 5000, "sticky": True},
    ],
)
@pytest.mark.parametrize("name", list(TARGETS))
def test_every_failing_call_surfaces(name: str, fault: dict[str, int]) -> None:
    clean = FaultyStorage(MemoryStorage())
    write_image(clean, name)
    for operation in ("pwrite", "truncate", "flush", "zero", "allocate"):
        for call in range(1, clean.calls[operation] + 1):
            inner = MemoryStorage()
            chosen = Fault(operation=operation, call=call, **fault)  # type: ignore[arg-type]
            with pytest.raises(StorageError) as failure:
                write_image(FaultyStorage(inner, chosen), name)
            assert failure.value.errno == fault["errno"]
            assert_no_wrong_image(inner, TARGETS[name][0], after=operation)


def assert_no_wrong_image(storage: MemoryStorage, format: str, *, after: str) -> None:
    """A qcow2 or VHD that was not finished is refused; or, finished but for the last flush or
    truncation, it is whole."""
    if format == "raw":
        return
    try:
        with open_storage(storage, format) as chain:
            assert chain.read(offset=0, length=chain.size) == guest(), after
    except QcowkitError:
        return
