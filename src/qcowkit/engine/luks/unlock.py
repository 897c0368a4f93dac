"""From a passphrase to the key of the disk: LUKS1 key slots, and the key of legacy AES.

What a header asks of the processor is bounded before anything is derived. Source: the LUKS1 on-disk
format, "Master key recovery"."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from qcowkit.budget import Budget
from qcowkit.codecs.qcow2.luks_header import LuksHeader, LuksSlot
from qcowkit.codecs.qcow2.luks_keys import check_hash, make_cipher, material_bytes, open_slot
from qcowkit.codecs.qcow2.sector_cipher import SectorCipher
from qcowkit.engine.crypt import DataCipher
from qcowkit.errors import RequestError, StorageError
from qcowkit.storage.protocol import Storage

_AES_KEY_BYTES = 16
WAY_OUT = (
    "name it by --object secret,id=S,file=PATH and encrypt.key-secret=S, or in Python by secrets="
)


def require_secret(secret: bytes | None, *, name: str, method: str) -> bytes:
    """The passphrase, or RequestError that says how to give one."""
    if secret is None:
        raise RequestError(
            f"{name}: the content is encrypted ({method}) and no passphrase was given: {WAY_OUT}"
        )
    return secret


def unlock_aes(secret: bytes) -> DataCipher:
    """The cipher of a legacy AES image: any passphrase makes one, and only the content tells
    whether it is the right one."""
    key = bytearray(secret[:_AES_KEY_BYTES].ljust(_AES_KEY_BYTES, b"\0"))
    return DataCipher(SectorCipher(key, mode="cbc"), by_guest=True)


def unlock_luks(
    header: LuksHeader,
    storage: Storage,
    *,
    offset: int,
    secret: bytes,
    by_guest: bool,
    budget: Budget,
) -> DataCipher:
    """The cipher of a LUKS disk whose header lies at host offset `offset`.

    Raises RequestError where the passphrase opens no slot, BudgetExceeded, UnsupportedFeature for
    a cipher that is not known, and StorageError."""
    master, _ = find_key(header, storage, offset=offset, secret=secret, budget=budget)
    try:
        return DataCipher(make_cipher(header, bytes(master)), by_guest=by_guest)
    finally:
        wipe(master)


def find_key(
    header: LuksHeader, storage: Storage, *, offset: int, secret: bytes, budget: Budget
) -> tuple[bytearray, int]:
    """The master key, and the number of the slot that the passphrase opens. Raises as
    `unlock_luks`. The caller wipes the key."""
    active = [(index, slot) for index, slot in enumerate(header.slots) if slot.active]
    if not active:
        raise RequestError(
            f"{storage.name}: no key slot of the LUKS header is active: without a backup of the "
            "header its content is lost"
        )
    check_effort(header, (slot for _, slot in active), budget=budget)
    check_hash(header.hash)
    for index, slot in active:
        material = load_material(header, slot, storage, offset=offset)
        key = open_slot(header, slot, material, secret)
        if key is not None:
            return bytearray(key), index
    count = len(active)
    slots = "the one active key slot" if count == 1 else f"any of the {count} active key slots"
    raise RequestError(f"{storage.name}: the passphrase does not open {slots}: {WAY_OUT}")


def check_effort(header: LuksHeader, slots: Iterable[LuksSlot], *, budget: Budget) -> None:
    """Raise BudgetExceeded where trying all slots would take longer than anybody should wait."""
    total = 0
    for slot in slots:
        total += slot.iterations + header.digest_iterations
    budget.spend("iterations of the LUKS key slots", value=total, limit=budget.key_iterations)


def load_material(header: LuksHeader, slot: LuksSlot, storage: Storage, *, offset: int) -> bytes:
    """The key material of a slot. A file that ends before it raises StorageError."""
    length = material_bytes(header)
    raw = storage.pread(length, offset=offset + slot.key_offset)
    if len(raw) < length:
        reason = f"the file ends within the key material of {length} bytes"
        raise StorageError("read", path=storage.name, errno=errno.EIO, reason=reason)
    return raw


def wipe(key: bytearray) -> None:
    """Overwrite a key that is no longer needed, as far as Python lets us."""
    key[:] = bytes(len(key))
