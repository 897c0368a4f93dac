"""Allocation JSON, and the documents of qemu-img that it is made from."""

from __future__ import annotations

import contextlib

from qcowkit.errors import QcowkitError
from qcowkit.operations.headers import allocation_from_qemu, parse_allocation


def target(data: bytes) -> None:
    """data: a document; with a zero byte in it, an info and a map document of qemu-img."""
    with contextlib.suppress(QcowkitError):
        found = parse_allocation(data)
        assert found.virtual_size >= 0
    info, _, rows = data.partition(b"\0")
    allocation_from_qemu(info, rows)


def seeds() -> list[bytes]:
    """Both shapes, and a pair of qemu's."""
    head = b'{"virtual_size":655360,"cluster_bits":16,"data_clusters":'
    info = b'{"virtual-size": 655360, "cluster-size": 65536, "format": "qcow2"}'
    row = (
        b'{"start": 0, "length": 655360, "depth": 0, "present": true, "zero": false, "data": true}'
    )
    return [head + b"[[0,1],[3,3]]}", head + b"[0,1,3]}", info + b"\0[" + row + b"]"]
