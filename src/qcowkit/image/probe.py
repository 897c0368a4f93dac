"""What a file is, by its content: the head and the tail. Numpy-free; reads 2 KiB at most.

A guest can write any magic into a raw disk. So a probed answer is good for showing and for reading
files that are trusted; whoever writes must be told the format."""

from __future__ import annotations

from typing import Literal

from qcowkit.errors import UnknownFormat
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR

FormatName = Literal["qcow2", "vpc", "luks", "raw"]

_HEAD_BYTES = 1024
_QCOW_MAGIC = b"QFI\xfb"
_VHD_COOKIE = b"conectix"
_LUKS_MAGIC = b"LUKS\xba\xbe"

# (offset in the head, magic, name of the format)
_FOREIGN_HEADS = (
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"QED\0", "QED"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0, b"Bochs Virtual HD Image", "Bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
)
_DMG_TAIL = b"koly"


def find_formats(storage: Storage) -> tuple[str, ...]:
    """The names of all formats whose magic is there: our own in lower case, foreign ones as their
    makers spell them. Empty for a raw disk. Raises StorageError."""
    size = storage.size()
    head = storage.pread(_HEAD_BYTES, offset=0)
    tail = storage.pread(SECTOR, offset=size - SECTOR) if size >= SECTOR else b""
    found = []
    if head.startswith(_QCOW_MAGIC):
        # Version 1 shares the magic, and nothing else, with its successors.
        found.append("qcow (version 1)" if head[4:8] == b"\0\0\0\1" else "qcow2")
    if head.startswith(_VHD_COOKIE) or tail.startswith(_VHD_COOKIE):
        found.append("vpc")
    if head.startswith(_LUKS_MAGIC):
        found.append("luks")
    found += [name for offset, magic, name in _FOREIGN_HEADS if head.startswith(magic, offset)]
    if tail.startswith(_DMG_TAIL):
        found.append("DMG")
    return tuple(found)


def probe_format(storage: Storage) -> FormatName:
    """The format of the content; `raw` where no magic is found.

    Raises UnknownFormat for a format that is known but cannot be opened, and where the magics of
    several formats are found."""
    found = find_formats(storage)
    if len(found) > 1:
        names = " and ".join(found)
        raise UnknownFormat(f"{storage.name}: the content is {names} at once, expected one format")
    if not found:
        return "raw"
    match found[0]:
        case "qcow2":
            return "qcow2"
        case "vpc":
            return "vpc"
        case "luks":
            return "luks"
        case name:
            raise UnknownFormat(
                f"{storage.name}: the content is {name}, expected qcow2, vpc, luks or raw"
            )
