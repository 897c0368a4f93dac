"""Which `--object secret` opens which layer of a disk. Numpy-free.

Keys are those of qemu: `encrypt.key-secret=S` for the image itself, `backing.encrypt.key-secret=S`
for its base, and so on downwards; a disk of format luks has plain `key-secret=S`."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace

from qcowkit.cli.options import ImageSpec, Secret, parse_objects
from qcowkit.engine.options import OpenOptions, Secrets
from qcowkit.errors import RequestError

_KEY_SECRET = re.compile(r"((?:backing\.)*)(?:encrypt\.)?key-secret")
_METHOD = re.compile(r"(?:backing\.)*encrypt\.format")
_METHODS = ("aes", "luks", "qcow")


def take_key_secrets(
    options: Mapping[str, str], *, flag: str
) -> tuple[dict[int, str], dict[str, str]]:
    """The ids of secrets by depth in the chain, and the keys that are left.

    `encrypt.format` may be said as well; the image knows better. Raises RequestError."""
    names: dict[int, str] = {}
    rest: dict[str, str] = {}
    for key, value in options.items():
        if found := _KEY_SECRET.fullmatch(key):
            depth = found[1].count(".")
            if names.setdefault(depth, value) != value:
                raise RequestError(f"{flag}: {key}= differs from another spelling of the same key")
        elif _METHOD.fullmatch(key):
            if value not in _METHODS:
                raise RequestError(f"{flag}: {key}= is {value!r}, expected aes or luks")
        else:
            rest[key] = value
    return names, rest


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


def find_secret(given: Mapping[str, Secret], name: str, *, what: str = "key-secret") -> bytes:
    """The data of a secret. Raises RequestError that names the key for an unknown id."""
    if name not in given:
        raise RequestError(f"{what}={name}: there is no --object secret with id={name}")
    return given[name].data
