"""Requests that read, write or discard, with the rules of their flags. Pure, but for `write -s`.

Source: docs of qemu-io, and what it refuses (reference of the command language)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qcowkit.errors import RequestError, StorageError, UnsupportedFeature
from qcowkit.operations.io_language.grammar import Call
from qcowkit.units import SECTOR, parse_size

# The largest request that qemu's block layer takes: a whole number of sectors below 2 GiB.
MAX_REQUEST = (1 << 31) - SECTOR
DEFAULT_PATTERN = 0xCD

_DECIMAL = re.compile(r"(?:0|[1-9][0-9]*)\Z")
_OCTAL = re.compile(r"0[0-7]+\Z")
_HEX = re.compile(r"0[xX][0-9a-fA-F]+\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a result is reported. machine: -C. quiet: -q, which wins."""

    quiet: bool = False
    machine: bool = False

    @classmethod
    def of(cls, call: Call) -> Style:
        """The flags of a call."""
        return cls(quiet=call.has("q"), machine=call.has("C"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A guest range of an open disk. offset, length: bytes. invalid: only to be counted."""

    command: str
    offset: int
    length: int
    style: Style
    invalid: bool = False

    @property
    def is_async(self) -> bool:
        """Whether the command ends once the request is under way."""
        return self.command.startswith("aio_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a read must find. start: from the first byte of the read. All in bytes."""

    pattern: int
    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRequest(Request):
    """`read`, `readv`, `aio_read`. dump: keep the bytes to print them."""

    verify: Verification | None = None
    dump: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteRequest(Request):
    """`write`, `writev`, `aio_write`. content: repeated as often as needed; None writes zeros
    without data. durable: -f."""

    content: bytes | None
    compressed: bool = False
    durable: bool = False
    unmap: bool = False
    fallback: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscardRequest(Request):
    """`discard`, `aio_discard`."""


def parse_request(call: Call) -> Request:
    """A request of one of the commands above.

    Raises RequestError that names the flag or the operand, UnsupportedFeature for the VM state,
    and StorageError where the file of `write -s` cannot be read."""
    if call.name.endswith("discard"):
        offset, length = _range(call)
        return DiscardRequest(command=call.name, offset=offset, length=length, style=Style.of(call))
    return _parse_read(call) if "read" in call.name else _parse_write(call)


def parse_pattern(text: str) -> int:
    """One byte: decimal, octal with a leading 0, or hexadecimal. Raises RequestError."""
    bases = ((_DECIMAL, 10), (_OCTAL, 8), (_HEX, 16))
    base = next((base for form, base in bases if form.match(text)), None)
    if base is None or (value := int(text, base)) > 255:
        raise RequestError(f"pattern {text!r} is not a byte from 0 to 255")
    return value


def _range(call: Call, *, limited: bool = True) -> tuple[int, int]:
    """Offset and length; several lengths count together."""
    offset = parse_size(call.operands[0], what=f"{call.name}: offset")
    lengths = [parse_size(text, what=f"{call.name}: length") for text in call.operands[1:]]
    length = sum(lengths)
    if limited and length > MAX_REQUEST:
        more = " (only write -z -n goes on)" if call.command.changes else ""
        raise RequestError(
            f"{call.name}: length {length} is above the largest request, {MAX_REQUEST} bytes{more}"
        )
    return offset, length


def _parse_read(call: Call) -> ReadRequest:
    offset, length = _range(call)
    _check_vm_state(call, offset=offset, length=length)
    return ReadRequest(
        command=call.name,
        offset=offset,
        length=length,
        style=Style.of(call),
        invalid=call.has("i"),
        verify=_verification(call, length=length),
        dump=call.has("v") and not call.has("q"),
    )


def _verification(call: Call, *, length: int) -> Verification | None:
    text = call.value("P")
    for flag in "sl":
        if call.has(flag) and text is None:
            raise RequestError(f"{call.name}: -{flag} needs -P")
    if text is None:
        return None
    start = parse_size(call.value("s") or "0", what=f"{call.name}: -s")
    rest = max(0, length - start)
    part = parse_size(call.value("l") or str(rest), what=f"{call.name}: -l")
    if start + part > length or start > length:
        raise RequestError(
            f"{call.name}: bytes {start} to {start + part} are to be verified, but only "
            f"{length} are read"
        )
    return Verification(pattern=parse_pattern(text), start=start, length=part)


def _parse_write(call: Call) -> WriteRequest:
    _check_write_flags(call)
    if call.name == "aio_write" and call.has("z") and len(call.operands) > 2:
        raise RequestError("aio_write: -z takes one length")
    offset, length = _range(call, limited=not call.has("n"))
    _check_vm_state(call, offset=offset, length=length)
    if call.has("c"):
        _check_aligned(call, "-c", offset=offset, length=length)
    return WriteRequest(
        command=call.name,
        offset=offset,
        length=length,
        style=Style.of(call),
        invalid=call.has("i"),
        content=_content(call, length=length),
        compressed=call.has("c"),
        durable=call.has("f"),
        unmap=call.has("u"),
        fallback=not call.has("n"),
    )


# Pairs that exclude one another. `-c` beside `-z` is ours: qemu-io drops one of the two unsaid.
_EXCLUSIVE = (("b", "z"), ("f", "b"), ("f", "c"), ("c", "z"))


def _check_write_flags(call: Call) -> None:
    for one, other in _EXCLUSIVE:
        if call.has(one) and call.has(other):
            raise RequestError(f"{call.name}: -{one} and -{other} exclude each other")
    for flag in "nu":
        if call.has(flag) and not call.has("z"):
            raise RequestError(f"{call.name}: -{flag} needs -z")
    sources = [f"-{flag}" for flag in "zPs" if call.has(flag)]
    if len(sources) > 1:
        raise RequestError(f"{call.name}: {' and '.join(sources)} exclude each other")


def _check_vm_state(call: Call, *, offset: int, length: int) -> None:
    if call.has("b"):
        _check_aligned(call, "-b", offset=offset, length=length)
        raise UnsupportedFeature(f"{call.name} -b", reason="the VM state cannot be reached here")


def _check_aligned(call: Call, flag: str, *, offset: int, length: int) -> None:
    for what, value in (("offset", offset), ("length", length)):
        if value % SECTOR:
            raise RequestError(
                f"{call.name}: {what} {value} is not a multiple of {SECTOR}, which {flag} needs"
            )


def _content(call: Call, *, length: int) -> bytes | None:
    if call.has("z"):
        return None
    path = call.value("s")
    if path is not None:
        return _read_file(path, length=length)
    text = call.value("P")
    return bytes([DEFAULT_PATTERN if text is None else parse_pattern(text)])


def _read_file(path: str, *, length: int) -> bytes:
    """As much of a file as can be needed. Raises StorageError, RequestError for an empty one."""
    try:
        with open(path, "rb") as file:
            content = file.read(max(1, length))
    except OSError as error:
        raise StorageError.wrap(error, operation="read pattern file", path=path) from error
    if not content:
        raise RequestError(f"write: -s: {path} is empty, there is nothing to repeat")
    return content


def tile(content: bytes, *, position: int, length: int) -> bytes:
    """`length` bytes of endless repetitions of `content`, from `position` on."""
    if len(content) == 1:
        return content * length
    first = position % len(content)
    head = content[first : first + length]
    missing = length - len(head)
    if not missing:
        return head
    return head + (content * (missing // len(content) + 1))[:missing]
