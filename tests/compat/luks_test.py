"""Encrypted images beside qemu and cryptsetup, in both directions."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qcowkit.image.registry import open_chain
from qcowkit.units import MiB
from tests.command import qcow
from tests.crypt_disks import KINDS, OBJECT, SECRET, described, guest_bytes, run_qemu
from tests.peers import peer

pytestmark = [
    pytest.mark.peer("qemu-img"),
    pytest.mark.pinned("options of its own, in full"),
]
SIZE = 3 * MiB + 0x6600


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(guest_bytes(SIZE, 1))
    return path


@pytest.mark.parametrize(
    "more",
    ["", ",extended_l2=on", ",cluster_size=512", ",cluster_size=2M", ",preallocation=metadata"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_qemu_reads_what_we_encrypt(raw: Path, tmp_path: Path, kind: str, more: str) -> None:
    path = tmp_path / "disk.qcow2"
    options = KINDS[kind] + ",encrypt.key-secret=s" + more
    qcow("convert", "-O", "qcow2", "--object", OBJECT, "-o", options, raw, path)
    plain = f"driver=raw,file.filename={raw}"
    run_qemu("qemu-img", "compare", "--object", OBJECT, "--image-opts", plain, described(path))
    run_qemu("qemu-img", "check", "--object", OBJECT, "--image-opts", described(path))
    qcow("check", path)


@pytest.mark.parametrize("kind", KINDS)
def test_we_read_what_qemu_encrypts(raw: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "disk.qcow2"
    options = KINDS[kind] + ",encrypt.key-secret=s"
    run_qemu(
        *("qemu-img", "convert", "--object", OBJECT, "-f", "raw", "-O", "qcow2"),
        *("-o", options, raw, path),
    )
    with open_chain(path, secrets=SECRET) as disk:
        assert disk.read(offset=0, length=SIZE) == raw.read_bytes()


def test_the_data_of_an_external_file_are_encrypted(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    options = KINDS["luks"] + ",encrypt.key-secret=s,data_file=disk.bin"
    qcow("convert", "-O", "qcow2", "--object", OBJECT, "-o", options, raw, path)
    plain = f"driver=raw,file.filename={raw}"
    data = f"data-file.driver=file,data-file.filename={tmp_path}/disk.bin,"
    qemu_view = data + described(path)
    run_qemu("qemu-img", "compare", "--object", OBJECT, "--image-opts", plain, qemu_view)
    assert (tmp_path / "disk.bin").stat().st_size == SIZE


def test_a_new_empty_image_reads_as_zeros_for_qemu(tmp_path: Path) -> None:
    path, zeros = tmp_path / "disk.qcow2", tmp_path / "zeros.raw"
    zeros.write_bytes(bytes(MiB))
    qcow("create", "-q", "-f", "qcow2", "--object", OBJECT, "-o", KINDS["luks"], path, "1M")
    plain = f"driver=raw,file.filename={zeros}"
    run_qemu("qemu-img", "compare", "--object", OBJECT, "--image-opts", plain, described(path))


@pytest.mark.parametrize(
    "options",
    ["", "cluster_size=2M", "encrypt.cipher-alg=aes-128", "encrypt.cipher-mode=cbc,compat=0.10"],
)
def test_measure_counts_the_header_as_qemu_does(options: str) -> None:
    keys = f"{KINDS['luks']},encrypt.key-secret=s,{options}".rstrip(",")
    words = ("measure", "--output=json", "--size", "10G", "-O", "qcow2", "--object", OBJECT)
    ours = qcow(*words, "-o", keys).json()
    assert str(ours["required"]) in run_qemu("qemu-img", *words, "-o", keys)
    assert str(ours["fully-allocated"]) in run_qemu("qemu-img", *words, "-o", keys)


@pytest.mark.peer("cryptsetup")
def test_cryptsetup_opens_our_header(raw: Path, tmp_path: Path) -> None:
    path, header = tmp_path / "disk.qcow2", tmp_path / "header"
    options = KINDS["luks"] + ",encrypt.key-secret=s"
    qcow("convert", "-O", "qcow2", "--object", OBJECT, "-o", options, raw, path)
    with open_chain(path, secrets=SECRET) as disk:
        crypto = disk.layers[0].metadata.extensions.crypto
    image = path.read_bytes()
    header.write_bytes(image[crypto.offset : crypto.offset + crypto.length] + bytes(MiB))
    dump = subprocess.run(
        [peer("cryptsetup"), "luksDump", header], capture_output=True, text=True, check=True
    ).stdout
    for line in ("Cipher mode:", "xts-plain64", "Payload offset:\t4040", "Key Slot 0: ENABLED"):
        assert line in dump, dump
    command = [peer("cryptsetup"), "open", "--test-passphrase", "--key-file=-", header]
    assert subprocess.run(command, input=SECRET, check=False).returncode == 0
    assert subprocess.run(command, input=b"wrong", check=False).returncode != 0


@pytest.mark.parametrize("more", ["", ",extended_l2=on", ",cluster_size=512"])
@pytest.mark.parametrize("kind", ["luks", "luks cbc essiv", "aes"])
def test_writes_of_both_hands_agree(raw: Path, tmp_path: Path, kind: str, more: str) -> None:
    """Ours and qemu's by turns, of any alignment; each reads what the other wrote."""
    path = tmp_path / "disk.qcow2"
    options = KINDS[kind] + ",encrypt.key-secret=s" + more
    qcow("convert", "-O", "qcow2", "--object", OBJECT, "-o", options, raw, path)
    expected = bytearray(raw.read_bytes())
    for turn, (offset, length) in enumerate(
        ((1000, 3), (65536, 65536), (70000, 200_001), (131072, 512), (2_000_000, 9000), (3, 1))
    ):
        command = f"write -P {turn + 1} {offset} {length}"
        expected[offset : offset + length] = bytes([turn + 1]) * length
        if turn % 2:
            words = ("--object", OBJECT, "--image-opts", "-c", command, described(path))
            run_qemu("qemu-io", *words)
        else:
            qcow("io", "--object", OBJECT, "-c", command, path)
    raw.write_bytes(expected)
    plain = f"driver=raw,file.filename={raw}"
    run_qemu("qemu-img", "compare", "--object", OBJECT, "--image-opts", plain, described(path))
    qcow("compare", "--object", OBJECT, "--image-opts", plain, described(path))
    run_qemu("qemu-img", "check", "--object", OBJECT, "--image-opts", described(path))
