"""The cipher of a disk whose guest data are encrypted, once its passphrase is known.

IVs count sectors of 512 bytes: by the place in the file for LUKS in qcow2, so that equal data look
different in two clusters and a cluster that moves is encrypted anew; by the guest offset for
legacy AES in qcow2 and for a LUKS disk by itself. Source: the qcow2 specification, "Data
encryption"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcowkit.codecs.qcow2.sector_cipher import SectorCipher
from qcowkit.engine.transfer import Write
from qcowkit.units import SECTOR, KiB

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from qcowkit.storage.protocol import Storage

# Bytes that are read, or encrypted, before the next ones: they are still in the cache then.
PIECE = 256 * KiB


class DataCipher:
    """Encrypts and decrypts whole sectors of one image. Safe from several threads.

    by_guest: IVs follow guest offsets, not host offsets. host, guest: bytes, multiples of 512."""

    def __init__(self, cipher: SectorCipher, *, by_guest: bool) -> None:
        self._cipher = cipher
        self._by_guest = by_guest

    def decrypt(self, view: memoryview, *, host: int, guest: int) -> None:
        """Decrypt a buffer in place."""
        self._cipher.decrypt_into(view, view, sector=self._sector(host, guest))

    def encrypt(self, data: Buffer, *, host: int, guest: int) -> bytearray:
        """The ciphertext in a buffer of its own."""
        return self._cipher.encrypt(data, sector=self._sector(host, guest))

    def encrypt_in_place(self, view: bytearray | memoryview, *, host: int, guest: int) -> None:
        """Encrypt a buffer in place."""
        self._cipher.encrypt_into(view, view, sector=self._sector(host, guest))

    def write_zeros(self, storage: Storage, *, host: int, guest: int, length: int) -> None:
        """Write zeros of the guest, which are none of the file. length: whole sectors."""
        for at in range(0, length, PIECE):
            part = self.encrypt(bytes(min(PIECE, length - at)), host=host + at, guest=guest + at)
            storage.pwrite([part], offset=host + at)

    def wipe(self) -> None:
        """Forget the keys: the image is closed."""
        self._cipher.wipe()

    def _sector(self, host: int, guest: int) -> int:
        return (guest if self._by_guest else host) // SECTOR


@dataclass(frozen=True, slots=True, kw_only=True)
class EncryptedWrite(Write):
    """A write of guest bytes, whole sectors in each buffer, that become ciphertext where they are.

    The buffers are used up: whoever asked for the write has no other use for them. guest: guest
    offset of the first byte."""

    cipher: DataCipher
    guest: int

    def run(self) -> None:
        """Carry it out, piece by piece: each goes to the host while it is in the cache."""
        done = 0
        for buffer in self.buffers:
            view = memoryview(buffer)
            for at in range(0, len(view), PIECE):
                part = view[at : at + PIECE]
                place = self.offset + done
                self.cipher.encrypt_in_place(part, host=place, guest=self.guest + done)
                self.storage.pwrite([part], offset=place)
                done += len(part)
