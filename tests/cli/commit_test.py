"""`qcow commit`: what it does, what it prints, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcowkit
from tests.command import qcow


def make(folder: Path, *, size: str = "4M") -> tuple[Path, Path]:
    """A raw base full of ones, and an overlay that has two in its second MiB."""
    base, top = folder / "base.raw", folder / "top.qcow2"
    base.write_bytes(b"\1" * (4 << 20))
    qcow("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", top, size)
    qcow("io", "-c", "write -q -P 2 1M 1M", top)
    return base, top


def test_the_backing_file_gets_the_data_and_the_overlay_is_empty(tmp_path: Path) -> None:
    base, top = make(tmp_path)
    done = qcow("commit", top)
    assert done.out.decode().splitlines() == [
        f"{base}: 1 MiB of data and 0 B of zeros committed",
        "the overlay is empty now",
    ]
    assert base.read_bytes() == b"\1" * (1 << 20) + b"\2" * (1 << 20) + b"\1" * (2 << 20)
    assert {one["depth"] for one in qcow("map", "--output=json", top).json()} == {1}
    qcow("check", top)


def test_d_leaves_the_overlay_as_it_is(tmp_path: Path) -> None:
    base, top = make(tmp_path)
    before = top.read_bytes()
    done = qcow("commit", "-d", top)
    assert done.out.decode().splitlines()[-1] == "the overlay was left as it is"
    assert top.read_bytes() == before
    assert base.read_bytes()[1 << 20] == 2


def test_quiet_says_nothing(tmp_path: Path) -> None:
    _, top = make(tmp_path)
    done = qcow("commit", "-q", "-t", "none", "-r", "1G", top)
    assert (done.out, done.err) == (b"", "")


def test_a_smaller_base_is_grown(tmp_path: Path) -> None:
    base, top = make(tmp_path, size="6M")
    done = qcow("commit", top)
    assert f"{base}: grown from 4 MiB to 6 MiB" in done.out.decode()
    assert base.stat().st_size == 6 << 20


@pytest.mark.parametrize("spelling", ["name", "path"])
def test_a_deeper_base_is_named_as_the_chain_does_or_by_its_path(
    tmp_path: Path, spelling: str
) -> None:
    base, middle = make(tmp_path)
    top = tmp_path / "third.qcow2"
    qcow("create", "-q", "-f", "qcow2", "-b", middle.name, "-F", "qcow2", top)
    qcow("io", "-c", "write -q -P 3 3M 1M", top)
    done = qcow("commit", "-b", base.name if spelling == "name" else base, top)
    assert done.out.decode().splitlines()[0] == f"{base}: 2 MiB of data and 0 B of zeros committed"
    assert done.out.decode().splitlines()[-1] == "the overlay was left as it is"
    assert base.read_bytes()[3 << 20] == 3
    assert base.read_bytes()[1 << 20] == 2


def test_a_base_outside_of_the_chain_is_refused(tmp_path: Path) -> None:
    _, top = make(tmp_path)
    done = qcow("commit", "-b", "other.raw", top, code=1)
    assert done.err.strip() == f"qcow commit: other.raw: is not in the backing chain of {top}"


def test_an_image_without_a_backing_file_is_refused(tmp_path: Path) -> None:
    top = tmp_path / "alone.qcow2"
    qcow("create", "-q", "-f", "qcow2", top, "1M")
    done = qcow("commit", top, code=1)
    assert "has no backing file that it could be committed into" in done.err


def test_sharing_is_refused(tmp_path: Path) -> None:
    _, top = make(tmp_path)
    done = qcow("commit", "-U", top, code=1)
    assert "images that another process uses must not be changed" in done.err


def test_a_base_outside_of_its_directory_is_not_written(tmp_path: Path) -> None:
    base, top = make(tmp_path)
    inner = tmp_path / "inner"
    inner.mkdir()
    moved = inner / "top.qcow2"
    qcow("create", "-q", "-u", "-f", "qcow2", "-b", "../base.raw", "-F", "raw", moved, "4M")
    before = base.read_bytes()
    done = qcow("commit", moved, code=1)
    assert "not admitted" in done.err
    assert base.read_bytes() == before
    qcow("commit", "--allow", tmp_path, moved)


def test_the_length_of_the_grown_base_is_recorded(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qcow("create", "-q", "-f", "qcow2", "-o", "guid=auto", base, "1M")
    words = ("-o", "guid=auto", "-b", "base.qcow2", "-F", "qcow2")
    qcow("create", "-q", "-f", "qcow2", *words, top, "2M")
    qcow("commit", "-q", top)
    assert qcow("io", "-r", "-c", "read -q 0 2M", top).err == ""


@pytest.mark.pinned("it names the method", "compat=0.10", "data_file")
def test_encrypted_layers_are_committed(tmp_path: Path) -> None:
    secret = ("--object", "secret,id=s,data=word")
    words = ("-o", "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=s")
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qcow("create", "-q", *secret, "-f", "qcow2", *words, base, "2M")
    backing = ("-b", "base.qcow2", "-F", "qcow2")
    qcow("create", "-q", *secret, "-f", "qcow2", *words, *backing, top, "2M")
    qcow("io", *secret, "-c", "write -q -P 5 1M 100k", top)
    qcow("commit", "-q", *secret, top)
    for path in (base, top):
        qcow("io", *secret, "-r", "-c", "read -q -P 5 1M 100k", path)
        qcow("check", "-q", path)
    assert {one["depth"] for one in qcow("map", *secret, "--output=json", top).json()} == {1}


@pytest.mark.pinned("it has a data file of its own")
def test_an_overlay_with_a_data_file_is_emptied(tmp_path: Path) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(b"\1" * (4 << 20))
    words = ("-o", "data_file=top.data", "-b", "base.raw", "-F", "raw")
    qcow("create", "-q", "-f", "qcow2", *words, top)
    qcow("io", "-c", "write -q -P 2 1M 1M", "-c", "write -q -z 3M 64k", top)
    qcow("commit", "-q", top)
    assert base.read_bytes()[1 << 20 : 2 << 20] == b"\2" * (1 << 20)
    assert base.read_bytes()[3 << 20] == 0
    assert {one["depth"] for one in qcow("map", "--output=json", top).json()} == {1}
    qcow("check", top)
    qcow("io", "-c", "write -q -P 6 2M 100k", "-c", "read -q -P 2 1M 1M", top)
    qcow("check", top)


def test_a_base_that_somebody_reads_is_not_written(tmp_path: Path) -> None:
    base, top = make(tmp_path)
    before = base.read_bytes()
    with qcowkit.open(base, format="raw"):
        done = qcow("commit", top, code=1)
    assert "is open for reading elsewhere" in done.err
    assert base.read_bytes() == before
    qcow("commit", top)


def test_a_rate_of_nothing_is_refused(tmp_path: Path) -> None:
    _, top = make(tmp_path)
    assert (
        "-r is 0, expected at least 1 byte a second" in qcow("commit", "-r", "0", top, code=1).err
    )


@pytest.mark.pinned("version 2 holds no bitmaps", "compat=0.10")
def test_bitmaps_of_the_overlay_stay_and_those_of_the_base_record_what_came(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qcow("create", "-q", "-f", "qcow2", base, "4M")
    qcow("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top)
    for path in (base, top):
        qcow("bitmap", "--add", path, "changes")
    qcow("io", "-c", "write -q -P 2 1M 64k", top)
    before = qcow("bitmap", "--list", "--output=json", top).json()
    assert qcow("bitmap", "--list", "--output=json", base).json() != before
    qcow("commit", "-q", top)
    assert qcow("bitmap", "--list", "--output=json", top).json() == before
    assert qcow("bitmap", "--list", "--output=json", base).json() == before
    for path in (base, top):
        qcow("check", "-q", path)
