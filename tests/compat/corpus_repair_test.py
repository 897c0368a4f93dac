"""Repair of the disk images with known content, the malformed ones too: never a crash, never a byte
of a guest that could be read before and reads otherwise now."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.errors import QcowkitError
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.registry import open_chain
from qcowkit.units import KiB, MiB
from tests.command import qcow
from tests.corpus import Entry, bad_images, corpus_root, entry_id, sound_images, unpack

pytestmark = [
    pytest.mark.skipif(corpus_root() is None, reason="peer corpus of images is missing"),
    pytest.mark.pinned("recorded images"),
]

PIECE = 64 * KiB
# Of larger disks only so much is read at both ends, and what their entries tell.
MOST = 64 * MiB


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def pieces(chain: Chain) -> Iterator[int]:
    """Guest offsets of what is compared."""
    yield from range(0, min(chain.size, MOST), PIECE)
    yield from range(max(MOST, chain.size - MiB), chain.size, PIECE)


def read_guest(path: Path, snapshot: str | None = None) -> dict[int, str]:
    """Digests of the pieces that can be read."""
    gate = ReferenceGate.below_image()
    try:
        chain = open_chain(path, format="qcow2", gate=gate, budget=TRUSTED, snapshot=snapshot)
    except QcowkitError:
        return {}
    found = {}
    with chain:
        for offset in pieces(chain):
            try:
                raw = chain.read(offset=offset, length=min(PIECE, chain.size - offset))
            except QcowkitError:
                continue
            found[offset] = hashlib.sha1(raw).hexdigest()
    return found


def views(entry: Entry) -> list[str | None]:
    """The disk and its snapshots."""
    return [None, *(guest["id"] for guest in entry.get("snapshot_guests", ()))]


def warns(path: Path) -> bool:
    """Whether the dirty or the corrupt bit is set, which a repair clears."""
    with path.open("rb") as file:
        head = file.read(80)
    return head[7] >= 3 and bool(head[79] & 3)


@pytest.mark.parametrize("entry", sound_images(format="qcow2"), ids=entry_id)
def test_a_repair_of_a_sound_image_changes_nothing_that_is_read(
    entry: Entry, tmp_path: Path
) -> None:
    path = unpack(entry, tmp_path)
    before = digest(path)
    code = qcow("check", "-f", "qcow2", path, code=None).code
    assert qcow("check", "-r", "all", "--dry-run", path, code=None).code == code
    assert digest(path) == before
    sound = code == 0 and not warns(path)
    guests = {} if sound else {view: read_guest(path, view) for view in views(entry)}
    qcow("check", "-r", "all", path)
    qcow("check", "-f", "qcow2", path)
    if sound:
        assert digest(path) == before
    for view, guest in guests.items():
        assert read_guest(path, view) == guest


@pytest.mark.parametrize("mode", ["leaks", "all"])
@pytest.mark.parametrize("entry", bad_images(format="qcow2"), ids=entry_id)
def test_a_repair_of_a_bad_image_costs_no_readable_data(
    entry: Entry, tmp_path: Path, mode: str
) -> None:
    path = unpack(entry, tmp_path)
    before, guest = digest(path), read_guest(path)
    planned = qcow("check", "-r", mode, "--dry-run", "-f", "qcow2", path, code=None)
    assert planned.code in (0, 1, 2, 3), planned.err
    assert digest(path) == before
    done = qcow("check", "-r", mode, "-f", "qcow2", path, code=None)
    assert done.code in (0, 1, 2, 3), done.err
    if done.code == 1:
        assert digest(path) == before
        assert done.err.count("\n") == 1
    after = read_guest(path)
    assert {offset: after.get(offset) for offset in guest} == guest
    repaired = digest(path)
    qcow("check", "-r", mode, "-f", "qcow2", path, code=None)
    assert digest(path) == repaired
