"""How an image is to be opened, as `--image-opts` and `qcow io -o` say it. Numpy-free.

Source: qemu's documentation of its block drivers. One table of keys; what qemu knows and this
program does not is refused with its reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qcowkit.cli.options import parse_bool
from qcowkit.engine.options import DEFAULT_OPTIONS, OpenOptions
from qcowkit.engine.qcow2.cache_sizes import check_sizes
from qcowkit.errors import RequestError
from qcowkit.units import parse_size

Parse = Callable[[str, str], Any]

OVERLAP_TEMPLATES = ("none", "constant", "cached", "all")
OVERLAP_STRUCTURES = (
    "main-header",
    "active-l1",
    "active-l2",
    "refcount-table",
    "refcount-block",
    "snapshot-table",
    "inactive-l1",
    "inactive-l2",
    "bitmap-directory",
)
_MAX_INTERVAL = (1 << 32) - 1

_KEY_SECRET = re.compile(r"((?:backing\.)*)(?:encrypt\.)?key-secret")
_METHOD = re.compile(r"(?:backing\.)*encrypt\.format")
_METHODS = ("aes", "luks", "qcow")


def _size(text: str, what: str) -> int:
    return parse_size(text, what=what)


def _switch(text: str, what: str) -> bool:
    return parse_bool(text, what=what)


def _seconds(text: str, what: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) <= _MAX_INTERVAL):
        raise RequestError(f"{what} is {text!r}, expected seconds from 0 to {_MAX_INTERVAL}")
    return int(text)


def _choice(words: Mapping[str, Any]) -> Parse:
    def parse(text: str, what: str) -> Any:
        if text not in words:
            raise RequestError(f"{what} is {text!r}, expected one of {', '.join(words)}")
        return words[text]

    return parse


class _Key(NamedTuple):
    """One key: the field it sets, how its value is read, whether every format has it."""

    field: str
    parse: Parse
    general: bool = False


_LOCKING = _choice({word: word for word in ("auto", "on", "off")})
_DISCARD = _choice({"ignore": False, "off": False, "unmap": True, "on": True})

_KEYS = {
    "cache-size": _Key("cache_size", _size),
    "l2-cache-size": _Key("l2_cache_size", _size),
    "l2-cache-entry-size": _Key("l2_cache_entry_size", _size),
    "refcount-cache-size": _Key("refcount_cache_size", _size),
    "cache-clean-interval": _Key("cache_clean_interval", _seconds),
    "lazy-refcounts": _Key("lazy_refcounts", _switch),
    "pass-discard-request": _Key("pass_discard_request", _switch),
    "pass-discard-snapshot": _Key("pass_discard_snapshot", _switch),
    "pass-discard-other": _Key("pass_discard_other", _switch),
    "discard-no-unref": _Key("discard_no_unref", _switch),
    "discard": _Key("discard", _DISCARD, general=True),
    "locking": _Key("locking", _LOCKING, general=True),
    "file.locking": _Key("locking", _LOCKING, general=True),
    "force-share": _Key("force_share", _switch, general=True),
}

_TEMPLATE_KEYS = ("overlap-check", "overlap-check.template")
_TEMPLATE = _choice({word: word for word in OVERLAP_TEMPLATES})
_OVERLAP = "overlap-check."

# By the beginning of a key: a whole key, or one that ends in a dot.
_REFUSALS = {
    "backing": "the backing file is the one that the image names; no other can be put in its place",
    "backing.": "the backing file is opened as the image names it; it takes no options of its own",
    "data-file": "the data file is the one that the image names; no other can be put in its place",
    "data-file.": "the data file is opened as the image names it; it takes no options of its own",
    "detect-zeroes": "writes are stored as they come; convert finds zeros",
}


def parse_open_options(
    pairs: Mapping[str, str], *, format: str | None = None, flag: str = "--image-opts"
) -> OpenOptions:
    """The options of a description; `format` None may turn out to be any.

    Raises RequestError that names `flag` and the key for an unknown key, a bad value, values that
    contradict one another, and a key of qcow2 images where `format` is another."""
    if not pairs:
        return DEFAULT_OPTIONS
    values: dict[str, Any] = {}
    checks: dict[str, bool] = {}
    template: dict[str, str] = {}
    for name, text in pairs.items():
        what = f"{flag}: {name}"
        _check_known(name, format=format, what=f"{what}=")
        structure = name.removeprefix(_OVERLAP)
        if name in _TEMPLATE_KEYS:
            template[name] = _TEMPLATE(text, what)
        elif structure in OVERLAP_STRUCTURES:
            checks[structure] = parse_bool(text, what=what)
        else:
            key = _KEYS[name]
            value = key.parse(text, what)
            if values.setdefault(key.field, value) != value:
                raise RequestError(f"{what} differs from another spelling of the same option")
    if len(set(template.values())) > 1:
        both = " and ".join(f"{name}={word}" for name, word in template.items())
        raise RequestError(f"{flag}: {both} contradict each other")
    for word in template.values():
        values["overlap_check"] = word
    return _checked(OpenOptions(overlap_checks=checks, **values), flag=flag)


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


def _check_known(name: str, *, format: str | None, what: str) -> None:
    """Refuse what cannot be used, with the reason."""
    for beginning, reason in _REFUSALS.items():
        if name == beginning or (beginning.endswith(".") and name.startswith(beginning)):
            raise RequestError(f"{what} is not supported: {reason}")
    key = _KEYS.get(name)
    overlap = name in _TEMPLATE_KEYS or (
        name.startswith(_OVERLAP) and name.removeprefix(_OVERLAP) in OVERLAP_STRUCTURES
    )
    if key is None and not overlap:
        raise RequestError(f"{what} is not supported")
    if format not in (None, "qcow2") and not (key and key.general):
        raise RequestError(f"{what} is an option of qcow2 images, the driver is {format}")


def _checked(options: OpenOptions, *, flag: str) -> OpenOptions:
    # Before anything is opened, and also where the image at hand needs no cache.
    try:
        check_sizes(options)
    except RequestError as error:
        raise RequestError(f"{flag}: {error}") from error
    return options
