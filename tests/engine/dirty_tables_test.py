"""Writing with a record of dirty L2 tables: what it says, and when."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcowkit.codecs.qcow2.dirty_tables import DirtyTables
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.codecs.qcow2.header import FIELD_OFFSETS
from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.dirty_record import DirtyRecord
from qcowkit.engine.qcow2.spec import Qcow2Spec
from qcowkit.errors import RequestError, StorageError
from qcowkit.image.chain import Chain
from qcowkit.image.qcow2_write import WritableQcow2Image
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.crash_disks import DiskKind
from qcowkit.testing.crash_storage import CrashFiles, WriteEffect
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.units import KiB, MiB, TiB
from tests.lazy_disks import (
    COVERAGE,
    QUIET,
    closed,
    crash,
    lazy_kind,
    metadata_of,
    recorded,
    use_again,
)

LAZY = lazy_kind()
FEATURES = FIELD_OFFSETS["incompatible_features"]


def write(chain: Chain, *tables: int) -> None:
    """A cluster of data in each of the L2 tables."""
    for table in tables:
        chain.write(b"d" * KiB, offset=table * COVERAGE)


def header_writes(files: CrashFiles) -> list[tuple[int, bytes]]:
    """(offset, bytes) of what was written into the first cluster."""
    return [
        (effect.offset, bytes(effect.data))
        for effect in files.effects
        if isinstance(effect, WriteEffect) and effect.offset < KiB
    ]


# New images


@pytest.mark.parametrize(
    ("changes", "has"),
    [
        ({"lazy_refcounts": True}, True),
        ({"lazy_refcounts": False}, False),
        ({"lazy_refcounts": True, "geometry": Geometry(cluster_bits=9)}, False),
    ],
    ids=["lazy", "not lazy", "least clusters"],
)
def test_new_images_with_lazy_refcounts_have_a_record(
    changes: dict[str, object], has: bool
) -> None:
    spec = Qcow2Spec(size=MiB, **changes)  # type: ignore[arg-type]
    assert (spec.extensions().dirty_tables is not None) is has


def test_the_record_of_a_new_image_is_empty_and_does_not_hold() -> None:
    raw = LAZY.make().live[0].to_bytes()
    record = metadata_of(raw).extensions.dirty_tables
    assert record is not None
    assert not any(record.bits)
    assert recorded(raw) is None


def test_names_have_precedence_over_a_record() -> None:
    spec = Qcow2Spec(
        size=MiB,
        geometry=Geometry(cluster_bits=10),
        lazy_refcounts=True,
        backing_name="b" * 830,
        backing_format="raw",
    )
    assert spec.extensions().dirty_tables is None
    assert replace(spec, backing_name="b" * 800).extensions().dirty_tables is not None


def test_the_record_of_a_large_disk_has_a_bit_for_each_table() -> None:
    record = Qcow2Spec(size=TiB, lazy_refcounts=True).extensions().dirty_tables
    assert record is not None
    assert (record.shift, record.covered >= 4096) == (0, True)


# Writing


def test_a_dirty_image_names_the_tables_that_have_changed() -> None:
    raw = crash(LAZY, lambda chain: write(chain, 1, 5))
    assert metadata_of(raw).dirty
    assert recorded(raw) == [1, 5]


def test_the_record_is_written_ahead_of_the_dirty_bit_and_its_own_bit_with_it() -> None:
    files = LAZY.make()
    crash(LAZY, lambda chain: write(chain, 2), files=files)
    record = metadata_of(files.live[0].to_bytes()).extensions.dirty_tables
    assert record is not None
    places = [offset for offset, _ in header_writes(files)]
    assert places == [record.host_offset + 8, FEATURES]
    _, features = header_writes(files)[1]
    assert features.hex() == "000000000000000100000000000000014000000000000000"


def test_later_tables_are_added() -> None:
    def use(chain: Chain) -> None:
        write(chain, 1)
        chain.flush()
        write(chain, 1, 6)

    assert recorded(crash(LAZY, use)) == [1, 6]


def test_a_table_that_is_recorded_already_costs_nothing_more() -> None:
    files = LAZY.make()

    def use(chain: Chain) -> None:
        write(chain, 1)
        chain.flush()
        before = len(header_writes(files))
        chain.write(b"e" * KiB, offset=COVERAGE + KiB)
        chain.flush()
        assert len(header_writes(files)) == before

    crash(LAZY, use, files=files)


def test_a_record_needs_no_barrier_of_its_own() -> None:
    def use(chain: Chain) -> None:
        write(chain, 1)
        chain.flush()
        write(chain, 5)
        chain.flush()

    def count(kind: DiskKind) -> int:
        files = kind.make()
        crash(kind, use, files=files)
        return len(files.flushes)

    plain = DiskKind(
        name="no record",
        size=8 * COVERAGE,
        options={"cluster_size": KiB},
        open_options=replace(QUIET, lazy_refcounts=True),
    )
    assert recorded(crash(plain, use)) is None
    assert count(LAZY) == count(plain)


def test_a_new_table_is_durable_before_its_entry_though_nothing_in_it_has_changed() -> None:
    """As after a write that has failed behind it."""
    files = LAZY.make()
    chain = LAZY.open(files, writable=True)
    top = chain.images[0]
    assert isinstance(top, WritableQcow2Image)
    state = top.disk.state
    chain.write(b"x" * 8 * KiB, offset=0)
    chain.discard(offset=0, length=8 * KiB)
    chain.flush()
    state.ensure_table(3)
    state.commit()
    l1 = metadata_of(files.live[0].to_bytes()).header.l1_table_offset
    (entry,) = [
        index
        for index, effect in enumerate(files.effects)
        if isinstance(effect, WriteEffect) and effect.offset == l1 and index
    ][-1:]
    assert files.flushes[-1].count == entry


def test_a_longer_l1_table_is_recorded_by_its_entries() -> None:
    kind = lazy_kind(size=4 * COVERAGE)

    def use(chain: Chain) -> None:
        chain.resize(200 * COVERAGE)
        write(chain, 150)

    assert recorded(crash(kind, use)) == [150]


def test_a_table_beyond_the_record_ends_it() -> None:
    kind = lazy_kind(record_bits=4)
    assert recorded(crash(kind, lambda chain: write(chain, 1, 4))) is None

    def use(chain: Chain) -> None:
        write(chain, 1)
        chain.flush()
        write(chain, 4)
        chain.flush()
        write(chain, 2)

    raw = crash(kind, use)
    assert metadata_of(raw).dirty
    assert recorded(raw) is None


def test_a_record_that_has_ended_begins_again_when_the_image_is_opened_anew() -> None:
    kind = lazy_kind(record_bits=4)
    raw = crash(kind, lambda chain: write(chain, 4))
    assert recorded(use_again(kind, raw, lambda chain: write(chain, 2))) == [2]


def test_closing_takes_both_bits_back_by_one_write() -> None:
    files = LAZY.make()
    with LAZY.open(files, writable=True) as chain:
        write(chain, 3)
    raw = files.live[0].to_bytes()
    assert not metadata_of(raw).dirty
    assert recorded(raw) is None
    assert header_writes(files)[-1] == (FEATURES, bytes(15) + b"\1" + bytes(8))


def test_what_an_earlier_use_has_recorded_is_forgotten() -> None:
    raw = closed(LAZY, lambda chain: write(chain, 3))
    assert recorded(use_again(LAZY, raw, lambda chain: write(chain, 5))) == [5]


def test_what_was_recorded_before_a_crash_is_forgotten_once_the_image_is_sound() -> None:
    raw = crash(LAZY, lambda chain: write(chain, 3))
    assert recorded(use_again(LAZY, raw, lambda chain: write(chain, 5))) == [5]


def test_a_writer_that_counts_at_once_leaves_the_record_alone() -> None:
    kind = lazy_kind(open_options=replace(QUIET, lazy_refcounts=False))
    before = kind.make().live[0].to_bytes()
    after = crash(kind, lambda chain: write(chain, 3))
    assert not metadata_of(after).dirty
    assert after[:KiB] == before[:KiB]


def test_an_image_without_a_record_is_dirty_as_ever() -> None:
    kind = lazy_kind(options={"cluster_size": 512})
    raw = crash(kind, lambda chain: write(chain, 0))
    assert metadata_of(raw).dirty
    assert metadata_of(raw).header.autoclear_features == 0


def test_a_bit_of_the_record_that_nobody_meant_is_cleared_before_the_first_change() -> None:
    kind = DiskKind(name="plain", size=MiB, open_options=QUIET, autoclear=1 << 62)
    raw = crash(kind, lambda chain: write(chain, 0))
    assert metadata_of(raw).header.autoclear_features == 0


def test_version_2_has_no_lazy_refcounts() -> None:
    kind = DiskKind(
        name="version 2",
        options={"compat": "0.10"},
        open_options=OpenOptions(lazy_refcounts=True),
    )
    files = kind.make()
    before = files.live[0].to_bytes()
    with pytest.raises(RequestError) as caught:
        kind.open(files, writable=True)
    assert str(caught.value) == "lazy-refcounts=on needs compat=1.1, found compat=0.10"
    assert files.live[0].to_bytes() == before


# The bits


def test_bits_that_could_not_be_written_are_written_by_the_next_call() -> None:
    memory = MemoryStorage(bytes(64))
    storage = FaultyStorage(memory, Fault(operation="pwrite", call=2))
    record = DirtyRecord(storage, DirtyTables(shift=0, bit_count=32, bits=bytes(4), host_offset=16))
    record.start([0])
    with pytest.raises(StorageError):
        record.add([9])
    assert memory.to_bytes()[24:28] == b"\1\0\0\0"
    assert record.add([9])
    assert memory.to_bytes()[24:28] == b"\1\2\0\0"
    assert not record.add([0, 9])


def test_only_bytes_that_change_are_written() -> None:
    storage = MemoryStorage(bytes(64))
    record = DirtyRecord(storage, DirtyTables(shift=2, bit_count=32, bits=bytes(4), host_offset=16))
    record.start([])
    storage.pwrite([b"\xee"], offset=24)
    assert record.add([127])
    assert storage.to_bytes()[24:28] == b"\xee\0\0\x80"
