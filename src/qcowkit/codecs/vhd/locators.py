"""Parent locators of a differencing VHD: where they lie, and the paths they spell. Pure.

A path leaves here as a POSIX path string, relative to the child's directory or absolute. What a
name may open is decided by the gate, not here.
Source: the VHD specification, section "Parent Locator Entries"."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Self

from qcowkit.errors import CorruptMetadata
from qcowkit.units import SECTOR

LOCATOR_COUNT = 8
LOCATOR_SIZE = 24
MAX_LOCATOR_BYTES = 64 << 10

UNUSED = b"\0\0\0\0"
RELATIVE = b"W2ru"
ABSOLUTE = b"W2ku"
FILE_URL = b"MacX"
# Deprecated by the specification, and found in old files: paths in 8-bit text, an alias record.
OLD_RELATIVE = b"Wi2r"
OLD_ABSOLUTE = b"Wi2k"
ALIAS = b"Mac "
PATH_CODES = (RELATIVE, ABSOLUTE, FILE_URL, OLD_RELATIVE, OLD_ABSOLUTE, ALIAS)

_STRUCT = struct.Struct(">4sIIIQ")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_PERCENT = re.compile(rb"%([0-9A-Fa-f]{2})")
_SCHEME = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*:")
_ALIAS_VERSION = 2
_ALIAS_NAME = 50
_ALIAS_NAME_END = _ALIAS_NAME + 64
_UNRESERVED = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentLocator:
    """One of the eight entries. data_length: bytes of the name. data_offset: host offset.

    data_space is as stored: sectors by the specification, bytes with some writers."""

    code: bytes = UNUSED
    data_space: int = 0
    data_length: int = 0
    reserved: int = 0
    data_offset: int = 0

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """An entry from its 24 bytes. Raises CorruptMetadata for another length."""
        if len(raw) != LOCATOR_SIZE:
            reason = f"{len(raw)} bytes, expected {LOCATOR_SIZE}"
            raise CorruptMetadata("parent locator", reason=reason)
        code, space, length, reserved, offset = _STRUCT.unpack(raw)
        return cls(
            code=code, data_space=space, data_length=length, reserved=reserved, data_offset=offset
        )

    def encode(self) -> bytes:
        """The 24 bytes of the entry."""
        return _STRUCT.pack(
            self.code, self.data_space, self.data_length, self.reserved, self.data_offset
        )

    @property
    def used(self) -> bool:
        """Whether the entry names a platform at all."""
        return self.code != UNUSED

    @property
    def space(self) -> int:
        """Bytes reserved for the name; a stored value below 512 counts sectors."""
        return self.data_space * SECTOR if self.data_space < SECTOR else self.data_space


def decode_locator(code: bytes, raw: bytes) -> tuple[str, ...]:
    """The paths that the data of a locator may mean, the likelier one first.

    Empty for platforms that nobody knows. Raises CorruptMetadata for bytes that are no text or
    hold control characters."""
    if code in (RELATIVE, ABSOLUTE):
        return (decode_windows_path(decode_utf16(raw, big_endian=False)),)
    if code == FILE_URL:
        return _decode_file_url(raw)
    if code in (OLD_RELATIVE, OLD_ABSOLUTE):
        return (decode_windows_path(_decode_old_text(raw)),)
    if code == ALIAS:
        return (_decode_alias(raw),)
    return ()


def encode_locator(code: bytes, path: str) -> bytes:
    """The data of a locator that means the POSIX `path`, the inverse of `decode_locator`."""
    if code == FILE_URL:
        prefix = "" if path.startswith(("/", "../")) else "./"
        return b"file://" + _quote((prefix + path).encode())
    if code == RELATIVE and not path.startswith(("/", "../")):
        path = "./" + path
    return path.replace("/", "\\").encode("utf-16-le")


def decode_utf16(raw: bytes, *, big_endian: bool) -> str:
    """Text up to its first NUL. `big_endian` is the order that the field should have.

    A byte order mark wins. So does the text itself: where no unit has anything in its low byte,
    not even a dot or a separator, it was written in the other order."""
    raw = raw[: len(raw) & ~1]
    low, high = (raw[1::2], raw[::2]) if big_endian else (raw[::2], raw[1::2])
    if raw[:2] in (b"\xfe\xff", b"\xff\xfe"):
        big_endian, raw = raw[0] == 0xFE, raw[2:]
    elif any(high) and not any(low):
        big_endian = not big_endian
    try:
        text = raw.decode("utf-16-be" if big_endian else "utf-16-le")
    except UnicodeDecodeError:
        raise CorruptMetadata("parent name", reason="the name is not UTF-16") from None
    return _printable(text.split("\0", 1)[0])


def decode_windows_path(text: str) -> str:
    """A Windows path as a POSIX one. Empty when the name is.

    A drive or a network share does not exist here: the last component is what remains, to be
    looked for beside the child, where the identity of the parent decides."""
    foreign = _DRIVE.match(text) or text.startswith(("\\\\", "//"))
    path = text.replace("\\", "/")
    return _plain(path.rstrip("/").rpartition("/")[2] if foreign else path)


def _decode_file_url(raw: bytes) -> tuple[str, ...]:
    """Both readings of a URL: XAPI writes its path as it is, everyone else quotes it."""
    raw = raw.rstrip(b"\0")
    if raw[:7].lower() == b"file://":
        raw = raw[7:]
        if raw.startswith(b"localhost/"):
            raw = raw[len(b"localhost") :]
    elif _SCHEME.match(raw):
        reason = f"URL {raw[:32]!r} does not begin with file://"
        raise CorruptMetadata("parent name", reason=reason)
    unquoted = _PERCENT.sub(lambda found: bytes([int(found[1], 16)]), raw)
    try:
        readings = [_printable(reading.decode()) for reading in (unquoted, raw)]
    except UnicodeDecodeError:
        raise CorruptMetadata("parent name", reason="the URL is not UTF-8") from None
    return tuple(dict.fromkeys(_plain(reading) for reading in readings))


def _decode_old_text(raw: bytes) -> str:
    """8-bit text; some writers put 16-bit text under the old codes as well."""
    if len(raw) > 1 and not any(raw[1::2]):
        return decode_utf16(raw, big_endian=False)
    return _printable(raw.split(b"\0", 1)[0].decode("cp1252", errors="replace"))


def _decode_alias(raw: bytes) -> str:
    """The file's own name from a Macintosh alias record of version 2.

    The folders in it are numbers of a volume that is not here: the name is looked for beside the
    child, where the identity of the parent decides. Layout: 16-bit version at byte 6, the name
    as a length and at most 63 bytes of Mac Roman at byte 50."""
    if len(raw) < _ALIAS_NAME_END or int.from_bytes(raw[6:8], "big") != _ALIAS_VERSION:
        raise CorruptMetadata("parent name", reason="the alias record is not of version 2")
    count = raw[_ALIAS_NAME]
    if not 0 < count < _ALIAS_NAME_END - _ALIAS_NAME:
        raise CorruptMetadata("parent name", reason=f"the alias has a name of {count} bytes")
    name = raw[_ALIAS_NAME + 1 : _ALIAS_NAME + 1 + count].decode("mac_roman")
    # A colon separates folders there, as a slash does here; a slash is a plain letter.
    return _plain(_printable(name.replace("/", ":")))


def _plain(path: str) -> str:
    """Without leading `./`; an absolute path keeps one slash."""
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    return "/" + path.lstrip("/") if path.startswith("/") else path


def _printable(text: str) -> str:
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in text):
        raise CorruptMetadata("parent name", reason="the name holds control characters")
    return text


def _quote(raw: bytes) -> bytes:
    return b"".join(bytes([byte]) if byte in _UNRESERVED else b"%%%02X" % byte for byte in raw)
