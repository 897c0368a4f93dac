"""`qcow amend`: key slots, and the options of qcow2 images."""

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


def option_of(path: Path, key: str) -> object:
    return qcow("info", "--output=json", path).json()["format-specific"]["data"][key]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.qcow2"
    qcow("create", "-q", "-f", "qcow2", path, "1M")
    qcow("io", "-c", "write -q -P 5 0 128k", path)
    return path


def test_it_says_what_was_changed(plain: Path) -> None:
    done = qcow("amend", "-o", "extended_l2=on,refcount_bits=64,size=2M", plain)
    words = "refcount_bits=64, extended_l2=on, size=2097152"
    assert done.out.decode() == f"{plain}: {words}\n"
    assert option_of(plain, "extended-l2") is True
    assert qcow("check", plain).code == 0
    assert qcow("io", "-c", "read -q -P 5 0 128k", plain).code == 0


def test_sizes_have_units_and_bools_their_spellings(plain: Path) -> None:
    qcow("amend", "-q", "-o", "cluster_size=16k", "-o", "lazy_refcounts", plain)
    assert option_of(plain, "lazy-refcounts") is True
    assert qcow("info", "--output=json", plain).json()["cluster-size"] == 16384


def test_an_option_over_a_base_reads_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"base" * 0x40000)
    top = tmp_path / "top.qcow2"
    words = ("-b", "base.raw", "-F", "raw")
    qcow("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", *words, top)
    qcow("io", "-c", "write -q -P 7 4k 4k", top)
    qcow("amend", "-q", "-o", "cluster_size=64k", top)
    text = "read -q -P 7 4k 4k"
    qcow("io", "-c", text, "-c", "read -q -P 0x62 0 1", top)
    qcow("check", "-q", top)


def test_a_missing_base_is_not_asked_for_where_it_is_not_needed(tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    words = ("-u", "-b", "gone.raw", "-F", "raw")
    qcow("create", "-q", "-f", "qcow2", *words, top, "1M")
    qcow("amend", "-q", "-o", "refcount_bits=32,lazy_refcounts=on,compression_type=zstd", top)
    assert option_of(top, "refcount-bits") == 32
    assert "gone.raw" in qcow("amend", "-q", "-o", "cluster_size=128k", top, code=1).err


def test_a_data_file_that_was_moved_gets_its_name(tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    qcow("create", "-q", "-f", "qcow2", "-o", "data_file=disk.data", path, "1M")
    qcow("io", "-c", "write -q -P 5 0 64k", path)
    data.rename(tmp_path / "moved.data")
    qcow("amend", "-q", "-o", "data_file=moved.data", path)
    qcow("io", "-c", "read -q -P 5 0 64k", path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "nocow=on"), "-o nocow: not an option that can be amended (see -o help)"),
        (("-o", "extended_l2=maybe"), "-o extended_l2 is 'maybe', expected on or off"),
        (("-o", "refcount_bits=many"), "-o refcount_bits is 'many', expected a whole number"),
        (("-o", "cluster_size=big"), "-o cluster_size: "),
        (("-o", "backing_file=x"), "backing_file cannot be amended: rebase changes"),
        (("-o", "size=1k"), "shrinking loses data, which resize does where it is asked to"),
        ((), "-o is missing: it says what shall change"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    plain: Path, words: tuple[str, ...], message: str
) -> None:
    before = plain.read_bytes()
    assert message in qcow("amend", *words, plain, code=1).err
    assert plain.read_bytes() == before


def test_help_lists_the_keys() -> None:
    text = qcow("amend", "-o", "help").out.decode()
    assert "compression_type=<str>" in text
    assert "encrypt.state=<str>" in text


@pytest.mark.peer("qemu-io")
@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_encrypted_data_move_with_their_passphrase(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "disk.qcow2"
    keys = KINDS[kind] + ",encrypt.key-secret=s,cluster_size=4k"
    secret = ("--object", "secret,id=s,data=old")
    qcow("create", "-q", "-f", "qcow2", *secret, "-o", keys, path, "1M")
    disk = described(path)
    # Out of order, so that no two clusters lie together.
    writes = [f"write -q -P {number + 1} {number * 4}k 3k" for number in (5, 3, 1, 2, 4, 0)]
    words = [word for write in writes for word in ("-c", write)]
    qcow("io", *secret, "--image-opts", *words, disk)
    before = path.read_bytes()
    assert "secret" in qcow("amend", "-o", "cluster_size=16k", path, code=1).err
    assert path.read_bytes() == before
    options = "cluster_size=16k,extended_l2=on"
    qcow("amend", "-q", *secret, "--image-opts", "-o", options, disk)
    reads = [f"read -q -P {number + 1} {number * 4}k 3k" for number in range(6)]
    words = [word for read in reads for word in ("-c", read)]
    qcow("io", *secret, "--image-opts", *words, disk)
    qcow("check", "-q", path)
    compat = f"driver=qcow2,encrypt.format={kind},encrypt.key-secret=s,file.filename={path}"
    run_qemu("qemu-io", *secret, "--image-opts", *words, compat)
