"""Parent locators: vhd.md 1.4, row 53 of the validation list."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.vhd.locators import (
    ABSOLUTE,
    FILE_URL,
    PATH_CODES,
    RELATIVE,
    ParentLocator,
    decode_locator,
    decode_utf16,
    decode_windows_path,
    encode_locator,
)
from qcowkit.errors import CorruptMetadata

components = st.text(
    st.characters(
        blacklist_categories=("Cs", "Cc"), blacklist_characters="/\\\ufeff\ufffe", codec="utf-8"
    ),
    min_size=1,
    max_size=8,
).filter(lambda name: name not in (".", ".."))
paths = st.lists(components, min_size=1, max_size=4).map(
    lambda names: "/".join([*names, "parent.vhd"])
)


@given(paths)
def test_relative_paths_survive_both_relative_locators(path: str) -> None:
    assert decode_locator(RELATIVE, encode_locator(RELATIVE, path))[0] == path
    assert decode_locator(FILE_URL, encode_locator(FILE_URL, path))[0] == path


@given(paths)
def test_absolute_paths_survive_the_absolute_locator(path: str) -> None:
    assert decode_locator(ABSOLUTE, encode_locator(ABSOLUTE, "/" + path)) == ("/" + path,)


def test_a_relative_name_is_written_as_windows_writes_it() -> None:
    raw = encode_locator(RELATIVE, "dir/parent.vhd")
    assert raw == ".\\dir\\parent.vhd".encode("utf-16-le")
    assert encode_locator(RELATIVE, "../p.vhd") == "..\\p.vhd".encode("utf-16-le")


def test_a_file_url_is_written_relative_and_quoted() -> None:
    assert encode_locator(FILE_URL, "a b/p%.vhd") == b"file://./a%20b/p%25.vhd"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (".\\dir\\parent.vhd", "dir/parent.vhd"),
        ("..\\base\\parent.vhd", "../base/parent.vhd"),
        ("parent.vhd", "parent.vhd"),
        ("./parent.vhd", "parent.vhd"),
        ("\\images\\parent.vhd", "/images/parent.vhd"),
        ("/images/parent.vhd", "/images/parent.vhd"),
        ("C:\\images\\parent.vhd", "parent.vhd"),
        ("d:/images/parent.vhd", "parent.vhd"),
        ("\\\\server\\share\\parent.vhd", "parent.vhd"),
        ("C:\\", "C:"),
        ("", ""),
    ],
)
def test_windows_paths_become_posix_paths(text: str, path: str) -> None:
    assert decode_windows_path(text) == path


@pytest.mark.parametrize(
    ("url", "paths"),
    [
        (b"file://./parent.vhd", ("parent.vhd",)),
        (b"file://parent.vhd", ("parent.vhd",)),
        (b"file:///images/parent.vhd", ("/images/parent.vhd",)),
        (b"FILE://localhost/images/parent.vhd\0\0", ("/images/parent.vhd",)),
        (b"file://./a%20b.vhd", ("a b.vhd", "a%20b.vhd")),
        ("file://./é.vhd".encode(), ("é.vhd",)),
        (b"parent.vhd", ("parent.vhd",)),
        (b"./50%", ("50%",)),
    ],
)
def test_file_urls_become_paths(url: bytes, paths: tuple[str, ...]) -> None:
    assert decode_locator(FILE_URL, url) == paths


@pytest.mark.parametrize(
    ("code", "raw", "reason"),
    [
        (FILE_URL, b"http://host/p.vhd", "URL b'http://host/p.vhd' does not begin with file://"),
        (FILE_URL, b"file://./%ff", "the URL is not UTF-8"),
        (FILE_URL, b"file://./a%00b", "the name holds control characters"),
        (RELATIVE, b"\x00\xd8.\0", "the name is not UTF-16"),
        (RELATIVE, "a\nb".encode("utf-16-le"), "the name holds control characters"),
    ],
)
def test_a_name_that_is_no_path_is_refused(code: bytes, raw: bytes, reason: str) -> None:
    with pytest.raises(CorruptMetadata, match=re.escape(f"parent name: {reason}")):
        decode_locator(code, raw)


def test_an_unknown_platform_gives_no_path() -> None:
    assert decode_locator(b"????", b"parent.vhd") == ()


@pytest.mark.parametrize(
    ("code", "raw", "path"),
    [
        (b"Wi2r", b".\\dir\\p\xe4rent.vhd\0junk", "dir/pärent.vhd"),
        (b"Wi2k", b"C:\\disks\\parent.vhd", "parent.vhd"),
        (b"Wi2r", ".\\parent.vhd".encode("utf-16-le"), "parent.vhd"),
    ],
)
def test_the_deprecated_windows_codes_hold_text_of_eight_bits(
    code: bytes, raw: bytes, path: str
) -> None:
    assert decode_locator(code, raw) == (path,)


def alias_record(name: bytes, *, version: int = 2) -> bytes:
    head = bytes(6) + version.to_bytes(2, "big") + bytes(42)
    return head + bytes([len(name)]) + name.ljust(63, b"\0") + bytes(36)


def test_a_macintosh_alias_gives_the_name_of_its_file() -> None:
    assert decode_locator(b"Mac ", alias_record(b"p\x8arent.vhd")) == ("pärent.vhd",)
    assert decode_locator(b"Mac ", alias_record(b"a/b.vhd")) == ("a:b.vhd",)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"parent.vhd", "the alias record is not of version 2"),
        (alias_record(b"a", version=3), "the alias record is not of version 2"),
        (alias_record(b""), "the alias has a name of 0 bytes"),
        (alias_record(b"x" * 63)[:50] + b"\x40" + b"x" * 80, "the alias has a name of 64 bytes"),
    ],
)
def test_an_alias_that_names_nothing_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(CorruptMetadata, match=re.escape(f"parent name: {reason}")):
        decode_locator(b"Mac ", raw)


@pytest.mark.parametrize("stored", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("expected_big_endian", [True, False])
def test_names_in_the_wrong_byte_order_are_understood(
    stored: str, expected_big_endian: bool
) -> None:
    raw = "./ünïcode.vhd".encode(stored)
    assert decode_utf16(raw, big_endian=expected_big_endian) == "./ünïcode.vhd"


def test_a_byte_order_mark_decides_the_byte_order() -> None:
    assert decode_utf16("\ufeff親.vhd".encode("utf-16-be"), big_endian=False) == "親.vhd"


def test_a_name_ends_at_its_first_nul() -> None:
    assert decode_utf16("a.vhd\0junk".encode("utf-16-le"), big_endian=False) == "a.vhd"


@given(st.sampled_from(list(PATH_CODES)), st.binary(max_size=64))
def test_no_bytes_make_the_name_decoder_fail_in_another_way(code: bytes, raw: bytes) -> None:
    with contextlib.suppress(CorruptMetadata):
        for path in decode_locator(code, raw):
            assert "\0" not in path
            path.encode()


@given(st.binary(min_size=24, max_size=24))
def test_every_locator_entry_survives_encoding(raw: bytes) -> None:
    assert ParentLocator.decode(raw).encode() == raw


def test_a_locator_entry_of_another_length_is_refused() -> None:
    with pytest.raises(CorruptMetadata, match="parent locator: 23 bytes, expected 24"):
        ParentLocator.decode(bytes(23))


def test_the_space_of_a_name_counts_sectors_below_512_and_bytes_above() -> None:
    assert ParentLocator(data_space=1).space == 512
    assert ParentLocator(data_space=512).space == 512
    assert ParentLocator(data_space=1024).space == 1024
