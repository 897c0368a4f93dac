"""What makes an image unfit for writing, what does not, and what failures of the host do."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Any

import pytest

from qcowkit.codecs.qcow2.entries import COMPRESSED, COPIED, READS_ZERO
from qcowkit.engine.options import OpenOptions
from qcowkit.errors import CorruptMetadata, QcowkitError, RequestError, StorageError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.qcow2_builder import BuiltImage, Compressed, Verbatim, build_qcow2
from qcowkit.units import KiB, MiB
from tests.engine.qcow2_rig import Rig

# Subclusters are copied and kept by rules of their own, which have tests of their own here.
pytestmark = pytest.mark.pinned("clusters of 4 KiB without subclusters", "extended_l2")

SIZE = 4 * KiB
GUEST = random.Random(1).randbytes(64 * KiB)
CLUSTERS: Any = {0: GUEST[:SIZE], 1: GUEST[SIZE : 2 * SIZE]}


def spoil_entry(**spec: Any) -> BuiltImage:
    """Guest cluster 3 leads to a place that is no cluster."""
    word = Verbatim(word=0x51200 | COPIED)
    return build_qcow2(clusters={**CLUSTERS, 3: word}, **spec)


def count_below_zero() -> BuiltImage:
    """The cluster of guest cluster 0 counts as free."""
    built = build_qcow2(clusters=CLUSTERS)
    host = built.places["l2"] + SIZE
    return built.patch(built.places["refcount_block"] + host // SIZE * 2, 0, width=2)


def lead_to(place: str) -> BuiltImage:
    """Guest cluster 3 leads to a structure of the image."""
    built = build_qcow2(clusters={**CLUSTERS, 3: Verbatim(word=0)})
    return built.patch(built.places["l2"] + 3 * 8, built.places[place] | COPIED)


def refuses_forever(rig: Rig, error: CorruptMetadata) -> None:
    """No change is possible any more, each tells the first error; the bit is there for others."""
    changes = [
        lambda: rig.chain.write(b"x", offset=0),
        lambda: rig.chain.write_zeroes(offset=0, length=SIZE),
        lambda: rig.chain.discard(offset=0, length=SIZE),
        lambda: rig.chain.resize(2 * MiB),
        lambda: rig.chain.write_compressed(GUEST[:SIZE], offset=9 * SIZE),
        rig.chain.flush,
    ]
    rig.forget()
    for change in changes:
        with pytest.raises(CorruptMetadata) as caught:
            change()
        assert caught.value is error
    assert rig.file.of("pwrite") == []
    if rig.metadata.header.version >= 3:
        assert rig.reopened().corrupt


def is_fit(rig: Rig) -> None:
    """The image may be written as before."""
    assert not rig.reopened().corrupt
    rig.chain.write(b"fit", offset=5 * SIZE)
    rig.chain.flush()
    assert rig.read(5 * SIZE, 3) == b"fit"


@pytest.mark.pinned("feature bits", "compat=0.10")
def test_a_malformed_entry_is_corruption_and_reads_of_good_data_go_on() -> None:
    rig = Rig(spoil_entry())
    with pytest.raises(CorruptMetadata, match=r"L2 table at host offset 0x\w+, entry 3: data cl"):
        rig.chain.write(b"x", offset=7 * SIZE)
    assert rig.reopened().corrupt
    assert rig.read(0, 2 * SIZE) == GUEST[: 2 * SIZE]
    error = rig.state.broken
    assert isinstance(error, CorruptMetadata)
    refuses_forever(rig, error)
    rig.chain.close()
    assert rig.reopened().corrupt


def test_a_version_2_image_has_no_bit_but_is_refused_as_well() -> None:
    rig = Rig(spoil_entry(version=2))
    before = rig.memory.to_bytes()
    with pytest.raises(CorruptMetadata) as caught:
        rig.chain.write(b"x", offset=7 * SIZE)
    refuses_forever(rig, caught.value)
    assert rig.memory.to_bytes() == before


@pytest.mark.pinned("writes a count of 16 bits", "refcount_bits=1", "refcount_bits=64")
def test_a_count_below_zero_is_corruption() -> None:
    rig = Rig(count_below_zero())
    rig.chain.discard(offset=0, length=SIZE)
    with pytest.raises(CorruptMetadata, match=r"refcount block .*refcount 0 of the cluster at 0x"):
        rig.chain.flush()
    error = rig.state.broken
    assert isinstance(error, CorruptMetadata)
    refuses_forever(rig, error)
    assert rig.read(SIZE, SIZE) == GUEST[SIZE : 2 * SIZE]


@pytest.mark.pinned("feature bits", "compat=0.10")
@pytest.mark.parametrize("place", ["l1", "refcount_table", "refcount_block", "l2"])
def test_an_entry_that_leads_to_metadata_is_corruption(place: str) -> None:
    rig = Rig(lead_to(place))
    before = rig.memory.to_bytes()
    with pytest.raises(CorruptMetadata, match="overlaps the metadata that"):
        rig.chain.write(b"x", offset=3 * SIZE)
    assert rig.reopened().corrupt
    after = bytearray(rig.memory.to_bytes())
    after[72:80] = before[72:80]
    assert after == before


def test_copied_without_an_offset_means_nothing_and_leads_nowhere() -> None:
    rig = Rig(clusters={**CLUSTERS, 3: Verbatim(word=COPIED)})
    rig.chain.write(b"x", offset=3 * SIZE)
    assert rig.host(3 * SIZE) > 0
    rig.chain.flush()
    rig.assert_clean()


@pytest.mark.pinned(
    "writes counts of 16 bits, reads feature bits",
    "refcount_bits=1",
    "refcount_bits=64",
    "compat=0.10",
)
def test_free_clusters_that_hold_metadata_are_not_given_out() -> None:
    built = build_qcow2(clusters=CLUSTERS)
    place = built.places["l1"]
    built.patch(built.places["refcount_block"] + place // SIZE * 2, 0, width=2)
    rig = Rig(built)
    with pytest.raises(CorruptMetadata, match="overlaps the metadata that active-l1 protects"):
        rig.chain.write(b"x", offset=9 * SIZE)
    assert rig.reopened().corrupt


@pytest.mark.pinned(
    "writes counts of 16 bits, reads feature bits", "refcount_bits=64", "compat=0.10"
)
def test_the_header_is_not_given_out_though_it_counts_as_free() -> None:
    built = build_qcow2(clusters=CLUSTERS)
    built.patch(built.places["refcount_block"], 0, width=2)
    rig = Rig(built, options=OpenOptions(overlap_check="none"))
    with pytest.raises(CorruptMetadata, match="the cluster of the header counts as free"):
        rig.chain.write(b"x", offset=9 * SIZE)
    assert rig.reopened().corrupt


@pytest.mark.pinned("writes the feature bits", "compat=0.10", "compression_type=zstd")
def test_an_image_with_the_corrupt_bit_is_not_opened_for_writing() -> None:
    built = build_qcow2(clusters=CLUSTERS).set_field("incompatible_features", 2)
    with pytest.raises(CorruptMetadata, match="the corrupt bit is set: the image can be read"):
        Rig(built)


# What does not make an image unfit.


def test_a_failure_of_the_host_is_no_corruption() -> None:
    memory = MemoryStorage(build_qcow2(clusters=CLUSTERS).to_bytes())
    faulty = FaultyStorage(memory, Fault(operation="pwrite", call=1))
    rig = Rig(clusters=CLUSTERS, storage=faulty)
    rig.memory = memory
    with pytest.raises(StorageError):
        rig.chain.write(b"x", offset=0)
    is_fit(rig)


def test_a_bad_compressed_cluster_is_no_reason_to_give_up_the_image() -> None:
    bad = Compressed(payload=b"\xff" * 100)
    rig = Rig(clusters={**CLUSTERS, 3: bad})
    with pytest.raises(CorruptMetadata, match="compressed cluster"):
        rig.chain.write(b"x", offset=3 * SIZE)
    is_fit(rig)
    # All of it may be overwritten: nothing is copied then.
    rig.chain.write(GUEST[:SIZE], offset=3 * SIZE)
    assert rig.read(3 * SIZE, SIZE) == GUEST[:SIZE]


class BrokenBelow:
    """A layer below that contradicts itself."""

    size = MiB

    def read_into(self, buffer: bytearray | memoryview, *, offset: int) -> None:
        raise CorruptMetadata("L2 table of the base", reason="is not what it should be")

    def is_zero(self, *, start: int, length: int) -> bool:
        return False

    def read_or_none(self, *, start: int, length: int) -> bytes:
        raise CorruptMetadata("L2 table of the base", reason="is not what it should be")


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("length", [1, 3 * SIZE])
def test_a_corrupt_base_is_no_corruption_of_the_image(warm: bool, length: int) -> None:
    rig = Rig(clusters=CLUSTERS, watch=False)
    rig.image.attach(BrokenBelow())
    if warm:
        rig.chain.write(GUEST[:SIZE], offset=8 * SIZE)
    with pytest.raises(CorruptMetadata, match="L2 table of the base"):
        rig.chain.write(GUEST[:length], offset=3 * SIZE + 1)
    assert not rig.reopened().corrupt
    rig.chain.write(GUEST[:SIZE], offset=5 * SIZE)
    rig.chain.flush()
    rig.assert_clean()


@pytest.mark.parametrize(
    "change",
    [
        lambda rig: rig.chain.write(b"x", offset=MiB),
        lambda rig: rig.chain.write_compressed(b"x", offset=SIZE),
        lambda rig: rig.chain.write_compressed(GUEST[:SIZE], offset=0),
        lambda rig: rig.chain.resize(SIZE),
        lambda rig: rig.chain.resize(7),
        lambda rig: rig.chain.resize(2 * MiB, preallocation="some"),
    ],
)
def test_a_refused_request_is_no_corruption(change: Any) -> None:
    rig = Rig(clusters=CLUSTERS)
    before = rig.memory.to_bytes()
    with pytest.raises(RequestError):
        change(rig)
    assert rig.memory.to_bytes() == before
    is_fit(rig)


def test_reserved_bit_0_of_extended_entries_is_ignored_by_writers_too() -> None:
    rig = Rig(cluster_bits=14, extended_l2=True, clusters={0: GUEST[: 16 * KiB]})
    rig.memory.pwrite(
        [(rig.word(0) | READS_ZERO).to_bytes(8, "big")], offset=rig.built.places["l2"]
    )
    fresh = Rig(
        BuiltImage(data=bytearray(rig.memory.to_bytes()), header=rig.built.header, places={})
    )
    fresh.chain.write(b"x", offset=0)
    assert fresh.read(0, 2) == b"x" + GUEST[1:2]


# Failures of the host.


def faulty_rig(fault: Fault, **spec: Any) -> Rig:
    """An image whose storage fails once; calls are counted from the opened image on."""
    spec = {"clusters": CLUSTERS, **spec}
    memory = MemoryStorage(build_qcow2(**spec).to_bytes())
    faulty = FaultyStorage(memory)
    rig = Rig(storage=faulty, **spec)
    rig.memory = memory
    faulty.calls.clear()
    faulty._faults = (fault,)
    return rig


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("length", [10, SIZE, 5 * SIZE])
def test_clusters_go_back_when_their_data_cannot_be_written(
    code: int, call: int, length: int
) -> None:
    """S003-06."""
    fault = Fault(operation="pwrite", call=call, errno=code, written=3)
    rig = faulty_rig(fault, cluster_bits=12, size=4 * MiB)
    # The second write needs a table of its own.
    requests = [5 * SIZE + 1, 2 * MiB + 5]
    failed: list[int] = []
    for offset in requests:
        try:
            rig.chain.write(GUEST[:length], offset=offset)
        except StorageError as error:
            failed.append(error.errno)
            assert rig.read(offset, length) == bytes(length)
    assert failed == [code]
    for offset in requests:
        rig.chain.write(GUEST[:length], offset=offset)
        assert rig.read(offset, length) == GUEST[:length]
    rig.chain.flush()
    rig.assert_clean()


@pytest.mark.parametrize("call", range(1, 6))
def test_a_commit_that_fails_is_completed_by_the_next(call: int) -> None:
    rig = faulty_rig(Fault(operation="pwrite", call=call))
    contents: dict[int, bytes] = {}
    for _ in range(3):
        for offset, data in ((5 * SIZE, b"a" * SIZE), (0, b"b" * SIZE)):
            try:
                rig.chain.discard(offset=offset, length=SIZE)
                rig.chain.write(data, offset=offset)
                contents[offset] = data
                rig.chain.flush()
            except StorageError:
                pass
    rig.chain.flush()
    rig.assert_clean()
    for offset, data in contents.items():
        assert rig.read(offset, SIZE) == data


def write_and_flush(rig: Rig, *, times: int) -> None:
    for index in range(times):
        rig.chain.write(GUEST[:SIZE], offset=(5 + index) * SIZE)
        rig.chain.flush()


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_failed_barrier_is_never_repeated(call: int) -> None:
    rig = faulty_rig(Fault(operation="flush", call=call))
    with pytest.raises(StorageError, match=r"flush: .* \(EIO\)"):
        write_and_flush(rig, times=4)
    changes: list[Callable[[], None]] = [
        lambda: rig.chain.write(b"x", offset=0),
        lambda: rig.chain.discard(offset=0, length=SIZE),
        rig.chain.flush,
        rig.chain.close,
    ]
    for change in changes:
        with pytest.raises(StorageError, match="an earlier flush failed"):
            change()
    assert not rig.reopened().corrupt
    assert rig.check().corruptions == 0


def test_a_failed_write_of_compressed_data_gives_its_space_back() -> None:
    rig = faulty_rig(Fault(operation="pwrite", call=2))
    rig.chain.write_compressed(b"a" * SIZE, offset=5 * SIZE)
    with pytest.raises(StorageError):
        rig.chain.write_compressed(b"b" * SIZE, offset=6 * SIZE)
    assert rig.read(6 * SIZE, SIZE) == bytes(SIZE)
    rig.chain.write_compressed(b"c" * SIZE, offset=7 * SIZE)
    rig.chain.flush()
    assert rig.read(5 * SIZE, SIZE) + rig.read(7 * SIZE, SIZE) == b"a" * SIZE + b"c" * SIZE
    rig.assert_clean()


def test_a_failed_growth_leaves_the_size_as_it_was() -> None:
    for call in range(1, 40):
        rig = faulty_rig(
            Fault(operation="pwrite", call=call), cluster_bits=9, size=32 * KiB, clusters={}
        )
        try:
            rig.chain.resize(4 * MiB, preallocation="metadata")
        except StorageError:
            assert rig.chain.size == 32 * KiB
            assert rig.reopened().virtual_size in (32 * KiB, 4 * MiB)
            rig.chain.resize(4 * MiB)
        assert rig.chain.size == 4 * MiB
        rig.chain.flush()
        assert rig.check().corruptions == 0


def test_an_error_says_where() -> None:
    rig = Rig(clusters={0: GUEST[:SIZE], 3: Verbatim(word=COMPRESSED | COPIED | 0x5000)})
    with pytest.raises(QcowkitError, match=r"entry 3: COPIED is set on a compressed cluster"):
        rig.chain.write(b"x", offset=0)
