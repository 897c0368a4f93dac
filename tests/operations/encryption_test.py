"""Options of encryption, in their two spellings, and what they exclude."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcowkit.errors import QcowkitError, RequestError
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.registry import open_chain
from qcowkit.operations.create import CreateOptions, create_image
from qcowkit.operations.encryption import OptionValue, qcow2_encryption
from tests.command import qcow
from tests.crypt_disks import OBJECT, QUICK, SECRET, guest_bytes

pytestmark = pytest.mark.pinned("options of its own, in full")


def test_both_spellings_of_legacy_encryption_are_equal() -> None:
    old, new = qcow2_encryption({"encryption": True}), qcow2_encryption({"encrypt.format": "aes"})
    assert old == new
    assert old is not None


def test_encryption_off_is_no_encryption() -> None:
    assert qcow2_encryption({"encryption": False}) is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"encryption": True, "encrypt.format": "luks"},
            "encryption and encrypt.format exclude one another",
        ),
        ({"encrypt.key-secret": "s"}, "encrypt.key-secret needs encrypt.format"),
        (
            {"encrypt.format": "aes", "encrypt.hash-alg": "sha1"},
            "encrypt.hash-alg is for encrypt.format=luks, found aes",
        ),
        ({"encrypt.format": "rot13"}, "encrypt.format is 'rot13', expected aes or luks"),
    ],
)
def test_keys_that_contradict_are_named(values: dict[str, OptionValue], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        qcow2_encryption(values)
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"data_file": "d.raw", "data_file_raw": True},
            "data_file_raw=on excludes encryption: a raw disk is in clear",
        ),
        (
            {"preallocation": "metadata", "compat": "0.10"},
            "preallocation with encryption needs compat=1.1, found compat=0.10",
        ),
    ],
)
def test_what_encryption_excludes_is_refused_before_a_file_appears(
    tmp_path: Path, more: dict[str, OptionValue], says: str
) -> None:
    options = CreateOptions.of("qcow2", {"size": 1 << 20, **QUICK, **more}, secret=SECRET)
    with pytest.raises(QcowkitError) as caught:
        create_image(tmp_path / "disk.qcow2", options, gate=ReferenceGate.deny_all())
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_encrypted_image_is_not_made_without_a_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    done = qcow("create", "-f", "qcow2", "-o", "encrypt.format=luks", path, "1M", code=1)
    assert "an encrypted image needs a passphrase: name it by --object" in done.err
    words = ("-o", "encrypt.format=luks,encrypt.key-secret=t", "--object", OBJECT)
    done = qcow("create", "-f", "qcow2", *words, path, "1M", code=1)
    assert "-o encrypt.key-secret=t: there is no --object secret with id=t" in done.err
    assert not list(tmp_path.iterdir())


def test_compressed_clusters_are_not_encrypted_and_so_refused(tmp_path: Path) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(bytes(65536))
    words = ("-o", "encrypt.format=luks", "--object", OBJECT)
    done = qcow("convert", "-c", "-O", "qcow2", *words, source, tmp_path / "x.qcow2", code=1)
    assert "compression: compressed clusters would not be encrypted" in done.err


def test_legacy_encryption_comes_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    words = ("-o", "encryption=on", "--object", OBJECT)
    done = qcow("create", "-q", "-f", "qcow2", *words, path, "1M")
    assert not done.err
    done = qcow("create", "-f", "qcow2", *words, path, "1M")
    assert done.err.startswith("warning: the content is encrypted with legacy AES, which does not")
    with open_chain(path, secrets=SECRET) as disk:
        assert disk.warnings[0].startswith("the content is encrypted with legacy AES")


@pytest.mark.parametrize("format", ["luks", "aes"])
def test_nothing_of_the_guest_is_in_the_file_in_clear(tmp_path: Path, format: str) -> None:
    source, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    source.write_bytes(b"plain text of the guest.".ljust(512, b".") * 1024)
    options = f"encrypt.format={format}" + (",encrypt.iter-time=10" if format == "luks" else "")
    qcow("convert", "-q", "-O", "qcow2", "--object", OBJECT, "-o", options, source, path)
    assert b"plain text" not in path.read_bytes()


def test_equal_clusters_look_different_in_the_file(tmp_path: Path) -> None:
    source, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    source.write_bytes(guest_bytes(512, 3).ljust(65536, b"x") * 2)
    options = "encrypt.format=luks,encrypt.iter-time=10"
    qcow("convert", "-O", "qcow2", "--object", OBJECT, "-o", options, source, path)
    with open_chain(path, secrets=SECRET) as disk:
        first, second = disk.images[0].mapping.extents(start=0, length=131072).host[0], 65536
        raw = path.read_bytes()
        assert raw[first : first + 512] != raw[first + second : first + second + 512]


def test_each_layer_has_a_passphrase_of_its_own(tmp_path: Path) -> None:
    base, top, raw = tmp_path / "base.qcow2", tmp_path / "top.qcow2", tmp_path / "disk.raw"
    raw.write_bytes(guest_bytes(1 << 18, 5))
    objects = ("--object", "secret,id=a,data=top", "--object", "secret,id=b,data=base")
    words = ("convert", "-q", "-O", "qcow2", *objects)
    quick = "encrypt.format=luks,encrypt.iter-time=10"
    qcow(*words, "-o", f"{quick},encrypt.key-secret=b", raw, base)
    options = f"{quick},encrypt.key-secret=a"
    qcow("create", "-q", "-f", "qcow2", *objects, "-o", options, "-b", base, "-F", "qcow2", top)
    spec = f"driver=qcow2,encrypt.key-secret=a,backing.encrypt.key-secret=b,file.filename={top}"
    plain = f"driver=raw,file.filename={raw}"
    qcow("compare", *objects, "--image-opts", plain, spec)
    done = qcow("compare", *objects, "--image-opts", plain, spec.replace("=b", "=a"), code=2)
    assert "the passphrase does not open the one active key slot" in done.err
    gate = ReferenceGate.below_image()
    with open_chain(top, gate=gate, secrets={0: b"top", 1: b"base"}) as disk:
        assert disk.read(offset=0, length=1 << 18) == raw.read_bytes()
