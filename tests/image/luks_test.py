"""LUKS disks by themselves, and what peers make of them."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.engine.luks.metadata import load_luks_metadata
from qcowkit.errors import CorruptMetadata, RequestError, StorageError, UnsupportedFeature
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.luks_write import WritableLuksImage
from qcowkit.image.registry import open_chain
from qcowkit.operations.create import CreateOptions, create_image
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.qcow2_builder import make_luks_area
from qcowkit.units import MiB
from tests.command import qcow
from tests.crypt_disks import OBJECT, SECRET, described, guest_bytes, run_qemu
from tests.peers import peer

SIZE = MiB + 0x1A00
QUICK = {"iter-time": 1, "cipher-alg": "aes-128"}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(guest_bytes(SIZE, 6))
    return path


@pytest.fixture
def disk(raw: Path, tmp_path: Path) -> Path:
    path = tmp_path / "disk.luks"
    qcow("convert", "-O", "luks", "--object", OBJECT, "-o", "iter-time=10", raw, path)
    return path


def test_the_content_decides_that_it_is_luks(raw: Path, disk: Path) -> None:
    with open_chain(disk, secrets=SECRET) as chain:
        assert (chain.format, chain.size) == ("luks", SIZE)
        assert chain.read(offset=0, length=SIZE) == raw.read_bytes()
        assert chain.read(offset=777, length=3) == raw.read_bytes()[777:780]


def test_it_converts_back_and_to_other_formats(raw: Path, disk: Path, tmp_path: Path) -> None:
    back, other = tmp_path / "back.raw", tmp_path / "other.qcow2"
    qcow("convert", "--object", OBJECT, "-f", "luks", "-O", "raw", disk, back)
    assert back.read_bytes() == raw.read_bytes()
    qcow("convert", "--object", OBJECT, "-O", "qcow2", disk, other)
    qcow("compare", "-q", "-f", "raw", raw, other)


@pytest.mark.peer("qemu-img")
def test_qemu_reads_ours_and_we_read_qemu_s(raw: Path, disk: Path, tmp_path: Path) -> None:
    plain = f"driver=raw,file.filename={raw}"
    words = ("--object", OBJECT, "--image-opts", plain)
    run_qemu("qemu-img", "compare", *words, described(disk, "luks"))
    theirs = tmp_path / "theirs.luks"
    run_qemu(
        *("qemu-img", "convert", "--object", OBJECT, "-f", "raw", "-O", "luks"),
        *("-o", "key-secret=s,iter-time=10,cipher-mode=cbc,ivgen-alg=essiv", raw, theirs),
    )
    qcow("compare", *words, described(theirs, "luks"))


@pytest.mark.peer("cryptsetup")
def test_cryptsetup_opens_it(disk: Path) -> None:
    dump = subprocess.run([peer("cryptsetup"), "isLuks", "--type", "luks1", disk], check=False)
    assert dump.returncode == 0
    command = [peer("cryptsetup"), "open", "--test-passphrase", "--key-file=-", disk]
    assert subprocess.run(command, input=SECRET, check=False).returncode == 0


@pytest.mark.peer("cryptsetup")
def test_we_open_what_cryptsetup_makes(tmp_path: Path) -> None:
    path = tmp_path / "disk.luks"
    path.write_bytes(bytes(4 * MiB))
    command = [peer("cryptsetup"), "luksFormat", "--type", "luks1", "-q", "--iter-time", "10"]
    command += ["--cipher", "aes-cbc-essiv:sha256", "--key-size", "256", str(path), "-"]
    subprocess.run(command, input=SECRET, check=True, capture_output=True)
    with open_chain(path, secrets=SECRET, writable=True, format="luks") as chain:
        chain.write(b"ours", offset=1000)
        assert chain.read(offset=1000, length=4) == b"ours"


@pytest.mark.parametrize("length", [1, 512, 100, 300_000])
@pytest.mark.parametrize("offset", [0, 511, 4096])
def test_writes_of_any_alignment_agree_with_an_array(
    raw: Path, disk: Path, offset: int, length: int
) -> None:
    model = bytearray(raw.read_bytes())
    model[offset : offset + length] = data = guest_bytes(length + 511, 8)[:length]
    with open_chain(disk, secrets=SECRET, writable=True) as chain:
        chain.write(data, offset=offset)
        chain.write_zeroes(offset=SIZE - 700, length=300)
        chain.discard(offset=0, length=4096)
    model[SIZE - 700 : SIZE - 400] = bytes(300)
    with open_chain(disk, secrets=SECRET) as chain:
        assert chain.read(offset=0, length=SIZE) == model


def test_what_is_added_reads_as_zeros(raw: Path, disk: Path) -> None:
    with open_chain(disk, secrets=SECRET, writable=True) as chain:
        chain.resize(SIZE - 512, shrink=True)
        chain.resize(SIZE + MiB)
        expected = raw.read_bytes()[: SIZE - 512] + bytes(MiB + 512)
        assert chain.read(offset=0, length=chain.size) == expected


def test_a_disk_that_cannot_grow_keeps_its_size(tmp_path: Path) -> None:
    path = tmp_path / "disk.luks"
    options = CreateOptions.of(
        "luks", {"size": MiB, **QUICK, "preallocation": "full"}, secret=SECRET
    )
    create_image(path, options, gate=ReferenceGate.deny_all())
    memory = MemoryStorage(path.read_bytes())
    storage = FaultyStorage(memory, Fault(operation="pwrite", call=2, errno=errno.ENOSPC))
    image = WritableLuksImage(
        load_luks_metadata(storage, budget=TRUSTED), storage, secret=SECRET, budget=TRUSTED
    )
    with pytest.raises(StorageError):
        image.resize(2 * MiB)
    assert (image.size, memory.size()) == (MiB, path.stat().st_size)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda disk: disk.resize(512), "shrinking was not asked for"),
        (lambda disk: disk.resize(2 * MiB + 1), "is not a multiple of 512"),
        (lambda disk: disk.resize(4 * MiB, preallocation="metadata"), "expected off, falloc or"),
        (lambda disk: disk.write_compressed(bytes(512), offset=0), "a luks disk has none"),
    ],
)
def test_what_cannot_be_is_refused(disk: Path, change: object, says: str) -> None:
    before = disk.read_bytes()
    with (
        open_chain(disk, secrets=SECRET, writable=True) as chain,
        pytest.raises(RequestError, match=says),
    ):
        change(chain)  # type: ignore[operator]
    assert disk.read_bytes() == before


def test_zeros_cannot_be_had_without_writing(disk: Path) -> None:
    with (
        open_chain(disk, secrets=SECRET, writable=True) as chain,
        pytest.raises(UnsupportedFeature, match="the zeros of a luks disk must be encrypted"),
    ):
        chain.write_zeroes(offset=0, length=512, fallback=False)


def test_a_disk_made_in_full_reads_as_zeros(tmp_path: Path) -> None:
    path = tmp_path / "disk.luks"
    words = ("-o", "iter-time=10,preallocation=full", path, "1M")
    qcow("create", "-q", "-f", "luks", "--object", OBJECT, *words)
    with open_chain(path, secrets=SECRET) as chain:
        assert chain.read(offset=0, length=MiB) == bytes(MiB)


def test_key_slots_are_changed_as_in_qcow2(disk: Path) -> None:
    objects = ("--object", OBJECT, "--object", "secret,id=n,data=new")
    words = ("-q", *objects, "--image-opts", "-o")
    keys = "state=active,new-secret=n,iter-time=10"
    qcow("amend", *words, keys, described(disk, "luks"))
    qcow("amend", *words, "state=inactive,keyslot=0", described(disk, "luks"))
    with pytest.raises(RequestError):
        open_chain(disk, secrets=SECRET)
    open_chain(disk, secrets=b"new").close()


def test_info_tells_what_the_header_says(disk: Path) -> None:
    info = qcow("info", "--output=json", disk).json()
    assert (info["format"], info["virtual-size"], info["encrypted"]) == ("luks", SIZE, True)
    data = info["format-specific"]["data"]
    assert (data["cipher-alg"], data["payload-offset"]) == ("aes-256", 2068480)
    text = qcow("info", disk).out.decode()
    assert "luks, aes-256 xts plain64, hash sha256, 1 of 8 key slots in use" in text


def test_measure_counts_header_and_disk() -> None:
    done = qcow("measure", "--output=json", "-O", "luks", "--size", "1M").json()
    assert done["required"] == done["fully-allocated"] == MiB + 2068480


def test_an_existing_disk_keeps_its_keys(raw: Path, disk: Path) -> None:
    before = disk.read_bytes()
    words = ("-n", "-f", "raw", "-O", "luks", "--object", OBJECT, raw, disk)
    done = qcow("convert", *words, code=1)
    assert "-n would lose the key slots of the target" in done.err
    assert disk.read_bytes() == before


@pytest.mark.parametrize(
    ("area", "says"),
    [
        (make_luks_area()[:500], "LUKS header at host offset 0x0: 500 bytes, expected at least"),
        (make_luks_area()[:4096], "the payload begins at 0x1f9000, behind the end of the file"),
        (b"\0" * 600, "magic 000000000000, expected 4c554b53babe"),
    ],
)
def test_a_malformed_header_is_refused(area: bytes, says: str) -> None:
    with pytest.raises(CorruptMetadata) as caught:
        load_luks_metadata(MemoryStorage(area), budget=TRUSTED)
    assert says in str(caught.value)


def test_a_ragged_end_is_cut_with_a_warning() -> None:
    storage = MemoryStorage(make_luks_area() + bytes(1000))
    metadata = load_luks_metadata(storage, budget=TRUSTED)
    assert metadata.virtual_size == 512
    assert metadata.warnings == ("the last 488 bytes of the file are no whole sector and are cut",)
