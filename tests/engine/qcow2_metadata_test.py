"""The validation rows of docs/formats/qcow2.md: for each a file that fails, and what is said."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.budget import TRUSTED, UNTRUSTED, Budget
from qcowkit.codecs.qcow2.extensions import ExtensionType
from qcowkit.codecs.qcow2.header import Compatible, Incompatible
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_bitmap_table, load_qcow2_metadata
from qcowkit.errors import (
    BudgetExceeded,
    CorruptMetadata,
    QcowkitError,
    RequestError,
)
from qcowkit.references import Reference, ReferenceKind
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import (
    BitmapSpec,
    BuiltImage,
    Compressed,
    SnapshotSpec,
    build_qcow2,
)
from qcowkit.units import EiB, KiB
from tests.engine.qcow2_rows import BITMAPS, CLUSTER, SMALL_LUKS, SNAPSHOTS, Row, extension, spoiled
from tests.engine.qcow2_rows_extensions import BITMAP_ROWS, EXTENSION_ROWS
from tests.engine.qcow2_rows_header import HEADER_ROWS, TABLE_ROWS

ALL_ROWS = HEADER_ROWS + TABLE_ROWS + EXTENSION_ROWS + BITMAP_ROWS


def load(image: BuiltImage, **options: Any) -> Qcow2Metadata:
    storage = MemoryStorage(image.to_bytes(), writable=False)
    return load_qcow2_metadata(storage, budget=options.pop("budget", TRUSTED), **options)


@pytest.mark.pinned(
    "bytes of the plain header and layout",
    "extended_l2",
    "compat=0.10",
    "compression_type=zstd",
    "cluster_size=512",
)
@pytest.mark.parametrize(
    "case", ALL_ROWS, ids=[f"row-{case.number}-{index}" for index, case in enumerate(ALL_ROWS)]
)
def test_a_file_that_breaks_a_row_is_refused_with_its_message(case: Row) -> None:
    image = spoiled(case)
    with pytest.raises(case.error) as caught:
        load(image)
    assert str(caught.value) == case.says


@pytest.mark.pinned("a disk of the largest size", "extended_l2")
@pytest.mark.parametrize(
    "case", ALL_ROWS, ids=[f"row-{case.number}-{index}" for index, case in enumerate(ALL_ROWS)]
)
def test_a_file_that_breaks_a_row_is_sound_before_it_is_spoiled(case: Row) -> None:
    if case.spoil is not None:
        load(build_qcow2(**case.spec))


def test_every_row_up_to_35_is_broken_by_some_file_or_is_about_keeping() -> None:
    kept = {6, 10, 11, 29}
    assert {case.number for case in ALL_ROWS} | kept == set(range(1, 36))


def test_row_6_unknown_header_bytes_are_kept() -> None:
    metadata = load(build_qcow2(unknown_fields=b"from the future.", backing_name="b"))
    assert metadata.header.header_length == 128
    assert metadata.header.unknown == bytes(7) + b"from the future."
    assert metadata.backing_name == "b"


@pytest.mark.pinned("writes the feature bits", "compat=0.10", "compression_type=zstd")
@pytest.mark.parametrize("bit", [Incompatible.DIRTY, Incompatible.CORRUPT])
def test_row_10_a_dirty_or_corrupt_image_opens_for_reading_and_is_not_touched(
    bit: Incompatible,
) -> None:
    image = build_qcow2().set_field("incompatible_features", bit)
    storage = MemoryStorage(image.to_bytes())
    metadata = load_qcow2_metadata(storage, budget=TRUSTED)
    assert (metadata.dirty, metadata.corrupt) == (
        bit is Incompatible.DIRTY,
        bit is Incompatible.CORRUPT,
    )
    assert storage.to_bytes() == image.to_bytes()


@pytest.mark.pinned("feature bits", "compat=0.10")
def test_row_11_unknown_compatible_and_autoclear_bits_are_let_pass() -> None:
    image = build_qcow2()
    image.set_field("compatible_features", 1 << 40 | Compatible.LAZY_REFCOUNTS)
    image.set_field("autoclear_features", 1 << 41)
    metadata = load(image)
    assert metadata.lazy_refcounts
    assert metadata.header.compatible_features == 1 << 40 | 1
    assert metadata.header.autoclear_features == 1 << 41


def test_row_17_a_check_may_open_an_image_without_a_refcount_table() -> None:
    image = build_qcow2().set_field("refcount_table_clusters", 0)
    assert load(image, for_check=True).header.refcount_table_clusters == 0


@pytest.mark.pinned("host offsets of the plain layout", "cluster_size=512")
def test_row_20_a_file_may_end_inside_its_last_table() -> None:
    image = build_qcow2(l1_size=500)
    table = image.data[0x1000:0x2000]
    image.set_field("l1_table_offset", len(image.data))
    image.data.extend(table[:8])
    assert load(image).header.l1_bytes == 4000


def test_row_29_unknown_extensions_are_kept_in_order_and_byte_for_byte() -> None:
    first, second = extension(0xFEEDBEEF, b"abc"), extension(0x11111111, b"")
    metadata = load(build_qcow2(unknown=[first, second], backing_name="b", backing_format="raw"))
    assert metadata.extensions.unknown == (first, second)


def test_row_30_stale_bitmaps_are_ignored_with_a_warning() -> None:
    image = build_qcow2(bitmaps=BITMAPS).set_field("autoclear_features", 0)
    image.patch(image.places["bitmaps"], 0xFFFFFFFFFFFFFFFF)
    metadata = load(image)
    assert metadata.bitmaps == ()
    assert metadata.warnings == ("the bitmaps are stale and ignored: their autoclear bit is clear",)


def test_row_35_a_bitmap_in_use_may_be_too_short() -> None:
    image = build_qcow2(bitmaps=[BitmapSpec(name="b", flags=1)], size=1 << 27)
    image.patch(image.places["bitmaps"] + 17, 9, width=1)
    assert load(image).bitmaps[0].in_use


TABLE_ENTRIES = [
    (2, "bitmap table at host offset 0x3000, entry 0: reserved bits 0x2 are set, expected 0"),
    (
        1 << 56,
        "bitmap table at host offset 0x3000, entry 0: reserved bits 0x100000000000000 are set, "
        "expected 0",
    ),
    (
        0x2001,
        "bitmap table at host offset 0x3000, entry 0: 0x2001 has an offset and the all-ones bit, "
        "expected one of them",
    ),
    (
        0x2200,
        "bitmap table at host offset 0x3000, entry 0: offset 0x2200 is not a multiple of the "
        "cluster size 0x1000",
    ),
]


@pytest.mark.pinned("host offsets of the plain layout", "extended_l2", "cluster_size=512")
@pytest.mark.parametrize(("word", "says"), TABLE_ENTRIES)
def test_row_36_a_malformed_bitmap_table_entry_is_refused(word: int, says: str) -> None:
    image = build_qcow2(bitmaps=[BitmapSpec(name="b", bits=b"\1")])
    image.patch(image.places["bitmap_table"], word)
    metadata = load(image)
    with pytest.raises(CorruptMetadata) as caught:
        load_bitmap_table(
            MemoryStorage(image.to_bytes()), metadata.bitmaps[0], geometry=metadata.geometry
        )
    assert str(caught.value) == says


@pytest.mark.pinned("offsets for clusters of 4 KiB", "extended_l2")
def test_a_bitmap_table_gives_offsets_and_both_short_forms() -> None:
    image = build_qcow2(bitmaps=[BitmapSpec(name="b", granularity_bits=9)], size=1 << 26)
    metadata = load(image)
    image.patch(image.places["bitmap_table"], struct.pack(">QQQ", 0x1000, 1, 0))
    table = load_bitmap_table(
        MemoryStorage(image.to_bytes()), metadata.bitmaps[0], geometry=metadata.geometry
    )
    assert table.tolist()[:3] == [0x1000, 1, 0]


def test_version_2_has_extensions_where_version_3_has_feature_bits() -> None:
    # Type 0xe2792aca at byte 72 would be a set of unknown incompatible bits in version 3.
    metadata = load(build_qcow2(version=2, backing_name="base.img", backing_format="qcow2"))
    assert metadata.header.header_length == 72
    assert metadata.header.incompatible_features == 0
    assert metadata.references == (
        Reference(kind=ReferenceKind.BACKING, names=("base.img",), format="qcow2"),
    )


@pytest.mark.pinned("bytes of the plain header", "compat=0.10", "compression_type=zstd")
def test_a_header_of_104_bytes_is_read() -> None:
    metadata = load(build_qcow2().set_field("header_length", 104))
    assert (metadata.header.header_length, metadata.compression_type) == (104, "zlib")


def test_a_size_inside_a_sector_is_cut_down_with_a_warning() -> None:
    metadata = load(build_qcow2().set_field("size", 1000))
    assert metadata.virtual_size == 512
    assert metadata.warnings == ("the size 1000 is not a whole number of sectors and is cut",)


def test_a_disk_without_a_byte_is_fine() -> None:
    assert load(build_qcow2(size=0)).virtual_size == 0


def test_a_data_file_is_a_raw_reference() -> None:
    metadata = load(build_qcow2(data_file_name="guest.data", data_file_raw=True))
    assert metadata.data_file
    assert metadata.data_file_raw
    assert metadata.references == (
        Reference(kind=ReferenceKind.DATA, names=("guest.data",), format="raw"),
    )


def test_a_data_file_name_without_its_feature_bit_is_ignored_with_a_warning() -> None:
    metadata = load(build_qcow2(unknown=[extension(ExtensionType.DATA_FILE, b"/etc/passwd")]))
    assert metadata.references == ()
    assert metadata.warnings == (
        "the data file name is ignored: the image has no external data file",
    )


def test_a_backing_name_that_is_not_utf_8_keeps_its_bytes() -> None:
    image = build_qcow2(backing_name="b\udce4r")
    assert load(image).backing_name == "b\udce4r"


def test_zstd_is_named_by_its_type() -> None:
    assert load(build_qcow2(compression_type=1)).compression_type == "zstd"


@pytest.mark.parametrize(
    ("spec", "method"),
    [({}, None), ({"crypt_method": 1}, "aes"), ({"luks": SMALL_LUKS}, "luks")],
)
def test_encryption_is_recognised_and_does_not_hinder_loading(
    spec: dict[str, Any], method: str | None
) -> None:
    assert load(build_qcow2(**spec)).encrypted == method


@pytest.mark.pinned("host offsets of the plain layout", "cluster_size=512")
def test_snapshots_carry_all_that_is_recorded() -> None:
    spec = SnapshotSpec(
        id="7",
        name="größer",
        clusters={0: b"old"},
        disk_size=512 * KiB,
        date_sec=1_700_000_000,
        date_nsec=5,
        vm_clock_nsec=12_000_000_034,
        vm_state_size=5 << 32,
        icount=99,
        unknown_extra=b"12345678",
    )
    image = build_qcow2(snapshots=[spec])
    (entry,) = load(image).snapshots
    assert entry.l1_offset > image.places["l1"]
    assert replace(entry, l1_offset=0) == replace(
        entry,
        id="7",
        name="größer",
        l1_offset=0,
        l1_entries=1,
        date_sec=1_700_000_000,
        date_nsec=5,
        vm_clock_nsec=12_000_000_034,
        vm_state_size=5 << 32,
        disk_size=512 * KiB,
        icount=99,
        unknown_extra=b"12345678",
    )


def test_a_snapshot_without_extra_data_has_the_size_of_the_image() -> None:
    image = build_qcow2(version=2, snapshots=[SnapshotSpec(id="1", name="12345678")])
    # Without extra data the id begins where that was.
    image.patch(image.places["snapshots"] + 36, 0, width=4)
    image.patch(image.places["snapshots"] + 40, b"1twelve..")
    (entry,) = load(image).snapshots
    assert (entry.disk_size, entry.icount, entry.name) == (1 << 20, None, "twelve..")


def test_a_snapshot_is_found_by_id_before_name() -> None:
    specs = [SnapshotSpec(id="1", name="2"), SnapshotSpec(id="2", name="x")]
    metadata = load(build_qcow2(snapshots=specs))
    assert metadata.find_snapshot("2").name == "x"
    assert metadata.find_snapshot("x").id == "2"


def test_an_unknown_snapshot_is_a_bad_request() -> None:
    metadata = load(build_qcow2(snapshots=SNAPSHOTS))
    with pytest.raises(RequestError) as caught:
        metadata.find_snapshot("three")
    assert str(caught.value) == "there is no snapshot with the id or name 'three'"


def test_a_snapshot_table_longer_than_one_read_is_walked_to_its_end() -> None:
    specs = [SnapshotSpec(id=str(index), name="n" * 60_000) for index in range(40)]
    metadata = load(build_qcow2(snapshots=specs, cluster_bits=16))
    assert [entry.id for entry in metadata.snapshots] == [spec.id for spec in specs]
    assert {entry.name for entry in metadata.snapshots} == {"n" * 60_000}


def test_many_bitmaps_are_walked_to_the_last() -> None:
    specs = [BitmapSpec(name=f"{index:04}" + "n" * 1000) for index in range(1100)]
    metadata = load(build_qcow2(bitmaps=specs))
    assert [entry.name for entry in metadata.bitmaps] == [spec.name for spec in specs]


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (
            replace(TRUSTED, virtual_size=1 << 19),
            "virtual size: 1048576 is above the limit of 524288",
        ),
        (
            replace(TRUSTED, metadata_bytes=100),
            "snapshot table bytes: 144 is above the limit of 100",
        ),
        (
            replace(TRUSTED, metadata_bytes=150),
            "bitmap directory bytes: 1032 is above the limit of 150",
        ),
    ],
)
def test_a_budget_is_refused_before_anything_is_loaded(budget: Budget, says: str) -> None:
    image = build_qcow2(snapshots=SNAPSHOTS, bitmaps=[BitmapSpec(name="b" * 1001)])
    with pytest.raises(BudgetExceeded) as caught:
        load(image, budget=budget)
    assert str(caught.value) == says


@pytest.mark.pinned("a disk of the largest size", "extended_l2")
def test_a_huge_sparse_image_is_described_from_a_few_bytes() -> None:
    image = build_qcow2(cluster_bits=21, size=4096)
    image.set_field("size", 1 * EiB)
    image.set_field("l1_size", 2 * 1024 * 1024)
    image.set_field("l1_table_offset", len(image.data))
    image.cut(len(image.data) + (16 << 20))
    assert load(image, budget=UNTRUSTED).virtual_size == EiB


class CountingStorage(MemoryStorage):
    """Remembers how much was asked for."""

    wanted = 0

    def pread(self, length: int, *, offset: int) -> bytes:
        self.wanted += length
        return super().pread(length, offset=offset)


@pytest.mark.pinned(
    "bytes of the plain header and layout",
    "extended_l2",
    "compat=0.10",
    "compression_type=zstd",
    "cluster_size=512",
)
@pytest.mark.parametrize("case", ALL_ROWS, ids=lambda case: f"row-{case.number}")
def test_a_refusal_reads_little(case: Row) -> None:
    storage = CountingStorage(spoiled(case).to_bytes())
    with pytest.raises(case.error):
        load_qcow2_metadata(storage, budget=TRUSTED)
    assert storage.wanted <= 4 << 20


def test_loading_reads_nothing_of_the_guest() -> None:
    image = build_qcow2(clusters={0: b"data", 1: Compressed(payload=b"stored")})
    first = load(image)
    offset = image.places["l2"] + CLUSTER
    image.patch(offset, b"\xff" * CLUSTER)
    assert load(image) == first


@given(offset=st.integers(0, 0x6000), value=st.binary(min_size=1, max_size=12))
def test_only_our_errors_leave_a_damaged_file(offset: int, value: bytes) -> None:
    image = build_qcow2(
        snapshots=SNAPSHOTS, bitmaps=BITMAPS, backing_name="base", backing_format="raw"
    )
    image.patch(offset, value)
    with contextlib.suppress(QcowkitError):
        load(image, budget=UNTRUSTED)


def test_metadata_needs_no_numpy() -> None:
    code = "import qcowkit.engine.qcow2.metadata, sys; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
