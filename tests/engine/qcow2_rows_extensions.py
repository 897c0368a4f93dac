"""Rows 22 to 35: files whose extensions or bitmaps are broken, and what is said of them."""

from __future__ import annotations

from qcowkit.codecs.qcow2.extensions import ExtensionType
from qcowkit.codecs.qcow2.header import Autoclear
from qcowkit.errors import UnsupportedFeature
from tests.engine.qcow2_rows import (
    BITMAPS,
    CLUSTER,
    SMALL_LUKS,
    backing_byte,
    extension,
    extension_field,
    fields,
    patch,
    row,
)

EXTENSION_ROWS = [
    row(
        22,
        "header extension at host offset 0x70: 4 bytes left, expected 8",
        fields(backing_file_offset=116, backing_file_size=1),
        unknown=[extension(7, b"")],
    ),
    row(
        22,
        (
            "header extension 0x12345678 at host offset 0x70: 2147483647 bytes, expected "
            "at most the 3976 that are left"
        ),
        extension_field(-4, 0x7FFFFFFF, 4),
        unknown=[extension(0x12345678, b"")],
    ),
    row(
        22,
        (
            "header extension 0x00000007 at host offset 0x70: 9 bytes, expected at most "
            "the 8 that are left"
        ),
        fields(backing_file_offset=128, backing_file_size=1),
        unknown=[extension(7, b"123456789")],
    ),
    row(
        23,
        "backing format extension at host offset 0x80: a second one, expected one",
        unknown=[extension(ExtensionType.BACKING_FORMAT, b"raw")],
        backing_format="raw",
    ),
    row(
        23,
        "data file name extension at host offset 0x80: a second one, expected one",
        unknown=[extension(ExtensionType.DATA_FILE, b"d")] * 2,
    ),
    row(
        23,
        "header extensions at host offset 0x870: more than 256 of them",
        unknown=[extension(7, b"")] * 257,
    ),
    row(
        24,
        "backing format extension: name of 16 bytes, expected at most 15",
        unknown=[extension(ExtensionType.BACKING_FORMAT, b"r" * 16)],
    ),
    row(
        24,
        "backing format extension: 'rawr' is not the name of a known format",
        None,
        UnsupportedFeature,
        unknown=[extension(ExtensionType.BACKING_FORMAT, b"rawr")],
    ),
    row(
        24,
        ("backing format extension: byte 0x00 at 3 of the name, expected no control characters"),
        unknown=[extension(ExtensionType.BACKING_FORMAT, b"raw\0")],
    ),
    row(
        25,
        (
            "header field backing_file_offset at host offset 0x8: 0x1001 is above the "
            "cluster size 0x1000"
        ),
        fields(backing_file_offset=CLUSTER + 1),
        backing_name="base",
    ),
    row(
        25,
        (
            "header field backing_file_offset at host offset 0x8: 0x68 lies inside the "
            "header of 112 bytes"
        ),
        fields(backing_file_offset=104),
        backing_name="base",
    ),
    row(
        25,
        ("header field backing_file_size at host offset 0x10: 1024, expected at most 1023"),
        fields(backing_file_size=1024),
        backing_name="base",
    ),
    row(
        25,
        "header field backing_file_size at host offset 0x10: 9, expected at most 8",
        fields(backing_file_offset=CLUSTER - 8, backing_file_size=9),
        backing_name="base",
    ),
    row(
        25,
        (
            "backing file name at host offset 0x78: byte 0x00 at 1 of the name, expected "
            "no control characters"
        ),
        backing_byte(0),
        backing_name="base",
    ),
    row(
        25,
        (
            "backing file name at host offset 0x78: byte 0x0a at 1 of the name, expected "
            "no control characters"
        ),
        backing_byte(10),
        backing_name="base",
    ),
    row(
        26,
        "data file name extension: name of 1024 bytes, expected at most 1023",
        unknown=[extension(ExtensionType.DATA_FILE, b"d" * 1024)],
    ),
    row(
        27,
        "feature name table: 47 bytes, expected a multiple of 48",
        unknown=[extension(ExtensionType.FEATURE_NAMES, bytes(47))],
    ),
    row(
        28,
        "crypto header extension: 15 bytes, expected 16",
        unknown=[extension(ExtensionType.CRYPTO, bytes(15))],
    ),
    row(
        28,
        ("crypto header extension: present with encryption method 0, expected only with 2 (LUKS)"),
        unknown=[extension(ExtensionType.CRYPTO, bytes(16))],
    ),
    row(
        28,
        (
            "crypto header at host offset 0x1200: offset is not a multiple of the cluster "
            "size 0x1000"
        ),
        extension_field(0, 0x1200),
        luks=SMALL_LUKS,
    ),
    row(
        28,
        (
            "crypto header at host offset 0x10000000000: ends at 0x10000081000, past the "
            "end of the file at 0x85000"
        ),
        extension_field(0, 1 << 40),
        luks=SMALL_LUKS,
    ),
    row(
        28,
        "crypto header extension: 67108865 bytes, expected at most 67108864",
        extension_field(8, (64 << 20) + 1),
        luks=SMALL_LUKS,
    ),
    row(
        28,
        "crypto header extension: 591 bytes, expected at least 592",
        extension_field(8, 591),
        luks=SMALL_LUKS,
    ),
    row(
        28,
        (
            "crypto header at host offset 0x2000: ends at 0x102000, past the end of the "
            "file at 0x85000"
        ),
        extension_field(8, 1 << 20),
        luks=SMALL_LUKS,
    ),
]

BITMAP_ROWS = [
    row(
        30,
        "bitmaps extension: 23 bytes, expected 24",
        unknown=[extension(ExtensionType.BITMAPS, bytes(23))],
    ),
    row(
        30,
        "bitmaps extension: reserved field is 0x1, expected 0",
        extension_field(4, 1, 4),
        bitmaps=BITMAPS,
    ),
    row(
        30,
        "bitmaps extension: 0 bitmaps, expected 1 to 65535",
        extension_field(0, 0, 4),
        bitmaps=BITMAPS,
    ),
    row(
        30,
        "bitmaps extension: 65536 bitmaps, expected 1 to 65535",
        extension_field(0, 65536, 4),
        bitmaps=BITMAPS,
    ),
    row(
        30,
        "bitmaps extension: directory of 0 bytes, expected 1 to 67107840",
        extension_field(8, 0),
        bitmaps=BITMAPS,
    ),
    row(
        30,
        "bitmaps extension: directory of 67107841 bytes, expected 1 to 67107840",
        extension_field(8, 1024 * 65535 + 1),
        bitmaps=BITMAPS,
    ),
    row(
        30,
        (
            "bitmap directory at host offset 0x1200: offset is not a multiple of the "
            "cluster size 0x1000"
        ),
        extension_field(16, 0x1200),
        bitmaps=BITMAPS,
    ),
    row(
        30,
        "bitmaps extension: missing, expected one while its autoclear bit is set",
        fields(autoclear_features=Autoclear.BITMAPS),
    ),
    row(
        31,
        ("bitmap directory at host offset 0x3020, entry 1: 0 bytes left, expected at least 24"),
        extension_field(0, 2, 4),
        bitmaps=BITMAPS,
    ),
    row(
        31,
        ("bitmap directory at host offset 0x3000: 1 entries of 32 bytes, expected to fill 40"),
        extension_field(8, 40),
        bitmaps=BITMAPS,
    ),
    row(
        31,
        (
            "bitmap directory at host offset 0x3000, entry 0: 40 bytes, expected at most "
            "the 32 that are left"
        ),
        patch("bitmaps", 18, 9, 2),
        bitmaps=BITMAPS,
    ),
    row(
        31,
        (
            "bitmap directory at host offset 0x4020, entry 1: name 'b' is there twice, "
            "expected unique names"
        ),
        bitmaps=BITMAPS * 2,
    ),
    row(
        32,
        (
            "bitmap directory at host offset 0x3000, entry 0: table of 0 entries, "
            "expected 1 to 134217728"
        ),
        patch("bitmaps", 8, 0, 4),
        bitmaps=BITMAPS,
    ),
    row(
        32,
        (
            "bitmap directory at host offset 0x3000, entry 0: table of 134217729 entries, "
            "expected 1 to 134217728"
        ),
        patch("bitmaps", 8, 0x8000001, 4),
        bitmaps=BITMAPS,
    ),
    row(
        32,
        (
            "bitmap directory at host offset 0x3000, entry 0: table offset 0x0 is not a "
            "positive multiple of 0x1000"
        ),
        patch("bitmaps", 0, 0),
        bitmaps=BITMAPS,
    ),
    row(
        32,
        (
            "bitmap directory at host offset 0x3000, entry 0: table offset 0x1200 is not "
            "a positive multiple of 0x1000"
        ),
        patch("bitmaps", 0, 0x1200),
        bitmaps=BITMAPS,
    ),
    row(
        32,
        (
            "bitmap directory at host offset 0x3000, entry 0: table offset "
            "0xfffffffffffff000 ends above 2**63 - 1"
        ),
        patch("bitmaps", 0, (1 << 64) - CLUSTER),
        bitmaps=BITMAPS,
    ),
    row(
        33,
        ("bitmap directory at host offset 0x3000, entry 0: type 2, expected 1 (dirty tracking)"),
        patch("bitmaps", 16, 2, 1),
        bitmaps=BITMAPS,
    ),
    row(
        33,
        (
            "bitmap directory at host offset 0x3000, entry 0: granularity of 8 bits, "
            "expected 9 to 31"
        ),
        patch("bitmaps", 17, 8, 1),
        bitmaps=BITMAPS,
    ),
    row(
        33,
        (
            "bitmap directory at host offset 0x3000, entry 0: granularity of 32 bits, "
            "expected 9 to 31"
        ),
        patch("bitmaps", 17, 32, 1),
        bitmaps=BITMAPS,
    ),
    row(
        33,
        ("bitmap directory at host offset 0x3000, entry 0: flags 0x4, expected at most 0x3"),
        patch("bitmaps", 12, 4, 4),
        bitmaps=BITMAPS,
    ),
    row(
        33,
        ("bitmap directory at host offset 0x3000, entry 0: name of 1024 bytes, expected 1 to 1023"),
        patch("bitmaps", 18, 1024, 2),
        bitmaps=BITMAPS,
    ),
    row(
        33,
        ("bitmap directory at host offset 0x3000, entry 0: name of 0 bytes, expected 1 to 1023"),
        patch("bitmaps", 18, 0, 2),
        bitmaps=BITMAPS,
    ),
    row(
        33,
        ("bitmap directory at host offset 0x3000, entry 0: 8 bytes of extra data, expected 0"),
        patch("bitmaps", 20, 8, 4),
        bitmaps=BITMAPS,
    ),
    row(
        33,
        "bitmap directory at host offset 0x3000, entry 0: name is not UTF-8 at byte 0",
        patch("bitmaps", 24, 0xFF, 1),
        bitmaps=BITMAPS,
    ),
    row(
        34,
        (
            "bitmap directory at host offset 0x3000, entry 0: 536875008 bytes of bits, "
            "expected at most 536870912"
        ),
        patch("bitmaps", 8, 131073, 4),
        bitmaps=BITMAPS,
    ),
    row(
        35,
        (
            "bitmap directory at host offset 0x3000, entry 0: covers 16777216 bytes, "
            "expected the disk of 134217728"
        ),
        patch("bitmaps", 17, 9, 1),
        bitmaps=BITMAPS,
        size=1 << 27,
        cluster_bits=12,
    ),
]
