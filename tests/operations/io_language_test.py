"""The command language of qemu-io: what is understood, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from qcowkit.errors import QcowkitError, RequestError, StorageError
from qcowkit.operations.io_language.grammar import COMMANDS, help_lines, help_of, parse_line
from qcowkit.operations.io_language.reports import dump_lines, exact_size
from qcowkit.operations.io_language.requests import (
    DiscardRequest,
    ReadRequest,
    Style,
    Verification,
    WriteRequest,
    parse_pattern,
    parse_request,
    tile,
)

# Words


@pytest.mark.parametrize(
    ("line", "name", "flags", "operands"),
    [
        ("read 0 4k", "read", {}, ("0", "4k")),
        ("  r\t0   4k ", "read", {}, ("0", "4k")),
        ("w -zu 0 4k", "write", {"z": "", "u": ""}, ("0", "4k")),
        ("write 0 4k -P3", "write", {"P": "3"}, ("0", "4k")),
        ("write -qP 3 0 4k", "write", {"q": "", "P": "3"}, ("0", "4k")),
        ("truncate -m full -- 2M", "truncate", {"m": "full"}, ("2M",)),
        ("aio_write 0 1k 1k 1k", "aio_write", {}, ("0", "1k", "1k", "1k")),
        ("? read", "help", {}, ("read",)),
        ("o -ro driver=raw x", "open", {"r": "", "o": "driver=raw"}, ("x",)),
    ],
)
def test_a_line_is_a_command_with_flags_and_operands(
    line: str, name: str, flags: dict[str, str], operands: tuple[str, ...]
) -> None:
    call = parse_line(line)
    assert call is not None
    assert (call.name, call.flags, call.operands) == (name, flags, operands)


@pytest.mark.parametrize("line", ["", "   ", "\n"])
def test_an_empty_line_is_no_command(line: str) -> None:
    assert parse_line(line) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("frobnicate 1", "unknown command 'frobnicate' (see help)"),
        ("zone_report 0 1", "zone_report: zoned devices are not supported"),
        ("zap 0 1", "zap: zoned devices are not supported"),
        ("discard -x 0 1", "discard: -x is unknown (discard [-Cq] OFFSET LENGTH)"),
        ("discard 0", "discard: 1 operand, expected 2 (discard [-Cq] OFFSET LENGTH)"),
        ("discard -1 4k", "discard: -1 is unknown (discard [-Cq] OFFSET LENGTH)"),
        (
            "truncate 1k -m",
            "truncate: -m needs a value (truncate [-m MODE] SIZE)",
        ),
        ("flush 3", "flush: 1 operand, expected none (flush)"),
        ("alloc", "alloc: 0 operands, expected 1 to 2 (alloc OFFSET [LENGTH])"),
        (
            "writev 0",
            "writev: 1 operand, expected at least 2 "
            "(writev [-Cfqr] [-P PATTERN] OFFSET LENGTH [LENGTH...])",
        ),
    ],
)
def test_a_line_that_is_not_understood_is_refused_by_name(line: str, message: str) -> None:
    with pytest.raises(QcowkitError) as caught:
        parse_line(line)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("205", 205), ("0xcd", 205), ("0XFF", 255), ("017", 15)]
)
def test_a_pattern_is_decimal_octal_or_hexadecimal(text: str, value: int) -> None:
    assert parse_pattern(text) == value


@pytest.mark.parametrize("text", ["256", "-1", "08", "0x", "0x100", "", "ab", "1.0", "٣"])
def test_no_other_pattern_is_a_byte(text: str) -> None:
    with pytest.raises(RequestError, match="is not a byte from 0 to 255"):
        parse_pattern(text)


def test_help_names_every_command_and_every_flag() -> None:
    text = "\n".join(help_lines())
    for command in COMMANDS:
        assert command.usage in text
        assert [flag for flag, meaning in command.flag_help if not meaning] == []


def test_help_of_one_command_tells_its_short_name_and_its_flags() -> None:
    assert help_of("d") == [
        "discard [-Cq] OFFSET LENGTH -- say that bytes are no longer needed (short: d)",
        "  -C  report as one line of comma-separated numbers",
        "  -q  report nothing but failures",
    ]


# Requests


def request_of(line: str) -> object:
    call = parse_line(line)
    assert call is not None
    return parse_request(call)


def test_requests_carry_what_their_flags_say(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"abc")
    plain, quick = Style(), Style(quiet=True, machine=True)
    verify = Verification(pattern=7, start=512, length=1024)
    assert [
        request_of("read -v -P 7 -s 512 -l 1k 4k 8k"),
        request_of("aio_read -i 0 1k 1k"),
        request_of("write -f -qC -P 0x10 0 2"),
        request_of("write -zun 0 3G"),
        request_of("write -c 0 64k"),
        request_of(f"write -s {source} 0 10"),
        request_of("aio_discard 1k 1k"),
    ] == [
        ReadRequest(
            command="read", offset=4096, length=8192, style=plain, verify=verify, dump=True
        ),
        ReadRequest(command="aio_read", offset=0, length=2048, style=plain, invalid=True),
        WriteRequest(
            command="write", offset=0, length=2, style=quick, content=b"\x10", durable=True
        ),
        WriteRequest(
            command="write",
            offset=0,
            length=3 << 30,
            style=plain,
            content=None,
            unmap=True,
            fallback=False,
        ),
        WriteRequest(
            command="write",
            offset=0,
            length=65536,
            style=plain,
            content=b"\xcd",
            compressed=True,
        ),
        WriteRequest(command="write", offset=0, length=10, style=plain, content=b"abc"),
        DiscardRequest(command="aio_discard", offset=1024, length=1024, style=plain),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("write -b -z 0 512", "write: -b and -z exclude each other"),
        ("write -f -b 0 512", "write: -f and -b exclude each other"),
        ("write -f -c 0 512", "write: -f and -c exclude each other"),
        ("write -c -z 0 512", "write: -c and -z exclude each other"),
        ("write -n 0 1", "write: -n needs -z"),
        ("aio_write -u 0 1", "aio_write: -u needs -z"),
        ("write -z -P 1 0 1", "write: -z and -P exclude each other"),
        ("write -P 1 -s f 0 1", "write: -P and -s exclude each other"),
        ("aio_write -z 0 1k 1k", "aio_write: -z takes one length"),
        ("write -c 1 512", "write: offset 1 is not a multiple of 512, which -c needs"),
        ("read -b 0 5", "read: length 5 is not a multiple of 512, which -b needs"),
        ("read -b 0 512", "read -b: the VM state cannot be reached here"),
        ("write -b 0 512", "write -b: the VM state cannot be reached here"),
        ("read -s 0 0 1", "read: -s needs -P"),
        ("read -l 1 0 1", "read: -l needs -P"),
        (
            "read -P 1 -s 512 -l 1k 0 1k",
            "read: bytes 512 to 1536 are to be verified, but only 1024 are read",
        ),
        (
            "read -P 1 -s 2k 0 1k",
            "read: bytes 2048 to 2048 are to be verified, but only 1024 are read",
        ),
        ("write -P 300 0 1k", "pattern '300' is not a byte from 0 to 255"),
        (
            "write 0 2G",
            "write: length 2147483648 is above the largest request, 2147483136 bytes "
            "(only write -z -n goes on)",
        ),
        (
            "readv 0 1G 1G",
            "readv: length 2147483648 is above the largest request, 2147483136 bytes",
        ),
        (
            "read x 1",
            "read: offset 'x' is not a number of bytes with an optional suffix "
            "b, k, M, G, T, P or E",
        ),
        (
            "discard 0 1k1",
            "discard: length '1k1' is not a number of bytes with an optional suffix "
            "b, k, M, G, T, P or E",
        ),
    ],
)
def test_a_request_against_the_rules_is_refused_by_flag(line: str, message: str) -> None:
    with pytest.raises(QcowkitError) as caught:
        request_of(line)
    assert str(caught.value) == message


def test_a_pattern_file_must_be_there_and_hold_something(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(RequestError, match="empty is empty, there is nothing to repeat"):
        request_of(f"write -s {empty} 0 1")
    with pytest.raises(StorageError, match="read pattern file: No such file or directory"):
        request_of(f"write -s {tmp_path}/missing 0 1")


@pytest.mark.parametrize("content", [b"a", b"abc", b"0123456789"])
def test_content_is_repeated_from_any_position(content: bytes) -> None:
    whole = content * 30
    for position, length in itertools.product(range(12), range(12)):
        expected = whole[position : position + length]
        assert tile(content, position=position, length=length) == expected


# Lines


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 bytes"),
        (512, "512 bytes"),
        (1023.5, "1023.500 bytes"),
        (65536, "64 KiB"),
        ((2 << 20) + 512, "2 MiB"),
        (3 << 29, "1.500 GiB"),
        (3000000, "2.861 MiB"),
        (5 << 60, "5 EiB"),
    ],
)
def test_sizes_have_three_decimals_unless_they_are_whole(value: float, text: str) -> None:
    assert exact_size(value) == text


def test_a_dump_shows_bytes_and_letters() -> None:
    assert list(dump_lines(b"Boot sector 9?\0\xff+", offset=0x1FE)) == [
        "000001fe:  42 6f 6f 74 20 73 65 63 74 6f 72 20 39 3f 00 ff  Boot.sector.9...",
        "0000020e:  2b  .",
    ]
