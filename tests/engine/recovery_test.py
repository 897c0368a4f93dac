"""Opening an image that was left dirty: by its record of dirty L2 tables, or by a full repair."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from qcowkit.codecs.qcow2.header import FIELD_OFFSETS, Autoclear
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2 import recovery_plan
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.engine.qcow2.recovery import recover_for_writing, recover_recorded, valid_record
from qcowkit.engine.qcow2.recovery_plan import FullRepairNeeded
from qcowkit.errors import StorageError
from qcowkit.image.chain import Chain
from qcowkit.operations.check import Verdict
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.crash_storage import Content, CrashFiles
from qcowkit.testing.device import MemoryDevice
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.recording import RecordingStorage
from qcowkit.units import KiB
from tests.lazy_disks import (
    COVERAGE,
    RecordKind,
    check,
    closed,
    content,
    crash,
    full_table,
    lazy_kind,
    metadata_of,
    recover,
    use_again,
)

LAZY = lazy_kind()
COPIED = 1 << 63
RECOVERED = "recovery: refcounts written"
REPAIRED = "repair: header bits cleared"
GOOD = (Verdict.CLEAN, Verdict.LEAKS)


def write(chain: Chain, *tables: int) -> None:
    """A cluster of data in each of the L2 tables."""
    for table in tables:
        chain.write(b"d" * KiB, offset=table * COVERAGE)


def l2_place(raw: bytes, table: int) -> int:
    """The host offset of an L2 table."""
    word = struct.unpack_from(">Q", raw, metadata_of(raw).header.l1_table_offset + 8 * table)[0]
    return int(word) & 0xFF_FFFF_FFFF_FE00


def word(raw: bytes, place: int) -> int:
    return int.from_bytes(raw[place : place + 8], "big")


def patched(raw: bytes, place: int, value: int) -> bytes:
    """The bytes with another word."""
    return raw[:place] + value.to_bytes(8, "big") + raw[place + 8 :]


def recover_by_record(raw: bytes, storage: Storage | None = None) -> bytes:
    """Only what the record names. Raises FullRepairNeeded."""
    memory = MemoryStorage(raw)
    storage = storage or memory
    metadata = load_qcow2_metadata(storage)
    record = valid_record(metadata)
    assert record is not None
    recover_recorded(storage, metadata, record, barriers=Barriers(storage))
    return memory.to_bytes()


# What is done


def test_what_recorded_tables_refer_to_is_counted() -> None:
    raw = crash(LAZY, lambda chain: write(chain, 1, 5))
    assert check(raw).verdict is Verdict.CORRUPT
    after, seen = recover(raw)
    assert seen == [RECOVERED]
    assert check(after).verdict is Verdict.CLEAN
    assert not metadata_of(after).dirty
    assert metadata_of(after).header.autoclear_features == 0
    assert content(LAZY, after) == content(LAZY, raw)


def test_only_recorded_tables_are_read() -> None:
    raw = closed(LAZY, lambda chain: write(chain, *range(8)))
    raw = use_again(LAZY, raw, lambda chain: chain.write(b"n" * KiB, offset=5 * COVERAGE + KiB))
    storage = RecordingStorage(MemoryStorage(raw))
    recover_by_record(raw, storage)
    tables = {l2_place(raw, table): table for table in range(8)}
    read = {call.offset for call in storage.of("pread") if call.length == KiB}
    assert [tables[offset] for offset in sorted(read & tables.keys())] == [5]


def test_an_image_that_is_not_dirty_is_left_alone() -> None:
    raw = closed(LAZY, lambda chain: write(chain, 1))
    assert recover(raw) == (raw, [])


def test_opening_for_writing_recovers_and_opening_for_reading_does_not() -> None:
    raw = crash(LAZY, lambda chain: write(chain, 1))
    files = CrashFiles([Content.of(raw)])
    with LAZY.open(files, writable=False) as chain:
        chain.read(offset=0, length=chain.size)
    assert files.effects == []
    with LAZY.open(files, writable=True):
        assert not metadata_of(files.live[0].to_bytes()).dirty


def test_a_cut_before_any_table_was_written_needs_nothing() -> None:
    """The bits are durable, and nothing else is."""
    raw = LAZY.make().live[0].to_bytes()
    storage = MemoryStorage(raw)
    features = struct.pack(">QQQ", 1, 1, Autoclear.DIRTY_TABLES)
    storage.pwrite([features], offset=FIELD_OFFSETS["incompatible_features"])
    assert recover(storage.to_bytes()) == (raw, [])


def test_what_is_no_longer_referred_to_stays_counted() -> None:
    raw = closed(LAZY, lambda chain: chain.write(b"x" * 8 * KiB, offset=0))
    raw = use_again(LAZY, raw, lambda chain: chain.discard(offset=0, length=4 * KiB))
    after, seen = recover(raw)
    assert seen == []
    assert check(after).verdict is Verdict.LEAKS
    assert not metadata_of(after).dirty


def test_a_moved_l1_table_is_counted() -> None:
    kind = lazy_kind(size=4 * COVERAGE)

    def use(chain: Chain) -> None:
        chain.resize(200 * COVERAGE)
        write(chain, 150)

    after, seen = recover(crash(kind, use))
    assert seen == [RECOVERED]
    assert check(after).verdict in GOOD


@pytest.mark.parametrize(
    "kind",
    [
        lazy_kind("1 bit", options={"refcount_bits": 1}),
        lazy_kind("64 bits", options={"refcount_bits": 64}),
        lazy_kind("subclusters", options={"cluster_size": 16 * KiB, "extended_l2": True}),
        lazy_kind("backing", backing=8 * COVERAGE),
    ],
    ids=lambda kind: str(kind.name),
)
def test_every_kind_of_image_is_recovered(kind: RecordKind) -> None:
    def use(chain: Chain) -> None:
        chain.write(b"a" * 100 * KiB, offset=10 * KiB)
        chain.flush()
        write(chain, 2, 3, 6)
        chain.write_zeroes(offset=64 * KiB, length=64 * KiB)

    raw = crash(kind, use)
    after, seen = recover(raw)
    assert RECOVERED in seen
    assert check(after).verdict in GOOD
    assert content(kind, after) == content(kind, raw)


def test_compressed_data_are_counted_once_for_each_reference() -> None:
    def use(chain: Chain) -> None:
        for table in (0, 0, 1, 2):
            offset = table * COVERAGE if table else chain.size - KiB
            chain.discard(offset=offset, length=KiB)
            chain.write_compressed(bytes([table + 1]) * KiB, offset=offset)
        chain.write_compressed(b"long" * 2 * KiB, offset=4 * COVERAGE)

    raw = crash(LAZY, use)
    assert check(raw).verdict is Verdict.CORRUPT
    after, seen = recover(raw)
    assert seen == [RECOVERED]
    assert check(after).verdict in GOOD
    assert content(LAZY, after) == content(LAZY, raw)


def test_with_a_data_file_only_tables_are_counted() -> None:
    kind = lazy_kind(data_file=True)
    files = kind.make()
    raw = crash(kind, lambda chain: write(chain, 1, 3), files=files)
    after, seen = recover(raw)
    assert seen == [RECOVERED]
    assert check(after).verdict is Verdict.CLEAN


# Refcount blocks and the table


def test_missing_refcount_blocks_are_made_behind_the_file() -> None:
    kind = lazy_kind(options={"refcount_bits": 64})
    raw = crash(kind, lambda chain: chain.write(b"x" * 500 * KiB, offset=0))
    after, seen = recover(raw)
    assert seen == [RECOVERED, "recovery: refcount table written"]
    assert check(after).verdict is Verdict.CLEAN


def test_a_refcount_table_that_is_too_short_is_replaced() -> None:
    raw = full_table()
    clusters = metadata_of(raw).header.refcount_table_clusters
    after, seen = recover(raw)
    assert seen == [
        RECOVERED,
        "recovery: refcount table written",
        "recovery: refcount table switched",
    ]
    assert metadata_of(after).header.refcount_table_clusters > clusters
    assert check(after).verdict is Verdict.CLEAN


# Clusters that counted more before


def packed_then_freed(use: object = None) -> bytes:
    """A cluster whose count in the file is 2 was freed, and was given out again."""

    def pack(chain: Chain) -> None:
        chain.write(b"x", offset=0)
        for index in (1, 2):
            chain.write_compressed(bytes(KiB), offset=index * KiB)

    def reuse(chain: Chain) -> None:
        chain.discard(offset=KiB, length=2 * KiB)
        chain.flush()
        if use == "table":
            write(chain, 3)
        else:
            chain.write(b"n" * KiB, offset=5 * KiB)

    return use_again(LAZY, closed(LAZY, pack), reuse)


def test_data_in_a_cluster_that_counts_too_much_lose_their_flag() -> None:
    raw = packed_then_freed()
    place = l2_place(raw, 0) + 5 * 8
    assert word(raw, place) & COPIED
    after, _ = recover(raw)
    assert word(after, place) == word(raw, place) & ~COPIED
    assert check(after).verdict is Verdict.LEAKS
    assert content(LAZY, after) == content(LAZY, raw)


def test_a_table_in_a_cluster_that_counts_too_much_loses_its_flag() -> None:
    raw = packed_then_freed("table")
    place = metadata_of(raw).header.l1_table_offset + 3 * 8
    assert word(raw, place) & COPIED
    after, _ = recover(raw)
    assert word(after, place) == word(raw, place) & ~COPIED
    assert check(after).verdict is Verdict.LEAKS


def test_too_many_such_flags_are_left_to_a_full_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery_plan, "MAX_FLAGS", 0)
    assert fault_of(packed_then_freed()) == "1 COPIED flags are untrue, which is too many"


# What is left to a full repair


def fault_of(raw: bytes) -> str:
    """Why the record is not enough; nothing is written then, and a full repair gets it right."""
    storage = MemoryStorage(raw)
    with pytest.raises(FullRepairNeeded) as caught:
        recover_by_record(raw, storage)
    assert storage.to_bytes() == raw
    return str(caught.value)


def test_without_its_bit_a_record_is_not_believed() -> None:
    raw = crash(LAZY, lambda chain: write(chain, 1, 5))
    raw = patched(raw, FIELD_OFFSETS["autoclear_features"], 0)
    after, seen = recover(raw)
    assert REPAIRED in seen
    assert RECOVERED not in seen
    assert check(after).verdict is Verdict.CLEAN


def test_without_a_record_everything_is_repaired() -> None:
    kind = lazy_kind(options={"cluster_size": 512})
    after, seen = recover(crash(kind, lambda chain: write(chain, 0)))
    assert REPAIRED in seen
    assert check(after).verdict is Verdict.CLEAN


def test_a_full_repair_drops_the_record_first() -> None:
    raw = crash(LAZY, lambda chain: write(chain, 1))
    raw = patched(raw, l2_place(raw, 1), word(raw, l2_place(raw, 1)) | 1 << 61)
    after, seen = recover(raw)
    assert seen[0] == "repair: unknown autoclear bits cleared"
    assert metadata_of(after).header.autoclear_features == 0
    assert check(after).verdict is Verdict.CLEAN


def dirty_pair() -> tuple[bytes, int, int]:
    """(image, places of two entries of table 1, the second of which holds data too)."""

    def use(chain: Chain) -> None:
        chain.write(b"x" * 2 * KiB, offset=COVERAGE)

    raw = crash(LAZY, use)
    place = l2_place(raw, 1)
    return raw, place, place + 8


def test_a_reserved_bit_needs_a_full_repair() -> None:
    raw, place, _ = dirty_pair()
    raw = patched(raw, place, word(raw, place) | 1 << 61)
    assert fault_of(raw) == "reserved bits 0x2000000000000000 are set, expected 0"


def test_a_cluster_beyond_the_end_of_the_file_needs_a_full_repair() -> None:
    raw, place, _ = dirty_pair()
    raw = patched(raw, place, COPIED | 1 << 30)
    assert fault_of(raw).startswith("data cluster offset 0x40000000 is beyond the end of the file")


def test_two_entries_for_one_cluster_need_a_full_repair() -> None:
    raw, first, second = dirty_pair()
    raw = patched(raw, first, word(raw, second))
    assert fault_of(raw) == "two entries lead to one cluster"


def test_data_over_metadata_need_a_full_repair() -> None:
    raw, place, _ = dirty_pair()
    raw = patched(raw, place, COPIED | metadata_of(raw).header.l1_table_offset)
    assert fault_of(raw) == "data lie where metadata are"


def test_compressed_data_over_plain_ones_need_a_full_repair() -> None:
    raw, first, second = dirty_pair()
    raw = patched(raw, first, 1 << 62 | word(raw, second) & ~COPIED)
    assert fault_of(raw) == "plain and compressed data share a cluster"


def test_an_l2_table_that_is_used_twice_needs_a_full_repair() -> None:
    raw, _, _ = dirty_pair()
    l1 = metadata_of(raw).header.l1_table_offset
    raw = patched(raw, l1 + 4 * 8, word(raw, l1 + 8))
    assert fault_of(raw) == "metadata share a cluster"


def test_a_single_reference_without_its_flag_needs_a_full_repair() -> None:
    raw, place, _ = dirty_pair()
    raw = patched(raw, place, word(raw, place) & ~COPIED)
    assert fault_of(raw) == "a cluster with a single reference is not COPIED"


def test_more_references_than_a_refcount_can_say_need_a_full_repair() -> None:
    kind = lazy_kind(options={"refcount_bits": 1})
    raw = crash(kind, lambda chain: chain.write_compressed(b"z" * KiB, offset=COVERAGE))
    place = l2_place(raw, 1)
    raw = patched(raw, place + 8, word(raw, place))
    assert fault_of(raw) == "a cluster has more references than its refcount can say"


def test_a_faulty_refcount_table_needs_a_full_repair() -> None:
    raw, _, _ = dirty_pair()
    raw = patched(raw, metadata_of(raw).header.refcount_table_offset + 16, 1 << 40)
    assert fault_of(raw) == "the refcount table has faulty entries"


def test_too_many_tables_are_left_to_a_full_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery_plan, "MAX_ENTRIES", 3 * 128)
    raw = crash(LAZY, lambda chain: write(chain, 0, 1, 2, 3))
    assert fault_of(raw) == "4 L2 tables are recorded, which is too many"
    assert recover_by_record(crash(LAZY, lambda chain: write(chain, 0, 1, 2)))


def test_too_many_tables_of_snapshots_are_left_to_a_full_repair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recovery_plan, "MAX_FIXED", 2)
    raw, _, _ = dirty_pair()
    assert fault_of(raw) == "snapshots and bitmaps have 3 clusters of tables"


def test_a_block_that_is_missing_on_a_device_needs_a_full_repair() -> None:
    kind = lazy_kind(options={"refcount_bits": 64})
    raw = crash(kind, lambda chain: chain.write(b"x" * 500 * KiB, offset=0))
    device = MemoryDevice(raw, size=1024 * KiB)
    with pytest.raises(FullRepairNeeded) as caught:
        recover_by_record(raw, device)
    assert str(caught.value) == "a refcount block is missing, and a device cannot grow"
    recover_for_writing(device, load_qcow2_metadata(device))
    assert check(device.to_bytes()).verdict in GOOD


def test_a_device_is_recovered_by_its_record() -> None:
    raw = crash(LAZY, lambda chain: write(chain, 1, 5))
    device = MemoryDevice(raw, size=1024 * KiB)
    recover_by_record(raw, device)
    assert check(device.to_bytes()).verdict in GOOD


# Failing hosts


def test_a_host_that_fails_anywhere_leaves_an_image_that_can_be_recovered() -> None:
    raw = full_table()
    wanted = content(lazy_kind(size=2304 * KiB), raw)
    for operation in ("pwrite", "flush"):
        call = 0
        while True:
            call += 1
            memory = MemoryStorage(raw)
            storage = FaultyStorage(memory, Fault(operation=operation, call=call, written=512))
            try:
                recover_for_writing(storage, load_qcow2_metadata(storage))
            except StorageError:
                after, _ = recover(memory.to_bytes())
                assert check(after).verdict in GOOD
                assert content(lazy_kind(size=2304 * KiB), after) == wanted
                continue
            break
        assert call > 3, operation


def test_an_error_of_the_host_is_told_as_one() -> None:
    raw = crash(LAZY, lambda chain: write(chain, 1))
    storage = FaultyStorage(MemoryStorage(raw), Fault(operation="pread", call=4, sticky=True))
    with pytest.raises(StorageError):
        recover_for_writing(storage, load_qcow2_metadata(MemoryStorage(raw)))


def test_the_options_of_a_writer_do_not_matter_to_recovery() -> None:
    raw = crash(LAZY, lambda chain: write(chain, 1))
    kind = replace(LAZY, open_options=OpenOptions(lazy_refcounts=False, cache_clean_interval=0))
    after = use_again(kind, raw, lambda chain: write(chain, 2))
    assert check(after).verdict is Verdict.CLEAN
