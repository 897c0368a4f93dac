"""What a file is, by head and tail."""

from __future__ import annotations

import struct

import pytest

from qcowkit.errors import UnknownFormat
from qcowkit.image.probe import find_formats, probe_format
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import build_qcow2
from tests.corpus import Entry, corpus_root, entry_id, sound_images, unpack

COOKIE = b"conectix"


def padded(head: bytes = b"", *, tail: bytes = b"", size: int = 4096) -> bytes:
    return head.ljust(size - 512, b"\0") + tail.ljust(512, b"\0")


def probe(data: bytes) -> str:
    return probe_format(MemoryStorage(data, name="disk"))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "raw"),
        (b"conect", "raw"),
        (bytes(511), "raw"),
        (bytes(1 << 16), "raw"),
        (build_qcow2().to_bytes(), "qcow2"),
        (build_qcow2(version=2).to_bytes(), "qcow2"),
        (padded(COOKIE), "vpc"),
        (padded(tail=COOKIE), "vpc"),
        (padded(COOKIE, tail=COOKIE), "vpc"),
        (COOKIE.ljust(512, b"\0"), "vpc"),
        # A qcow2 of a version to come is still a qcow2, which its loader refuses.
        (padded(b"QFI\xfb\0\0\0\4"), "qcow2"),
        (padded(b"\0QFI\xfb"), "raw"),
    ],
)
def test_a_format_is_found_by_head_and_tail(data: bytes, expected: str) -> None:
    assert probe(data) == expected


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (padded(b"KDMV"), "VMDK"),
        (padded(b"COWD"), "VMDK"),
        (padded(b"# Disk DescriptorFile\nversion=1\n"), "VMDK"),
        (padded(b"vhdxfile"), "VHDX"),
        (padded(b"<<< VDI >>>".ljust(64, b"\0") + struct.pack("<I", 0xBEDA107F)), "VDI"),
        (padded(b"QFI\xfb\0\0\0\1"), "qcow (version 1)"),
        (padded(b"QED\0"), "QED"),
        (padded(b"WithoutFreeSpace"), "Parallels"),
        (padded(b"WithouFreSpacExt"), "Parallels"),
        (padded(b"Bochs Virtual HD Image\0"), "Bochs"),
        (padded(b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0\n"), "cloop"),
        (padded(tail=b"koly"), "DMG"),
    ],
)
def test_a_foreign_format_is_refused_by_name(data: bytes, name: str) -> None:
    with pytest.raises(UnknownFormat) as caught:
        probe(data)
    assert str(caught.value) == f"disk: the content is {name}, expected qcow2, vpc, luks or raw"


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (build_qcow2().to_bytes() + padded(tail=COOKIE), "qcow2 and vpc"),
        (padded(b"KDMV", tail=COOKIE), "vpc and VMDK"),
        (build_qcow2().to_bytes() + padded(tail=b"koly"), "qcow2 and DMG"),
        (padded(COOKIE, tail=b"koly"), "vpc and DMG"),
        (
            padded(b"QFI\xfb\0\0\0\3".ljust(64, b"\0") + b"\x7f\x10\xda\xbe"),
            "qcow2 and VDI",
        ),
    ],
)
def test_two_formats_at_once_are_refused(data: bytes, names: str) -> None:
    with pytest.raises(UnknownFormat) as caught:
        probe(data)
    assert str(caught.value) == (f"disk: the content is {names} at once, expected one format")


def test_all_magics_are_reported_to_who_wants_them() -> None:
    data = padded(b"KDMV", tail=b"koly")
    assert find_formats(MemoryStorage(data)) == ("VMDK", "DMG")


@pytest.mark.skipif(corpus_root() is None, reason="there is no corpus")
@pytest.mark.parametrize("entry", sound_images(), ids=entry_id)
def test_the_corpus_is_probed_as_it_is_declared(entry: Entry, tmp_path: object) -> None:
    path = unpack(entry, tmp_path)  # type: ignore[arg-type]
    assert probe(path.read_bytes()) == entry["format"]
