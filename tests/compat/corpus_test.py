"""Every image of the corpus says what its entry says, and stays as it is, byte for byte.

What qemu recorded is compared by the keys that were recorded: later versions add some."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.errors import QcowkitError, UnsupportedFeature
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import close_layers, open_layers
from qcowkit.image.registry import open_chain
from qcowkit.units import KiB, MiB
from tests.command import qcow
from tests.corpus import Entry, bad_images, entry_id, sound_images, unpack

pytestmark = pytest.mark.skipif(not sound_images(), reason="the corpus is not here")

_STEP = 8 * MiB
# For these qemu maps whole blocks; ours tell the sectors that the bitmaps leave out.
_BY_SECTOR = ("vhd-dynamic", "vhd-odd-size", "vhd-leading-copy-only", "chain-c-over-vhd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """An image on the shelf: its entry, and its path in a folder of its own."""

    entry: Entry
    path: Path

    @property
    def encrypted(self) -> bool:
        """Whether the image, or one that it stands on, needs a secret."""
        return "secret" in self.entry.get("open", {})

    def open(self, **options: Any) -> Chain:
        """The guest disk, with the names inside admitted below the folder."""
        gate = ReferenceGate.below_image()
        return open_chain(self.path, format=self.entry["format"], gate=gate, **options)


def unpacked(entry: Entry) -> Iterator[Unpacked]:
    """The image for as long as its tests run; afterwards no file may have changed."""
    with tempfile.TemporaryDirectory(prefix="qcowkit-corpus-") as name:
        folder = Path(name)
        path = unpack(entry, folder)
        before = digests(folder)
        yield Unpacked(entry=entry, path=path)
        assert digests(folder) == before, "a file has changed, or one appeared"


@pytest.fixture(params=sound_images(), ids=entry_id, scope="module")
def image(request: pytest.FixtureRequest) -> Iterator[Unpacked]:
    yield from unpacked(request.param)


@pytest.fixture(params=bad_images(), ids=entry_id, scope="module")
def bad(request: pytest.FixtureRequest) -> Iterator[Unpacked]:
    yield from unpacked(request.param)


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha1").hexdigest()
    return found


def guest_sha256(chain: Chain, *, start: int = 0, length: int | None = None) -> str:
    """The digest of guest bytes, read in steps."""
    digest = hashlib.sha256()
    stop = chain.size if length is None else start + length
    for offset in range(start, stop, _STEP):
        digest.update(chain.read(offset=offset, length=min(_STEP, stop - offset)))
    return digest.hexdigest()


def test_the_disk_reads_to_its_recorded_content(image: Unpacked) -> None:
    if image.encrypted:
        with pytest.raises(UnsupportedFeature, match=r"encryption: the content is encrypted"):
            image.open()
        return
    with image.open() as chain:
        assert chain.size == image.entry["virtual_size"]
        if "guest_sha256" in image.entry:
            assert guest_sha256(chain) == image.entry["guest_sha256"]
        for start, length, digest in image.entry.get("probes", ()):
            assert guest_sha256(chain, start=start, length=length) == digest, start


def test_what_lies_between_the_probes_is_zero(image: Unpacked) -> None:
    probes = image.entry.get("probes")
    if not probes:
        return
    with image.open() as chain:
        for (start, length, _), (following, *_) in zip(probes, probes[1:], strict=False):
            gap = min(64 * KiB, following - start - length)
            assert not any(chain.read(offset=start + length, length=gap))


def test_every_snapshot_reads_to_its_recorded_content(image: Unpacked) -> None:
    for guest in image.entry.get("snapshot_guests", ()):
        if image.encrypted:
            with pytest.raises(UnsupportedFeature):
                image.open(snapshot=guest["id"])
            continue
        with image.open(snapshot=guest["id"]) as chain:
            assert (chain.size, guest_sha256(chain)) == (guest["size"], guest["guest_sha256"])


def test_snapshots_are_found_by_name_as_well(image: Unpacked) -> None:
    by_id = {guest["id"]: guest for guest in image.entry.get("snapshot_guests", ())}
    snapshots = image.entry.get("info", {}).get("snapshots", ())
    names = [one["name"] for one in snapshots]
    for one in snapshots:
        unique = names.count(one["name"]) == 1 and one["name"] not in by_id
        if one["id"] in by_id and unique and not image.encrypted:
            with image.open(snapshot=one["name"]) as chain:
                assert guest_sha256(chain) == by_id[one["id"]]["guest_sha256"]


def test_the_map_is_the_recorded_one(image: Unpacked) -> None:
    if "map" not in image.entry:
        return
    if image.encrypted:
        done = qcow("map", "-f", image.entry["format"], image.path, code=1)
        assert "encryption: the content is encrypted" in done.err
        return
    done = qcow("map", "--output=json", "-f", image.entry["format"], image.path)
    # A disk without a byte is one extent of no length in qemu, and no extent here.
    recorded = [row for row in image.entry["map"] if row["length"]]
    rows = done.json()
    if image.entry["name"] in _BY_SECTOR:
        assert_same_blocks(rows, recorded)
        return
    for row, expected in zip(rows, recorded, strict=True):
        assert {key: row.get(key) for key in expected} == expected
        assert ("offset" in row) == ("offset" in expected), row


def assert_same_blocks(rows: list[Any], recorded: list[Any]) -> None:
    """Every row of ours lies in a recorded one of the same depth; data of ours is data there."""
    position = 0
    for row in rows:
        while recorded[position]["start"] + recorded[position]["length"] <= row["start"]:
            position += 1
        block = recorded[position]
        assert row["start"] + row["length"] <= block["start"] + block["length"], row
        assert row["depth"] == block["depth"], row
        if row["data"]:
            assert block["data"], row
            assert row["offset"] - block["offset"] == row["start"] - block["start"]
        elif block["data"]:
            # Not one sector of this range was ever written.
            assert row["zero"], row


def project(found: Any, recorded: Any) -> Any:
    """`found`, but only the keys that `recorded` has, at every depth."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        return {key: project(found.get(key), value) for key, value in recorded.items()}
    if isinstance(recorded, list) and isinstance(found, list) and len(found) == len(recorded):
        return [project(one, other) for one, other in zip(found, recorded, strict=True)]
    return found


def test_info_is_the_recorded_one(image: Unpacked) -> None:
    recorded = image.entry.get("info", {})
    done = qcow("info", "--output=json", "-f", image.entry["format"], image.path)
    assert project(done.json(), recorded) == recorded


def test_info_shows_the_whole_chain(image: Unpacked) -> None:
    done = qcow(
        "info", "--output=json", "--backing-chain", "-f", image.entry["format"], image.path
    )
    layers = done.json()
    depths = {row["depth"] for row in image.entry.get("map", ())}
    assert max(depths, default=0) < len(layers)


def test_the_verdict_of_check_is_the_recorded_one(image: Unpacked) -> None:
    recorded = dict(image.entry.get("check", {}))
    if not recorded:
        return
    expected = recorded.pop("exit_code")
    done = qcow("check", "--output=json", "-f", image.entry["format"], image.path, code=None)
    if image.entry["format"] == "vpc":
        # qemu cannot check these; ours can.
        assert done.code == 0
        return
    assert done.code == expected, done.err
    if expected != 63:
        assert project(done.json(), recorded) == recorded


def test_a_bad_image_is_refused_at_open_or_later_as_its_entry_says(bad: Unpacked) -> None:
    entry = bad.entry
    if entry["at"] == "open":
        with pytest.raises(QcowkitError) as failure:
            bad.open()
        message = str(failure.value)
        assert message
        assert "\n" not in message
        assert not message.endswith(".")
    elif entry["at"] == "read" or "must fail" in entry["reason"]:
        with pytest.raises(QcowkitError), bad.open() as chain:
            chain.read(offset=0, length=64 * KiB)
    else:
        with bad.open() as chain:
            chain.read(offset=0, length=64 * KiB)


def test_no_command_takes_an_image_that_is_refused_at_open(bad: Unpacked) -> None:
    if bad.entry["at"] != "open":
        return
    for verb in ("info", "map", "headers", "check"):
        if verb == "check" and "only a check may open it" in bad.entry["reason"]:
            continue
        done = qcow(verb, "-f", bad.entry["format"], bad.path, code=1)
        assert done.out == b""
        assert done.err.startswith(f"qcow {verb}: ")
        assert done.err.count("\n") == 1


def test_a_bad_image_is_not_converted(bad: Unpacked) -> None:
    fails = bad.entry["at"] in ("open", "read") or "must fail" in bad.entry["reason"]
    with tempfile.TemporaryDirectory() as name:
        target = Path(name, "disk.raw")
        target.write_bytes(b"precious")
        done = qcow("convert", "-f", bad.entry["format"], bad.path, target, code=None)
        if fails:
            assert done.code == 1
            assert done.err.count("\n") == 1
            assert target.read_bytes() == b"precious"
        assert [path.name for path in target.parent.iterdir()] == ["disk.raw"]


def test_a_check_does_not_call_a_bad_image_clean(bad: Unpacked) -> None:
    expected = {"check-reports", "open-readonly-only"}
    if bad.entry["expect"] not in expected and bad.entry["name"] != "reftable-empty":
        return
    done = qcow("check", "-f", bad.entry["format"], bad.path, code=None)
    assert done.code in (1, 2, 3), done.err


def test_a_corrupt_image_is_not_opened_for_writing(bad: Unpacked) -> None:
    if bad.entry["at"] != "readonly":
        return
    source = bad.path.parent.parent / f"{bad.path.parent.name}.raw"
    source.write_bytes(bytes(512))
    try:
        for format in ("qcow2", "raw"):
            done = qcow("convert", "-n", "-f", "raw", "-O", format, source, bad.path, code=None)
            assert done.code == 1, format
    finally:
        source.unlink()


def test_a_bad_image_does_not_pass_inspection(bad: Unpacked) -> None:
    if bad.entry["at"] == "open":
        assert qcow("inspect", bad.path, code=None).code in (1, 2)


def test_nothing_stays_open_when_an_image_is_refused(bad: Unpacked) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    try:
        layers = open_layers(
            bad.path,
            format=bad.entry["format"],
            gate=ReferenceGate.below_image(),
            budget=TRUSTED,
        )
    except QcowkitError:
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    else:
        close_layers(layers)
