"""Sessions of the command language on disks in memory, and on qcow2 files."""

from __future__ import annotations

import errno
import itertools

from qcowkit.budget import TRUSTED
from qcowkit.errors import RequestError, StorageError
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.metadata import RawMetadata, load_metadata
from qcowkit.image.raw import RawImage
from qcowkit.image.raw_write import WritableRawImage
from qcowkit.image.registry import open_chain
from qcowkit.operations.create import CreateOptions, create_image
from qcowkit.operations.io_language.opening import OpenRequest
from qcowkit.operations.io_language.reports import Outcome
from qcowkit.operations.io_language.session import IoSession
from qcowkit.storage.protocol import Storage
from qcowkit.testing.recording import RecordingStorage
from qcowkit.units import KiB, MiB

SIZE = 64 * KiB


class MemoryOpener:
    """Opens the raw disks of a table; what was written is there at the next opening."""

    def __init__(self, **disks: Storage) -> None:
        self.disks = disks
        self.requests: list[OpenRequest] = []

    def parse(self, text: str) -> dict[str, str]:
        pairs = (part.partition("=") for part in text.split(",") if part)
        return {key: value for key, _, value in pairs}

    def check(self, request: OpenRequest) -> None:
        if "bad" in request.options:
            raise RequestError("-o: bad= is not supported")

    def open(self, request: OpenRequest) -> Chain:
        self.requests.append(request)
        storage = self.disks[str(request.path)]
        metadata = load_metadata(storage, "raw", budget=TRUSTED)
        assert isinstance(metadata, RawMetadata)
        if "broken" in request.options:
            raise StorageError("open", path="disk", errno=errno.EACCES)
        if not request.writable or request.temporary:
            return Chain([RawImage(metadata, Lasting(storage))])
        image = WritableRawImage(metadata, Lasting(storage))
        return Chain([image], top=image)


class Lasting(RecordingStorage):
    """A storage that survives its closing."""

    def close(self) -> None:
        self.flush()


class Qcow2Opener(MemoryOpener):
    """Opens qcow2 files."""

    def open(self, request: OpenRequest) -> Chain:
        self.requests.append(request)
        return open_chain(
            str(request.path),
            format="qcow2",
            gate=ReferenceGate.below_image(),
            writable=request.writable and not request.temporary,
        )


def make_session(opener: MemoryOpener, name: str | None = "disk", **how: bool) -> IoSession:
    ticks = itertools.count(step=0.5)
    session = IoSession(opener, clock=lambda: float(next(ticks)), pause=lambda _: None)
    if name is not None:
        session.open(OpenRequest(path=name, **how))
    return session


def lines_of(outcome: Outcome) -> list[str]:
    return [line for report in outcome.reports for line in report.render()]


def said(session: IoSession, *commands: str) -> list[str]:
    """What the last of several commands printed; none may fail."""
    found: list[str] = []
    for command in commands:
        outcome = session.run(command)
        assert not outcome.failed, (command, outcome)
        found = lines_of(outcome)
    return found


def refused(session: IoSession, command: str) -> str:
    """The one message of a command that fails without a result."""
    outcome = session.run(command)
    assert outcome.failed
    assert not outcome.reports
    (message,) = outcome.errors
    return message


def make_image(path: str) -> str:
    """An empty qcow2 file of 1 MiB; its path."""
    options = CreateOptions.of("qcow2", {"size": MiB})
    create_image(path, options, gate=ReferenceGate.deny_all())
    return path
