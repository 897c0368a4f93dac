"""Which `--object secret` opens which layer of a disk. Numpy-free.

Keys are those of qemu: `encrypt.key-secret=S` for the image itself, `backing.encrypt.key-secret=S`
for its base, and so on downwards; a disk of format luks has plain `key-secret=S`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace

from qcowkit.cli.common import warn
from qcowkit.cli.options import ImageSpec, Secret, parse_objects
from qcowkit.codecs.qcow2.luks_params import LEGACY_AES
from qcowkit.engine.options import OpenOptions, Secrets
from qcowkit.errors import RequestError
from qcowkit.operations.encryption import OptionValue, encrypts


def secrets_of(args: Namespace, names: Mapping[int, str]) -> Secrets:
    """The passphrases of one chain. A single secret is for every layer that none is named for.

    Raises RequestError for an id that no --object has."""
    given = parse_objects(args.objects)
    by_depth = {depth: find_secret(given, name) for depth, name in names.items()}
    other = next(iter(given.values())).data if len(given) == 1 else None
    return Secrets(by_depth=by_depth, other=other)


def opening_of(args: Namespace, spec: ImageSpec) -> OpenOptions:
    """The options of an operand with its passphrases."""
    return replace(spec.opening, secrets=secrets_of(args, spec.key_secrets))


def new_secret(args: Namespace, format: str, values: dict[str, OptionValue]) -> bytes | None:
    """The passphrase of a new image, None in clear; a warning where it does not help much.

    Without `key-secret` a single --object secret is taken. Raises RequestError."""
    given = parse_objects(args.objects)
    if not encrypts(format, values):
        return None
    if values.get("encrypt.format") == "aes" or values.get("encryption"):
        warn(args, [LEGACY_AES])
    key = next((key for key in ("encrypt.key-secret", "key-secret") if key in values), None)
    if key is not None:
        return find_secret(given, str(values[key]), what=f"-o {key}")
    return next(iter(given.values())).data if len(given) == 1 else None


def find_secret(given: Mapping[str, Secret], name: str, *, what: str = "key-secret") -> bytes:
    """The data of a secret. Raises RequestError that names the key for an unknown id."""
    if name not in given:
        raise RequestError(f"{what}={name}: there is no --object secret with id={name}")
    return given[name].data
