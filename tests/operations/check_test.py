"""What a check finds, one kind of fault at a time, and how it tells."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcowkit.errors import Cancelled, StorageError, UnsupportedFeature
from qcowkit.operations.check import CheckResult, Verdict, check_image, open_for_check
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.qcow2_builder import (
    BitmapSpec,
    BuiltImage,
    Compressed,
    Data,
    SnapshotSpec,
    Verbatim,
    Zero,
    build_qcow2,
    make_luks_area,
)
from qcowkit.units import KiB, MiB
from tests.command import qcow

CLUSTER = 4 * KiB
COPIED = 1 << 63
COMPRESSED = 1 << 62
# Of the default image, where the sector count of a compressed descriptor begins.
COUNT_SHIFT = 58
BLOCK = 4096


def check(image: BuiltImage | bytes, format: str = "qcow2") -> CheckResult:
    raw = image.to_bytes() if isinstance(image, BuiltImage) else image
    return check_storage(MemoryStorage(raw), format)


def check_storage(storage: Storage, format: str = "qcow2", **options: Any) -> CheckResult:
    return check_image(open_for_check(storage, format=format), **options)


def texts(result: CheckResult) -> list[str]:
    return [f"{finding.severity.value}: {finding}" for finding in result.findings]


def make(**changes: Any) -> BuiltImage:
    """A disk with two data clusters, of 4 KiB each."""
    return build_qcow2(**{"clusters": {0: b"zero", 1: b"one"}, **changes})


def entry(image: BuiltImage, index: int, word: int, second: int | None = None) -> BuiltImage:
    """Replace an entry of the first L2 table."""
    step = 8 if second is None else 16
    image.patch(image.places["l2"] + index * step, word)
    return image if second is None else image.patch(image.places["l2"] + index * 16 + 8, second)


def set_count(image: BuiltImage, host: int, count: int) -> BuiltImage:
    """Replace a 16-bit refcount, by the host offset of its cluster."""
    size = 1 << image.header.cluster_bits
    return image.patch(image.places["refcount_block"] + host // size * 2, count, width=2)


def word_of(image: BuiltImage, index: int) -> int:
    place = image.places["l2"] + index * 8
    return int.from_bytes(image.data[place : place + 8], "big")


def host_of(image: BuiltImage, index: int) -> int:
    return word_of(image, index) & 0xFF_FFFF_FFFF_FE00


SOUND: dict[str, dict[str, Any]] = {
    "empty": {"clusters": {}},
    "version 2": {"version": 2},
    "1-bit refcounts": {"refcount_order": 0},
    "2-bit refcounts": {"refcount_order": 1},
    "4-bit refcounts": {"refcount_order": 2},
    "8-bit refcounts": {"refcount_order": 3},
    "32-bit refcounts": {"refcount_order": 5},
    "64-bit refcounts": {"refcount_order": 6},
    "clusters of 512 bytes": {"cluster_bits": 9},
    "clusters of 2 MiB": {"cluster_bits": 21, "size": 4 * MiB},
    "zeros": {"clusters": {0: Zero(), 1: Zero(payload=b"old"), 2: b"data"}},
    "extended": {
        "cluster_bits": 14,
        "extended_l2": True,
        "clusters": {0: Data(payload=b"x", bitmap=1), 3: Zero(), 4: Data(payload=b"", bitmap=0)},
    },
    "compressed": {"clusters": {n: Compressed(payload=bytes(3000)) for n in range(5)}},
    "snapshots": {
        "clusters": {0: b"data", 1: Compressed(payload=bytes(5000))},
        "snapshots": [SnapshotSpec(id="1"), SnapshotSpec(id="2", clusters={5: b"own"})],
    },
    "bitmaps": {"bitmaps": [BitmapSpec(name="a", bits=b"\1"), BitmapSpec(name="b")]},
    "LUKS": {"luks": make_luks_area()},
    "data file": {"data_file_name": "disk.raw", "data_file_raw": True},
}


@pytest.mark.parametrize("changes", SOUND.values(), ids=SOUND)
def test_a_sound_image_is_clean(changes: dict[str, Any]) -> None:
    result = check(make(**changes))
    assert texts(result) == []
    assert result.verdict is Verdict.CLEAN


@pytest.mark.parametrize("changes", SOUND.values(), ids=SOUND)
def test_the_end_of_the_image_is_that_of_its_last_cluster(changes: dict[str, Any]) -> None:
    image = make(**changes)
    assert check(image).image_end_offset == len(image.data)


def give_cluster(image: BuiltImage, host: int) -> None:
    """Entry 9 refers to that cluster too, and the refcount agrees."""
    entry(image, 9, host)
    set_count(image, host, 2)


def table_entry(image: BuiltImage, index: int, word: int) -> None:
    image.patch(image.places["refcount_table"] + index * 8, word)


def share_table(image: BuiltImage) -> None:
    """A second L1 entry for the same L2 table, with a refcount that agrees."""
    image.patch(image.places["l1"], image.places["l2"])
    image.patch(image.places["l1"] + 8, image.places["l2"])
    set_count(image, image.places["l2"], 2)


def mix_packed(image: BuiltImage) -> None:
    host = host_of(image, 0)
    entry(image, 0, host)
    entry(image, 1, COMPRESSED | host)
    set_count(image, host, 2)


Spoil = Callable[[BuiltImage], object]
# What is done to the image of `make`, and what must be among the findings.
FAULTS: dict[str, tuple[dict[str, Any], Spoil, str]] = {
    "leak": (
        {},
        lambda i: set_count(i, host_of(i, 0), 3),
        "leak: cluster at host offset 0x3000: refcount is 3, expected 1 from its references",
    ),
    "refcount too low": (
        {},
        lambda i: set_count(i, host_of(i, 1), 0),
        "corruption: cluster at host offset 0x4000: refcount is 0, expected 1 from its references",
    ),
    "refcount beyond the end": (
        {},
        lambda i: set_count(i, 300 * CLUSTER, 1),
        "leak: cluster at host offset 0x12c000: refcount is 1, expected 0 from its references; "
        "it lies beyond the end of the file",
    ),
    "L2 reserved bits": (
        {},
        lambda i: entry(i, 0, word_of(i, 0) | 0x3F00_0000_0000_00A0),
        "corruption: L2 table at host offset 0x2000, entry 0: reserved bits 0x3f000000000000a0 "
        "are set, expected 0",
    ),
    "L2 unaligned": (
        {},
        lambda i: entry(i, 0, COPIED | 0x3200),
        "corruption: L2 table at host offset 0x2000, entry 0: data cluster offset 0x3200 is not a "
        "multiple of the cluster size 0x1000",
    ),
    "data beyond the end": (
        {},
        lambda i: entry(i, 7, COPIED | 0x10_0000),
        "corruption: L2 table at host offset 0x2000, entry 7: data cluster offset 0x100000 is "
        "beyond the end of the file at 0x7000",
    ),
    "COPIED missing": (
        {},
        lambda i: entry(i, 0, host_of(i, 0)),
        "corruption: L2 table at host offset 0x2000, entry 0: COPIED is clear for the data "
        "cluster at 0x3000 with refcount 1, expected set",
    ),
    "COPIED wrong": (
        {"snapshots": [SnapshotSpec(id="1")]},
        lambda i: entry(i, 0, COPIED | host_of(i, 0)),
        "corruption: L2 table at host offset 0x2000, entry 0: COPIED is set for the data "
        "cluster at 0x3000 with refcount 2, expected clear",
    ),
    "zero flag in version 2": (
        {"version": 2},
        lambda i: entry(i, 5, 1),
        "corruption: L2 table at host offset 0x2000, entry 5: the zero flag of 0x1 is set in a "
        "version 2 image",
    ),
    "L1 reserved bits": (
        {},
        lambda i: i.patch(i.places["l1"], COPIED | 0x2000 | 0x101),
        "corruption: L1 table at host offset 0x1000, entry 0: reserved bits 0x101 are set, "
        "expected 0",
    ),
    "L1 unaligned": (
        {},
        lambda i: i.patch(i.places["l1"], COPIED | 0x2200),
        "corruption: L1 table at host offset 0x1000, entry 0: L2 table offset 0x2200 is not a "
        "multiple of the cluster size 0x1000",
    ),
    "L2 table beyond the end": (
        {},
        lambda i: i.patch(i.places["l1"], COPIED | 0x70_0000),
        "corruption: L1 table at host offset 0x1000, entry 0: L2 table offset 0x700000 is beyond "
        "the end of the file at 0x7000",
    ),
    "L1 COPIED missing": (
        {},
        lambda i: i.patch(i.places["l1"], 0x2000),
        "corruption: L1 table at host offset 0x1000, entry 0: COPIED is clear for the L2 table at "
        "0x2000 with refcount 1, expected set",
    ),
    "L2 table used twice": (
        {"size": 4 * MiB},
        share_table,
        "corruption: L2 table at host offset 0x2000: 2 entries of the L1 table refer to it, "
        "expected 1",
    ),
    "snapshot L1 entry beyond the end": (
        {"snapshots": [SnapshotSpec(id="7")]},
        lambda i: i.patch(0x5000, 0x90_0000),
        "corruption: L1 table of snapshot '7' at host offset 0x5000, entry 0: L2 table offset "
        "0x900000 is beyond the end of the file at 0x9000",
    ),
    "refcount table reserved bits": (
        {},
        lambda i: table_entry(i, 0, i.places["refcount_block"] | 3),
        "corruption: refcount table at host offset 0x5000, entry 0: reserved bits 0x3 are set, "
        "expected 0",
    ),
    "refcount block unaligned": (
        {},
        lambda i: table_entry(i, 1, 0x6200),
        "corruption: refcount table at host offset 0x5000, entry 1: refcount block offset 0x6200 "
        "is not a multiple of the cluster size 0x1000",
    ),
    "refcount block beyond the end": (
        {},
        lambda i: table_entry(i, 2, 1 << 63),
        "corruption: refcount table at host offset 0x5000, entry 2: refcount block offset "
        "0x8000000000000000 is beyond the end of the file at 0x7000",
    ),
    "refcount block used twice": (
        {},
        lambda i: table_entry(i, 1, i.places["refcount_block"]),
        "corruption: refcount block at host offset 0x6000: 1 other reference uses the same cluster",
    ),
    "no refcount table": (
        {},
        lambda i: i.set_field("refcount_table_clusters", 0),
        "corruption: header: there is no refcount table, expected one",
    ),
    "data in the header": (
        {},
        lambda i: give_cluster(i, 0x1000),
        "corruption: L1 table at host offset 0x1000: 1 other reference uses the same cluster",
    ),
    "data in an L2 table": (
        {},
        lambda i: give_cluster(i, 0x2000),
        "corruption: L2 table at host offset 0x2000: 1 other reference uses the same cluster",
    ),
    "data in a snapshot table": (
        {"snapshots": [SnapshotSpec(id="1", clusters={0: b"own"})]},
        lambda i: give_cluster(i, i.places["snapshots"]),
        "corruption: snapshot table at host offset 0x8000: 1 other reference uses the same cluster",
    ),
    "data and compressed data": (
        {},
        mix_packed,
        "corruption: compressed data at host offset 0x3000: 1 other reference uses the same "
        "cluster",
    ),
    "compressed COPIED": (
        {"clusters": {0: Compressed(payload=bytes(700))}},
        lambda i: entry(i, 0, word_of(i, 0) | COPIED),
        "corruption: L2 table at host offset 0x2000, entry 0: COPIED is set on compressed data at "
        "0x3000",
    ),
    "compressed beyond the end": (
        {"clusters": {0: Compressed(payload=bytes(700))}},
        lambda i: entry(i, 0, COMPRESSED | 1 << COUNT_SHIFT | 0x5F00),
        "corruption: L2 table at host offset 0x2000, entry 0: compressed data at 0x5f00 reach "
        "beyond the end of the file at 0x6000",
    ),
    "bitmap table reserved bits": (
        {"bitmaps": [BitmapSpec(name="b", bits=b"\1")]},
        lambda i: i.patch(i.places["bitmap_table"], 0x5002),
        "corruption: table of bitmap 'b' at host offset 0x6000, entry 0: 0x5002: reserved bits "
        "are set, expected 0",
    ),
    "bitmap table both": (
        {"bitmaps": [BitmapSpec(name="b", bits=b"\1")]},
        lambda i: i.patch(i.places["bitmap_table"], 0x5001),
        "corruption: table of bitmap 'b' at host offset 0x6000, entry 0: 0x5001: has an offset "
        "and the all-ones bit, expected one of them",
    ),
    "bitmap data unaligned": (
        {"bitmaps": [BitmapSpec(name="b", bits=b"\1")]},
        lambda i: i.patch(i.places["bitmap_table"], 0x5200),
        "corruption: table of bitmap 'b' at host offset 0x6000, entry 0: 0x5200: offset is not a "
        "multiple of the cluster size 0x1000",
    ),
    "bitmap data beyond the end": (
        {"bitmaps": [BitmapSpec(name="b", bits=b"\1")]},
        lambda i: i.patch(i.places["bitmap_table"], 0x50_0000),
        "corruption: table of bitmap 'b' at host offset 0x6000, entry 0: offset 0x500000 is "
        "beyond the end of the file at 0xa000",
    ),
    "bitmap data elsewhere": (
        {"bitmaps": [BitmapSpec(name="b", bits=b"\1")]},
        lambda i: i.patch(i.places["bitmap_table"], 0x3000),
        "corruption: data of bitmap 'b' at host offset 0x3000: 1 other reference uses the same "
        "cluster",
    ),
    "data file moved": (
        {"data_file_name": "disk.raw"},
        lambda i: entry(i, 1, COPIED | 0x5000),
        "corruption: L2 table at host offset 0x2000, entry 1: data cluster offset 0x5000 of an "
        "external data file differs from the guest's",
    ),
    "data file without COPIED": (
        {"data_file_name": "disk.raw"},
        lambda i: entry(i, 1, 0x1000),
        "corruption: L2 table at host offset 0x2000, entry 1: COPIED is clear for the data cluster "
        "at 0x1000 of an external data file, expected set",
    ),
    "compressed with a data file": (
        {"data_file_name": "disk.raw"},
        lambda i: entry(i, 1, COMPRESSED | 0x1000),
        "corruption: L2 table at host offset 0x2000, entry 1: compressed data at 0x1000 in an "
        "image with an external data file",
    ),
}

EXTENDED: dict[str, Any] = {"cluster_bits": 14, "extended_l2": True}
EXTENDED_FAULTS: dict[str, tuple[int, int, str]] = {
    "both bits": (
        COPIED | 0xC000,
        5 << 32 | 4,
        "subclusters 0x4 are both allocated and zero",
    ),
    "no host cluster": (0, 6, "subclusters 0x6 are allocated without a host cluster"),
    "bit 0": (COPIED | 0xC001, 1, "bit 0 of 0x800000000000c001 is set, which extended L2 entries "
              "reserve"),
    "compressed": (
        COMPRESSED | 0xC000,
        8,
        "subcluster bitmap of a compressed cluster is 0x8, expected 0",
    ),
}  # fmt: skip


@pytest.mark.pinned(
    "host offsets of the plain layout",
    "extended_l2",
    "refcount_bits=1",
    "refcount_bits=64",
    "cluster_size=512",
)
@pytest.mark.parametrize(("changes", "spoil", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_reported_with_its_place(
    changes: dict[str, Any], spoil: Spoil, expected: str
) -> None:
    image = make(**changes)
    spoil(image)
    result = check(image)
    assert expected in texts(result)
    leaks = all(text.startswith("leak") for text in texts(result))
    assert result.verdict is (Verdict.LEAKS if leaks else Verdict.CORRUPT)


@pytest.mark.parametrize(
    ("word", "bitmap", "reason"), EXTENDED_FAULTS.values(), ids=EXTENDED_FAULTS
)
def test_a_fault_of_an_extended_entry_is_reported(word: int, bitmap: int, reason: str) -> None:
    image = entry(make(**EXTENDED), 0, word, bitmap)
    result = check(image)
    assert f"corruption: L2 table at host offset 0x8000, entry 0: {reason}" in texts(result)
    assert result.verdict is Verdict.CORRUPT


@pytest.mark.pinned("host offsets of the plain layout", "extended_l2", "cluster_size=512")
def test_a_faulty_entry_does_not_hide_the_next() -> None:
    image = make()
    entry(image, 0, 0x3200)
    entry(image, 1, COPIED | 0x4000 | 0x10)
    set_count(image, 0x4000, 2)
    found = texts(check(image))
    assert any("entry 0: data cluster offset 0x3200" in text for text in found)
    assert any("entry 1: reserved bits 0x10" in text for text in found)
    assert (
        "leak: cluster at host offset 0x3000: refcount is 1, expected 0 from its references"
        in found
    )


def test_a_table_that_the_file_cuts_is_reported() -> None:
    image = build_qcow2(cluster_bits=9, size=4 * MiB, clusters={0: b"x"})
    place = image.places["l1"]
    # The last cluster of the L1 table alone is cut: a file may end in the middle of one.
    moved = len(image.data)
    image.data.extend(image.data[place : place + 1024])
    image.set_field("l1_table_offset", moved).cut(moved + 600)
    found = texts(check(image))
    assert any(
        "L1 table" in text and "the file ends after 600 of its 1024" in text for text in found
    )


@pytest.mark.pinned(
    "writes counts of 16 bits", "extended_l2", "refcount_bits=1", "refcount_bits=64"
)
def test_refcounts_of_a_cut_file_are_not_reported_beside_its_entries() -> None:
    image = make()
    # Both data clusters move behind the end; their refcounts go with them.
    for index, host in ((0, 0x20_0000), (1, 0x20_1000)):
        set_count(image, host_of(image, index), 0)
        entry(image, index, COPIED | host)
        set_count(image, host, 1)
    result = check(image)
    assert result.corruptions == 2
    assert result.leaks == 0


@pytest.mark.pinned(
    "writes the feature bits", "extended_l2", "compat=0.10", "compression_type=zstd"
)
def test_the_dirty_and_the_corrupt_bit_are_noted_and_are_no_fault() -> None:
    image = make().set_field("incompatible_features", 3)
    result = check(image)
    assert result.verdict is Verdict.CLEAN
    assert any("dirty bit" in note for note in result.notes)
    assert any("corrupt bit" in note for note in result.notes)


@pytest.mark.pinned("entries of 8 bytes", "extended_l2")
def test_only_the_first_thousand_findings_are_kept_and_all_are_counted() -> None:
    clusters = {index: Verbatim(word=1 << 40 | index << 12) for index in range(1500)}
    result = check(build_qcow2(size=8 * MiB, clusters=clusters))
    assert result.corruptions == 1500
    assert len(result.findings) == 1000
    assert "  and 500 more" in list(result.render())


def test_what_the_host_cannot_read_makes_the_check_fail() -> None:
    raw = make().to_bytes()
    quiet = FaultyStorage(MemoryStorage(raw))
    check_storage(quiet)
    failed = 0
    for call in range(1, quiet.calls["pread"] + 1):
        storage = FaultyStorage(MemoryStorage(raw), Fault(operation="pread", call=call))
        # What comes before the tables is needed: without it there is no check.
        try:
            result = check_storage(storage)
        except StorageError:
            continue
        assert result.verdict is Verdict.FAILED
        assert "EIO" in texts(result)[0]
        failed += 1
    assert failed >= 3


def test_a_check_can_be_cancelled() -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled, match=r"the check was cancelled\Z"):
        check_storage(MemoryStorage(make().to_bytes()), cancel=cancel)


@pytest.mark.pinned("host offsets of the plain layout", "extended_l2", "cluster_size=512")
def test_progress_ends_at_its_total() -> None:
    seen: list[tuple[int, int]] = []
    storage = MemoryStorage(make(size=64 * MiB, clusters={0: b"a", 9000: b"b"}).to_bytes())
    check_storage(storage, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2 * CLUSTER, 2 * CLUSTER)
    assert seen == sorted(seen)


def test_a_check_writes_nothing() -> None:
    image = make().patch(8, bytes(4))
    storage = FaultyStorage(MemoryStorage(image.to_bytes()))
    check_storage(storage)
    assert set(storage.calls) <= {"*", "pread", "size", "allocated", "close"}


def test_a_raw_disk_cannot_be_checked() -> None:
    with pytest.raises(UnsupportedFeature, match=r"a raw disk has no metadata"):
        check(bytes(1024), "raw")


# JSON and text


def test_json_leaves_out_what_is_zero() -> None:
    result = CheckResult(filename="a", format="qcow2", leaks=2, total_clusters=5)
    assert result.as_json() == {
        "filename": "a",
        "format": "qcow2",
        "check-errors": 0,
        "leaks": 2,
        "total-clusters": 5,
    }


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ({}, Verdict.CLEAN),
        ({"leaks": 1}, Verdict.LEAKS),
        ({"leaks": 1, "corruptions": 1}, Verdict.CORRUPT),
        ({"corruptions": 1, "check_errors": 1}, Verdict.FAILED),
    ],
)
def test_the_gravest_finding_is_the_verdict(counts: dict[str, Any], verdict: Verdict) -> None:
    assert CheckResult(filename="a", format="qcow2", **counts).verdict is verdict


@pytest.mark.pinned(
    "host offsets of the plain layout",
    "extended_l2",
    "refcount_bits=1",
    "refcount_bits=64",
    "cluster_size=512",
)
def test_the_text_says_the_verdict_first_and_lists_what_was_found() -> None:
    image = set_count(make(), 0x3000, 2)
    entry(image, 1, COPIED | 0x4000 | 0x10)
    lines = list(check(image).render())
    assert lines[0] == "<memory>: corrupt: data are damaged, or will be by further writing"
    assert "2 corruptions" in lines
    assert "1 leak" in lines
    assert lines[-2] == "clusters   2 of 256 allocated (0.78 %), 0.00 % fragmented"
    assert lines[-1] == "image end  28 KiB (28672 bytes)"


@pytest.mark.pinned("writes counts of 16 bits", "refcount_bits=1")
def test_the_command_gives_the_exit_codes_of_qemu_img(tmp_path: Path) -> None:
    cases = ((make(), 0), (set_count(make(), 0, 2), 3), (entry(make(), 0, 0x3200), 2))
    for number, (image, code) in enumerate(cases):
        path = tmp_path / f"{number}.qcow2"
        path.write_bytes(image.to_bytes())
        found = qcow("check", "--output=json", path, code=code).json()
        assert found["filename"] == str(path)
        assert qcow("check", "-q", path, code=code).out == b""
    path.write_bytes(bytes(4096))
    assert qcow("check", path, code=63).out == b""
    assert qcow("check", tmp_path / "missing", code=1).out == b""
