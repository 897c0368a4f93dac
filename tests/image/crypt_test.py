"""Encrypted disks as their guests see them, and what the file holds meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.engine.options import OpenOptions, Secrets
from qcowkit.errors import RequestError, UnsupportedFeature
from qcowkit.extents.table import Flag, Hit
from qcowkit.image.chain import Chain
from qcowkit.image.lineage import Layer
from qcowkit.image.metadata import load_metadata
from qcowkit.image.registry import build_chain
from qcowkit.operations.create import CreateOptions, open_target
from qcowkit.operations.map import iter_rows
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.recording import RecordingStorage
from qcowkit.units import KiB, MiB
from tests.command import qcow
from tests.crypt_disks import KINDS, OBJECT, SECRET, guest_bytes

pytestmark = pytest.mark.pinned("options of its own, in full")
LUKS = {"encrypt.format": "luks", "encrypt.iter-time": 1, "encrypt.cipher-alg": "aes-128"}
AES = {"encrypt.format": "aes"}
SIZE = MiB


class Kept(MemoryStorage):
    """Memory that outlives the disk over it."""

    def close(self) -> None:
        """Stays as it is."""


def made(**options: Any) -> Kept:
    """An empty encrypted image."""
    storage = Kept()
    values = {
        "cluster_size": 4 * KiB,
        **(options if "encrypt.format" in options else LUKS | options),
    }
    create = CreateOptions.of("qcow2", values, secret=SECRET)
    open_target(storage, create, size=SIZE)[0].finish()
    return storage


def opened(storage: Storage, *, writable: bool = True, secret: bytes | None = SECRET) -> Chain:
    metadata = load_metadata(storage, "qcow2", budget=TRUSTED)
    layers = [Layer(storage=storage, metadata=metadata)]
    options = OpenOptions(secrets=Secrets(other=secret))
    return build_chain(layers, writable=writable, options=options)


@pytest.mark.parametrize("options", [LUKS, AES], ids=["luks", "aes"])
def test_what_is_written_is_read_and_is_not_in_the_file(options: dict[str, Any]) -> None:
    storage = made(**options)
    with opened(storage) as disk:
        disk.write(b"secret words" * 100, offset=5001)
        assert disk.read(offset=5001, length=1200) == b"secret words" * 100
    assert b"secret words" not in storage.to_bytes()
    with opened(storage, writable=False) as disk:
        expected = bytes(5001) + b"secret words" * 100 + bytes(3000)
        assert disk.read(offset=0, length=9201) == expected


def test_the_rest_of_a_new_cluster_reads_as_zeros() -> None:
    with opened(made()) as disk:
        disk.write(b"x", offset=4096 + 1000)
        assert disk.read(offset=4096, length=4096) == bytes(1000) + b"x" + bytes(3095)


def test_a_cluster_that_is_written_as_zeros_reads_as_zeros() -> None:
    with opened(made()) as disk:
        disk.write(bytes(4096), offset=4096)
        assert disk.read(offset=4096, length=4096) == bytes(4096)
        # The next cluster gets host space that was somebody's before.
        disk.write(b"a" * 4096, offset=8192)
        disk.discard(offset=8192, length=4096)
        disk.flush()
        disk.write(b"b", offset=12288)
        assert disk.read(offset=12288, length=4096) == b"b" + bytes(4095)


@pytest.mark.parametrize("length", [512, 4096, 100, 700_000])
@pytest.mark.parametrize("offset", [0, 512, 1023, 4095])
def test_requests_of_any_alignment_agree_with_an_array(offset: int, length: int) -> None:
    model = bytearray(guest_bytes(SIZE, 7))
    with opened(made()) as disk:
        disk.write(model, offset=0)
        data = guest_bytes(length + 511, 8)[:length]
        model[offset : offset + length] = data
        disk.write(data, offset=offset)
        assert disk.read(offset=0, length=SIZE) == model


def test_the_short_way_writes_what_the_long_way_writes() -> None:
    """Sectors in place, warm; the disk opened anew finds the same."""
    storage = made()
    with opened(storage) as disk:
        disk.write(guest_bytes(SIZE, 9), offset=0)
        for _ in range(3):
            disk.write(b"s" * 512, offset=8192 + 512)
    expected = bytearray(guest_bytes(SIZE, 9))
    expected[8704:9216] = b"s" * 512
    with opened(storage, writable=False) as disk:
        assert disk.read(offset=0, length=SIZE) == expected


def test_no_plain_text_ever_reaches_the_storage() -> None:
    storage = RecordingStorage(made())
    with opened(storage) as disk:
        for offset, length in ((0, 4096), (100, 50), (8192, 12288), (512, 512), (9000, 20000)):
            disk.write(b"PLAINTEXT!" * (length // 10 + 1), offset=offset)
    for call in storage.calls:
        assert b"PLAINTEXT" not in repr(call).encode()


def test_copy_on_write_encrypts_anew_for_the_new_place() -> None:
    base = RecordingStorage(MemoryStorage(guest_bytes(SIZE, 3)))
    top = made(backing_file="base", backing_fmt="raw")
    layers = [
        Layer(storage=top, metadata=load_metadata(top, "qcow2", budget=TRUSTED)),
        Layer(storage=base, metadata=load_metadata(base, "raw", budget=TRUSTED)),
    ]
    options = OpenOptions(secrets=Secrets(other=SECRET))
    expected = bytearray(guest_bytes(SIZE, 3))
    expected[10000:10003] = b"new"
    with build_chain(layers, writable=True, options=options) as disk:
        disk.write(b"new", offset=10000)
        assert disk.read(offset=0, length=SIZE) == expected


def test_a_snapshot_keeps_its_content_when_the_disk_changes(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    source = tmp_path / "disk.raw"
    source.write_bytes(guest_bytes(SIZE, 4))
    qcow("convert", "-O", "qcow2", "--object", OBJECT, "-o", KINDS["luks"], source, path)
    qcow("snapshot", "-c", "before", path)
    words = ("--object", OBJECT, "-c", "write -P 7 1000 70000", path)
    qcow("io", *words)
    was = tmp_path / "was.raw"
    qcow("convert", "--object", OBJECT, "-l", "before", "-O", "raw", path, was)
    assert was.read_bytes() == source.read_bytes()
    expected = bytearray(source.read_bytes())
    expected[1000:71000] = b"\7" * 70000
    qcow("convert", "--object", OBJECT, "-O", "raw", path, was)
    assert was.read_bytes() == expected
    qcow("check", path)


def test_a_grown_disk_reads_as_zeros_where_it_was_added() -> None:
    storage = made()
    with opened(storage) as disk:
        disk.write(b"e" * 4096, offset=SIZE - 4096)
        disk.resize(SIZE - 1024, shrink=True)
        disk.resize(2 * SIZE, preallocation="full")
        assert disk.read(offset=SIZE - 1024, length=MiB) == bytes(MiB)
        disk.write(b"n", offset=SIZE + 5000)
        assert disk.read(offset=SIZE + 4096, length=4096) == bytes(904) + b"n" + bytes(3191)


def test_preallocation_of_version_2_is_refused_by_name() -> None:
    with (
        opened(made(compat="0.10")) as disk,
        pytest.raises(RequestError, match=r"preallocation=full of an encrypted image needs compat"),
    ):
        disk.resize(2 * SIZE, preallocation="full")


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("extended", [False, True])
def test_a_preallocated_image_reads_as_zeros(mode: str, extended: bool) -> None:
    storage = made(preallocation=mode, extended_l2=extended, cluster_size=16 * KiB)
    with opened(storage) as disk:
        assert disk.read(offset=0, length=SIZE) == bytes(SIZE)
        disk.write(b"x", offset=20000)
        assert disk.read(offset=16384, length=16384) == bytes(3616) + b"x" + bytes(12767)


def test_compressed_writes_are_refused() -> None:
    with opened(made()) as disk, pytest.raises(RequestError, match="cannot be encrypted"):
        disk.write_compressed(bytes(4096), offset=0)


def test_encrypted_extents_say_so_and_no_lookup_shows_their_place() -> None:
    with opened(made()) as disk:
        disk.write(b"x" * 4096, offset=0)
        (data, _) = disk.extents(start=0, length=8192)
        assert data.flags == Flag.DATA | Flag.PRESENT | Flag.COPIED | Flag.ENCRYPTED
        assert disk.images[0].lookup(0) == (Hit.OTHER, -1, 4096)
        assert next(iter_rows(disk)).host[0] == -1


def test_a_raw_data_file_that_claims_to_be_encrypted_is_not_written() -> None:
    storage = Kept()
    values = {"data_file": "d", "cluster_size": 4 * KiB, **LUKS}
    data = Kept()
    create = CreateOptions.of("qcow2", values, secret=SECRET)
    open_target(storage, create, size=SIZE, data_storage=data)[0].finish()
    # Autoclear bit 1: the data file is a raw disk.
    storage.pwrite([(2).to_bytes(8, "big")], offset=88)
    metadata = load_metadata(storage, "qcow2", budget=TRUSTED)
    layers = [Layer(storage=storage, metadata=metadata, data_storage=data)]
    with pytest.raises(UnsupportedFeature, match="encryption with a raw data file"):
        build_chain(layers, writable=True, options=OpenOptions(secrets=Secrets(other=SECRET)))


def test_a_closed_disk_has_forgotten_its_keys() -> None:
    disk = opened(made(), writable=False)
    cipher = disk.images[0].cipher  # type: ignore[attr-defined]
    disk.close()
    with pytest.raises(RequestError, match="its keys are gone"):
        cipher.encrypt(bytes(512), host=0, guest=0)


def test_passphrases_do_not_show_in_what_is_printed() -> None:
    options = OpenOptions(secrets=Secrets(by_depth={0: SECRET}, other=SECRET))
    assert "horse" not in repr(options)
    assert "horse" not in repr(CreateOptions.of("qcow2", {}, secret=SECRET))
