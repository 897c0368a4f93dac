"""Every image of the corpus says what its entry says, and stays as it is, byte for byte.

What qemu recorded is compared by the keys that were recorded: later versions add some."""

from __future__ import annotations

import base64
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.errors import QcowkitError, RequestError
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import close_layers, open_layers
from qcowkit.image.registry import open_chain
from qcowkit.units import KiB, MiB
from tests.command import qcow
from tests.corpus import Entry, bad_images, entry_id, sound_images, unpack

pytestmark = [
    pytest.mark.skipif(not sound_images(), reason="the corpus is not here"),
    pytest.mark.pinned("recorded images"),
]

_STEP = 8 * MiB
# For these qemu maps whole blocks; ours tells the sectors that their bitmaps leave out.
_BY_SECTOR = ("vhd-trailing-footer-only", "vhd-leading-copy-only", "vhd-odd-size")
# What qemu does not mind, or cannot check at all, and ours reports.
_STRICTER = {
    "damage-count-beyond-end": 3,
    "vhd-trailing-footer-only": 2,
    "vhd-leading-copy-only": 2,
}


def some(name: str, entries: list[Entry]) -> pytest.MarkDecorator:
    """Run the test for these entries only; `name` is the fixture that unpacks them."""
    return pytest.mark.parametrize(name, entries, indirect=True, ids=entry_id, scope="module")


def having(key: str) -> pytest.MarkDecorator:
    """Run the test for the sound images about which this is known."""
    found = [one for one in sound_images() if key in one or key in one.get("open", ())]
    return some("image", found)


def bad_at(*places: str) -> pytest.MarkDecorator:
    """Run the test for the bad images whose verdict comes there."""
    return some("bad", [entry for entry in bad_images() if entry["at"] in places])


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """An image on the shelf: its entry, and its path in a folder of its own."""

    entry: Entry
    path: Path

    @property
    def secret(self) -> bytes | None:
        """The passphrase, for an image that has one."""
        text = self.entry.get("open", {}).get("secret")
        return None if text is None else text.encode()

    @property
    def access(self) -> tuple[str, ...]:
        """What a command needs beside the name to open the disk."""
        secret = self.secret
        if secret is None:
            return ()
        text = base64.b64encode(secret).decode().replace(",", ",,")
        return ("--object", f"secret,id=s,data={text},format=base64")

    def open(self, **options: Any) -> Chain:
        """The guest disk, with the names inside admitted below the folder."""
        options = {"secrets": self.secret, **options}
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
    with image.open() as chain:
        assert chain.size == image.entry["virtual_size"]
        if "guest_sha256" in image.entry:
            assert guest_sha256(chain) == image.entry["guest_sha256"]
        for start, length, digest in image.entry.get("probes", ()):
            assert guest_sha256(chain, start=start, length=length) == digest, start


@having("secret")
def test_an_encrypted_disk_does_not_open_without_its_passphrase(image: Unpacked) -> None:
    with pytest.raises(RequestError, match=r"is encrypted \((luks|aes)\) and no passphrase"):
        image.open(secrets=None)
    qcow("map", "-f", image.entry["format"], image.path, code=1)


@having("probes")
def test_what_lies_between_the_probes_is_zero(image: Unpacked) -> None:
    probes = image.entry["probes"]
    with image.open() as chain:
        for (start, length, _), (following, *_) in zip(probes, probes[1:], strict=False):
            # Two probes may overlap.
            gap = max(0, min(64 * KiB, following - start - length))
            assert not any(chain.read(offset=start + length, length=gap))


@having("snapshot_guests")
def test_every_snapshot_reads_to_its_recorded_content(image: Unpacked) -> None:
    for guest in image.entry["snapshot_guests"]:
        with image.open(snapshot=guest["id"]) as chain:
            assert (chain.size, guest_sha256(chain)) == (guest["size"], guest["guest_sha256"])


@having("snapshot_guests")
def test_snapshots_are_found_by_name_as_well(image: Unpacked) -> None:
    by_id = {guest["id"]: guest for guest in image.entry["snapshot_guests"]}
    snapshots = image.entry["info"]["snapshots"]
    names = [one["name"] for one in snapshots]
    for one in snapshots:
        unique = names.count(one["name"]) == 1 and one["name"] not in by_id
        if one["id"] in by_id and unique:
            with image.open(snapshot=one["name"]) as chain:
                assert guest_sha256(chain) == by_id[one["id"]]["guest_sha256"]


@having("map")
def test_the_map_is_the_recorded_one(image: Unpacked) -> None:
    access = image.access
    done = qcow("map", "--output=json", "-f", image.entry["format"], image.path, *access)
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


@having("info")
def test_info_is_the_recorded_one(image: Unpacked) -> None:
    recorded = image.entry["info"]
    done = qcow("info", "--output=json", "-f", image.entry["format"], image.path)
    assert project(done.json(), recorded) == recorded


def test_info_describes_every_layer(image: Unpacked) -> None:
    options = ("info", "--output=json", "--backing-chain", "-f", image.entry["format"])
    layers = qcow(*options, image.path).json()
    deepest = max((row["depth"] for row in image.entry.get("map", ())), default=0)
    assert deepest < len(layers)
    assert layers[0]["virtual-size"] == image.entry["virtual_size"]


@having("check")
def test_the_verdict_of_check_is_the_recorded_one(image: Unpacked) -> None:
    recorded = dict(image.entry["check"])
    expected = recorded.pop("exit_code")
    name, format = image.entry["name"], image.entry["format"]
    done = qcow("check", "--output=json", "-f", format, image.path, code=None)
    if name in _STRICTER:
        expected = _STRICTER[name]
    elif format == "vpc":
        # qemu cannot check these.
        expected = 0
    assert done.code == expected, done.err
    if name not in _STRICTER and format == "qcow2":
        assert project(done.json(), recorded) == recorded


@bad_at("open")
def test_a_bad_image_is_refused_with_one_line(bad: Unpacked) -> None:
    with pytest.raises(QcowkitError) as failure:
        bad.open()
    message = str(failure.value)
    assert message
    assert "\n" not in message
    assert not message.endswith(".")


def fails_to_read(entry: Entry) -> bool:
    """Whether reading the start of the disk must fail, when opening has not failed already."""
    return entry["at"] in ("open", "read") or "must fail" in entry["reason"]


@bad_at("read", "check")
def test_a_bad_image_is_not_read(bad: Unpacked) -> None:
    try:
        with bad.open() as chain:
            chain.read(offset=0, length=64 * KiB)
    except QcowkitError:
        # Refusing earlier than the entry asks for is always right.
        return
    assert not fails_to_read(bad.entry)


@bad_at("readonly")
def test_a_corrupt_image_is_read(bad: Unpacked) -> None:
    with bad.open() as chain:
        assert any(chain.read(offset=0, length=64 * KiB))


@bad_at("readonly")
def test_a_corrupt_image_is_not_written(bad: Unpacked, tmp_path: Path) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(bytes(512))
    assert qcow("convert", "-n", "-f", "raw", "-O", "qcow2", source, bad.path, code=1).err


@bad_at("open")
def test_no_command_takes_an_image_that_is_refused_at_open(bad: Unpacked) -> None:
    for verb in ("info", "map", "headers", "check"):
        if verb == "check" and "only a check may open it" in bad.entry["reason"]:
            continue
        done = qcow(verb, "-f", bad.entry["format"], bad.path, code=1)
        assert done.out == b""
        assert done.err.startswith(f"qcow {verb}: ")
        assert done.err.count("\n") == 1


def test_a_bad_image_is_not_converted(bad: Unpacked, tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    target.write_bytes(b"precious")
    done = qcow("convert", "-f", bad.entry["format"], bad.path, target, code=None)
    if done.code or fails_to_read(bad.entry):
        assert done.code == 1
        assert done.err.count("\n") == 1
        assert target.read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == ["disk.raw"]


@some(
    "bad",
    [
        entry
        for entry in bad_images()
        if entry["at"] in ("check", "readonly") or "only a check may open it" in entry["reason"]
    ],
)
def test_a_check_does_not_call_a_bad_image_clean(bad: Unpacked) -> None:
    done = qcow("check", "-f", bad.entry["format"], bad.path, code=None)
    assert done.code in (1, 2, 3), done.err


@bad_at("open")
def test_a_bad_image_does_not_pass_inspection(bad: Unpacked) -> None:
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
