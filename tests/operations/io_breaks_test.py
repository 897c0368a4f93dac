"""Breaks: a request is stopped at a metadata event, and what the session does meanwhile.

docs/adr/0011 has the order in which a flush writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowkit.image.registry import open_chain
from qcowkit.operations.io_language.session import IoSession
from qcowkit.storage.memory import MemoryStorage
from qcowkit.units import KiB
from tests.io_sessions import (
    SIZE,
    MemoryOpener,
    Qcow2Opener,
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


def test_a_request_stops_at_a_break_and_readers_go_on(qcow2: IoSession) -> None:
    said(qcow2, "write -P 1 0 64k")
    assert said(qcow2, "break l1_update A", "flush") == [
        "flush stopped at l1_update, to be resumed: A"
    ]
    said(qcow2, "read -P 1 0 64k", "wait_break A", "map")
    for command in ("write 0 1", "flush", "aio_flush", "close", "truncate 2M", "reopen"):
        assert refused(qcow2, command) == (
            f"{command.split()[0]}: a request is stopped at l1_update and holds the image: "
            "resume A first"
        )
    said(qcow2, "resume A", "write -P 2 0 64k", "flush", "read -P 2 0 64k")


def test_what_is_stopped_can_crash_there(image: str, tmp_path: Path) -> None:
    session = make_session(Qcow2Opener(), image)
    said(session, "write -P 1 0 64k", "break l1_update A", "aio_write -f -P 1 0 64k")
    said(session, "wait_break A")
    crashed = tmp_path / "crashed.qcow2"
    crashed.write_bytes(Path(image).read_bytes())
    said(session, "resume A", "aio_flush")
    session.finish()
    with open_chain(crashed, format="qcow2") as chain:
        assert chain.read(offset=0, length=64 * KiB) == bytes(64 * KiB)
    with open_chain(image, format="qcow2") as chain:
        assert chain.read(offset=0, length=64 * KiB) == b"\x01" * (64 * KiB)


def test_the_end_lets_everything_go_on(image: str) -> None:
    session = make_session(Qcow2Opener(), image)
    said(session, "break refblock_update A", "break l1_update B", "aio_write -f -P 1 0 64k")
    said(session, "wait_break A")
    assert not session.finish().failed
    with open_chain(image, format="qcow2") as chain:
        assert chain.read(offset=0, length=64 * KiB) == b"\x01" * (64 * KiB)


def test_a_break_that_is_taken_back_stops_nothing(qcow2: IoSession) -> None:
    said(qcow2, "break l1_update A", "remove_break A", "write 0 64k", "flush")
    said(qcow2, "write 64k 64k", "break refblock_update A", "aio_write -f 0 1", "wait_break A")
    said(qcow2, "remove_break A", "aio_flush")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("remove_break X", "remove_break: there is no break 'X'"),
        ("resume X", "resume: no request is stopped at 'X'"),
        ("wait_break X", "wait_break: no request came to the break 'X'"),
    ],
)
def test_a_break_that_is_not_there_is_refused_by_its_tag(
    qcow2: IoSession, command: str, message: str
) -> None:
    assert refused(qcow2, command) == message


def test_an_unknown_event_is_refused_with_those_that_are_known(qcow2: IoSession) -> None:
    message = refused(qcow2, "break coffee A")
    assert message.startswith("break: event 'coffee' is unknown; known are ")
    assert "l2_update" in message


def test_a_barrier_is_an_event_too(qcow2: IoSession) -> None:
    said(qcow2, "write 0 64k", "break data_and_refcounts_before_tables A")
    stopped = "flush stopped at data and refcounts before tables, to be resumed: A"
    assert said(qcow2, "flush") == [stopped]
    said(qcow2, "resume A", "flush")


def test_other_images_have_no_events(session: IoSession) -> None:
    assert refused(session, "break l2_update A") == (
        "break: expected a writable qcow2 image, found a writable raw image"
    )
