"""Encrypting and decrypting whole sectors of 512 bytes, many at a time. Pure.

Sources: IEEE 1619 (XTS), NIST SP 800-38A (CBC), the LUKS1 on-disk format ("cipher-mode": IV
generators plain, plain64 and essiv). The C library runs over all sectors in one call: of XTS the
tweaks of a sector follow from its first by multiplication, which is done for all of them at once;
CBC is a chain within a sector only, so that block i of all sectors goes together."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qcowkit.errors import UnsupportedFeature
from qcowkit.units import SECTOR

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BLOCKS = SECTOR // 16
_STEP = np.arange(_BLOCKS, dtype=np.uint64)
_REST = np.uint64(63) - _STEP
_ONE = np.uint64(1)
_Words = npt.NDArray[np.uint64]

# Digest sizes of the hashes that LUKS1 headers of disk images name.
HASHES = {"sha1": 20, "sha224": 28, "sha256": 32, "sha384": 48, "sha512": 64, "ripemd160": 20}


class SectorCipher:
    """One key and one way to make IVs. Safe from several threads; sectors are numbered from 0.

    mode: `xts` or `cbc`. ivgen: `plain` (32 bits), `plain64`, or `essiv` with the name of a hash.
    Raises UnsupportedFeature for what is not known."""

    def __init__(
        self, key: bytes, *, mode: str, ivgen: str = "plain64", ivgen_hash: str | None = None
    ) -> None:
        if mode not in ("xts", "cbc"):
            raise UnsupportedFeature(f"cipher mode {mode!r}", reason="expected xts or cbc")
        half = len(key) // 2 if mode == "xts" else len(key)
        if half not in (16, 24, 32):
            raise UnsupportedFeature(f"a key of {len(key)} bytes", reason=f"unknown to AES-{mode}")
        self._mode = mode
        self._data = _ecb(key[:half])
        self._tweak = _ecb(key[half:]) if mode == "xts" else self._data
        self._ivs = self._data
        self._ivgen = ivgen
        if ivgen == "essiv":
            self._ivs = _ecb(_essiv_key(key, ivgen_hash))
        elif ivgen not in ("plain", "plain64"):
            raise UnsupportedFeature(
                f"IV generator {ivgen!r}", reason="expected plain, plain64 or essiv"
            )

    def encrypt(self, data: Buffer, *, sector: int) -> bytes:
        """Ciphertext of whole sectors, the first of which has the number `sector`."""
        words = _words(data)
        ivs = self._make_ivs(sector, len(words))
        if self._mode == "xts":
            return self._xts(words, ivs, encrypt=True)
        out = np.empty_like(words)
        last = ivs
        for block in range(_BLOCKS):
            plain = words[:, block] ^ last
            last = _run(self._data, plain, encrypt=True)
            out[:, block] = last
        return out.tobytes()

    def decrypt(self, data: Buffer, *, sector: int) -> bytes:
        """Plaintext of whole sectors, the first of which has the number `sector`."""
        words = _words(data)
        ivs = self._make_ivs(sector, len(words))
        if self._mode == "xts":
            return self._xts(words, ivs, encrypt=False)
        plain = _run(self._data, words, encrypt=False)
        plain[:, 1:] ^= words[:, :-1]
        plain[:, 0] ^= ivs
        return plain.tobytes()

    def _make_ivs(self, sector: int, count: int) -> _Words:
        """Shape (count, 2): little-endian halves of the IV of each sector."""
        ivs = np.zeros((count, 2), dtype="<u8")
        ivs[:, 0] = np.arange(sector, sector + count, dtype=np.uint64)
        if self._ivgen == "plain":
            ivs[:, 0] &= np.uint64(0xFFFF_FFFF)
        if self._ivgen == "essiv":
            return _run(self._ivs, ivs, encrypt=True)
        return ivs

    def _xts(self, words: _Words, ivs: _Words, *, encrypt: bool) -> bytes:
        tweaks = _xts_tweaks(_run(self._tweak, ivs, encrypt=True))
        out = _run(self._data, words ^ tweaks, encrypt=encrypt)
        out ^= tweaks
        return out.tobytes()


def _words(data: Buffer) -> _Words:
    """Sectors as little-endian 64-bit words, shape (sectors, blocks, 2)."""
    raw = np.frombuffer(memoryview(data), dtype="<u8")
    assert raw.size % (SECTOR // 8) == 0, "whole sectors only"
    return raw.reshape(-1, _BLOCKS, 2)


def _xts_tweaks(first: _Words) -> _Words:
    """All tweaks from the first ones. first: shape (n, 2). Returns (n, blocks, 2).

    Tweak j is the first one times x to the power of j, modulo x^128 + x^7 + x^2 + x + 1. With fewer
    than 64 blocks what is shifted out fits in a word, and is multiplied back in at once."""
    low, high = first[:, :1], first[:, 1:]
    out = np.empty((len(first), _BLOCKS, 2), dtype="<u8")
    over = (high >> _ONE) >> _REST
    out[:, :, 1] = (high << _STEP) | ((low >> _ONE) >> _REST)
    over ^= (over << _ONE) ^ (over << np.uint64(2)) ^ (over << np.uint64(7))
    out[:, :, 0] = (low << _STEP) ^ over
    return out


def _ecb(key: bytes) -> Cipher[modes.ECB]:
    return Cipher(algorithms.AES(key), modes.ECB())


def _run(cipher: Cipher[modes.ECB], words: _Words, *, encrypt: bool) -> _Words:
    """All blocks of an array through the block cipher; same shape."""
    context = cipher.encryptor() if encrypt else cipher.decryptor()
    raw = context.update(np.ascontiguousarray(words).data.cast("B"))
    out: npt.NDArray[Any] = np.frombuffer(bytearray(raw), dtype="<u8").reshape(words.shape)
    return out


def _essiv_key(key: bytes, name: str | None) -> bytes:
    """The key of the IVs: the hash of the data's key, cut to a size that AES has."""
    if name not in HASHES:
        known = ", ".join(HASHES)
        raise UnsupportedFeature(f"hash {name!r}", reason=f"essiv expects one of {known}")
    digest = hashlib.new(name, key).digest()
    size = max(size for size in (16, 24, 32) if size <= len(digest))
    return digest[:size]
