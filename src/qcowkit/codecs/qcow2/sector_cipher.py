"""Encrypting and decrypting whole sectors of 512 bytes, many at a time. Pure.

Sources: IEEE 1619 (XTS), NIST SP 800-38A (CBC), the LUKS1 on-disk format ("cipher-mode": IV
generators plain, plain64 and essiv). The C library runs over many sectors in one call: of XTS the
tweaks of a sector follow from its first by multiplication, which is done for all of them at once;
CBC is a chain within a sector only, so that block i of all sectors goes together.

Work goes in pieces that stay in the processor's second-level cache, through buffers that are made
once: fresh memory costs more than the cipher itself."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qcowkit.errors import RequestError, UnsupportedFeature
from qcowkit.units import SECTOR

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BLOCKS = SECTOR // 16
# Sectors of one piece: few enough for the cache, enough to hide what each step costs by itself.
_PIECE = 512
_STEP = np.arange(_BLOCKS, dtype=np.uint64)
_REST = np.uint64(64) - _STEP
_ONE, _TWO, _SEVEN = np.uint64(1), np.uint64(2), np.uint64(7)
_Words = npt.NDArray[np.uint64]

# Digest sizes of the hashes that LUKS1 headers of disk images name.
HASHES = {"sha1": 20, "sha224": 28, "sha256": 32, "sha384": 48, "sha512": 64, "ripemd160": 20}


class SectorCipher:
    """One key and one way to make IVs. Safe from several threads; sectors are numbered from 0.

    mode: `xts` or `cbc`. ivgen: `plain` (32 bits), `plain64`, or `essiv` with the name of a hash.
    Raises UnsupportedFeature for what is not known."""

    def __init__(
        self,
        key: bytes | bytearray,
        *,
        mode: str,
        ivgen: str = "plain64",
        ivgen_hash: str | None = None,
    ) -> None:
        if mode not in ("xts", "cbc"):
            raise UnsupportedFeature(f"cipher mode {mode!r}", reason="expected xts or cbc")
        half = len(key) // 2 if mode == "xts" else len(key)
        if half not in (16, 24, 32):
            raise UnsupportedFeature(f"a key of {len(key)} bytes", reason=f"unknown to AES-{mode}")
        if ivgen not in ("plain", "plain64", "essiv"):
            raise UnsupportedFeature(
                f"IV generator {ivgen!r}", reason="expected plain, plain64 or essiv"
            )
        self._mode = mode
        self._ivgen = ivgen
        self._keys = [bytearray(key[:half]), bytearray(key[half:])]
        if ivgen == "essiv":
            self._keys.append(bytearray(_essiv_key(key, ivgen_hash)))
        # What one thread works with at a time; appending and popping are atomic.
        self._lanes: list[_Lane] = []
        self._wiped = False

    def encrypt(self, data: Buffer, *, sector: int) -> bytearray:
        """Ciphertext of whole sectors, the first of which has the number `sector`."""
        out = bytearray(memoryview(data).nbytes)
        self.encrypt_into(data, out, sector=sector)
        return out

    def decrypt(self, data: Buffer, *, sector: int) -> bytearray:
        """Plaintext of whole sectors, the first of which has the number `sector`."""
        out = bytearray(memoryview(data).nbytes)
        self.decrypt_into(data, out, sector=sector)
        return out

    def encrypt_into(self, data: Buffer, out: Buffer, *, sector: int) -> None:
        """The same into a buffer of the same size, which may be the data's own."""
        self._run(data, out, sector, _Lane.encrypt_xts, _Lane.encrypt_cbc)

    def decrypt_into(self, data: Buffer, out: Buffer, *, sector: int) -> None:
        """The same into a buffer of the same size, which may be the data's own."""
        self._run(data, out, sector, _Lane.decrypt_xts, _Lane.decrypt_cbc)

    def wipe(self) -> None:
        """Overwrite the keys, as far as Python lets us; nothing can be done with them after."""
        self._wiped = True
        self._lanes.clear()
        for key in self._keys:
            key[:] = bytes(len(key))

    def _run(self, data: Buffer, out: Buffer, sector: int, xts: Any, cbc: Any) -> None:
        words, target = _words(data), _words(out)
        assert len(words) == len(target), "as much out as in"
        work = xts if self._mode == "xts" else cbc
        lane = self._take_lane()
        for at in range(0, len(words), _PIECE):
            part = words[at : at + _PIECE]
            work(lane, part, target[at : at + _PIECE], lane.make_ivs(sector + at, len(part)))
        if not self._wiped:
            self._lanes.append(lane)

    def _take_lane(self) -> _Lane:
        if self._wiped:
            raise RequestError("the image was closed: its keys are gone")
        try:
            return self._lanes.pop()
        except IndexError:
            essiv = bytes(self._keys[2]) if len(self._keys) > 2 else None
            tweak = bytes(self._keys[1]) if self._mode == "xts" else None
            return _Lane(bytes(self._keys[0]), tweak=tweak, essiv=essiv, ivgen=self._ivgen)


class _Lane:
    """Contexts and buffers for one thread at a time."""

    def __init__(self, key: bytes, *, tweak: bytes | None, essiv: bytes | None, ivgen: str) -> None:
        self._encrypt, self._decrypt = _ecb(key).encryptor(), _ecb(key).decryptor()
        self._tweak = None if tweak is None else _ecb(tweak).encryptor()
        self._essiv = None if essiv is None else _ecb(essiv).encryptor()
        self._short = ivgen == "plain"
        shape = (_PIECE, _BLOCKS)
        self._ivs = np.zeros((_PIECE, 2), dtype=np.uint64)
        # The C library asks for a block more than it writes.
        self._first = np.empty(2 * _PIECE + 2, dtype=np.uint64)
        self._tweaks = np.empty((*shape, 2), dtype=np.uint64)
        self._planes = np.empty((3, *shape), dtype=np.uint64)
        self._work = np.empty((*shape, 2), dtype=np.uint64)
        self._done = np.empty(2 * _PIECE * _BLOCKS + 2, dtype=np.uint64)

    def make_ivs(self, sector: int, count: int) -> _Words:
        """Shape (count, 2): little-endian halves of the IV of each sector."""
        ivs = self._ivs[:count]
        ivs[:, 0] = np.arange(sector, sector + count, dtype=np.uint64)
        ivs[:, 1] = 0
        if self._short:
            ivs[:, 0] &= np.uint64(0xFFFF_FFFF)
        if self._essiv is not None:
            return self._first_of(self._essiv, ivs)
        return ivs

    def encrypt_xts(self, words: _Words, out: _Words, ivs: _Words) -> None:
        self._xts(self._encrypt, words, out, ivs)

    def decrypt_xts(self, words: _Words, out: _Words, ivs: _Words) -> None:
        self._xts(self._decrypt, words, out, ivs)

    def encrypt_cbc(self, words: _Words, out: _Words, ivs: _Words) -> None:
        """Block after block, of all sectors together."""
        count = len(words)
        last = ivs
        # Block i of a sector is read before block i of the output is written: both may be one.
        plain = self._work.reshape(-1)[: 2 * count].reshape(count, 2)
        done = self._done[: 2 * count].reshape(count, 2)
        for block in range(_BLOCKS):
            np.bitwise_xor(words[:, block], last, out=plain)
            self._encrypt.update_into(_bytes(plain), _bytes(self._done))
            out[:, block] = done
            last = done

    def decrypt_cbc(self, words: _Words, out: _Words, ivs: _Words) -> None:
        count = len(words)
        work = self._work[:count]
        work[:] = words
        self._decrypt.update_into(_bytes(work), _bytes(self._done))
        done = self._done[: work.size].reshape(work.shape)
        np.bitwise_xor(done[:, 1:], work[:, :-1], out=out[:, 1:])
        np.bitwise_xor(done[:, 0], ivs, out=out[:, 0])

    def _xts(self, context: Any, words: _Words, out: _Words, ivs: _Words) -> None:
        count = len(words)
        assert self._tweak is not None, "XTS has a second key"
        tweaks = self._expand(self._first_of(self._tweak, ivs), count)
        work = self._work[:count]
        np.bitwise_xor(words, tweaks, out=work)
        context.update_into(_bytes(work), _bytes(self._done))
        np.bitwise_xor(self._done[: work.size].reshape(work.shape), tweaks, out=out)

    def _first_of(self, context: Any, ivs: _Words) -> _Words:
        context.update_into(_bytes(np.ascontiguousarray(ivs)), _bytes(self._first))
        return self._first[: ivs.size].reshape(ivs.shape).copy()

    def _expand(self, first: _Words, count: int) -> _Words:
        """All tweaks from the first ones. first: shape (count, 2). Returns (count, blocks, 2).

        Tweak j is the first one times x to the power of j, modulo x^128 + x^7 + x^2 + x + 1. With
        fewer than 64 blocks what is shifted out fits in a word, and is multiplied back in at once.
        A shift by all 64 bits leaves zero."""
        low, high = first[:, :1], first[:, 1:]
        tweaks = self._tweaks[:count]
        over, shifted, total = self._planes[:, :count]
        np.right_shift(high, _REST, out=over)
        np.left_shift(low, _STEP, out=total)
        total ^= over
        for power in (_ONE, _TWO, _SEVEN):
            np.left_shift(over, power, out=shifted)
            total ^= shifted
        tweaks[:, :, 0] = total
        np.left_shift(high, _STEP, out=total)
        np.right_shift(low, _REST, out=shifted)
        np.bitwise_or(total, shifted, out=tweaks[:, :, 1])
        return tweaks


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.data.cast("B")


def _words(data: Buffer) -> _Words:
    """Sectors as little-endian 64-bit words, shape (sectors, blocks, 2)."""
    raw = np.frombuffer(memoryview(data), dtype="<u8")
    assert raw.size % (SECTOR // 8) == 0, "whole sectors only"
    return raw.reshape(-1, _BLOCKS, 2)


def _ecb(key: bytes) -> Cipher[modes.ECB]:
    return Cipher(algorithms.AES(key), modes.ECB())


def _essiv_key(key: bytes | bytearray, name: str | None) -> bytes:
    """The key of the IVs: the hash of the data's key, cut to a size that AES has."""
    if name not in HASHES:
        known = ", ".join(HASHES)
        raise UnsupportedFeature(f"hash {name!r}", reason=f"essiv expects one of {known}")
    digest = hashlib.new(name, key).digest()
    size = max(size for size in (16, 24, 32) if size <= len(digest))
    return digest[:size]
