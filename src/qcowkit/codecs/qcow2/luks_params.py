"""What the content of a new disk shall be encrypted with: choices, checked as a whole. Pure.

Source: the LUKS1 on-disk format; defaults and the place of key material are those of qemu."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from qcowkit.codecs.qcow2.luks_header import LUKS_SLOTS, LUKS_STRIPES
from qcowkit.errors import RequestError
from qcowkit.units import KiB, align_up

CIPHER_ALGS: Final = ("aes-128", "aes-192", "aes-256")
CIPHER_MODES: Final = ("xts", "cbc")
IVGEN_ALGS: Final = ("plain", "plain64", "essiv")
HASH_ALGS: Final = ("sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
ITER_TIME_MS: Final = 2000
LEGACY_AES: Final = (
    "the content is encrypted with legacy AES, which does not withstand an attacker: "
    "encrypt.format=luks does"
)

# The first slot's key material, and what all of it is aligned to.
_ALIGNMENT = 4 * KiB
_MAX_ITER_TIME_MS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LuksParams:
    """A LUKS1 header by the names of qemu. iter_time: milliseconds that trying one passphrase shall
    take. ivgen_hash: for essiv only. Raises RequestError for what does not fit together."""

    cipher_alg: str = "aes-256"
    cipher_mode: str = "xts"
    ivgen_alg: str = "plain64"
    ivgen_hash: str | None = None
    hash_alg: str = "sha256"
    iter_time: int = ITER_TIME_MS

    def __post_init__(self) -> None:
        _check("cipher-alg", self.cipher_alg, CIPHER_ALGS)
        _check("cipher-mode", self.cipher_mode, CIPHER_MODES)
        _check("ivgen-alg", self.ivgen_alg, IVGEN_ALGS)
        _check("hash-alg", self.hash_alg, HASH_ALGS)
        if self.ivgen_hash is not None:
            _check("ivgen-hash-alg", self.ivgen_hash, HASH_ALGS)
            if self.ivgen_alg != "essiv":
                raise RequestError(f"ivgen-hash-alg is for essiv, found ivgen-alg={self.ivgen_alg}")
        if self.key_bytes == 24:
            raise RequestError(
                "cipher-alg=aes-192 and cipher-mode=cbc exclude one another: key material of 24 "
                "byte keys does not fill whole sectors, and other programs cannot read it"
            )
        if not 1 <= self.iter_time <= _MAX_ITER_TIME_MS:
            raise RequestError(
                f"iter-time is {self.iter_time} ms, expected 1 to {_MAX_ITER_TIME_MS}"
            )

    @property
    def key_bytes(self) -> int:
        """Bytes of the master key: XTS takes two."""
        single = int(self.cipher_alg.removeprefix("aes-")) // 8
        return 2 * single if self.cipher_mode == "xts" else single

    @property
    def mode(self) -> str:
        """Mode and IV generator as they stand in a header, such as `cbc-essiv:sha256`."""
        hash = f":{self.ivgen_hash or 'sha256'}" if self.ivgen_alg == "essiv" else ""
        return f"{self.cipher_mode}-{self.ivgen_alg}{hash}"

    @property
    def slot_bytes(self) -> int:
        """Bytes from one slot's key material to the next."""
        return align_up(self.key_bytes * LUKS_STRIPES, _ALIGNMENT)

    def key_offset(self, slot: int) -> int:
        """Where a slot's key material begins, in bytes from the start of the header."""
        return _ALIGNMENT + slot * self.slot_bytes

    @property
    def header_bytes(self) -> int:
        """Bytes of header and key material together."""
        return self.key_offset(LUKS_SLOTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encryption:
    """How guest data of a new image are encrypted. luks: for that method."""

    method: Literal["aes", "luks"] = "luks"
    luks: LuksParams = field(default_factory=LuksParams)

    @property
    def header_bytes(self) -> int:
        """Bytes that the image needs for it; legacy AES keeps nothing."""
        return self.luks.header_bytes if self.method == "luks" else 0


def _check(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RequestError(f"{key} is {value!r}, expected one of {', '.join(known)}")
