"""Values with a syntax of their own: `-o k=v,k=v`, `--image-opts`, `--object`. Numpy-free.

In all of them a comma within a value is written twice."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qcowkit.engine.options import DEFAULT_OPTIONS, OpenOptions
from qcowkit.errors import RequestError, StorageError

HELP_WORDS = ("help", "?")

# A comma that stands alone ends an option; two are one comma of the value.
_SEPARATOR = re.compile(r"(?<!,)((?:,,)*),(?!,)")
_TRUE = ("on", "yes", "true", "y")
_FALSE = ("off", "no", "false", "n")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """What to open: `format` None is found from the content.

    options: keys of a description that are not read yet; `opening`: what they mean, once read.
    read_only: a description that excludes writing. key_secrets: ids of secrets by depth in the
    chain, 0 for the image itself."""

    path: str
    format: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    opening: OpenOptions = DEFAULT_OPTIONS
    read_only: bool = False
    key_secrets: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """A password given with --object."""

    id: str
    data: bytes


def split_options(text: str) -> list[str]:
    """The parts of `a=1,b=2`, with `,,` read as one comma of a value."""
    parts = _SEPARATOR.sub(lambda found: found[1] + "\0", text).split("\0")
    return [part.replace(",,", ",") for part in parts if part]


def parse_options(texts: Iterable[str], *, flag: str = "-o") -> dict[str, str]:
    """Keys and values of all uses of a flag; a key without a value is `on`, the last one wins."""
    return _pairs([part for text in texts for part in split_options(text)], flag=flag)


def _pairs(parts: Iterable[str], *, flag: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not key:
            raise RequestError(f"{flag}: {part!r} has no name before the equals sign")
        options[key] = value if equals else "on"
    return options


def asks_for_help(texts: Iterable[str]) -> bool:
    """Whether `help` or `?` stands among the options."""
    return any(part in HELP_WORDS for text in texts for part in split_options(text))


def parse_bool(text: str, *, what: str) -> bool:
    """`on` or `off`, and their usual other spellings. Raises RequestError that names `what`."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise RequestError(f"{what} is {text!r}, expected on or off")


def parse_image_opts(text: str) -> ImageSpec:
    """`driver=FMT,file.filename=PATH,...`; other keys stay in `options`, for `cli/open_options`.

    Raises RequestError for a driver chain that this program has no meaning for."""
    options = parse_options([text], flag="--image-opts")
    driver = options.pop("driver", None)
    protocol = options.pop("file.driver", "file")
    if driver in ("file", "host_device"):
        # A protocol at the top is what qemu shows as a raw disk.
        driver = "raw"
    if protocol not in ("file", "host_device"):
        raise RequestError(f"--image-opts: file.driver={protocol} is not supported, only file")
    path = options.pop("file.filename", None)
    short = options.pop("filename", None)
    if (path is None) == (short is None):
        raise RequestError(f"--image-opts: {text!r} needs one of file.filename= and filename=")
    read_only = [
        parse_bool(options.pop(key, "off"), what=f"--image-opts: {key}=")
        for key in ("read-only", "file.read-only")
    ]
    # How the host is asked for bytes: the content does not depend on it.
    for key in ("file.aio", "cache.direct"):
        options.pop(key, None)
    return ImageSpec(
        path=path or short or "", format=driver, options=options, read_only=any(read_only)
    )


def parse_object(text: str) -> Secret:
    """A secret of `--object secret,id=S,data=TEXT|file=PATH[,format=raw|base64]`."""
    kind, *rest = split_options(text) or [""]
    if kind != "secret":
        raise RequestError(f"--object {kind}: only secret is known")
    options = _pairs(rest, flag="--object secret")
    name = options.pop("id", "")
    data, path = options.pop("data", None), options.pop("file", None)
    encoding = options.pop("format", "raw")
    if not name:
        raise RequestError("--object secret: id= is missing")
    for key in options:
        if key in ("keyid", "iv"):
            raise RequestError(f"--object secret: {key}= (a wrapped secret) is not supported")
        raise RequestError(f"--object secret: {key}= is unknown")
    if (data is None) == (path is None):
        raise RequestError(f"--object secret,id={name}: needs one of data= and file=")
    raw = (
        _read_secret(path) if path is not None else (data or "").encode("utf-8", "surrogateescape")
    )
    if encoding == "base64":
        raw = _decode_base64(raw, name=name)
    elif encoding != "raw":
        raise RequestError(f"--object secret: format is {encoding!r}, expected raw or base64")
    return Secret(id=name, data=raw)


def parse_objects(texts: Sequence[str]) -> dict[str, Secret]:
    """All secrets by their id. Raises RequestError for an id that is used twice."""
    secrets: dict[str, Secret] = {}
    for text in texts:
        secret = parse_object(text)
        if secret.id in secrets:
            raise RequestError(f"--object secret: id {secret.id!r} is used twice")
        secrets[secret.id] = secret
    return secrets


def _read_secret(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise StorageError.wrap(error, operation="read secret", path=path) from error


def _decode_base64(raw: bytes, *, name: str) -> bytes:
    try:
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except binascii.Error as error:
        raise RequestError(f"--object secret,id={name}: not valid base64 ({error})") from error
