"""How an image is to be opened: every option of a description, and what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from qcowkit.cli.open_options import OVERLAP_STRUCTURES, parse_open_options
from qcowkit.cli.options import parse_image_opts
from qcowkit.engine.options import DEFAULT_OPTIONS, OpenOptions
from qcowkit.errors import RequestError
from qcowkit.image.gate import ReferenceGate
from qcowkit.operations.create import CreateOptions, create_image
from qcowkit.units import KiB, MiB
from tests.command import qcow
from tests.peers import peer, run_peer


def test_no_option_means_the_defaults() -> None:
    assert parse_open_options({}) == DEFAULT_OPTIONS


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("cache-size", "4M", "cache_size", 4 * MiB),
        ("l2-cache-size", "1M", "l2_cache_size", MiB),
        ("l2-cache-entry-size", "4k", "l2_cache_entry_size", 4 * KiB),
        ("refcount-cache-size", "0x40000", "refcount_cache_size", 256 * KiB),
        ("cache-clean-interval", "0", "cache_clean_interval", 0),
        ("cache-clean-interval", "4294967295", "cache_clean_interval", 4294967295),
        ("lazy-refcounts", "on", "lazy_refcounts", True),
        ("lazy-refcounts", "off", "lazy_refcounts", False),
        ("pass-discard-request", "off", "pass_discard_request", False),
        ("pass-discard-snapshot", "off", "pass_discard_snapshot", False),
        ("pass-discard-other", "on", "pass_discard_other", True),
        ("discard-no-unref", "on", "discard_no_unref", True),
        ("discard", "unmap", "discard", True),
        ("discard", "on", "discard", True),
        ("discard", "ignore", "discard", False),
        ("discard", "off", "discard", False),
        ("overlap-check", "all", "overlap_check", "all"),
        ("overlap-check.template", "none", "overlap_check", "none"),
        ("overlap-check.active-l2", "off", "overlap_checks", {"active-l2": False}),
        ("locking", "on", "locking", "on"),
        ("file.locking", "off", "locking", "off"),
        ("force-share", "on", "force_share", True),
    ],
)
def test_an_option_sets_its_field_and_no_other(
    name: str, text: str, field: str, value: Any
) -> None:
    found = parse_open_options({name: text})
    assert found == OpenOptions(**{field: value})


def test_overlap_checks_are_switched_one_by_one_beside_a_template() -> None:
    pairs = {f"overlap-check.{name}": "on" for name in OVERLAP_STRUCTURES}
    pairs["overlap-check.main-header"] = "off"
    found = parse_open_options({"overlap-check": "constant", **pairs})
    assert found.overlap_check == "constant"
    assert dict(found.overlap_checks) == {
        name: name != "main-header" for name in OVERLAP_STRUCTURES
    }


def test_two_spellings_of_a_template_may_agree() -> None:
    pairs = {"overlap-check": "all", "overlap-check.template": "all"}
    assert parse_open_options(pairs).overlap_check == "all"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            {"overlap-check": "all", "overlap-check.template": "none"},
            "--image-opts: overlap-check=all and overlap-check.template=none contradict each other",
        ),
        (
            {"overlap-check": "some"},
            "--image-opts: overlap-check is 'some', expected one of none, constant, cached, all",
        ),
        (
            {"overlap-check.main-header": "maybe"},
            "--image-opts: overlap-check.main-header is 'maybe', expected on or off",
        ),
        (
            {"overlap-check.colour": "on"},
            "--image-opts: overlap-check.colour= is not supported",
        ),
        (
            {"discard": "maybe"},
            "--image-opts: discard is 'maybe', expected one of ignore, off, unmap, on",
        ),
        (
            {"file.locking": "yes"},
            "--image-opts: file.locking is 'yes', expected one of auto, on, off",
        ),
        (
            {"locking": "on", "file.locking": "off"},
            "--image-opts: file.locking differs from another spelling of the same option",
        ),
        (
            {"l2-cache-size": "much"},
            "--image-opts: l2-cache-size 'much' is not a number of bytes with an optional suffix "
            "b, k, M, G, T, P or E",
        ),
        (
            {"cache-clean-interval": "4294967296"},
            "--image-opts: cache-clean-interval is '4294967296', expected seconds from 0 to "
            "4294967295",
        ),
        (
            {"cache-size": "1M", "l2-cache-size": "2M"},
            "--image-opts: l2-cache-size is 2097152, which exceeds the cache-size of 1048576",
        ),
        (
            {"encrypt.cipher": "s"},
            "--image-opts: encrypt.cipher= is not supported",
        ),
        (
            {"backing": "other.qcow2"},
            "--image-opts: backing= is not supported: the backing file is the one that the image "
            "names; no other can be put in its place",
        ),
        (
            {"backing.driver": "raw"},
            "--image-opts: backing.driver= is not supported: the backing file is opened as the "
            "image names it; it takes no options of its own",
        ),
        (
            {"data-file.filename": "x"},
            "--image-opts: data-file.filename= is not supported: the data file is opened as the "
            "image names it; it takes no options of its own",
        ),
        (
            {"detect-zeroes": "on"},
            "--image-opts: detect-zeroes= is not supported: writes are stored as they come; "
            "convert finds zeros",
        ),
        ({"colour": "red"}, "--image-opts: colour= is not supported"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(pairs: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_open_options(pairs)
    assert str(refused.value) == message


@pytest.mark.parametrize("format", ["raw", "vpc"])
@pytest.mark.parametrize("name", ["l2-cache-size", "overlap-check", "overlap-check.active-l1"])
def test_options_of_qcow2_are_refused_for_other_formats(format: str, name: str) -> None:
    text = f"{name}= is an option of qcow2 images, the driver is {format}"
    with pytest.raises(RequestError, match=text):
        parse_open_options({name: "none"}, format=format)


def test_options_of_the_file_go_with_every_format() -> None:
    pairs = {"file.locking": "off", "discard": "unmap", "force-share": "on"}
    assert parse_open_options(pairs, format="raw").locking == "off"


def test_another_flag_is_named_where_it_gives_the_options() -> None:
    with pytest.raises(RequestError, match=r"^-o: colour= is not supported$"):
        parse_open_options({"colour": "red"}, flag="-o")


def test_a_description_may_exclude_writing() -> None:
    assert parse_image_opts("driver=raw,file.filename=x,read-only=on").read_only
    assert not parse_image_opts("driver=raw,file.filename=x,read-only=off").read_only
    with pytest.raises(RequestError, match="read-only= is 'maybe', expected on or off"):
        parse_image_opts("driver=raw,file.filename=x,read-only=maybe")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    options = CreateOptions.of("qcow2", {"size": MiB})
    create_image(path, options, gate=ReferenceGate.deny_all())
    return path


def described(disk: Path, options: str) -> str:
    return f"driver=qcow2,file.filename={disk},{options}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("info",),
        ("map",),
        ("check",),
        ("measure",),
        ("headers",),
    ],
)
def test_every_verb_that_opens_a_disk_takes_the_options(
    disk: Path, arguments: tuple[str, ...]
) -> None:
    options = "l2-cache-size=1M,cache-clean-interval=0,file.locking=off,overlap-check=none"
    qcow(*arguments, "--image-opts", described(disk, options))
    done = qcow(*arguments, "--image-opts", described(disk, "l3-cache-size=1M"), code=None)
    assert done.code != 0
    assert "--image-opts: l3-cache-size= is not supported" in done.err


def test_comparing_and_copying_take_the_options(disk: Path, tmp_path: Path) -> None:
    text = described(disk, "l2-cache-size=1M")
    qcow("compare", "--image-opts", text, text)
    qcow("convert", "--image-opts", text, tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").stat().st_size == MiB


MATRIX = (
    "l2-cache-size=1M",
    "cache-size=1M,l2-cache-size=1M",
    "cache-size=1M,l2-cache-size=1025k",
    "cache-size=1M,l2-cache-size=1k,refcount-cache-size=1k",
    "cache-clean-interval=0",
    "cache-clean-interval=4294967296",
    "overlap-check=cached",
    "overlap-check=some",
    "overlap-check=all,overlap-check.template=all",
    "overlap-check=all,overlap-check.template=none",
    "overlap-check.template=constant,overlap-check.inactive-l2=on",
    "overlap-check.colour=on",
    "lazy-refcounts=on",
    "lazy-refcounts=maybe",
    "discard=unmap",
    "discard=ignore",
    "discard=on",
    "discard=maybe",
    "pass-discard-request=off,pass-discard-snapshot=off,pass-discard-other=on",
    "file.locking=off",
    "file.locking=yes",
    "colour=red",
)


@pytest.mark.pinned("lazy refcounts, which only matter to a writer here", "compat=0.10")
@pytest.mark.peer("qemu-io", "qemu-img")
@pytest.mark.parametrize("options", MATRIX)
def test_qemu_accepts_and_refuses_the_same(disk: Path, options: str) -> None:
    run_peer("qemu-img", "check", disk)
    text = described(disk, options)
    theirs = subprocess.run(
        [peer("qemu-io"), "-c", "quit", "--image-opts", text], capture_output=True, check=False
    )
    ours = qcow("map", "--image-opts", text, code=None)
    assert (ours.code == 0) == (theirs.returncode == 0), (ours.err, theirs.stderr)
