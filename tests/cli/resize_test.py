"""`qcow resize`: its operands, what it says, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcowkit.units import KiB, MiB
from tests.command import qcow

DISK = "disk.qcow2"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    qcow("create", "-q", "-f", "qcow2", DISK, "4M")


def size_of(path: str = DISK) -> int:
    size: int = qcow("info", "--output=json", path).json()["virtual-size"]
    return size


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ([DISK, "8M"], 8 * MiB),
        ([DISK, "+1.5M"], 5632 * KiB),
        (["--shrink", DISK, "-1M"], 3 * MiB),
        ([DISK, "--shrink", "-1M"], 3 * MiB),
        ([DISK, "-1M", "--shrink"], 3 * MiB),
        (["--shrink", "-f", "qcow2", DISK, "-0x100000"], 3 * MiB),
        (["--shrink", "--", DISK, "-512"], 4 * MiB - 512),
        (["--preallocation=metadata", DISK, "5M"], 5 * MiB),
        (["--prealloc", "falloc", DISK, "5M"], 5 * MiB),
        (["--image-opts", f"driver=qcow2,file.filename={DISK},l2-cache-size=1M", "5M"], 5 * MiB),
    ],
)
def test_the_size_may_have_a_sign_and_stand_anywhere(arguments: list[str], size: int) -> None:
    qcow("resize", *arguments)
    assert size_of() == size


def test_it_says_what_was_done_and_what_is_visible() -> None:
    done = qcow("resize", DISK, "+1M")
    assert done.out.decode() == (
        "disk.qcow2: grown from 4 MiB (4194304 bytes) to 5 MiB (5242880 bytes)\n"
        "what was added reads as zeros\n"
    )


def test_a_backing_file_is_exposed_where_that_is_asked_for() -> None:
    qcow("create", "-q", "-f", "qcow2", "-b", DISK, "-F", "qcow2", "top.qcow2", "1M")
    done = qcow("resize", "--expose-backing", "top.qcow2", "2M")
    assert done.out.decode() == (
        "top.qcow2: grown from 1 MiB (1048576 bytes) to 2 MiB (2097152 bytes)\n"
        "what was added shows the backing file\n"
    )
    done = qcow("resize", "--expose-backing", DISK, "8M", code=1)
    assert "only what is added over a backing file can show it, found no backing file" in done.err


def test_quiet_says_nothing() -> None:
    assert qcow("resize", "-q", DISK, "+1M").out == b""


def test_shrinking_has_to_be_asked_for() -> None:
    done = qcow("resize", DISK, "1M", code=1)
    assert done.err == (
        "qcow resize: new size is 1048576 bytes, below the present 4194304: what lies beyond would "
        "be lost; --shrink does it all the same\n"
    )
    assert size_of() == 4 * MiB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DISK], "the following arguments are required: [+|-]SIZE"),
        ([DISK, "much"], "argument [+|-]SIZE: size 'much' is not a number of bytes"),
        ([DISK, "5M", "-x"], "unrecognized arguments: -x"),
        (["-U", DISK, "5M"], "-U: an image that another process writes must not be resized"),
        (["--preallocation=some", DISK, "5M"], "argument --preallocation: invalid choice: 'some'"),
        (["-", "5M"], "-: standard input and output are not supported as an image yet"),
        (["-f", "raw", "none.raw", "5M"], "none.raw: open: No such file or directory"),
        (
            ["--image-opts", f"driver=qcow2,file.filename={DISK},read-only=on", "5M"],
            "--image-opts: read-only=on, and disk.qcow2 would be written",
        ),
    ],
)
def test_bad_usage_names_what_is_wrong(arguments: list[str], message: str) -> None:
    assert message in qcow("resize", *arguments, code=1).err
    assert size_of() == 4 * MiB


def test_a_disk_that_only_looks_raw_has_to_be_called_raw() -> None:
    Path("disk.raw").write_bytes(bytes(MiB))
    done = qcow("resize", "disk.raw", "2M", code=1)
    assert "name the format raw to write it" in done.err
    qcow("resize", "-f", "raw", "disk.raw", "2M")
    assert Path("disk.raw").stat().st_size == 2 * MiB


def test_a_base_outside_of_the_directory_needs_to_be_allowed() -> None:
    Path("machines").mkdir()
    overlay = "machines/top.qcow2"
    qcow("create", "-q", "-f", "qcow2", "-b", f"../{DISK}", "-F", "qcow2", overlay)
    done = qcow("resize", overlay, "8M", code=1)
    assert "not admitted" in done.err
    qcow("resize", "--allow", ".", overlay, "8M")
    assert size_of(overlay) == 8 * MiB
