"""A toy image format, right or wrong on purpose: each bug is one that real writers have had.

A map of two-byte words at its head says in which slot of the file each guest sector lies, 0 for
none. Writes go to free slots; a flush makes the data durable, then the map."""

from __future__ import annotations

import struct
from typing import Any

from qcowkit.errors import RequestError
from qcowkit.testing.crash_effects import Content
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.testing.guest_log import Int64Array, sector_values

SECTOR = 512
BUGS = (
    "map before data",
    "early reuse",
    "flush of nothing",
    "word across sectors",
    "neighbour kept",
    "data file not flushed",
)


class Toy:
    """Makes and opens toy disks. bug: one of BUGS, or empty for a writer that is right."""

    format = "raw"
    cluster_size = SECTOR
    compresses = False

    def __init__(self, bug: str = "", *, sectors: int = 400, two_files: bool = False) -> None:
        self.bug = bug
        self.sectors = sectors
        self.two_files = two_files or bug == "data file not flushed"
        self.map_at, self.stride = SECTOR, 2
        if bug == "word across sectors":
            self.map_at, self.stride, self.sectors = SECTOR - 1, SECTOR, 100

    def backing_values(self) -> Int64Array:
        return sector_values(0, [])

    def initial_values(self) -> Int64Array:
        return sector_values(self.sectors, [])

    def make(self) -> CrashFiles:
        contents = [Content.of(bytes(3 * SECTOR))]
        return CrashFiles([*contents, Content()] if self.two_files else contents)

    def open(self, files: CrashFiles, *, writable: bool) -> Any:
        return ToyDisk(self, files, writable=writable)


class ToyDisk:
    """What a guest uses of a `Chain`."""

    def __init__(self, toy: Toy, files: CrashFiles, *, writable: bool) -> None:
        self.toy = toy
        self.size = toy.sectors * SECTOR
        self.storage = files.open(writable=writable)
        self.data = files.open(1, writable=writable) if toy.two_files else self.storage
        # Slots on both sides of 256 have words that differ in both of their bytes.
        self.first = 250
        length = toy.sectors * toy.stride
        raw = self.storage.pread(length, offset=toy.map_at).ljust(length, b"\0")
        self.map = [word for (word,) in self.words().iter_unpack(raw)]
        self.stored = list(self.map)
        self.quarantine: set[int] = set()

    def words(self) -> struct.Struct:
        return struct.Struct(f">H{self.toy.stride - 2}x")

    def read(self, *, offset: int, length: int) -> bytes:
        sectors = range(offset // SECTOR, (offset + length) // SECTOR)
        return b"".join(self.read_sector(index) for index in sectors)

    def read_sector(self, index: int) -> bytes:
        slot = self.map[index]
        raw = self.data.pread(SECTOR, offset=slot * SECTOR) if slot else b""
        return raw.ljust(SECTOR, b"\0")

    def write(self, data: bytes, *, offset: int) -> None:
        for position in range(0, len(data), SECTOR):
            self.write_sector((offset + position) // SECTOR, data[position : position + SECTOR])

    def write_sector(self, index: int, data: bytes) -> None:
        if self.toy.bug == "neighbour kept" and self.map[index]:
            # In place, but with a neighbour's bytes in the same request.
            slot = self.map[index]
            data = data[:400] + self.data.pread(112, offset=slot * SECTOR + 400)
        slot = self.free_slot()
        self.data.pwrite([data], offset=slot * SECTOR)
        self.give_up(index)
        self.map[index] = slot

    def free_slot(self) -> int:
        used = set(self.map) | self.quarantine
        return next(slot for slot in range(self.first, 1 << 16) if slot not in used)

    def give_up(self, index: int) -> None:
        if self.map[index] and self.toy.bug != "early reuse":
            self.quarantine.add(self.map[index])
        self.map[index] = 0

    def write_zeroes(self, *, offset: int, length: int, unmap: bool) -> None:
        for index in range(offset // SECTOR, (offset + length) // SECTOR):
            self.give_up(index)

    def discard(self, *, offset: int, length: int) -> None:
        self.write_zeroes(offset=offset, length=length, unmap=True)

    def flush(self) -> None:
        if self.toy.bug not in ("map before data", "data file not flushed"):
            self.data.flush()
        if self.map != self.stored:
            raw = b"".join(self.words().pack(word) for word in self.map)
            # A write that is cut short shall not end within a word: it begins and ends with
            # bytes that mean nothing.
            buffers = [bytes(2), raw, bytes(2)]
            self.storage.pwrite(buffers, offset=self.toy.map_at - 2)
            self.stored = list(self.map)
        if self.toy.bug != "flush of nothing":
            self.storage.flush()
        self.quarantine.clear()

    def resize(self, size: int, *, shrink: bool) -> None:
        raise RequestError("a toy has one size")

    def close(self) -> None:
        if self.storage.caps.writable:
            self.flush()

    def __enter__(self) -> ToyDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
