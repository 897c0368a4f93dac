"""The cipher of a qcow2 image, by the method that its header names."""

from __future__ import annotations

from qcowkit.budget import Budget
from qcowkit.engine.crypt import DataCipher
from qcowkit.engine.luks.unlock import require_secret, unlock_aes, unlock_luks
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.storage.protocol import Storage


def open_cipher(
    metadata: Qcow2Metadata, storage: Storage, *, secret: bytes | None, budget: Budget
) -> DataCipher | None:
    """None where the content is in clear. Raises RequestError without a passphrase or for a wrong
    one, and what `unlock_luks` raises."""
    if metadata.encrypted is None:
        return None
    key = require_secret(secret, name=storage.name, method=metadata.encrypted)
    if metadata.luks is None:
        return unlock_aes(key)
    crypto = metadata.extensions.crypto
    assert crypto is not None, "a LUKS header was found through its extension"
    return unlock_luks(
        metadata.luks, storage, offset=crypto.offset, secret=key, by_guest=False, budget=budget
    )
