"""`qcow amend`, as far as it changes key slots."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcowkit.image.registry import open_chain
from tests.command import qcow
from tests.crypt_disks import KINDS, described, run_qemu

pytestmark = pytest.mark.pinned("options of its own, in full")
OBJECTS = ("--object", "secret,id=s,data=old", "--object", "secret,id=n,data=new")
ADD = "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    keys = KINDS["luks"] + ",encrypt.key-secret=s"
    qcow("create", "-q", "-f", "qcow2", *OBJECTS, "-o", keys, path, "1M")
    return path


def opens(path: Path, secret: bytes) -> bool:
    try:
        open_chain(path, secrets=secret).close()
    except Exception:
        return False
    return True


def test_a_passphrase_is_added_and_the_old_one_taken_away(disk: Path) -> None:
    done = qcow("amend", *OBJECTS, "--image-opts", "-o", ADD, described(disk))
    assert done.out.decode() == f"{disk}: key slot 1 active, 2 in use\n"
    assert (opens(disk, b"old"), opens(disk, b"new")) == (True, True)
    words = ("-o", "encrypt.state=inactive,encrypt.old-secret=s")
    done = qcow("amend", *OBJECTS, *words, disk)
    assert done.out.decode() == f"{disk}: key slot 0 inactive, 1 in use\n"
    assert (opens(disk, b"old"), opens(disk, b"new")) == (False, True)
    qcow("check", "-q", disk)


def test_the_last_key_needs_force(disk: Path) -> None:
    words = ("-q", "-o", "encrypt.state=inactive,encrypt.keyslot=0", disk)
    done = qcow("amend", *words, code=1)
    assert "key slot 0 holds the last key of the disk" in done.err
    assert opens(disk, b"old")
    qcow("amend", "--force", *words)
    assert not opens(disk, b"old")


def test_slots_show_in_info(disk: Path) -> None:
    qcow("amend", "-q", *OBJECTS, "--image-opts", "-o", ADD, described(disk))
    slots = qcow("info", "--output=json", disk).json()["format-specific"]["data"]["encrypt"][
        "slots"
    ]
    assert [slot["active"] for slot in slots] == [True, True] + [False] * 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("encrypt.state=on", "-o encrypt.state is 'on', expected active or inactive"),
        ("encrypt.keyslot=1", "-o encrypt.state is missing, expected active or inactive"),
        ("encrypt.state=active", "state=active needs new-secret"),
        ("encrypt.state=inactive", "state=inactive needs one of keyslot and old-secret"),
        (
            "encrypt.state=active,encrypt.new-secret=n,encrypt.old-secret=s",
            "old-secret is for state=inactive",
        ),
        (
            "encrypt.state=inactive,encrypt.keyslot=0,encrypt.iter-time=5",
            "new-secret and iter-time are for state=active",
        ),
        ("encrypt.state=inactive,encrypt.keyslot=x", "-o encrypt.keyslot is 'x', expected a whole"),
        (
            "encrypt.state=active,encrypt.new-secret=q",
            "-o encrypt.new-secret=q: there is no --object secret with id=q",
        ),
        ("encrypt.colour=red", "-o encrypt.colour: not an option that can be amended"),
        (ADD + ",encrypt.keyslot=9", "there is no key slot 9, expected 0 to 7"),
    ],
)
def test_what_cannot_be_is_named_and_changes_nothing(disk: Path, options: str, says: str) -> None:
    before = disk.read_bytes()
    done = qcow("amend", *OBJECTS, "--image-opts", "-o", options, described(disk), code=1)
    assert says in done.err
    assert disk.read_bytes() == before


def test_only_luks_has_key_slots(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow("create", "-q", "-f", "qcow2", path, "1M")
    done = qcow("amend", *OBJECTS, "-o", ADD, path, code=1)
    assert "only LUKS has key slots, the encryption is none" in done.err


@pytest.mark.peer("qemu-img")
def test_qemu_and_we_change_the_slots_by_turns(disk: Path) -> None:
    qcow("amend", "-q", *OBJECTS, "--image-opts", "-o", ADD, described(disk))
    theirs = described(disk).replace("key-secret=s", "key-secret=n")
    run_qemu("qemu-img", "info", *OBJECTS, "--image-opts", theirs)
    run_qemu("qemu-img", "check", *OBJECTS, "--image-opts", theirs)
    options = "encrypt.state=inactive,encrypt.old-secret=s"
    run_qemu("qemu-img", "amend", *OBJECTS, "--image-opts", "-o", options, theirs)
    assert (opens(disk, b"old"), opens(disk, b"new")) == (False, True)
    options = "encrypt.state=active,encrypt.new-secret=s,encrypt.iter-time=10"
    run_qemu("qemu-img", "amend", *OBJECTS, "--image-opts", "-o", options, theirs)
    assert (opens(disk, b"old"), opens(disk, b"new")) == (True, True)
