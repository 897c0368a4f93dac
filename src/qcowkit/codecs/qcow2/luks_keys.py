"""The keys of a LUKS1 header: slots are opened and made, the master key is verified. Pure.

Source: the LUKS1 on-disk format, "Anti-forensic splitter", "Key material", "Master key digest".
Random bytes come from the caller. What a key was in is overwritten where Python allows it."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

import numpy as np

from qcowkit.codecs.qcow2.luks_header import LUKS_STRIPES, LuksHeader, LuksSlot
from qcowkit.codecs.qcow2.sector_cipher import HASHES, SectorCipher
from qcowkit.errors import UnsupportedFeature
from qcowkit.units import SECTOR, align_up

DIGEST_BYTES = 20
SALT_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSlot:
    """What it takes to fill a key slot. random: the split of the key, but for its last stripe."""

    passphrase: bytes
    salt: bytes
    iterations: int
    random: bytes


def check_hash(name: str) -> None:
    """Raise UnsupportedFeature for a hash that is not known here, or not to this machine."""
    if name not in HASHES or name not in hashlib.algorithms_available:
        known = ", ".join(one for one in HASHES if one in hashlib.algorithms_available)
        raise UnsupportedFeature(f"hash {name!r}", reason=f"expected one of {known}")


def make_cipher(header: LuksHeader, key: bytes) -> SectorCipher:
    """The cipher of the payload, or of key material, as the header names it."""
    if header.cipher != "aes":
        raise UnsupportedFeature(f"cipher {header.cipher!r}", reason="expected aes")
    return SectorCipher(
        key, mode=header.cipher_mode, ivgen=header.ivgen, ivgen_hash=header.ivgen_hash
    )


def material_bytes(header: LuksHeader) -> int:
    """Bytes of the key material of a slot, in whole sectors."""
    return align_up(header.key_bytes * LUKS_STRIPES, SECTOR)


def derive(passphrase: bytes, *, hash: str, salt: bytes, iterations: int, length: int) -> bytes:
    """PBKDF2."""
    check_hash(hash)
    return hashlib.pbkdf2_hmac(hash, passphrase, salt, iterations, length)


def open_slot(
    header: LuksHeader, slot: LuksSlot, material: bytes, passphrase: bytes
) -> bytes | None:
    """The master key, or None where the passphrase is not the slot's.

    material: the slot's key material. Iterations are the caller's to bound."""
    key = derive(
        passphrase,
        hash=header.hash,
        salt=slot.salt,
        iterations=slot.iterations,
        length=header.key_bytes,
    )
    split = make_cipher(header, key).decrypt(material[: material_bytes(header)], sector=0)
    master = merge(split[: header.key_bytes * LUKS_STRIPES], hash=header.hash, stripes=LUKS_STRIPES)
    return master if is_master_key(header, master) else None


def is_master_key(header: LuksHeader, key: bytes) -> bool:
    """Whether the digest in the header is that of the key."""
    digest = master_digest(
        key, hash=header.hash, salt=header.digest_salt, iterations=header.digest_iterations
    )
    return hmac.compare_digest(digest, header.digest)


def master_digest(key: bytes, *, hash: str, salt: bytes, iterations: int) -> bytes:
    """What the header keeps of the master key."""
    return derive(key, hash=hash, salt=salt, iterations=iterations, length=DIGEST_BYTES)


def make_material(header: LuksHeader, new: NewSlot, master: bytes) -> bytes:
    """The key material of a slot that the passphrase opens, in whole sectors."""
    key = derive(
        new.passphrase,
        hash=header.hash,
        salt=new.salt,
        iterations=new.iterations,
        length=header.key_bytes,
    )
    parts = split(master, new.random, hash=header.hash, stripes=LUKS_STRIPES)
    padded = parts.ljust(material_bytes(header), b"\0")
    return bytes(make_cipher(header, key).encrypt(padded, sector=0))


def split(key: bytes, random: bytes, *, hash: str, stripes: int) -> bytes:
    """The key spread over `stripes` times its size, of which every byte is needed to get it back.

    random: (stripes - 1) * len(key) bytes."""
    assert len(random) == (stripes - 1) * len(key)
    last = _fold(random, len(key), hash)
    return random + _xor(last, key)


def merge(material: bytes | bytearray, *, hash: str, stripes: int) -> bytes:
    """The key back from its split."""
    size = len(material) // stripes
    return _xor(_fold(material[:-size], size, hash), material[-size:])


def _fold(parts: bytes | bytearray, size: int, hash: str) -> bytes:
    block = bytes(size)
    for at in range(0, len(parts), size):
        block = _diffuse(_xor(block, parts[at : at + size]), hash)
    return block


def _diffuse(block: bytes, hash: str) -> bytes:
    """Each piece of a hash's size becomes the hash of its number and itself."""
    size = HASHES[hash]
    return b"".join(
        hashlib.new(hash, index.to_bytes(4, "big") + block[at : at + size]).digest()[
            : len(block) - at
        ]
        for index, at in enumerate(range(0, len(block), size))
    )


def _xor(left: bytes | bytearray, right: bytes | bytearray) -> bytes:
    return (np.frombuffer(left, np.uint8) ^ np.frombuffer(right, np.uint8)).tobytes()
