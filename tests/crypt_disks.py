"""Encrypted disks for tests: how they are made, and what peers need to open them."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from tests.peers import peer

SECRET = b"correct horse"
OBJECT = "secret,id=s,data=correct horse"
# Ten milliseconds for a passphrase: what is tested is not how long it takes.
QUICK = {"encrypt.format": "luks", "encrypt.iter-time": 10}
KINDS = {
    "luks": "encrypt.format=luks,encrypt.iter-time=10",
    "luks cbc essiv": (
        "encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg=aes-128,"
        "encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv"
    ),
    "luks plain": (
        "encrypt.format=luks,encrypt.iter-time=10,encrypt.ivgen-alg=plain,"
        "encrypt.cipher-alg=aes-192,encrypt.hash-alg=sha512"
    ),
    "aes": "encrypt.format=aes",
}


def guest_bytes(size: int, seed: int) -> bytes:
    """Data, zeros and data by pieces of some sectors."""
    bits = random.Random(seed)
    out = b""
    while len(out) < size:
        length = 512 * bits.randrange(1, 200)
        out += bits.randbytes(length) if bits.random() < 0.6 else bytes(length)
    return out[:size]


def described(path: Path | str, format: str = "qcow2") -> str:
    """The image for `--image-opts`, with its passphrase."""
    key = {"qcow2": "encrypt.key-secret=s,", "luks": "key-secret=s,"}.get(format, "")
    return f"driver={format},{key}file.filename={path}"


def run_qemu(name: str, *arguments: object) -> str:
    """A peer of qemu with the secret. Making LUKS headers fails now and then for want of a
    clock that is exact enough: it is tried again then."""
    words = [peer(name), *map(str, arguments)]
    for _ in range(20):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done.stdout
