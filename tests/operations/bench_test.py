"""Bench: which requests are sent, and what is said of them. How long they took is not looked at."""

from __future__ import annotations

import itertools

import pytest

from qcowkit.errors import RequestError, StorageError
from qcowkit.image.chain import Chain
from qcowkit.image.metadata import RawMetadata
from qcowkit.image.raw import RawImage
from qcowkit.image.raw_write import WritableRawImage
from qcowkit.operations.bench import (
    BenchOptions,
    BenchResult,
    describe_run,
    iter_offsets,
    run_bench,
)
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.recording import RecordingStorage
from qcowkit.units import KiB, MiB

SIZE = 64 * KiB


def disk(storage: RecordingStorage | FaultyStorage) -> Chain:
    image = WritableRawImage(RawMetadata(virtual_size=storage.size()), storage)
    return Chain([image], top=image)


def recorded() -> RecordingStorage:
    return RecordingStorage(MemoryStorage(bytes(SIZE)))


def offsets(*, disk_size: int = SIZE, **options: int) -> list[int]:
    return list(itertools.chain(*iter_offsets(BenchOptions(**options), disk_size=disk_size)))


def test_offsets_ascend_by_the_size_of_a_request() -> None:
    assert offsets(count=3, size=512) == [0, 512, 1024]
    assert offsets(count=3, size=512, offset=100, step=1000) == [100, 1100, 2100]


def test_offsets_count_modulo_the_size_of_the_disk() -> None:
    assert offsets(disk_size=10240, count=5, step=4096) == [0, 4096, 8192, 2048, 6144]


def test_a_huge_step_is_no_overflow() -> None:
    found = offsets(disk_size=(1 << 62) + 4096, count=4, step=1 << 62)
    assert found == [(index << 62) % ((1 << 62) + 4096) for index in range(4)]


def test_batches_end_where_a_flush_is_due() -> None:
    options = BenchOptions(count=10, write=True, depth=1, flush_interval=4)
    assert [len(batch) for batch in iter_offsets(options, disk_size=MiB)] == [4, 4, 2]


def test_many_requests_are_made_in_batches() -> None:
    options = BenchOptions(count=200_000, size=1, step=1)
    batches = list(iter_offsets(options, disk_size=MiB))
    assert len(batches) > 1
    assert list(itertools.chain(*batches)) == list(range(200_000))


def test_random_offsets_are_aligned_inside_and_the_same_for_a_seed() -> None:
    found = offsets(count=1000, seed=5)
    assert found == offsets(count=1000, seed=5)
    assert found != offsets(count=1000, seed=6)
    assert {offset % 4096 for offset in found} == {0}
    assert set(found) == set(range(0, SIZE, 4096))


@pytest.mark.parametrize("threads", [1, 3])
def test_every_request_is_sent(threads: int) -> None:
    storage = recorded()
    run_bench(disk(storage), BenchOptions(count=16, write=True, threads=threads, pattern=7))
    written = sorted(call.offset for call in storage.calls if call.operation == "pwrite")
    assert written == list(range(0, SIZE, 4096))
    assert storage.pread(SIZE, offset=0) == b"\x07" * SIZE


def test_reading_changes_nothing() -> None:
    storage = recorded()
    run_bench(disk(storage), BenchOptions(count=32))
    assert {call.operation for call in storage.calls} <= {
        "pread",
        "pread_into",
        "size",
        "iter_data",
    }


@pytest.mark.parametrize(
    ("options", "flushes"),
    [
        (BenchOptions(count=10, write=True), 0),
        (BenchOptions(count=10, write=True, depth=1, flush_interval=4), 2),
        (BenchOptions(count=8, write=True, depth=4, flush_interval=4), 2),
        (BenchOptions(count=10, write=True, sync=True), 10),
        (BenchOptions(count=10, write=True, sync=True, latency=True), 10),
    ],
)
def test_flushes_come_when_they_are_due(options: BenchOptions, flushes: int) -> None:
    storage = recorded()
    run_bench(disk(storage), options)
    assert [call.operation for call in storage.calls].count("flush") == flushes


@pytest.mark.parametrize("write", [False, True])
def test_each_request_can_be_timed(write: bool) -> None:
    result = run_bench(
        disk(recorded()), BenchOptions(count=100, write=write, latency=True, threads=2)
    )
    assert result.latencies is not None
    assert len(result.latencies) == 100
    found = result.percentiles()
    assert list(found) == ["50", "90", "99", "99.9", "100"]
    assert list(found.values()) == sorted(found.values())
    assert result.render()[2].startswith("latency: 50 % in ")


def test_only_the_requests_are_timed() -> None:
    moments = iter([10.0, 10.5, 20.0, 20.25])
    options = BenchOptions(count=6, write=True, depth=3, flush_interval=3)
    result = run_bench(disk(recorded()), options, clock=lambda: next(moments))
    assert result.seconds == 0.75


def test_no_requests_are_no_error() -> None:
    result = run_bench(disk(recorded()), BenchOptions(count=0))
    assert result.seconds == 0
    assert result.percentiles() == {}


def test_the_figures_are_lines_and_json() -> None:
    options = BenchOptions(count=1000, write=True, seed=3)
    result = BenchResult(options=options, seconds=0.5)
    assert describe_run(options) == [
        "1000 write requests of 4 KiB, at random multiples of 4 KiB, seed 3; depth 64, 1 thread"
    ]
    assert result.render() == ["Run completed in 0.500 seconds.", "2000 requests/s, 7.81 MiB/s"]
    assert result.as_json() == {
        "count": 1000,
        "size": 4096,
        "depth": 64,
        "threads": 1,
        "offset": 0,
        "step": 4096,
        "write": True,
        "seconds": 0.5,
        "ops-per-second": 2000.0,
        "bytes-per-second": 8192000.0,
        "random": 3,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BenchOptions(size=0), "request size 0, expected 1 to 2147483647 bytes"),
        (BenchOptions(size=1 << 31), "request size 2147483648, expected 1 to 2147483647 bytes"),
        (BenchOptions(depth=0), "depth 0, expected at least 1"),
        (BenchOptions(threads=0), "threads 0, expected at least 1"),
        (BenchOptions(pattern=256), "pattern 256, expected a byte from 0 to 255"),
        (BenchOptions(flush_interval=64), "a flush interval needs a write test"),
        (
            BenchOptions(flush_interval=63, write=True),
            "flush interval 63 is below the depth of 64",
        ),
        (BenchOptions(offset=SIZE), "offset 65536 is beyond the disk of 65536 bytes"),
        (
            BenchOptions(offset=SIZE - 512),
            "the request of 4096 bytes at offset 65024 leaves the disk of 65536 bytes",
        ),
        (
            BenchOptions(size=3 * 4096),
            "the request of 12288 bytes at offset 61440 leaves the disk of 65536 bytes",
        ),
        (
            BenchOptions(size=MiB, seed=1),
            "the request of 1048576 bytes at offset 0 leaves the disk of 65536 bytes",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is(
    options: BenchOptions, message: str
) -> None:
    storage = recorded()
    with pytest.raises(RequestError) as caught:
        run_bench(disk(storage), options)
    assert str(caught.value) == message
    assert "pwrite" not in [call.operation for call in storage.calls]


def test_an_empty_disk_is_refused() -> None:
    with pytest.raises(RequestError, match="the disk has no bytes that could be asked for"):
        run_bench(disk(RecordingStorage(MemoryStorage())), BenchOptions())


def test_a_write_test_needs_a_disk_for_writing() -> None:
    chain = Chain([RawImage(RawMetadata(virtual_size=SIZE), MemoryStorage(bytes(SIZE)))])
    with pytest.raises(RequestError, match="a write test needs a disk that is open for writing"):
        run_bench(chain, BenchOptions(write=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_the_disk_ends_the_run(threads: int) -> None:
    storage = FaultyStorage(MemoryStorage(bytes(SIZE)), Fault(operation="pwrite", call=5))
    with pytest.raises(StorageError):
        run_bench(disk(storage), BenchOptions(count=16, write=True, threads=threads))
