"""Key slots of an encrypted image: passphrases are added and taken away."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qcowkit.budget import TRUSTED, Budget
from qcowkit.codecs.qcow2.luks_params import ITER_TIME_MS
from qcowkit.engine.luks.keyslots import KeySlots
from qcowkit.engine.luks.metadata import LuksMetadata
from qcowkit.engine.luks.unlock import require_secret
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.errors import RequestError, UnsupportedFeature
from qcowkit.image.lineage import Layer


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyChange:
    """What shall change, named as the keys of `amend`. state: `active` adds `new_secret`,
    `inactive` takes away the slot or every slot that `old_secret` opens. iter_time: milliseconds.

    Raises RequestError for values that contradict or need one another."""

    state: Literal["active", "inactive"]
    new_secret: bytes | None = field(default=None, repr=False)
    old_secret: bytes | None = field(default=None, repr=False)
    slot: int | None = None
    iter_time: int | None = None

    def __post_init__(self) -> None:
        if self.state == "active":
            if self.new_secret is None:
                raise RequestError("state=active needs new-secret")
            if self.old_secret is not None:
                raise RequestError("old-secret is for state=inactive")
            if self.iter_time is not None and self.iter_time < 1:
                raise RequestError(f"iter-time is {self.iter_time} ms, expected at least 1")
            return
        if self.new_secret is not None or self.iter_time is not None:
            raise RequestError("new-secret and iter-time are for state=active")
        if (self.slot is None) == (self.old_secret is None):
            raise RequestError("state=inactive needs one of keyslot and old-secret")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysChanged:
    """The slots that have changed, and how many are active now."""

    state: Literal["active", "inactive"]
    slots: tuple[int, ...]
    active: int

    def render(self) -> str:
        """A line to print."""
        names = ", ".join(map(str, self.slots))
        slots = "key slot" if len(self.slots) == 1 else "key slots"
        return f"{slots} {names} {self.state}, {self.active} in use"


def change_keys(
    layer: Layer,
    change: KeyChange,
    *,
    secret: bytes | None,
    force: bool = False,
    budget: Budget = TRUSTED,
) -> KeysChanged:
    """Change the key slots of an image whose file is open for writing.

    secret: a passphrase of the image, which adding a key needs. force: overwrite an active slot,
    or give up the last key. Raises RequestError, UnsupportedFeature where there are no key slots,
    StorageError."""
    slots = _open_slots(layer, budget)
    if change.state == "active":
        assert change.new_secret is not None, "checked when it was made"
        number = slots.add(
            change.new_secret,
            secret=require_secret(secret, name=layer.storage.name, method="luks"),
            slot=change.slot,
            iter_time=change.iter_time or ITER_TIME_MS,
            force=force,
        )
        changed: tuple[int, ...] = (number,)
    else:
        changed = slots.remove(slot=change.slot, secret=change.old_secret, force=force)
    active = sum(slot.active for slot in slots.header.slots)
    return KeysChanged(state=change.state, slots=changed, active=active)


def _open_slots(layer: Layer, budget: Budget) -> KeySlots:
    metadata = layer.metadata
    if isinstance(metadata, Qcow2Metadata) and metadata.luks is not None:
        crypto = metadata.extensions.crypto
        assert crypto is not None, "a LUKS header was found through its extension"
        return KeySlots(layer.storage, metadata.luks, offset=crypto.offset, budget=budget)
    if isinstance(metadata, LuksMetadata):
        return KeySlots(layer.storage, metadata.header, offset=0, budget=budget)
    method = getattr(metadata, "encrypted", None) or "none"
    raise UnsupportedFeature(
        f"key slots of {layer.storage.name}",
        reason=f"only LUKS has key slots, the encryption is {method}",
    )
