"""`qcow rebase`: what it does, what it prints, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import qcow


def make(folder: Path) -> Path:
    """A raw base of ones, another of twos, and an overlay of the first with a MiB of its own."""
    (folder / "one.raw").write_bytes(b"\1" * (4 << 20))
    (folder / "two.raw").write_bytes(b"\1" * (1 << 20) + b"\2" * (3 << 20))
    top = folder / "top.qcow2"
    qcow("create", "-q", "-f", "qcow2", "-b", "one.raw", "-F", "raw", top)
    qcow("io", "-c", "write -q -P 7 1M 1M", top)
    return top


def backing(path: Path) -> tuple[str | None, str | None]:
    info = qcow("info", "--output=json", path).json()
    return info.get("backing-filename"), info.get("backing-filename-format")


def shows(path: Path, *patterns: int) -> bool:
    """Whether each MiB has its pattern."""
    words = [("-c", f"read -q -P {one} {at}M 1M") for at, one in enumerate(patterns)]
    return qcow("io", "-r", *sum(words, ()), path, code=None).code == 0


def test_the_disk_stays_and_its_base_changes(tmp_path: Path) -> None:
    top = make(tmp_path)
    done = qcow("rebase", "-b", "two.raw", "-F", "raw", top)
    assert done.out.decode().splitlines() == [
        "3 MiB compared, 2 MiB of data and 0 B of zeros copied",
        "the backing file is now: two.raw",
    ]
    assert backing(top) == ("two.raw", "raw")
    assert shows(top, 1, 7, 1, 1)
    qcow("check", top)


def test_onto_nothing_the_disk_stands_by_itself(tmp_path: Path) -> None:
    top = make(tmp_path)
    qcow("rebase", "-b", "", top)
    (tmp_path / "one.raw").unlink()
    assert backing(top) == (None, None)
    assert shows(top, 1, 7, 1, 1)


def test_u_writes_the_name_alone(tmp_path: Path) -> None:
    top = make(tmp_path)
    done = qcow("rebase", "-u", "-b", "two.raw", "-F", "raw", top)
    assert done.out.decode() == "the backing file is now: two.raw\n"
    assert shows(top, 1, 7, 2, 2)
    qcow("rebase", "-q", "-u", "-b", "gone/away.qcow2", "-F", "qcow2", top)
    assert backing(top) == ("gone/away.qcow2", "qcow2")
    qcow("rebase", "-u", "-b", "one.raw", "-F", "raw", top)
    assert shows(top, 1, 7, 1, 1)


@pytest.mark.pinned("compressed clusters share host clusters", "refcount_bits=1", "data_file")
def test_c_compresses_what_is_copied(tmp_path: Path) -> None:
    top = make(tmp_path)
    before = top.stat().st_size
    qcow("rebase", "-q", "-c", "-b", "", top)
    assert top.stat().st_size < before + (1 << 20)
    assert shows(top, 1, 7, 1, 1)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ((), '-b is missing: it names the new backing file, or is "" for none'),
        (("-b", "two.raw"), "-b needs -F, the format of the new backing file"),
        (("-b", "", "-F", "raw"), '-F excludes -b "": no backing file has no format'),
        (("-u", "-c", "-b", ""), "-u excludes -c: it copies nothing"),
        (("-b", "top.qcow2", "-F", "qcow2"), "top.qcow2: its chain leads to the image itself"),
        (("-u", "-b", "top.qcow2", "-F", "qcow2"), "an image cannot be its own backing file"),
        (("-b", "none.raw", "-F", "raw"), "No such file"),
        (("-U", "-b", ""), "an image that another process uses must not be changed"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(
    tmp_path: Path, flags: tuple[str, ...], text: str
) -> None:
    top = make(tmp_path)
    before = top.read_bytes()
    assert text in qcow("rebase", *flags, top, code=1).err
    assert top.read_bytes() == before


def test_an_overlay_of_the_image_is_no_base_for_it(tmp_path: Path) -> None:
    top = make(tmp_path)
    above = tmp_path / "above.qcow2"
    qcow("create", "-q", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", above)
    done = qcow("rebase", "-b", "above.qcow2", "-F", "qcow2", top, code=1)
    assert "above.qcow2: its chain leads to the image itself, which would be a loop" in done.err


@pytest.mark.pinned("the folder holds all files", "data_file")
def test_a_folder_moves_as_a_whole_and_names_start_at_the_image(tmp_path: Path) -> None:
    (tmp_path / "tree" / "bases").mkdir(parents=True)
    top = make(tmp_path / "tree")
    (tmp_path / "tree" / "two.raw").rename(tmp_path / "tree" / "bases" / "two.raw")
    qcow("rebase", "-q", "-b", "bases/two.raw", "-F", "raw", top)
    (tmp_path / "tree").rename(tmp_path / "elsewhere")
    assert shows(tmp_path / "elsewhere" / "top.qcow2", 1, 7, 1, 1)


def test_shared_ancestors_are_not_read(tmp_path: Path) -> None:
    make(tmp_path)
    second = tmp_path / "second.qcow2"
    qcow("create", "-q", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", second)
    done = qcow("rebase", "-b", "one.raw", "-F", "raw", second)
    assert done.out.decode().startswith("1 MiB compared, 1 MiB of data")
    assert shows(second, 1, 7, 1, 1)


def test_the_identity_of_the_new_base_is_recorded(tmp_path: Path) -> None:
    for name in ("one", "two"):
        qcow("create", "-q", "-f", "qcow2", "-o", "guid=auto", tmp_path / f"{name}.qcow2", "1M")
    top = tmp_path / "over.qcow2"
    words = ("-o", "guid=auto", "-b", "one.qcow2", "-F", "qcow2")
    qcow("create", "-q", "-f", "qcow2", *words, top)
    qcow("rebase", "-q", "-b", "two.qcow2", "-F", "qcow2", top)
    qcow("io", "-c", "write -q 0 64k", top)
    qcow("rebase", "-q", "-u", "-b", "one.qcow2", "-F", "qcow2", top)
    qcow("io", "-c", "write -q 0 64k", top)


@pytest.mark.pinned("it names the method", "compat=0.10", "data_file")
def test_encrypted_layers_are_rebased(tmp_path: Path) -> None:
    secret = ("--object", "secret,id=s,data=word")
    words = ("-o", "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=s")
    (tmp_path / "two.raw").write_bytes(b"\2" * (2 << 20))
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qcow("create", "-q", *secret, "-f", "qcow2", *words, base, "2M")
    qcow("io", *secret, "-c", "write -q -P 5 0 2M", base)
    backing = ("-b", "base.qcow2", "-F", "qcow2")
    qcow("create", "-q", *secret, "-f", "qcow2", *words, *backing, top)
    qcow("io", *secret, "-c", "write -q -P 6 1M 1M", top)
    done = qcow("rebase", "-c", *secret, "-b", "", top, code=1)
    assert "what is encrypted cannot be compressed" in done.err
    qcow("rebase", "-q", *secret, "-b", "two.raw", "-F", "raw", top)
    commands = ("-c", "read -q -P 5 0 1M", "-c", "read -q -P 6 1M 1M")
    qcow("io", *secret, "-r", *commands, top)
    qcow("check", "-q", top)


@pytest.mark.pinned("it needs subclusters")
def test_clusters_that_have_their_place_already_are_not_compressed(tmp_path: Path) -> None:
    make(tmp_path)
    top = tmp_path / "placed.qcow2"
    words = ("-o", "extended_l2=on,preallocation=metadata", "-b", "one.raw", "-F", "raw")
    qcow("create", "-q", "-f", "qcow2", *words, top)
    qcow("rebase", "-q", "-c", "-b", "", top)
    assert shows(top, 1, 1, 1, 1)
    qcow("check", "-q", top)


@pytest.mark.pinned("it has a data file of its own")
def test_an_overlay_with_a_data_file_is_rebased_and_not_compressed(tmp_path: Path) -> None:
    make(tmp_path)
    top = tmp_path / "outside.qcow2"
    words = ("-o", "data_file=outside.data", "-b", "one.raw", "-F", "raw")
    qcow("create", "-q", "-f", "qcow2", *words, top)
    done = qcow("rebase", "-c", "-b", "", top, code=1)
    assert "an external data file holds no compressed clusters" in done.err
    qcow("rebase", "-q", "-b", "two.raw", "-F", "raw", top)
    assert shows(top, 1, 1, 1, 1)
    qcow("check", "-q", top)
