"""Rows 1 to 21: files whose header or tables are broken, and what is said of them."""

from __future__ import annotations

from qcowkit.codecs.qcow2.extensions import ExtensionType
from qcowkit.codecs.qcow2.header import Autoclear, Incompatible
from qcowkit.errors import UnsupportedFeature
from tests.engine.qcow2_rows import (
    BITMAPS,
    CLUSTER,
    SMALL_LUKS,
    SNAPSHOTS,
    cut,
    extension,
    feature_name,
    fields,
    onto,
    patch,
    row,
)

HEADER_ROWS = [
    row(1, "header: 0 bytes, expected at least 72", cut(0)),
    row(1, "header: 71 bytes, expected at least 72", cut(71), version=2),
    row(1, "header: 103 bytes, expected at least 104", cut(103)),
    row(
        1,
        ("header field header_length at host offset 0x64: 112, but the file has 111 bytes"),
        cut(111),
    ),
    row(
        2,
        "header field magic at host offset 0x0: 514649fa, expected 514649fb",
        fields(magic=0x514649FA),
    ),
    row(3, "qcow2 version 1: expected version 2 or 3", fields(version=1), UnsupportedFeature),
    row(3, "qcow2 version 4: expected version 2 or 3", fields(version=4), UnsupportedFeature),
    row(
        4,
        "header field cluster_bits at host offset 0x14: 8, expected 9 to 21",
        fields(cluster_bits=8),
    ),
    row(
        4,
        "header field cluster_bits at host offset 0x14: 22, expected 9 to 21",
        fields(cluster_bits=22),
    ),
    row(
        4,
        "header field cluster_bits at host offset 0x14: 4294967295, expected 9 to 21",
        fields(cluster_bits=0xFFFFFFFF),
    ),
    row(
        5,
        (
            "header field header_length at host offset 0x64: 96, expected 104 to the "
            "cluster size 4096"
        ),
        fields(header_length=96),
    ),
    row(
        5,
        (
            "header field header_length at host offset 0x64: 4104, expected 104 to the "
            "cluster size 4096"
        ),
        fields(header_length=CLUSTER + 8),
    ),
    row(
        5,
        "header field header_length at host offset 0x64: 116 is not a multiple of 8",
        fields(header_length=116),
    ),
    row(
        7,
        "header field refcount_order at host offset 0x60: 7, expected 0 to 6",
        fields(refcount_order=7),
    ),
    row(
        8,
        "encryption method 3: expected 0 (none), 1 or 2",
        fields(crypt_method=3),
        UnsupportedFeature,
    ),
    row(8, "crypto header extension: missing, expected one for LUKS", fields(crypt_method=2)),
    row(
        9,
        "incompatible feature bit 5: the image needs it, and it is not known here",
        fields(incompatible_features=1 << 5),
        UnsupportedFeature,
    ),
    row(
        9,
        (
            "incompatible feature bit 7, incompatible feature bit 63 ('\\x1bteleport'): "
            "the image needs it, and it is not known here"
        ),
        fields(incompatible_features=1 << 63 | 1 << 7 | 1),
        UnsupportedFeature,
        unknown=[extension(ExtensionType.FEATURE_NAMES, feature_name(0, 63, b"\x1bteleport"))],
    ),
    row(
        12,
        (
            "header field compression_type at host offset 0x68: 0 (zlib), expected "
            "another while its feature bit is set"
        ),
        fields(incompatible_features=Incompatible.COMPRESSION),
    ),
    row(
        12,
        (
            "header field compression_type at host offset 0x68: 1, expected 0 while its "
            "feature bit is clear"
        ),
        fields(compression_type=1),
    ),
    row(
        12,
        "compression type 2: expected 0 (zlib) or 1 (zstd)",
        fields(compression_type=2),
        UnsupportedFeature,
    ),
    row(
        12,
        (
            "header field compression_type at host offset 0x68: 0 (zlib), expected "
            "another while its feature bit is set"
        ),
        fields(header_length=104, incompatible_features=Incompatible.COMPRESSION),
    ),
    row(
        13,
        (
            "header field autoclear_features at host offset 0x58: the raw external data "
            "bit is set, expected clear without an external data file"
        ),
        fields(autoclear_features=Autoclear.DATA_FILE_RAW),
    ),
    row(
        13,
        ("header field nb_snapshots at host offset 0x3c: 1, expected 0 with an external data file"),
        fields(nb_snapshots=1),
        data_file_name="d",
    ),
    row(
        13,
        (
            "header field backing_file_offset at host offset 0x8: 0x88, expected 0 with a "
            "raw external data file"
        ),
        data_file_name="d",
        data_file_raw=True,
        backing_name="b",
    ),
    row(
        13,
        "data file name extension: missing, expected one with an external data file",
        fields(incompatible_features=Incompatible.DATA_FILE),
    ),
    row(
        14,
        (
            "header field cluster_bits at host offset 0x14: 13, expected at least 14 with "
            "extended L2 entries"
        ),
        fields(incompatible_features=Incompatible.EXTENDED_L2),
        cluster_bits=13,
    ),
    row(
        15,
        (
            "header field size at host offset 0x18: 9223372036854775808, expected at most "
            "9223372036854775807"
        ),
        fields(size=1 << 63),
    ),
    row(
        15,
        (
            "header field size at host offset 0x18: 9223372036854775296 needs "
            "281474976710656 L1 entries, expected at most 2147483647"
        ),
        fields(size=(1 << 63) - 512),
        cluster_bits=9,
    ),
    row(
        15,
        ("header field l1_size at host offset 0x24: 1 entries, expected 2 for a disk of 4194304"),
        fields(size=4 << 20),
    ),
]

TABLE_ROWS = [
    row(
        16,
        ("header field l1_size at host offset 0x24: 4194305 entries, expected at most 4194304"),
        fields(l1_size=4194305),
    ),
    row(
        16,
        (
            "header field l1_table_offset at host offset 0x28: 0x1200 is not a multiple "
            "of the cluster size 0x1000"
        ),
        fields(l1_table_offset=0x1200),
    ),
    row(
        16,
        (
            "header field l1_table_offset at host offset 0x28: 0x7ffffffffffff000 with "
            "8000 bytes ends above 2**63 - 1"
        ),
        fields(l1_table_offset=(1 << 63) - CLUSTER),
        l1_size=1000,
    ),
    row(
        17,
        (
            "header field refcount_table_clusters at host offset 0x38: 0, expected at "
            "least 1; only a check may open the image"
        ),
        fields(refcount_table_clusters=0),
    ),
    row(
        17,
        ("header field refcount_table_clusters at host offset 0x38: 2049, expected at most 2048"),
        fields(refcount_table_clusters=2049),
    ),
    row(
        17,
        (
            "header field refcount_table_offset at host offset 0x30: 0x2200 is not a "
            "multiple of the cluster size 0x1000"
        ),
        fields(refcount_table_offset=0x2200),
    ),
    row(
        17,
        (
            "header field refcount_table_offset at host offset 0x30: 0xfffffffffffff000 "
            "with 4096 bytes ends above 2**63 - 1"
        ),
        fields(refcount_table_offset=(1 << 64) - CLUSTER),
    ),
    row(
        18,
        "header field nb_snapshots at host offset 0x3c: 65537, expected at most 65536",
        fields(nb_snapshots=65537),
        snapshots=SNAPSHOTS,
    ),
    row(
        18,
        (
            "header field snapshots_offset at host offset 0x40: 0x1200 is not a multiple "
            "of the cluster size 0x1000"
        ),
        fields(snapshots_offset=0x1200),
        snapshots=SNAPSHOTS,
    ),
    row(
        18,
        (
            "snapshot table at host offset 0x4000, entry 0: 1025 bytes of extra data, "
            "expected at most 1024"
        ),
        patch("snapshots", 36, 1025, 4),
        snapshots=SNAPSHOTS,
    ),
    row(
        18,
        (
            "snapshot table at host offset 0x4000, entry 0: 15 bytes of extra data, "
            "expected at least 16"
        ),
        patch("snapshots", 36, 15, 4),
        snapshots=SNAPSHOTS,
    ),
    row(
        18,
        (
            "snapshot table at host offset 0x4000, entry 0: 65600 bytes, expected at most "
            "the 12288 that are left"
        ),
        patch("snapshots", 14, 0xFFFF, 2),
        snapshots=SNAPSHOTS,
    ),
    row(
        18,
        ("snapshot table at host offset 0x8000, entry 0: 0 bytes left, expected at least 40"),
        fields(nb_snapshots=3, snapshots_offset=0x8000),
        snapshots=SNAPSHOTS,
    ),
    row(
        18,
        "snapshot table at host offset 0x4000, entry 0: id is not UTF-8 at byte 0",
        patch("snapshots", 64, 0xFF, 1),
        snapshots=SNAPSHOTS,
    ),
    row(
        18,
        "snapshot table at host offset 0x4000, entry 0: name is not UTF-8 at byte 0",
        patch("snapshots", 65, 0xC3, 1),
        snapshots=SNAPSHOTS,
    ),
    row(
        18,
        (
            "snapshot table at host offset 0x4000, entry 1: id '1' is there twice, "
            "expected unique ids"
        ),
        patch("snapshots", 72 + 64, ord("1"), 1),
        snapshots=SNAPSHOTS,
    ),
    row(
        19,
        (
            "snapshot table at host offset 0x4000, entry 0: L1 table offset 0x1200 is not "
            "a multiple of 0x1000"
        ),
        patch("snapshots", 0, 0x1200),
        snapshots=SNAPSHOTS,
    ),
    row(
        19,
        (
            "snapshot table at host offset 0x4000, entry 0: L1 table of 4194305 entries, "
            "expected at most 4194304"
        ),
        patch("snapshots", 8, 4194305, 4),
        snapshots=SNAPSHOTS,
    ),
    row(
        19,
        (
            "snapshot table at host offset 0x4000, entry 0: L1 table offset "
            "0xfffffffffffff000 ends above 2**63 - 1"
        ),
        patch("snapshots", 0, (1 << 64) - CLUSTER),
        snapshots=SNAPSHOTS,
    ),
    row(
        19,
        (
            "snapshot table at host offset 0x4000, entry 0: disk size "
            "9223372036854775808, expected at most 9223372036854775807"
        ),
        patch("snapshots", 48, 1 << 63),
        snapshots=SNAPSHOTS,
    ),
    row(
        20,
        ("L1 table at host offset 0x4000: ends at 0x4008, past the end of the file at 0x4000"),
        fields(l1_table_offset=0x4000),
    ),
    row(
        20,
        ("L1 table at host offset 0x1000: ends at 0x11000, past the end of the file at 0x4000"),
        fields(l1_size=0x2000),
    ),
    row(
        20,
        (
            "refcount table at host offset 0x2000: ends at 0x6000, past the end of the "
            "file at 0x4000"
        ),
        fields(refcount_table_clusters=4),
    ),
    row(
        20,
        ("snapshot table at host offset 0x100000, entry 0: 0 bytes left, expected at least 40"),
        fields(snapshots_offset=0x100000),
        snapshots=SNAPSHOTS,
    ),
    row(
        20,
        (
            "snapshot L1 table at host offset 0x100000: ends at 0x100008, past the end of "
            "the file at 0x7000"
        ),
        patch("snapshots", 0, 0x100000),
        snapshots=SNAPSHOTS,
    ),
    row(
        20,
        (
            "bitmap table at host offset 0x100000: ends at 0x100008, past the end of the "
            "file at 0x6000"
        ),
        patch("bitmaps", 0, 0x100000),
        bitmaps=BITMAPS,
    ),
    row(
        21,
        "L1 table at host offset 0x0: overlaps the header, which ends at 0x1000",
        fields(l1_table_offset=0),
    ),
    row(
        21,
        ("refcount table at host offset 0x2000: overlaps the L1 table, which ends at 0x3000"),
        onto("l1_table_offset", "refcount_table"),
    ),
    row(
        21,
        ("refcount table at host offset 0x1000: overlaps the L1 table, which ends at 0x2000"),
        onto("refcount_table_offset", "l1"),
    ),
    row(
        21,
        ("snapshot table at host offset 0x0, entry 0: 1 bytes of extra data, expected at least 16"),
        fields(snapshots_offset=0),
        snapshots=SNAPSHOTS,
    ),
    row(
        21,
        ("snapshot table at host offset 0x4000: overlaps the L1 table, which ends at 0x5000"),
        onto("l1_table_offset", "snapshots"),
        snapshots=SNAPSHOTS,
    ),
    row(
        21,
        ("crypto header at host offset 0x2000: overlaps the refcount table, which ends at 0x3000"),
        onto("refcount_table_offset", "crypto"),
        luks=SMALL_LUKS,
    ),
    row(
        21,
        (
            "bitmap directory at host offset 0x3000: overlaps the refcount table, which "
            "ends at 0x4000"
        ),
        onto("refcount_table_offset", "bitmaps"),
        bitmaps=BITMAPS,
    ),
]
