"""The syntax of -o, --image-opts and --object."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.cli.create_options import options_help, parse_create_options
from qcowkit.cli.options import (
    asks_for_help,
    parse_image_opts,
    parse_object,
    parse_objects,
    parse_options,
    split_options,
)
from qcowkit.errors import RequestError, StorageError
from qcowkit.units import KiB

values = st.text(st.characters(exclude_characters="\0=", exclude_categories=["Cs"]), min_size=1)


@given(st.lists(values, min_size=1))
def test_values_with_doubled_commas_come_back(parts: list[str]) -> None:
    # A value that begins or ends with a comma cannot be told from a doubled separator.
    parts = [f"k=[{part}]" for part in parts]
    text = ",".join(part.replace(",", ",,") for part in parts)
    assert split_options(text) == parts


def test_a_doubled_comma_is_one_comma_of_a_value() -> None:
    assert parse_options(["backing_file=a,,b,size=1"]) == {"backing_file": "a,b", "size": "1"}


def test_three_commas_are_a_comma_and_an_end() -> None:
    assert split_options("a=x,,,b=y") == ["a=x,", "b=y"]


def test_the_last_use_of_a_key_wins() -> None:
    assert parse_options(["size=1", "size=2"]) == {"size": "2"}


def test_a_key_without_a_value_is_on() -> None:
    assert parse_options(["lazy_refcounts"]) == {"lazy_refcounts": "on"}


def test_a_value_without_a_key_is_refused() -> None:
    with pytest.raises(RequestError, match="-o: '=5' has no name before the equals sign"):
        parse_options(["=5"])


@pytest.mark.parametrize("texts", [["help"], ["?"], ["size=1,help"], ["size=1", "help"]])
def test_help_among_options_is_seen(texts: list[str]) -> None:
    assert asks_for_help(texts)


def test_help_as_a_value_is_no_question() -> None:
    assert not asks_for_help(["backing_file=help"])


def test_create_options_are_typed() -> None:
    found = parse_create_options(
        "qcow2", ["cluster_size=128k,compat=v3", "refcount_bits=1,extended_l2=on"]
    )
    assert found == {
        "cluster_size": 128 * KiB,
        "compat": "1.1",
        "refcount_bits": 1,
        "extended_l2": True,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour=red", "-o colour: not an option of qcow2"),
        ("compat=2.0", "-o compat is '2.0', expected one of 0.10, 1.1"),
        ("lazy_refcounts=maybe", "-o lazy_refcounts is 'maybe', expected on or off"),
        ("refcount_bits=-1", "-o refcount_bits is '-1', expected a whole number"),
        (
            "encrypt.format=rot13",
            "-o encrypt.format is 'rot13', expected one of luks, aes",
        ),
        ("cluster_size=big", "-o cluster_size 'big' is not a number of bytes"),
    ],
)
def test_a_bad_create_option_is_named(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("(", r"\(")):
        parse_create_options("qcow2", [text])


@pytest.mark.parametrize("format", ["qcow2", "vpc", "raw"])
def test_the_help_lists_what_can_be_used(format: str) -> None:
    text = options_help(format)
    assert "size=<size>" in text
    assert ("encrypt.format" in text) is (format == "qcow2")


def test_image_opts_name_driver_and_file() -> None:
    spec = parse_image_opts("driver=qcow2,file.driver=file,file.filename=a,,b.qcow2")
    assert (spec.path, spec.format, spec.options) == ("a,b.qcow2", "qcow2", {})


def test_a_protocol_at_the_top_is_a_raw_disk() -> None:
    assert parse_image_opts("driver=file,filename=disk").format == "raw"


def test_unknown_image_opts_are_kept_for_the_image() -> None:
    spec = parse_image_opts("driver=raw,file.filename=disk,offset=512")
    assert spec.options == {"offset": "512"}


@pytest.mark.parametrize("text", ["driver=qcow2", "filename=a,file.filename=b"])
def test_image_opts_need_one_file_name(text: str) -> None:
    with pytest.raises(RequestError, match="needs one of file.filename= and filename="):
        parse_image_opts(text)


def test_another_protocol_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="file.driver=nbd is not supported"):
        parse_image_opts("driver=raw,file.driver=nbd,file.filename=x")


def test_a_secret_is_read_from_its_text() -> None:
    secret = parse_object("secret,id=s,data=a,,b=c")
    assert (secret.id, secret.data) == ("s", b"a,b=c")


def test_a_secret_is_read_from_a_base64_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"c2VjcmV0\n")
    assert parse_object(f"secret,id=s,file={path},format=base64").data == b"secret"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tls-creds-x509,id=t", "--object tls-creds-x509: only secret is known"),
        ("secret,data=x", "id= is missing"),
        ("secret,id=s", "needs one of data= and file="),
        ("secret,id=s,data=x,file=y", "needs one of data= and file="),
        ("secret,id=s,data=x,keyid=k", "keyid= .a wrapped secret. is not supported"),
        ("secret,id=s,data=x,colour=red", "colour= is unknown"),
        ("secret,id=s,data=x,format=hex", "format is 'hex', expected raw or base64"),
        ("secret,id=s,data=!,format=base64", "not valid base64"),
    ],
)
def test_a_bad_secret_is_refused_with_its_reason(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_object(text)


def test_a_missing_secret_file_keeps_its_errno(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="read secret: No such file or directory"):
        parse_object(f"secret,id=s,file={tmp_path}/none")


def test_a_secret_id_is_used_once() -> None:
    with pytest.raises(RequestError, match="id 's' is used twice"):
        parse_objects(["secret,id=s,data=x", "secret,id=s,data=y"])
