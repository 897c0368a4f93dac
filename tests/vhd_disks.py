"""Small VHDs that are open for writing, and what has become of them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from qcowkit.budget import TRUSTED
from qcowkit.engine.findings import Effort, FindingLog
from qcowkit.engine.vhd.audit import audit_vhd
from qcowkit.engine.vhd.mapping import BlockMap
from qcowkit.engine.vhd.metadata import VhdMetadata, load_vhd_metadata
from qcowkit.engine.vhd.writer import BlockWriter
from qcowkit.image.chain import Chain
from qcowkit.image.raw import RawImage, RawMetadata
from qcowkit.image.vhd import VhdImage
from qcowkit.image.vhd_write import WritableVhdImage
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.recording import Call
from qcowkit.testing.vhd_builder import DIFFERENCING, VhdBuilder

BLOCK = 4096
SPAN = BLOCK + 512
TABLE_AT = 1536
FIRST_BLOCK = 2048


class Bytes:
    """A `Below` of given bytes; zero where they are."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read_into(self, buffer: bytearray | memoryview, *, offset: int) -> None:
        assert offset + len(buffer) <= self.size
        buffer[:] = self.data[offset : offset + len(buffer)]

    def is_zero(self, *, start: int, length: int) -> bool:
        assert start + length <= self.size
        return not any(self.data[start : start + length])


def build(blocks: int = 4, **options: Any) -> bytes:
    """An empty dynamic disk of so many blocks."""
    return bytes(VhdBuilder(size=blocks * BLOCK, **options).build())


def build_child(blocks: int = 4) -> bytes:
    return build(blocks, disk_type=DIFFERENCING)


def build_with_a_name_behind_the_table(blocks: int) -> bytes:
    """As some writers do it: the name of the parent lies between the table and the blocks."""
    name = ".\\parent.vhd".encode("utf-16-le")
    builder = VhdBuilder(size=blocks * BLOCK, disk_type=DIFFERENCING).locator(b"W2ru", name)
    builder.header["table_offset"] = TABLE_AT
    entry = struct.pack(">4sIIIQ", b"W2ru", 1, len(name), 0, FIRST_BLOCK)
    builder.header["locators"] = entry.ljust(192, b"\0")
    raw = builder.build()
    raw[TABLE_AT : FIRST_BLOCK + 512] = b"\xff" * 512 + name.ljust(512, b"\0")
    return bytes(raw)


def load(storage: Storage) -> VhdMetadata:
    return load_vhd_metadata(storage, budget=TRUSTED)


def open_writer(storage: Storage, below: bytes | None = None, **options: Any) -> BlockWriter:
    metadata = load(storage)
    writer = BlockWriter(storage, metadata, BlockMap.load(metadata, storage), **options)
    writer.underneath.below = None if below is None else Bytes(below)
    return writer


def put(writer: BlockWriter, data: bytes, *, offset: int) -> None:
    writer.write(memoryview(data), offset=offset)


def base_of(below: bytes) -> RawImage:
    storage = MemoryStorage(below, writable=False)
    return RawImage(RawMetadata(virtual_size=len(below)), storage)


def open_disk(storage: Storage, below: bytes | None = None, *, writable: bool = True) -> Chain:
    """The disk of a file, over a raw base where one is given."""
    bases = [] if below is None else [base_of(below)]
    if not writable:
        return Chain([VhdImage(load(storage), storage), *bases])
    top = WritableVhdImage(load(storage), storage)
    return Chain([top, *bases], top=top)


def content(storage: MemoryStorage, below: bytes | None = None) -> bytes:
    """The guest disk as another process would read it from the file."""
    chain = open_disk(MemoryStorage(storage.to_bytes()), below, writable=False)
    return chain.read(offset=0, length=chain.size)


def audit(storage: MemoryStorage) -> list[str]:
    """What a check finds in the file, and warnings of its metadata."""
    copy = MemoryStorage(storage.to_bytes())
    metadata, log = load(copy), FindingLog()
    audit_vhd(copy, metadata, log=log, effort=Effort(stored=copy.size()))
    return [*map(str, log.kept), *metadata.warnings]


def changes(calls: Sequence[Call]) -> list[tuple[str, int, int]]:
    """What was done to a recorded storage, without reads: (operation, offset, length)."""
    return [
        (call.operation, call.offset, call.length)
        for call in calls
        if call.operation not in ("pread", "iter_data", "close")
    ]


def per_byte(pattern: bytes, size: int) -> bytes:
    """`pattern` over and over."""
    return (pattern * (size // len(pattern) + 1))[:size]
