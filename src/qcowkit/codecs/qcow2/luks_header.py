"""The LUKS1 header of an encrypted image: what describes it, without any key. Pure.

Source: the LUKS1 on-disk format, "The partition header". Nothing is decrypted here."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

from qcowkit.errors import CorruptMetadata, UnsupportedFeature
from qcowkit.units import SECTOR, align_up

LUKS_MAGIC = b"LUKS\xba\xbe"
LUKS_HEADER_BYTES = 592
LUKS_SLOTS = 8
LUKS_STRIPES = 4000
MIN_ITERATIONS = 1000

_HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
# The first field of a slot: active or not.
SLOT_STATE_BYTES = 4
_ACTIVE = 0x00AC71F3
_INACTIVE = 0x0000DEAD
_KEY_BYTES = (16, 24, 32, 48, 64)
_TITLE = "LUKS header"


@dataclass(frozen=True, slots=True, kw_only=True)
class LuksSlot:
    """One key slot. key_offset: bytes from the start of the LUKS header. salt: 32 bytes."""

    active: bool
    iterations: int
    salt: bytes
    key_offset: int
    stripes: int

    def encode(self) -> bytes:
        """The 48 bytes of the slot."""
        state = _ACTIVE if self.active else _INACTIVE
        sector = self.key_offset // SECTOR
        return _SLOT.pack(state, self.iterations, self.salt, sector, self.stripes)


@dataclass(frozen=True, slots=True, kw_only=True)
class LuksHeader:
    """The fields of a LUKS1 header. key_bytes: of the master key. payload_offset: bytes; qcow2
    does not use it. cipher, mode and hash are names as they stand in the header."""

    cipher: str
    mode: str
    hash: str
    payload_offset: int
    key_bytes: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[LuksSlot, ...]

    @classmethod
    def decode(cls, raw: bytes, *, host_offset: int, length: int) -> Self:
        """The header from its first 592 bytes.

        host_offset: for messages. length: of the area that holds header and key material. Raises
        CorruptMetadata, and UnsupportedFeature for another LUKS version."""

        def bad(reason: str) -> CorruptMetadata:
            return CorruptMetadata(_TITLE, host_offset=host_offset, reason=reason)

        if len(raw) < LUKS_HEADER_BYTES:
            raise bad(f"{len(raw)} bytes, expected at least {LUKS_HEADER_BYTES}")
        (magic, version, *names, payload, key_bytes, digest, salt, iterations, uuid) = (
            _HEADER.unpack_from(raw)
        )
        if magic != LUKS_MAGIC:
            raise bad(f"magic {magic.hex()}, expected {LUKS_MAGIC.hex()}")
        if version != 1:
            raise UnsupportedFeature(f"LUKS version {version}", reason="expected version 1")
        if key_bytes not in _KEY_BYTES:
            raise bad(f"master key of {key_bytes} bytes, expected one of {_KEY_BYTES}")
        if iterations < MIN_ITERATIONS:
            raise bad(f"{iterations} digest iterations, expected at least {MIN_ITERATIONS}")
        cipher, mode, hash_name = (_text(name) for name in names)
        header = cls(
            cipher=cipher,
            mode=mode,
            hash=hash_name,
            payload_offset=payload * SECTOR,
            key_bytes=key_bytes,
            digest=digest,
            digest_salt=salt,
            digest_iterations=iterations,
            uuid=_text(uuid),
            slots=_decode_slots(raw, host_offset),
        )
        header._check_slots(host_offset, length)
        return header

    def encode(self) -> bytes:
        """The 592 bytes of the header."""
        raw = _HEADER.pack(
            LUKS_MAGIC,
            1,
            self.cipher.encode("ascii"),
            self.mode.encode("ascii"),
            self.hash.encode("ascii"),
            self.payload_offset // SECTOR,
            self.key_bytes,
            self.digest,
            self.digest_salt,
            self.digest_iterations,
            self.uuid.encode("ascii"),
        )
        return raw + b"".join(slot.encode() for slot in self.slots)

    @property
    def cipher_name(self) -> str:
        """Cipher and key width as qemu names them, such as `aes-256`; XTS uses two half keys."""
        bits = self.key_bytes * 8
        return f"{self.cipher}-{bits // 2 if self.cipher_mode == 'xts' else bits}"

    def slot_offset(self, index: int) -> int:
        """Where a slot stands in the header, in bytes from its start."""
        return _HEADER.size + index * _SLOT.size

    @property
    def cipher_mode(self) -> str:
        """The mode without its IV generator, such as `xts`."""
        return self.mode.partition("-")[0]

    @property
    def ivgen(self) -> str:
        """The IV generator, such as `plain64`."""
        return self.mode.partition("-")[2].partition(":")[0]

    @property
    def ivgen_hash(self) -> str | None:
        """The hash of the IV generator, where it has one."""
        return self.mode.partition(":")[2] or None

    def _check_slots(self, host_offset: int, length: int) -> None:
        """Key material, of unused slots too: behind the header, inside its area, and disjoint."""
        size = align_up(self.key_bytes * LUKS_STRIPES, SECTOR)
        last = align_up(LUKS_HEADER_BYTES, SECTOR)
        placed = sorted((slot.key_offset, index) for index, slot in enumerate(self.slots))
        for offset, index in placed:
            end = offset + size
            if offset < last or end > length:
                reason = (
                    f"key material at {offset:#x} to {end:#x}, expected {last:#x} to {length:#x}"
                )
                raise CorruptMetadata(
                    "LUKS key slot", host_offset=host_offset, index=index, reason=reason
                )
            last = end


def _decode_slots(raw: bytes, host_offset: int) -> tuple[LuksSlot, ...]:
    slots = []
    for index in range(LUKS_SLOTS):
        state, iterations, salt, offset, stripes = _SLOT.unpack_from(
            raw, _HEADER.size + index * _SLOT.size
        )
        reason = ""
        if state not in (_ACTIVE, _INACTIVE):
            reason = f"state {state:#010x}, expected {_ACTIVE:#010x} or {_INACTIVE:#010x}"
        elif state == _ACTIVE and iterations < MIN_ITERATIONS:
            reason = f"{iterations} iterations, expected at least {MIN_ITERATIONS}"
        elif stripes != LUKS_STRIPES:
            reason = f"{stripes} stripes, expected {LUKS_STRIPES}"
        if reason:
            raise CorruptMetadata(
                "LUKS key slot", host_offset=host_offset, index=index, reason=reason
            )
        slots.append(
            LuksSlot(
                active=state == _ACTIVE,
                iterations=iterations,
                salt=salt,
                key_offset=offset * SECTOR,
                stripes=stripes,
            )
        )
    return tuple(slots)


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("ascii", "replace")
