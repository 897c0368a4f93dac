"""Ciphers over many sectors at once, against the C library's own modes a sector at a time."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qcowkit.codecs.qcow2.sector_cipher import SectorCipher
from qcowkit.errors import RequestError, UnsupportedFeature

SECTOR = 512
# More than two pieces of the vectorised loop, and a ragged one.
SECTORS = 600


def content(length: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(length)


def encrypt_singly(
    data: bytes, sector: int, mode: Callable[[bytes], modes.Mode], key: bytes
) -> bytes:
    """Each sector by itself, its IV from `mode`."""
    out = b""
    for index in range(len(data) // SECTOR):
        iv = (sector + index).to_bytes(16, "little")
        context = Cipher(algorithms.AES(key), mode(iv)).encryptor()
        out += context.update(data[index * SECTOR : (index + 1) * SECTOR]) + context.finalize()
    return out


@pytest.mark.parametrize("key_bytes", [32, 64])
@pytest.mark.parametrize("sector", [0, 7, (1 << 32) - 3, 1 << 40])
def test_xts_is_the_c_library_s_xts(key_bytes: int, sector: int) -> None:
    key, data = content(key_bytes, 1), content(SECTORS * SECTOR, 2)
    cipher = SectorCipher(key, mode="xts")
    found = cipher.encrypt(data, sector=sector)
    assert found == encrypt_singly(data, sector, modes.XTS, key)
    assert cipher.decrypt(found, sector=sector) == data


@pytest.mark.parametrize("key_bytes", [16, 24, 32])
def test_cbc_is_the_c_library_s_cbc(key_bytes: int) -> None:
    key, data = content(key_bytes, 3), content(SECTORS * SECTOR, 4)
    cipher = SectorCipher(key, mode="cbc")
    found = cipher.encrypt(data, sector=11)
    assert found == encrypt_singly(data, 11, modes.CBC, key)
    assert cipher.decrypt(found, sector=11) == data


@pytest.mark.parametrize(("name", "size"), [("sha256", 32), ("sha1", 16), ("sha224", 24)])
def test_essiv_encrypts_the_sector_number_with_a_hash_of_the_key(name: str, size: int) -> None:
    key, data = content(16, 5), content(4 * SECTOR, 6)
    salted = Cipher(algorithms.AES(hashlib.new(name, key).digest()[:size]), modes.ECB())

    def mode(number: bytes) -> modes.Mode:
        return modes.CBC(salted.encryptor().update(number))

    cipher = SectorCipher(key, mode="cbc", ivgen="essiv", ivgen_hash=name)
    assert cipher.encrypt(data, sector=9) == encrypt_singly(data, 9, mode, key)


def test_plain_ivs_have_32_bits() -> None:
    data = content(2 * SECTOR, 7)
    short = SectorCipher(content(32, 8), mode="xts", ivgen="plain")
    long = SectorCipher(content(32, 8), mode="xts", ivgen="plain64")
    assert short.encrypt(data, sector=1 << 32) == long.encrypt(data, sector=0)


@pytest.mark.parametrize("mode", ["xts", "cbc"])
def test_a_buffer_may_be_worked_on_in_place(mode: str) -> None:
    data = content(SECTORS * SECTOR, 9)
    cipher = SectorCipher(content(32, 10), mode=mode)
    buffer = bytearray(data)
    cipher.encrypt_into(buffer, buffer, sector=5)
    assert buffer == cipher.encrypt(data, sector=5)
    cipher.decrypt_into(buffer, buffer, sector=5)
    assert buffer == data


def test_the_vector_of_ieee_1619_comes_out() -> None:
    """Vector 1 of appendix B is 32 bytes of zeros; the start of a sector of zeros is the same."""
    cipher = SectorCipher(bytes(32), mode="xts")
    expected = "917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e"
    assert cipher.encrypt(bytes(SECTOR), sector=0)[:32].hex() == expected


def test_wiped_keys_encrypt_nothing() -> None:
    cipher = SectorCipher(bytes(32), mode="xts")
    cipher.encrypt(bytes(SECTOR), sector=0)
    cipher.wipe()
    with pytest.raises(RequestError, match="the image was closed: its keys are gone"):
        cipher.encrypt(bytes(SECTOR), sector=0)


@pytest.mark.parametrize(
    ("key_bytes", "mode", "ivgen", "says"),
    [
        (32, "ctr", "plain64", "cipher mode 'ctr': expected xts or cbc"),
        (40, "xts", "plain64", "a key of 40 bytes: unknown to AES-xts"),
        (32, "xts", "benbi", "IV generator 'benbi': expected plain, plain64 or essiv"),
        (32, "cbc", "essiv", "hash None: essiv expects one of sha1, sha224, sha256, sha384"),
    ],
)
def test_what_is_unknown_is_named(key_bytes: int, mode: str, ivgen: str, says: str) -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        SectorCipher(bytes(key_bytes), mode=mode, ivgen=ivgen)
    assert says in str(caught.value)
