"""Key slots that are filled and emptied, and what a crash leaves of them."""

from __future__ import annotations

import random

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.luks_header import LuksHeader
from qcowkit.codecs.qcow2.luks_params import LuksParams
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.luks.format import format_luks
from qcowkit.engine.luks.keyslots import KeySlots
from qcowkit.engine.luks.unlock import find_key
from qcowkit.errors import QcowkitError, RequestError
from qcowkit.storage.memory import MemoryStorage

OLD, NEW = b"old passphrase", b"new passphrase"
OFFSET = 4096
BITS = random.Random(3)


def quickly(hash: str, *, key_bytes: int, milliseconds: int) -> int:
    return 1000


PARAMS = LuksParams(cipher_alg="aes-128")
HEADER, AREA, MASTER = format_luks(PARAMS, OLD, random=BITS.randbytes, measure=quickly)


class Watched(MemoryStorage):
    """Memory that keeps what would be durable at every moment: all that was flushed, with any one
    of the writes since, whole or cut at a sector."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.moments: list[bytes] = [data]
        self._durable = data
        self._since: list[tuple[int, bytes]] = []

    def pwrite(self, buffers: object, *, offset: int) -> None:
        raw = b"".join(map(bytes, buffers))  # type: ignore[call-overload]
        super().pwrite([raw], offset=offset)
        cut = min(len(raw), -offset % 512 or 512)
        self._since.append((offset, raw))
        for part, at in ((raw, 0), (raw[:cut], 0), (raw[cut:], cut)):
            state = bytearray(self._durable)
            state[offset + at : offset + at + len(part)] = part
            self.moments.append(bytes(state))
        self.moments.append(self.to_bytes())

    def flush(self) -> None:
        self._durable = self.to_bytes()
        self._since.clear()
        self.moments.append(self._durable)


def watched() -> tuple[Watched, KeySlots, list[str]]:
    storage, events = Watched(bytes(OFFSET) + AREA), list[str]()
    slots = KeySlots(
        storage,
        HEADER,
        offset=OFFSET,
        budget=TRUSTED,
        barriers=Barriers(storage, observe=events.append),
        random=BITS.randbytes,
        measure=quickly,
    )
    return storage, slots, events


def opens(raw: bytes, secret: bytes) -> int | None:
    """The slot that the passphrase opens in a file with these bytes."""
    area = raw[OFFSET:]
    header = LuksHeader.decode(area[:592], host_offset=OFFSET, length=len(area))
    try:
        master, index = find_key(
            header, MemoryStorage(raw), offset=OFFSET, secret=secret, budget=TRUSTED
        )
    except QcowkitError:
        return None
    assert master == MASTER
    return index


def test_a_new_passphrase_opens_the_disk_beside_the_old_one() -> None:
    storage, slots, _ = watched()
    assert slots.add(NEW, secret=OLD, iter_time=10) == 1
    assert (opens(storage.to_bytes(), OLD), opens(storage.to_bytes(), NEW)) == (0, 1)
    raw = storage.to_bytes()
    assert slots.header == LuksHeader.decode(
        raw[OFFSET : OFFSET + 592], host_offset=OFFSET, length=len(AREA)
    )


def test_a_slot_of_one_s_own_choice_is_filled() -> None:
    storage, slots, _ = watched()
    # The entry of slot 6 lies in two sectors.
    assert slots.add(NEW, secret=OLD, slot=6, iter_time=10) == 6
    assert opens(storage.to_bytes(), NEW) == 6


def test_a_removed_passphrase_opens_nothing_and_leaves_no_trace() -> None:
    storage, slots, _ = watched()
    slots.add(NEW, secret=OLD, iter_time=10)
    assert slots.remove(secret=OLD) == (0,)
    raw = storage.to_bytes()
    assert (opens(raw, OLD), opens(raw, NEW)) == (None, 1)
    assert raw[OFFSET + 4096 : OFFSET + 4096 + PARAMS.slot_bytes] == bytes(PARAMS.slot_bytes)


def test_material_is_overwritten_with_noise_before_it_becomes_zeros() -> None:
    _, slots, events = watched()
    slots.add(NEW, secret=OLD, iter_time=10)
    events.clear()
    slots.remove(slot=0)
    noise = ["key material overwritten"] * 3
    assert events == ["key slot inactive", *noise, "key slot empty"]


def test_material_is_durable_before_its_slot_is_active() -> None:
    _, slots, events = watched()
    slots.add(NEW, secret=OLD, iter_time=10)
    assert events == ["key material", "key slot"]


@pytest.mark.parametrize("slot", [1, 6])
def test_the_old_key_survives_a_crash_while_another_is_added(slot: int) -> None:
    storage, slots, _ = watched()
    slots.add(NEW, secret=OLD, slot=slot, iter_time=10)
    for moment in storage.moments:
        assert opens(moment, OLD) == 0
        header = LuksHeader.decode(moment[OFFSET:][:592], host_offset=0, length=len(AREA))
        if header.slots[slot].active:
            assert opens(moment, NEW) == slot


def test_the_other_key_survives_a_crash_while_one_is_removed() -> None:
    storage, slots, _ = watched()
    slots.add(NEW, secret=OLD, slot=6, iter_time=10)
    storage.moments.clear()
    slots.remove(slot=6)
    for moment in storage.moments:
        assert opens(moment, OLD) == 0
        header = LuksHeader.decode(moment[OFFSET:][:592], host_offset=0, length=len(AREA))
        if header.slots[6].active:
            # Whoever still finds the slot can still use it.
            assert opens(moment, NEW) == 6


def test_an_active_slot_is_overwritten_only_by_force() -> None:
    storage, slots, _ = watched()
    slots.add(b"third", secret=OLD, iter_time=10)
    with pytest.raises(RequestError, match=r"key slot 1 is active already \(--force"):
        slots.add(NEW, secret=OLD, slot=1, iter_time=10)
    slots.add(NEW, secret=OLD, slot=1, iter_time=10, force=True)
    raw = storage.to_bytes()
    assert (opens(raw, b"third"), opens(raw, NEW)) == (None, 1)


def test_the_last_key_is_never_overwritten_in_place() -> None:
    _, slots, _ = watched()
    with pytest.raises(RequestError, match="key slot 0 holds the last key of the disk: a crash"):
        slots.add(NEW, secret=OLD, slot=0, iter_time=10, force=True)


def test_the_last_key_goes_only_by_force() -> None:
    storage, slots, _ = watched()
    with pytest.raises(RequestError, match="holds the last key of the disk: without it"):
        slots.remove(slot=0)
    assert opens(storage.to_bytes(), OLD) == 0
    slots.remove(slot=0, force=True)
    assert opens(storage.to_bytes(), OLD) is None


def test_eight_keys_are_all_that_there_is_room_for() -> None:
    _, slots, _ = watched()
    for number in range(1, 8):
        assert slots.add(b"%d" % number, secret=OLD, iter_time=10) == number
    with pytest.raises(RequestError, match="all 8 key slots are active"):
        slots.add(NEW, secret=OLD, iter_time=10)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"slot": 8}, "there is no key slot 8, expected 0 to 7"),
        ({"slot": 3}, "key slot 3 is not active"),
        ({"secret": b"wrong"}, "the old passphrase opens no active key slot"),
        ({}, "which key slot becomes inactive is not said"),
    ],
)
def test_what_cannot_be_removed_is_named(request_: dict[str, object], says: str) -> None:
    storage, slots, _ = watched()
    before = storage.to_bytes()
    with pytest.raises(RequestError) as caught:
        slots.remove(**request_)  # type: ignore[arg-type]
    assert says in str(caught.value)
    assert storage.to_bytes() == before


def test_adding_needs_a_passphrase_that_opens_the_disk() -> None:
    storage, slots, _ = watched()
    before = storage.to_bytes()
    with pytest.raises(RequestError, match="does not open the one active key slot"):
        slots.add(NEW, secret=b"wrong", iter_time=10)
    with pytest.raises(RequestError, match="the new passphrase is empty"):
        slots.add(b"", secret=OLD, iter_time=10)
    assert storage.to_bytes() == before
