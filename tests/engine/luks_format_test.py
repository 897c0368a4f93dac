"""New LUKS headers, and what opens them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from qcowkit.budget import TRUSTED, Budget
from qcowkit.codecs.qcow2.luks_header import LuksHeader
from qcowkit.codecs.qcow2.luks_params import Encryption, LuksParams
from qcowkit.engine.luks.format import format_luks, measure_iterations, new_crypt
from qcowkit.engine.luks.unlock import find_key
from qcowkit.errors import BudgetExceeded, RequestError, StorageError, UnsupportedFeature
from qcowkit.storage.memory import MemoryStorage

SECRET = b"correct horse"


def quickly(hash: str, *, key_bytes: int, milliseconds: int) -> int:
    return 1000


def made(params: LuksParams | None = None) -> tuple[LuksHeader, bytes, bytearray]:
    bits = random.Random(1)
    return format_luks(params or LuksParams(), SECRET, random=bits.randbytes, measure=quickly)


def storage_of(
    area: bytes, header: LuksHeader | None = None, *, offset: int = 512
) -> MemoryStorage:
    storage = MemoryStorage(bytes(offset) + area)
    if header is not None:
        storage.pwrite([header.encode()], offset=offset)
    return storage


@pytest.mark.parametrize(
    "params",
    [
        LuksParams(),
        LuksParams(cipher_alg="aes-128"),
        LuksParams(cipher_alg="aes-192", hash_alg="sha512"),
        LuksParams(cipher_mode="cbc", ivgen_alg="essiv", hash_alg="sha1"),
        LuksParams(ivgen_alg="plain", hash_alg="sha384"),
    ],
    ids=lambda one: f"{one.cipher_alg}-{one.mode}-{one.hash_alg}",
)
def test_a_new_header_is_opened_by_its_passphrase(params: LuksParams) -> None:
    header, area, master = made(params)
    assert LuksHeader.decode(area[:592], host_offset=0, length=len(area)) == header
    found = find_key(header, storage_of(area), offset=512, secret=SECRET, budget=TRUSTED)
    assert found == (master, 0)


def test_another_passphrase_opens_nothing() -> None:
    header, area, _ = made()
    with pytest.raises(RequestError) as caught:
        find_key(header, storage_of(area), offset=512, secret=b"wrong", budget=TRUSTED)
    assert str(caught.value) == (
        "<memory>: the passphrase does not open the one active key slot: name it by --object "
        "secret,id=S,file=PATH and encrypt.key-secret=S, or in Python by secrets="
    )


def test_without_an_active_slot_nothing_is_tried() -> None:
    header, area, _ = made()
    slots = tuple(replace(slot, active=False) for slot in header.slots)
    with pytest.raises(RequestError, match="no key slot of the LUKS header is active"):
        find_key(
            replace(header, slots=slots),
            storage_of(area),
            offset=512,
            secret=SECRET,
            budget=TRUSTED,
        )


def test_a_header_that_would_take_for_ever_is_refused_before_any_work() -> None:
    header, area, _ = made()
    slot = replace(header.slots[3], active=True, iterations=0xFFFF_FFFF)
    slow = replace(header, slots=(*header.slots[:3], slot, *header.slots[4:]))
    with pytest.raises(BudgetExceeded) as caught:
        find_key(slow, storage_of(area), offset=512, secret=SECRET, budget=TRUSTED)
    assert str(caught.value) == (
        "iterations of the LUKS key slots: 4294970295 is above the limit of 268435456"
    )


def test_the_bound_is_the_caller_s() -> None:
    header, area, _ = made()
    with pytest.raises(BudgetExceeded):
        find_key(
            header,
            storage_of(area),
            offset=512,
            secret=SECRET,
            budget=Budget(key_iterations=1999),
        )


def test_key_material_that_is_missing_is_an_error_of_the_file() -> None:
    header, area, _ = made()
    with pytest.raises(StorageError, match="the file ends within the key material of 256000"):
        find_key(header, storage_of(area[:90000]), offset=512, secret=SECRET, budget=TRUSTED)


def test_a_hash_that_is_not_known_is_named() -> None:
    header, area, _ = made()
    with pytest.raises(UnsupportedFeature, match="hash 'whirlpool': expected one of sha1"):
        find_key(
            replace(header, hash="whirlpool"),
            storage_of(area),
            offset=512,
            secret=SECRET,
            budget=TRUSTED,
        )


def test_two_headers_have_nothing_in_common_but_their_form() -> None:
    one, other = (format_luks(LuksParams(), SECRET, measure=quickly) for _ in range(2))
    assert one[2] != other[2]
    assert one[0].uuid != other[0].uuid
    assert one[0].digest_salt != other[0].digest_salt


def test_iterations_are_never_below_a_thousand() -> None:
    assert measure_iterations("sha512", key_bytes=64, milliseconds=0) == 1000


@pytest.mark.parametrize("secret", [None, b""])
def test_a_new_disk_needs_a_passphrase(secret: bytes | None) -> None:
    with pytest.raises(RequestError, match=r"encrypt\.format=luks needs a passphrase"):
        new_crypt(Encryption(), secret)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cipher_alg": "serpent"}, "cipher-alg is 'serpent', expected one of aes-128, aes-192"),
        ({"cipher_mode": "ecb"}, "cipher-mode is 'ecb', expected one of xts, cbc"),
        ({"ivgen_alg": "random"}, "ivgen-alg is 'random', expected one of plain, plain64, essiv"),
        ({"hash_alg": "md5"}, "hash-alg is 'md5', expected one of sha1, sha224"),
        ({"ivgen_hash": "sha1"}, "ivgen-hash-alg is for essiv, found ivgen-alg=plain64"),
        ({"iter_time": 0}, "iter-time is 0 ms, expected 1 to 1048576"),
        (
            {"cipher_alg": "aes-192", "cipher_mode": "cbc"},
            "cipher-alg=aes-192 and cipher-mode=cbc exclude one another",
        ),
    ],
)
def test_parameters_that_cannot_be_are_named(options: dict[str, str], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        LuksParams(**options)  # type: ignore[arg-type]
    assert says in str(caught.value)
