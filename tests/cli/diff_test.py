"""`qcow diff`: what it lists, what it writes, how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import qcow
from tests.peers import run_peer


def make(folder: Path) -> tuple[Path, Path]:
    """Two raw disks of 4 MiB: 5 KiB of the second are new, 64 KiB are zero."""
    old, new = folder / "old.raw", folder / "new.raw"
    content = bytearray(b"\1" * (4 << 20))
    old.write_bytes(content)
    content[1 << 20 : (1 << 20) + 5000] = b"\2" * 5000
    content[2 << 20 : (2 << 20) + 65536] = bytes(65536)
    new.write_bytes(content)
    return old, new


def test_the_summary_names_what_differs_and_the_exit_code_says_it(tmp_path: Path) -> None:
    old, new = make(tmp_path)
    done = qcow("diff", old, new, code=1)
    assert done.out.decode() == (
        "2 ranges differ between 0x100000 and 0x210000: 8 KiB of data, 64 KiB of zeros; "
        "4 MiB compared\n"
    )
    same = qcow("diff", old, old)
    assert same.out.decode() == "nothing differs, 0 B compared\n"
    assert qcow("diff", "-q", old, new, code=1).out == b""


def test_the_list_has_ascending_ranges(tmp_path: Path) -> None:
    old, new = make(tmp_path)
    listed = qcow("diff", "--output=json", "-g", "512", old, new, code=1).json()
    assert listed == [
        {"start": 1 << 20, "length": 5120, "zero": False},
        {"start": 2 << 20, "length": 65536, "zero": True},
    ]
    assert qcow("diff", "--output=json", old, old).json() == []


@pytest.mark.pinned("snapshots", "refcount_bits=1", "data_file")
def test_snapshots_of_one_image_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow("create", "-q", "-f", "qcow2", path, "4M")
    for name, pattern in (("one", 3), ("two", 4)):
        qcow("io", "-c", f"write -q -P {pattern} 1M 64k", path)
        qcow("snapshot", "-q", "-c", name, path)
    listed = qcow("diff", "--output=json", "-l", "one", "-L", "two", path, path, code=1).json()
    assert listed == [{"start": 1 << 20, "length": 65536, "zero": False}]
    assert qcow("diff", "-L", "two", path, path).out.startswith(b"nothing differs")


def test_the_delta_is_an_overlay_of_the_first_disk(tmp_path: Path) -> None:
    old, new = make(tmp_path)
    delta = tmp_path / "delta.qcow2"
    qcow("diff", "-q", "-O", "qcow2", old, new, delta)
    info = qcow("info", "--output=json", delta).json()
    assert (info["backing-filename"], info["backing-filename-format"]) == ("old.raw", "raw")
    qcow("compare", delta, new)
    qcow("check", delta)


def test_the_delta_may_name_another_base_or_none(tmp_path: Path) -> None:
    old, new = make(tmp_path)
    base = tmp_path / "old.qcow2"
    qcow("convert", "-f", "raw", "-O", "qcow2", old, base)
    delta, alone = tmp_path / "delta.qcow2", tmp_path / "alone.qcow2"
    names = ("--backing", "old.qcow2", "--backing-format", "qcow2")
    qcow("diff", "-q", "-O", "qcow2", *names, old, new, delta)
    qcow("compare", delta, new)
    qcow("diff", "-q", "-O", "qcow2", "-o", "cluster_size=4k", "--standalone", old, new, alone)
    assert "backing-filename" not in qcow("info", "--output=json", alone).json()
    qcow("rebase", "-q", "-u", "-b", "old.raw", "-F", "raw", alone)
    qcow("compare", alone, new)


@pytest.mark.peer("qemu-img")
def test_qemu_sees_the_second_disk_through_the_delta(tmp_path: Path) -> None:
    old, new = make(tmp_path)
    delta = tmp_path / "delta.qcow2"
    qcow("diff", "-q", "-O", "qcow2", old, new, delta)
    run_peer("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", delta, new)
    run_peer("qemu-img", "check", "-q", delta)


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (("-O", "qcow2", "old.raw", "new.raw"), 2, "-O and DELTA need one another"),
        (("old.raw", "new.raw", "delta.qcow2"), 2, "-O and DELTA need one another"),
        (("--standalone", "old.raw", "new.raw"), 2, "--standalone needs -O"),
        (("-g", "1000", "old.raw", "new.raw"), 2, "granularity is 1000, expected a power of two"),
        (("old.raw", "none.raw"), 2, "No such file"),
        (("-l", "x", "old.raw", "new.raw"), 2, "raw images have no internal snapshots"),
        (
            ("-O", "qcow2", "-l", "x", "old.raw", "new.raw", "d"),
            2,
            "no name leads to a snapshot of an image",
        ),
    ],
)
def test_what_cannot_be_done_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    code: int,
    text: str,
) -> None:
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert text in qcow("diff", *flags, code=code).err
    assert not (tmp_path / "delta.qcow2").exists()


def test_a_delta_never_takes_the_place_of_what_it_is_made_from(tmp_path: Path) -> None:
    old, new = make(tmp_path)
    before = new.read_bytes()
    for path in (old, new):
        qcow("diff", "-O", "qcow2", old, new, path, code=2)
    assert new.read_bytes() == before
