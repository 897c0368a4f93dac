"""What options of create and convert say about encryption, whatever prefix their keys have.

In a qcow2 image the keys begin with `encrypt.`. Numpy-free."""

from __future__ import annotations

from collections.abc import Mapping

from qcowkit.codecs.qcow2.luks_params import ITER_TIME_MS, Encryption, LuksParams
from qcowkit.errors import RequestError

OptionValue = str | int | bool
PREFIX = "encrypt."
METHODS = ("aes", "luks")
# Keys of a LUKS header, without a prefix.
LUKS_KEYS = (
    "cipher-alg",
    "cipher-mode",
    "ivgen-alg",
    "ivgen-hash-alg",
    "hash-alg",
    "iter-time",
)


def qcow2_encryption(values: Mapping[str, OptionValue]) -> Encryption | None:
    """How a new qcow2 image is encrypted; None in clear. `encryption=on` is
    `encrypt.format=aes`. Raises RequestError for keys that contradict or need one another."""
    method = values.get(PREFIX + "format")
    if "encryption" in values:
        if method is not None:
            raise RequestError("encryption and encrypt.format exclude one another")
        method = "aes" if values["encryption"] else None
    given = [key for key in (*LUKS_KEYS, "key-secret") if PREFIX + key in values]
    if method is None:
        if given:
            raise RequestError(f"{PREFIX}{given[0]} needs encrypt.format")
        return None
    if method == "luks":
        return Encryption(method="luks", luks=luks_params(values, prefix=PREFIX))
    if method != "aes":
        raise RequestError(f"encrypt.format is {method!r}, expected aes or luks")
    for key in given:
        if key != "key-secret":
            raise RequestError(f"{PREFIX}{key} is for encrypt.format=luks, found aes")
    return Encryption(method="aes")


def luks_params(values: Mapping[str, OptionValue], *, prefix: str) -> LuksParams:
    """The header that the keys ask for. Raises RequestError for a bad value."""

    def text(key: str, default: str) -> str:
        return str(values.get(prefix + key, default))

    hash = values.get(prefix + "ivgen-hash-alg")
    return LuksParams(
        cipher_alg=text("cipher-alg", "aes-256"),
        cipher_mode=text("cipher-mode", "xts"),
        ivgen_alg=text("ivgen-alg", "plain64"),
        ivgen_hash=None if hash is None else str(hash),
        hash_alg=text("hash-alg", "sha256"),
        iter_time=int(values.get(prefix + "iter-time", ITER_TIME_MS)),
    )


def encrypts(format: str, values: Mapping[str, OptionValue]) -> bool:
    """Whether a new image with these options needs a passphrase. Raises RequestError."""
    return format == "luks" or (format == "qcow2" and qcow2_encryption(values) is not None)


def require_new_secret(
    format: str, values: Mapping[str, OptionValue], secret: bytes | None
) -> None:
    """Before any file is touched: raise RequestError where a passphrase is missing or empty."""
    if encrypts(format, values) and not secret:
        raise RequestError(
            "an encrypted image needs a passphrase: name it by --object secret,id=S,file=PATH and "
            "encrypt.key-secret=S, or in Python by secret="
        )
