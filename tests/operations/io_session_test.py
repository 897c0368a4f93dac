"""Sessions of the command language: what commands do to a disk, and what they say."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowkit.errors import QcowkitError, RequestError, StorageError, UnsupportedFeature
from qcowkit.image.gate import ReferenceGate
from qcowkit.operations.create import CreateOptions, create_image
from qcowkit.operations.io_language.opening import OpenRequest
from qcowkit.operations.io_language.session import IoSession
from qcowkit.operations.io_language.transfers import errno_of
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.recording import RecordingStorage
from qcowkit.units import MiB
from tests.io_sessions import (
    SIZE,
    MemoryOpener,
    Qcow2Opener,
    lines_of,
    make_image,
    make_session,
    refused,
    said,
)


@pytest.fixture
def session() -> Iterator[IoSession]:
    """A raw disk of 64 KiB, all zeros; each request takes half a second."""
    session = make_session(MemoryOpener(disk=MemoryStorage(bytes(SIZE))))
    yield session
    session.finish()


@pytest.fixture
def image(tmp_path: Path) -> str:
    """An empty qcow2 file of 1 MiB."""
    return make_image(str(tmp_path / "disk.qcow2"))


@pytest.fixture
def qcow2(image: str) -> Iterator[IoSession]:
    session = make_session(Qcow2Opener(), image)
    yield session
    session.finish()


def test_a_transfer_is_two_lines(session: IoSession) -> None:
    assert said(session, "write 512 1536") == [
        "wrote 1536/1536 bytes at offset 512",
        "1.500 KiB, 1 ops; 00.50 sec (3 KiB/sec and 2.0000 ops/sec)",
    ]


def test_a_transfer_for_machines_is_one_line(session: IoSession) -> None:
    assert said(session, "write -C 512 1536") == ["1536,1,0:00:00.50,3072.000,2.000"]
    assert said(session, "write -qC 512 1536") == []


def test_a_long_transfer_is_told_in_hours_and_minutes() -> None:
    moments = iter([0.0, 3723.25])
    session = IoSession(MemoryOpener(disk=MemoryStorage(bytes(SIZE))), clock=lambda: next(moments))
    session.open(OpenRequest(path="disk"))
    assert "1:02:03.25 (" in said(session, "read 0 512")[1]


# Reading and writing


def test_what_is_written_is_read_back(session: IoSession) -> None:
    said(session, "write -P 7 100 1000", "writev -P 8 1100 10 20", "read -P 7 100 1000")
    said(session, "readv -P 8 1100 30", "read -P 0 0 100")
    assert said(session, "read -v 1098 4")[0] == "0000044a:  07 07 08 08  ...."


def test_without_a_pattern_bytes_are_0xcd(session: IoSession) -> None:
    said(session, "write 0 512", "read -P 0xcd 0 512")


def test_a_byte_that_is_not_expected_fails_and_is_named(session: IoSession) -> None:
    said(session, "write -P 1 0 4k", "write -P 2 2050 1")
    outcome = session.run("read -q -P 1 -s 1k -l 2k 0 4k")
    assert outcome.failed
    assert lines_of(outcome) == ["Pattern verification failed at offset 1024, 2048 bytes"]
    assert outcome.errors == ("read: byte at offset 0x802 is 0x02, expected 0x01",)


def test_only_the_part_that_is_asked_for_is_verified(session: IoSession) -> None:
    said(session, "write -P 1 1k 1k", "read -P 1 -s 512 -l 1k 512 4k", "read -P 1 -l 1k 1k 2k")
    said(session, "read -P 0 -s 1k 1k 4k")


def test_zeros_are_written_without_data(session: IoSession) -> None:
    said(session, "write 0 4k", "write -z 1k 1k", "write -zun 3k 1k")
    said(session, "read -P 0 1k 1k", "read -P 0 3k 1k", "read -P 0xcd 2k 1k")


def test_a_file_is_repeated_across_pieces(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"abcdefg")
    storage = MemoryStorage(bytes(20 * MiB))
    session = make_session(MemoryOpener(disk=storage))
    said(session, f"write -s {source} 5 17M")
    assert storage.to_bytes()[5 : 5 + 17 * MiB] == (b"abcdefg" * (17 * MiB))[: 17 * MiB]


def test_pieces_end_at_whole_clusters() -> None:
    storage = RecordingStorage(MemoryStorage(bytes(20 * MiB)))
    session = make_session(MemoryOpener(disk=storage))
    said(session, "write 1M 17M")
    written = [(call.offset, call.length) for call in storage.calls if call.operation == "pwrite"]
    assert written == [(MiB, 7 * MiB), (8 * MiB, 8 * MiB), (16 * MiB, 2 * MiB)]


def test_a_durable_write_is_flushed() -> None:
    storage = RecordingStorage(MemoryStorage(bytes(SIZE)))
    session = make_session(MemoryOpener(disk=storage))
    said(session, "write 0 512")
    assert operations(storage) == ["pwrite"]
    said(session, "write -f 0 512")
    assert operations(storage) == ["pwrite", "pwrite", "flush"]


@pytest.mark.parametrize("mode", ["writethrough", "directsync"])
def test_with_writethrough_every_change_is_flushed(mode: str) -> None:
    storage = RecordingStorage(MemoryStorage(bytes(SIZE)))
    session = make_session(MemoryOpener(disk=storage), None)
    said(session, f"open -t {mode} disk", "write 0 512", "discard 0 4k")
    assert operations(storage) == ["pwrite", "flush", "discard", "flush"]


def operations(storage: RecordingStorage) -> list[str]:
    changing = ("pwrite", "flush", "discard", "zero", "truncate")
    return [call.operation for call in storage.calls if call.operation in changing]


def test_discards_that_are_ignored_do_nothing() -> None:
    storage = RecordingStorage(MemoryStorage(bytes(SIZE)))
    session = make_session(MemoryOpener(disk=storage), None)
    assert said(session, "open -d ignore disk", "discard 0 4k")[0] == (
        "discard 4096/4096 bytes at offset 0"
    )
    assert operations(storage) == []


@pytest.mark.parametrize(
    "command", ["write 64k 1", "read 65535 2", "write -z 60k 5k", "discard 1M 1"]
)
def test_a_range_outside_of_the_disk_is_an_input_output_error(
    session: IoSession, command: str
) -> None:
    outcome = session.run(command)
    assert outcome.failed
    assert lines_of(outcome) == [f"{command.split()[0]} failed: Input/output error"]
    assert "is outside the disk of 0x10000 bytes" in outcome.errors[0]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (StorageError("write", path="p", errno=errno.ENOSPC), errno.ENOSPC),
        (UnsupportedFeature("zeros", reason="no"), errno.ENOTSUP),
        (RequestError("no"), errno.EIO),
    ],
)
def test_errors_become_error_numbers(error: QcowkitError, number: int) -> None:
    assert errno_of(error) == number


def test_an_error_of_the_host_is_told_in_its_words() -> None:
    storage = FaultyStorage(MemoryStorage(bytes(SIZE)), Fault(operation="pwrite", errno=28))
    session = make_session(MemoryOpener(disk=storage))
    outcome = session.run("write 0 512")
    assert lines_of(outcome) == ["write failed: No space left on device"]
    assert said(session, "write 0 512")


def test_a_raw_disk_is_not_compressed(session: IoSession) -> None:
    outcome = session.run("write -c 0 64k")
    assert lines_of(outcome) == ["write failed: Operation not supported"]
    assert outcome.errors == ("write: raw images have no compressed clusters",)


def test_a_data_file_holds_no_compressed_clusters(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.qcow2")
    options = CreateOptions.of("qcow2", {"size": MiB, "data_file": "data"})
    create_image(path, options, gate=ReferenceGate.deny_all())
    session = make_session(Qcow2Opener(), path)
    outcome = session.run("write -c 0 64k")
    assert lines_of(outcome) == ["write failed: Operation not supported"]
    assert outcome.errors == ("write: compressed clusters cannot lie in a data file",)
    session.finish()


def test_a_failed_asynchronous_read_is_told_as_qemu_io_does(session: IoSession) -> None:
    assert all_said(session, "aio_read 64k 1", "aio_flush") == ["readv failed: Input/output error"]


@pytest.mark.pinned("compressed clusters of 64 KiB", "data_file", "cluster_size=512")
def test_compressed_clusters_are_whole_and_new(qcow2: IoSession) -> None:
    said(qcow2, "write -c -P 5 64k 128k", "read -P 5 64k 128k")
    misplaced = qcow2.run("write -c 512 64k")
    assert lines_of(misplaced) == ["write failed: Invalid argument"]
    again = qcow2.run("write -c 64k 64k")
    assert lines_of(again) == ["write failed: Input/output error"]


@pytest.mark.parametrize("command", ["write 0 1", "aio_write 0 1", "discard 0 1", "truncate 1k"])
def test_a_read_only_disk_is_not_changed(command: str) -> None:
    session = make_session(MemoryOpener(disk=MemoryStorage(bytes(SIZE))), writable=False)
    name = command.split()[0]
    assert refused(session, command) == f"{name}: the image is open read-only"
    said(session, "read 0 512", "flush", "map")


def test_invalid_requests_are_only_counted(session: IoSession) -> None:
    assert said(session, "aio_write -i 0 1k") == ["invalid write request counted, 1 in all"]
    assert said(session, "aio_read -i 0 1k") == ["invalid read request counted, 1 in all"]
    said(session, "read -P 0 0 1k")
    assert (session.invalid_reads, session.invalid_writes) == (1, 1)


# Requests under way


def all_said(session: IoSession, *commands: str) -> list[str]:
    """What several commands printed, none of which may fail: a result may come with any."""
    return [line for command in commands for line in said(session, command)]


def test_the_result_of_an_asynchronous_request_comes_when_it_has_ended(
    session: IoSession,
) -> None:
    found = all_said(session, "aio_write -P 9 0 4k", "aio_flush", "aio_read -P 9 0 4k", "aio_flush")
    assert [line for line in found if "bytes at" in line] == [
        "wrote 4096/4096 bytes at offset 0",
        "read 4096/4096 bytes at offset 0",
    ]


def test_asynchronous_failures_are_told_and_do_not_fail_the_run(session: IoSession) -> None:
    found = all_said(session, "aio_read -q -P 1 0 4k", "aio_write 64k 1", "aio_flush")
    # The write leaves the disk, which is known at once: it may be told of before the read ends.
    assert sorted(found) == [
        "Pattern verification failed at offset 0, 4096 bytes",
        "aio_write failed: Input/output error",
    ]
    assert not session.finish().failed


def test_requests_for_the_same_bytes_keep_their_order(session: IoSession) -> None:
    for value in range(50):
        said(session, f"aio_write -q -P {value} {value * 100} 4k")
    for value in range(49):
        said(session, f"read -P {value} {value * 100} 100")
    said(session, "read -P 49 4900 4k")


def test_results_are_told_in_the_order_of_the_requests(session: IoSession) -> None:
    for value in range(20):
        session.run(f"aio_write {value} 40k")
    collected = [line for line in lines_of(session.run("aio_flush")) if line.startswith("wrote")]
    offsets = [int(line.rpartition(" ")[2]) for line in collected]
    assert offsets == sorted(offsets)
    assert offsets[-1] == 19


def test_the_end_waits_for_requests_under_way() -> None:
    storage = MemoryStorage(bytes(SIZE))
    session = make_session(MemoryOpener(disk=storage))
    for index in range(16):
        session.run(f"aio_write -q -P 3 {index * 4096} 4k")
    assert not session.finish().failed
    assert storage.to_bytes() == b"\x03" * SIZE


# Looking


def test_length_is_told_as_a_size(session: IoSession) -> None:
    assert said(session, "length") == ["64 KiB"]


@pytest.mark.pinned("zero clusters", "compat=0.10")
def test_the_map_shows_what_the_image_holds_itself(qcow2: IoSession) -> None:
    said(qcow2, "write 64k 64k", "write -z 128k 64k")
    assert said(qcow2, "map") == [
        "64 KiB (0x10000) bytes not allocated at offset 0 bytes (0x0)",
        "128 KiB (0x20000) bytes     allocated at offset 64 KiB (0x10000)",
        "832 KiB (0xd0000) bytes not allocated at offset 192 KiB (0x30000)",
    ]


def test_a_raw_disk_holds_everything(session: IoSession) -> None:
    assert said(session, "map") == ["64 KiB (0x10000) bytes     allocated at offset 0 bytes (0x0)"]


def test_alloc_counts_what_is_held_of_a_range(qcow2: IoSession) -> None:
    said(qcow2, "write 64k 64k")
    assert said(qcow2, "alloc 0") == ["0/512 bytes allocated at offset 0 bytes"]
    assert said(qcow2, "alloc 96k 1G") == ["32768/950272 bytes allocated at offset 96 KiB"]
    assert said(qcow2, "a 2M 4k") == ["0/0 bytes allocated at offset 2 MiB"]


@pytest.mark.pinned("the options are what is shown")
def test_info_of_a_qcow2_image_tells_its_features(qcow2: IoSession) -> None:
    assert said(qcow2, "info") == [
        "format name: qcow2",
        "cluster size: 64 KiB",
        "vm state offset: 512 MiB",
        "Format specific information:",
        "    compat: 1.1",
        "    compression type: zlib",
        "    refcount bits: 16",
        "    lazy refcounts: false",
        "    corrupt: false",
        "    extended l2: false",
    ]


def test_info_of_a_raw_disk_is_short(session: IoSession) -> None:
    assert said(session, "info") == [
        "format name: raw",
        "cluster size: 0 bytes",
        "vm state offset: 0 bytes",
    ]


def test_truncate_grows_and_shrinks(session: IoSession) -> None:
    said(session, "write 0 64k", "truncate 32k")
    assert said(session, "length") == ["32 KiB"]
    said(session, "truncate -m full 1M", "read -P 0 32k 992k", "read -P 0xcd 0 32k")


def test_a_resize_that_cannot_be_says_why(session: IoSession) -> None:
    assert refused(session, "truncate -m metadata 1M") == (
        "truncate: preallocation 'metadata': expected off, falloc or full for a raw disk"
    )


# Opening


def test_without_an_image_only_some_commands_make_sense() -> None:
    session = make_session(MemoryOpener(), None)
    for command in ("read 0 1", "length", "close", "aio_flush", "reopen", "break l2_update A"):
        assert refused(session, command) == "no image is open (see help open)"
    said(session, "help", "help read", "sleep 1", "")
    assert not session.finish().failed


def test_open_gives_its_flags_to_the_opener() -> None:
    opener = MemoryOpener(disk=MemoryStorage(bytes(SIZE)))
    session = make_session(opener, None)
    said(session, "open -rUkn -i native -d unmap -o l2-cache-size=1M disk")
    assert opener.requests == [
        OpenRequest(
            path="disk",
            options={"l2-cache-size": "1M", "discard": "unmap"},
            writable=False,
            cache="none",
            force_share=True,
        )
    ]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("open disk", "an image is open already: close it first"),
        ("open -i fast disk", "open: -i is 'fast', expected one of threads, native, io_uring"),
        ("open -d some disk", "open: -d is 'some', expected one of ignore, off, unmap, on"),
        ("reopen -r -w", "reopen: -r and -w exclude each other"),
        ("reopen -o driver=raw", "reopen: driver= cannot change while an image is open"),
        ("reopen -o bad=1", "-o: bad= is not supported"),
        (
            "reopen -c fast",
            "cache mode is 'fast', expected one of none, writeback, writethrough, directsync, "
            "unsafe",
        ),
        ("sleep soon", "sleep: milliseconds 'soon' is not a whole number"),
        ("sigraise TERM", "sigraise: signal 'TERM' is not a whole number"),
    ],
)
def test_opening_against_the_rules_is_refused(
    session: IoSession, command: str, message: str
) -> None:
    assert refused(session, command) == message
    said(session, "write 0 512")


@pytest.mark.parametrize("flag", ["s", "C"])
def test_changes_of_a_read_only_image_are_contradictory(flag: str) -> None:
    session = make_session(MemoryOpener(disk=MemoryStorage(bytes(SIZE))), None)
    message = f"-{flag} needs an image that is written, -r excludes that"
    assert refused(session, f"open -r{flag} disk") == message


def test_reopening_changes_between_reading_and_writing(session: IoSession) -> None:
    said(session, "write -P 1 0 512", "reopen -r", "read -P 1 0 512")
    assert refused(session, "write 0 1") == "write: the image is open read-only"
    said(session, "reopen", "read 0 1")
    assert session.run("write 0 1").failed
    said(session, "reopen -w -c directsync", "write 0 1")


def test_a_reopening_that_fails_leaves_the_image_as_it_was(session: IoSession) -> None:
    assert refused(session, "reopen -o broken=on") == (
        "reopen: disk: open: Permission denied (EACCES); the image is open as before"
    )
    said(session, "write 0 1")


def test_a_temporary_overlay_takes_all_changes() -> None:
    storage = MemoryStorage(b"\x11" * SIZE)
    session = make_session(MemoryOpener(disk=storage), temporary=True)
    said(session, "write -P 2 100 1k", "read -P 2 100 1k", "read -P 0x11 0 100")
    said(session, "discard 0 64k", "read -P 0 0 64k")
    assert refused(session, "reopen -r") == (
        "reopen: what was changed lies in a temporary overlay, and would go"
    )
    assert not session.finish().failed
    assert storage.to_bytes() == b"\x11" * SIZE


@pytest.mark.pinned("clusters of 64 KiB", "cluster_size=512")
def test_copy_on_read_stores_what_lies_below(tmp_path: Path) -> None:
    base, top = tmp_path / "base.raw", str(tmp_path / "top.qcow2")
    base.write_bytes(b"\x22" * MiB + bytes(MiB))
    options = {"backing_file": "base.raw", "backing_fmt": "raw"}
    create_image(top, CreateOptions.of("qcow2", options), gate=ReferenceGate.below_image())
    session = make_session(Qcow2Opener(), top, copy_on_read=True)
    said(session, "read -P 0x22 100k 1k", "read -P 0 1M 1k", "aio_read 512k 1", "aio_flush")
    held = [line for line in said(session, "map") if "    allocated" in line]
    assert held == [
        "64 KiB (0x10000) bytes     allocated at offset 64 KiB (0x10000)",
        "64 KiB (0x10000) bytes     allocated at offset 512 KiB (0x80000)",
        "64 KiB (0x10000) bytes     allocated at offset 1 MiB (0x100000)",
    ]
    session.finish()


def test_an_error_of_closing_fails() -> None:
    storage = FaultyStorage(MemoryStorage(bytes(SIZE)), Fault(operation="flush"))
    session = make_session(MemoryOpener(disk=storage))
    said(session, "write 0 512")
    outcome = session.finish()
    assert outcome.failed
    assert outcome.errors == ("close: <memory>: flush: Input/output error (EIO)",)


# Ends


def test_quit_abort_and_signals_are_left_to_the_front_end(session: IoSession) -> None:
    assert session.run("quit").ends
    abort = session.run("abort")
    assert (abort.ends, abort.crash) == (True, True)
    assert session.run("sigraise 15").signal == 15
