"""The `-o` keys of every format that can be written: one table for checking and for `-o help`.

Numpy-free. A key that qemu-img knows and this program does not is refused with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from qcowkit.cli.options import parse_bool, parse_options
from qcowkit.codecs.qcow2.luks_params import CIPHER_ALGS, CIPHER_MODES, HASH_ALGS, IVGEN_ALGS
from qcowkit.errors import RequestError
from qcowkit.units import parse_size

OptionValue = str | int | bool


class OptionKind(Enum):
    """How a value is written."""

    TEXT = "str"
    SIZE = "size"
    NUMBER = "num"
    BOOL = "on/off"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionSpec:
    """One key. `choices`: the values allowed; `aliases`: other spellings of a value.

    `refusal`: why the key cannot be used here; such a key is left out of the help."""

    name: str
    kind: OptionKind = OptionKind.TEXT
    help: str = ""
    choices: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    refusal: str | None = None

    def parse(self, text: str) -> OptionValue:
        """The value as its kind. Raises RequestError that names the key."""
        what = f"-o {self.name}"
        if self.refusal:
            raise RequestError(f"{what}: {self.refusal}")
        if self.kind is OptionKind.BOOL:
            return parse_bool(text, what=what)
        if self.kind is OptionKind.SIZE:
            return parse_size(text, what=what)
        if self.kind is OptionKind.NUMBER:
            if not (text.isascii() and text.isdecimal()):
                raise RequestError(f"{what} is {text!r}, expected a whole number")
            return int(text)
        value = dict(self.aliases).get(text, text)
        if self.choices and value not in self.choices:
            raise RequestError(f"{what} is {text!r}, expected one of {', '.join(self.choices)}")
        return value


def _refused(*names: str, reason: str) -> tuple[OptionSpec, ...]:
    return tuple(OptionSpec(name=name, refusal=reason) for name in names)


def _luks_options(prefix: str) -> tuple[OptionSpec, ...]:
    """The keys of a new LUKS header."""
    words = {
        "cipher-alg": (CIPHER_ALGS, "cipher and width of its key; aes-256 when not given"),
        "cipher-mode": (CIPHER_MODES, "xts (the default) or cbc"),
        "hash-alg": (HASH_ALGS, "of keys and digests; sha256 when not given"),
        "ivgen-alg": (IVGEN_ALGS, "plain64 (the default), plain or essiv"),
        "ivgen-hash-alg": (HASH_ALGS, "of essiv; sha256 when not given"),
    }
    return (
        OptionSpec(
            name=prefix + "key-secret",
            help="id of the --object secret with the passphrase; the only secret when not given",
        ),
        *(
            OptionSpec(name=prefix + name, choices=choices, help=text)
            for name, (choices, text) in words.items()
        ),
        OptionSpec(
            name=prefix + "iter-time",
            kind=OptionKind.NUMBER,
            help="milliseconds that trying a passphrase takes; 2000 when not given",
        ),
    )


_SIZE = OptionSpec(name="size", kind=OptionKind.SIZE, help="size of the guest disk")
_HOST = _refused(
    "nocow", "extent_size_hint", reason="attributes of the host's file system are not set here"
)
_PREALLOCATION = "off leaves holes, falloc reserves space, full writes zeros"

_QCOW2 = (
    OptionSpec(name="backing_file", help="base image, the same as -b"),
    OptionSpec(name="backing_fmt", help="format of the base image, the same as -F"),
    OptionSpec(
        name="cluster_size",
        kind=OptionKind.SIZE,
        help="512 to 2M, a power of two; 64k when not given",
    ),
    OptionSpec(
        name="compat",
        choices=("0.10", "1.1"),
        aliases=(("v2", "0.10"), ("v3", "1.1")),
        help="0.10 (v2) or 1.1 (v3, the default)",
    ),
    OptionSpec(
        name="compression_level",
        kind=OptionKind.NUMBER,
        help="for convert -c: higher is smaller and slower",
    ),
    OptionSpec(
        name="compression_type", choices=("zlib", "zstd"), help="zlib (the default) or zstd"
    ),
    OptionSpec(
        name="contiguous_runs",
        kind=OptionKind.BOOL,
        help="record what lies in one piece, so that readers need no L2 tables for it",
    ),
    OptionSpec(name="data_file", help="keep the guest's data in this file"),
    OptionSpec(
        name="data_file_raw", kind=OptionKind.BOOL, help="the data file is a raw disk of its own"
    ),
    OptionSpec(name="extended_l2", kind=OptionKind.BOOL, help="subclusters of 1/32 cluster"),
    OptionSpec(
        name="guid",
        help="which disk this is: auto (a random GUID), a GUID, or none (the default)",
    ),
    OptionSpec(name="lazy_refcounts", kind=OptionKind.BOOL, help="put off refcount updates"),
    OptionSpec(
        name="preallocation",
        choices=("off", "metadata", "falloc", "full"),
        help="metadata maps every cluster; " + _PREALLOCATION,
    ),
    OptionSpec(
        name="refcount_bits", kind=OptionKind.NUMBER, help="1, 2, 4, 8, 16 (default), 32 or 64"
    ),
    _SIZE,
    OptionSpec(
        name="encryption", kind=OptionKind.BOOL, help="on is the same as encrypt.format=aes"
    ),
    OptionSpec(
        name="encrypt.format",
        choices=("luks", "aes"),
        help="encrypt the content: luks, or legacy aes, which is not secure",
    ),
    *_luks_options("encrypt."),
    *_HOST,
)

_VPC = (
    OptionSpec(
        name="force_size",
        kind=OptionKind.BOOL,
        help="keep the size exactly, instead of rounding it to whole cylinders",
    ),
    OptionSpec(
        name="subformat", choices=("dynamic", "fixed"), help="dynamic (the default) or fixed"
    ),
    _SIZE,
    *_HOST,
)

_RAW = (
    OptionSpec(name="preallocation", choices=("off", "falloc", "full"), help=_PREALLOCATION),
    _SIZE,
    *_HOST,
)

_LUKS = (
    OptionSpec(
        name="preallocation",
        choices=("off", "falloc", "full"),
        help="of a new disk: full writes zeros, others leave noise",
    ),
    *_luks_options(""),
    _SIZE,
    *_HOST,
)

CREATE_OPTIONS = {"qcow2": _QCOW2, "vpc": _VPC, "luks": _LUKS, "raw": _RAW}


def parse_create_options(format: str, texts: Sequence[str]) -> dict[str, OptionValue]:
    """The keys of every `-o`, checked and typed: sizes and numbers as int, switches as bool.

    Raises RequestError that names the key for an unknown key or a bad value."""
    known = {spec.name: spec for spec in CREATE_OPTIONS[format]}
    values: dict[str, OptionValue] = {}
    for key, text in parse_options(texts).items():
        spec = known.get(key)
        if spec is None:
            raise RequestError(f"-o {key}: not an option of {format} (see -o help)")
        values[key] = spec.parse(text)
    return values


def options_help(format: str) -> str:
    """What `-o help` prints."""
    shown = [spec for spec in CREATE_OPTIONS[format] if spec.refusal is None]
    heads = [f"{spec.name}=<{spec.kind.value}>" for spec in shown]
    width = max(map(len, heads))
    lines = (f"  {head:{width}}  {spec.help}\n" for head, spec in zip(heads, shown, strict=True))
    return f"options of {format}:\n" + "".join(lines)
