"""A new LUKS disk as the target of a bulk copy: every byte is written, zeros too."""

from __future__ import annotations

from qcowkit.engine.crypt import EncryptedWrite
from qcowkit.engine.luks.format import NewCrypt
from qcowkit.engine.transfer import MAX_DIRECT, Chunk, Write
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, KiB


class LuksBulkWriter:
    """A `BulkTarget` on an empty file. What is not placed reads as noise, so whoever copies a disk
    places all of it (`CopyRules.everything`). size: guest bytes, whole sectors."""

    direct_limit = MAX_DIRECT
    unit = grain = 4 * KiB
    explicit_zeros = False

    def __init__(self, storage: Storage, *, size: int, crypt: NewCrypt) -> None:
        self._storage = storage
        self._size = size
        self._crypt = crypt
        self._payload = len(crypt.area)

    def place(self, chunk: Chunk) -> list[Write]:
        """See `BulkTarget.place`."""
        view = chunk.view[: chunk.length]
        buffers: list[bytes | bytearray | memoryview] = [view]
        if short := -len(view) % SECTOR:
            whole = len(view) - len(view) % SECTOR
            buffers = [view[:whole], bytearray(view[whole:]) + bytes(short)]
        return [self._write(buffers, chunk.start)]

    def place_zeros(self, start: int, length: int) -> None:
        """See `BulkTarget.place_zeros`."""
        write_zeros(self._storage, self._crypt, start=start, length=min(length, self._size - start))

    def place_direct(self, start: int, length: int) -> tuple[Storage, int]:
        """Nothing of the host's can be copied to an encrypted disk."""
        raise AssertionError("a host cannot encrypt")

    def finish(self) -> None:
        """See `BulkTarget.finish`."""
        self._storage.truncate(self._payload + self._size)
        self._storage.pwrite([self._crypt.area], offset=0)

    def _write(self, buffers: list[bytes | bytearray | memoryview], guest: int) -> Write:
        return EncryptedWrite(
            storage=self._storage,
            buffers=buffers,
            offset=self._payload + guest,
            cipher=self._crypt.cipher,
            guest=guest,
        )


def write_zeros(storage: Storage, crypt: NewCrypt, *, start: int, length: int) -> None:
    """Encrypted zeros for guest bytes [start, start + length), whole sectors."""
    crypt.cipher.write_zeros(storage, host=len(crypt.area) + start, guest=start, length=length)
