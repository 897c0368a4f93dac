"""Key slots of a LUKS1 header, filled and emptied in place so that a crash never costs a key.

A slot becomes active by four bytes, once its key material is durable; it becomes inactive by the
same four bytes, durable before the material is overwritten. Source: the LUKS1 on-disk format, "Add
a passphrase", "Revoke a key slot"."""

from __future__ import annotations

import os
from dataclasses import replace

from qcowkit.budget import Budget
from qcowkit.codecs.qcow2.luks_header import SLOT_STATE_BYTES, LuksHeader
from qcowkit.codecs.qcow2.luks_keys import SALT_BYTES, check_hash, material_bytes, open_slot
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.luks.format import (
    Measure,
    Random,
    fill_slot,
    measure_iterations,
    with_slot,
)
from qcowkit.engine.luks.unlock import check_effort, find_key, load_material, wipe
from qcowkit.errors import RequestError
from qcowkit.storage.protocol import Storage

# Times that key material is overwritten with noise before it becomes zeros.
_PASSES = 3


class KeySlots:
    """The slots of one header, whose storage is writable and held. offset: of the header, bytes.

    header: as it is in the file now."""

    def __init__(
        self,
        storage: Storage,
        header: LuksHeader,
        *,
        offset: int,
        budget: Budget,
        barriers: Barriers | None = None,
        random: Random = os.urandom,
        measure: Measure = measure_iterations,
    ) -> None:
        """barriers: of the storage, for those who watch. random, measure: see `format_luks`."""
        self.header = header
        self._storage = storage
        self._offset = offset
        self._budget = budget
        self._barriers = barriers or Barriers(storage)
        self._random = random
        self._measure = measure

    def add(
        self,
        new: bytes,
        *,
        secret: bytes,
        slot: int | None = None,
        iter_time: int,
        force: bool = False,
    ) -> int:
        """Give a slot the passphrase `new`; returns its number.

        secret: a passphrase that opens the disk now. slot: None for the first free one. iter_time:
        milliseconds. force: an active slot may be overwritten, though never the last one. Raises
        RequestError, StorageError and what `find_key` raises."""
        if not new:
            raise RequestError("the new passphrase is empty")
        index = self._choose(slot, force=force)
        master, _ = find_key(
            self.header, self._storage, offset=self._offset, secret=secret, budget=self._budget
        )
        try:
            if self.header.slots[index].active:
                self._deactivate(index)
            header = self.header
            iterations = self._measure(
                header.hash, key_bytes=header.key_bytes, milliseconds=iter_time
            )
            filled, material = fill_slot(
                header,
                index,
                secret=new,
                master=bytes(master),
                iterations=iterations,
                random=self._random,
            )
        finally:
            wipe(master)
        self._write(material, at=filled.key_offset)
        # All but its state: the entry may lie in two sectors, of which one may be lost.
        self._write(replace(filled, active=False).encode(), at=header.slot_offset(index))
        self._barriers.wait("key material")
        self._write_state(index, active=True)
        self._barriers.wait("key slot")
        self.header = with_slot(header, index, filled)
        return index

    def remove(
        self, *, slot: int | None = None, secret: bytes | None = None, force: bool = False
    ) -> tuple[int, ...]:
        """Empty one slot, or all that a passphrase opens; returns their numbers.

        force: also where no key is left, after which the content is lost. Raises RequestError and
        StorageError."""
        chosen = (self._known(slot),) if slot is not None else self._opened_by(secret)
        active = [index for index, one in enumerate(self.header.slots) if one.active]
        if not set(active) - set(chosen) and not force:
            raise RequestError(
                f"key slot {chosen[-1]} holds the last key of the disk: without it the content is "
                "lost for good (--force)"
            )
        for index in chosen:
            self._deactivate(index)
        for index in chosen:
            self._erase(index)
        return chosen

    def _choose(self, slot: int | None, *, force: bool) -> int:
        slots = self.header.slots
        if slot is None:
            free = [index for index, one in enumerate(slots) if not one.active]
            if not free:
                raise RequestError(
                    f"all {len(slots)} key slots are active: remove one first, or name the one to "
                    "overwrite (encrypt.keyslot, --force)"
                )
            return free[0]
        self._check_number(slot)
        if slots[slot].active:
            if not force:
                raise RequestError(f"key slot {slot} is active already (--force overwrites it)")
            if sum(one.active for one in slots) == 1:
                raise RequestError(
                    f"key slot {slot} holds the last key of the disk: a crash while it is "
                    "overwritten would lose the content; fill another slot, then remove this one"
                )
        return slot

    def _known(self, slot: int) -> int:
        self._check_number(slot)
        if not self.header.slots[slot].active:
            raise RequestError(f"key slot {slot} is not active")
        return slot

    def _check_number(self, slot: int) -> None:
        last = len(self.header.slots) - 1
        if not 0 <= slot <= last:
            raise RequestError(f"there is no key slot {slot}, expected 0 to {last}")

    def _opened_by(self, secret: bytes | None) -> tuple[int, ...]:
        if secret is None:
            raise RequestError(
                "which key slot becomes inactive is not said: encrypt.keyslot names it, or "
                "encrypt.old-secret the passphrase"
            )
        header = self.header
        active = [(index, one) for index, one in enumerate(header.slots) if one.active]
        check_effort(header, (one for _, one in active), budget=self._budget)
        check_hash(header.hash)
        found = tuple(
            index
            for index, one in active
            if open_slot(
                header,
                one,
                load_material(header, one, self._storage, offset=self._offset),
                secret,
            )
        )
        if not found:
            raise RequestError("the old passphrase opens no active key slot")
        return found

    def _deactivate(self, index: int) -> None:
        self._write_state(index, active=False)
        self._barriers.wait("key slot inactive")
        slot = replace(self.header.slots[index], active=False)
        self.header = with_slot(self.header, index, slot)

    def _erase(self, index: int) -> None:
        slot = replace(self.header.slots[index], iterations=0, salt=bytes(SALT_BYTES))
        length = material_bytes(self.header)
        for _ in range(_PASSES):
            self._write(self._random(length), at=slot.key_offset)
            self._barriers.wait("key material overwritten")
        self._write(bytes(length), at=slot.key_offset)
        self._write(slot.encode(), at=self.header.slot_offset(index))
        self._barriers.wait("key slot empty")
        self.header = with_slot(self.header, index, slot)

    def _write_state(self, index: int, *, active: bool) -> None:
        raw = replace(self.header.slots[index], active=active).encode()[:SLOT_STATE_BYTES]
        self._write(raw, at=self.header.slot_offset(index))

    def _write(self, raw: bytes, *, at: int) -> None:
        self._barriers.check()
        self._barriers.pending = True
        self._storage.pwrite([raw], offset=self._offset + at)
