"""A new LUKS1 header with a fresh master key, and keys that take their time to derive."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from qcowkit.codecs.qcow2.luks_header import (
    LUKS_SLOTS,
    LUKS_STRIPES,
    MIN_ITERATIONS,
    LuksHeader,
    LuksSlot,
)
from qcowkit.codecs.qcow2.luks_keys import (
    SALT_BYTES,
    NewSlot,
    check_hash,
    derive,
    make_cipher,
    make_material,
    master_digest,
)
from qcowkit.codecs.qcow2.luks_params import Encryption, LuksParams
from qcowkit.engine.crypt import DataCipher
from qcowkit.engine.luks.unlock import unlock_aes, wipe
from qcowkit.errors import RequestError

Random = Callable[[int], bytes]


class Measure(Protocol):
    """How many iterations of PBKDF2 are made in a time."""

    def __call__(self, hash: str, *, key_bytes: int, milliseconds: int) -> int: ...


# Shorter runs than this say little about the processor; seconds.
_LEAST_RUN = 0.05
_FIRST_RUN = 1 << 14
# The header's digest is checked as well when a passphrase is tried: in an eighth of its time.
_DIGEST_SHARE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCrypt:
    """The cipher of a new disk, and the bytes of its LUKS header with all key material; `area` is
    empty for legacy AES."""

    cipher: DataCipher
    area: bytes = b""


def new_crypt(encryption: Encryption, secret: bytes | None, *, by_guest: bool = False) -> NewCrypt:
    """Keys for a new disk. by_guest: see `DataCipher`. Raises RequestError without a passphrase,
    UnsupportedFeature for a hash that this machine does not have."""
    if not secret:
        raise RequestError(
            f"encrypt.format={encryption.method} needs a passphrase: name it by "
            "--object secret,id=S,file=PATH and encrypt.key-secret=S, or in Python by secret="
        )
    if encryption.method == "aes":
        return NewCrypt(cipher=unlock_aes(secret))
    header, area, master = format_luks(encryption.luks, secret)
    try:
        cipher = DataCipher(make_cipher(header, bytes(master)), by_guest=by_guest)
    finally:
        wipe(master)
    return NewCrypt(cipher=cipher, area=area)


def measure_iterations(hash: str, *, key_bytes: int, milliseconds: int) -> int:
    """How many iterations of PBKDF2 this thread makes in that time, at least 1000."""
    count, taken = _FIRST_RUN, 0.0
    while True:
        begin = time.thread_time()
        derive(b"passphrase", hash=hash, salt=bytes(32), iterations=count, length=key_bytes)
        taken = time.thread_time() - begin
        if taken >= _LEAST_RUN:
            return max(MIN_ITERATIONS, int(count * milliseconds / 1000 / taken))
        count *= 2


def format_luks(
    params: LuksParams,
    secret: bytes,
    *,
    random: Random = os.urandom,
    measure: Measure = measure_iterations,
) -> tuple[LuksHeader, bytes, bytearray]:
    """A header whose slot 0 is the passphrase's, with its area, and the master key.

    random: makes so many bytes. measure: see `measure_iterations`."""
    check_hash(params.hash_alg)
    if params.ivgen_hash is not None:
        check_hash(params.ivgen_hash)
    master = bytearray(random(params.key_bytes))
    iterations = measure(params.hash_alg, key_bytes=params.key_bytes, milliseconds=params.iter_time)
    digest_iterations = max(MIN_ITERATIONS, iterations // _DIGEST_SHARE)
    salt = random(SALT_BYTES)
    header = LuksHeader(
        cipher="aes",
        mode=params.mode,
        hash=params.hash_alg,
        payload_offset=params.header_bytes,
        key_bytes=params.key_bytes,
        digest=master_digest(
            bytes(master), hash=params.hash_alg, salt=salt, iterations=digest_iterations
        ),
        digest_salt=salt,
        digest_iterations=digest_iterations,
        uuid=str(uuid.UUID(bytes=random(16), version=4)),
        slots=tuple(_unused_slot(params, index) for index in range(LUKS_SLOTS)),
    )
    slot, material = fill_slot(
        header, 0, secret=secret, master=bytes(master), iterations=iterations, random=random
    )
    header = with_slot(header, 0, slot)
    area = bytearray(params.header_bytes)
    head = header.encode()
    area[: len(head)] = head
    area[slot.key_offset : slot.key_offset + len(material)] = material
    return header, bytes(area), master


def fill_slot(
    header: LuksHeader,
    index: int,
    *,
    secret: bytes,
    master: bytes,
    iterations: int,
    random: Random = os.urandom,
) -> tuple[LuksSlot, bytes]:
    """An active slot for the passphrase in place of number `index`, and its key material."""
    new = NewSlot(
        passphrase=secret,
        salt=random(SALT_BYTES),
        iterations=iterations,
        random=random((LUKS_STRIPES - 1) * header.key_bytes),
    )
    slot = replace(header.slots[index], active=True, iterations=iterations, salt=new.salt)
    return slot, make_material(header, new, master)


def with_slot(header: LuksHeader, index: int, slot: LuksSlot) -> LuksHeader:
    """The header with one slot changed."""
    slots = (*header.slots[:index], slot, *header.slots[index + 1 :])
    return replace(header, slots=slots)


def _unused_slot(params: LuksParams, index: int) -> LuksSlot:
    return LuksSlot(
        active=False,
        iterations=0,
        salt=bytes(SALT_BYTES),
        key_offset=params.key_offset(index),
        stripes=LUKS_STRIPES,
    )
