"""The identity of an image and of its backing file: a header extension of our own. Pure.

Seeds 002-10 and 002-12; docs/formats/qcow2.md, "Identity". A GUID says which disk an image is,
whatever its file is called. The GUID of the backing file belongs to the name under which it was
recorded: where another program has changed that name since, it says nothing."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from dataclasses import dataclass
from typing import Self
from uuid import UUID

from qcowkit.errors import RequestError
from qcowkit.units import INT64_MAX

# "qkid"
IDENTITY_TYPE = 0x716B6964
VERSION = 1
# version, reserved, GUID, backing GUID, backing length, digest of the backing name
_DATA = struct.Struct(">B7s16s16sQ16s")
_NIL = bytes(16)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackingIdentity:
    """Which disk a backing file is. length: its guest bytes when that was recorded."""

    guid: UUID
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What an image says of itself and of the file below it.

    name_digest: of the backing file name for which `backing` holds; zeros without a backing."""

    guid: UUID
    backing: BackingIdentity | None = None
    name_digest: bytes = _NIL

    @classmethod
    def of(
        cls, guid: UUID, *, backing: BackingIdentity | None = None, backing_name: str | None = None
    ) -> Self:
        """What is to be recorded beside `backing_name`, the name as the header has it."""
        if backing is None or backing_name is None:
            return cls(guid=guid)
        return cls(guid=guid, backing=backing, name_digest=_digest(backing_name))

    @classmethod
    def decode(cls, raw: bytes) -> Self | None:
        """None for what is not exactly an identity of this version: it is an unknown extension
        then, since an image is never refused for a note that it may do without."""
        if len(raw) != _DATA.size:
            return None
        version, reserved, guid, below, length, digest = _DATA.unpack(raw)
        if version != VERSION or any(reserved) or guid == _NIL:
            return None
        if below == _NIL:
            return None if length or any(digest) else cls(guid=UUID(bytes=guid))
        if length > INT64_MAX:
            return None
        backing = BackingIdentity(guid=UUID(bytes=below), length=length)
        return cls(guid=UUID(bytes=guid), backing=backing, name_digest=digest)

    def encode(self) -> bytes:
        """The data of the extension."""
        backing = self.backing
        below, length = (_NIL, 0) if backing is None else (backing.guid.bytes, backing.length)
        return _DATA.pack(VERSION, bytes(7), self.guid.bytes, below, length, self.name_digest)

    def backing_of(self, name: str | None) -> BackingIdentity | None:
        """Which disk the backing file `name` has to be; None where that was not recorded for this
        name."""
        if name is None or self.backing is None or self.name_digest != _digest(name):
            return None
        return self.backing


def parse_guid(text: str) -> UUID:
    """A GUID in the usual notation, for example 6ba7b810-9dad-11d1-80b4-00c04fd430c8.

    Raises RequestError for anything else, and for zeros, which stand for no GUID."""
    guid: UUID | None = None
    with contextlib.suppress(ValueError):
        guid = UUID(text)
    if guid is None or guid.bytes == _NIL:
        raise RequestError(f"guid is {text!r}, expected 32 hexadecimal digits that are not all 0")
    return guid


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[: len(_NIL)]
