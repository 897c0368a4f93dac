"""What `info` says: against the recorded words of qemu, and what is ours alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.header import Incompatible
from qcowkit.errors import QcowkitError
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import Layer, close_layers, open_layers
from qcowkit.image.metadata import load_metadata
from qcowkit.operations.info import Info, describe_image, describe_images, render_info
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import (
    BitmapSpec,
    BuiltImage,
    SnapshotSpec,
    build_qcow2,
    make_luks_area,
)
from tests.corpus import Entry, bad_images, corpus_root, entry_id, sound_images, unpack
from tests.peers import run_peer

needs_corpus = pytest.mark.skipif(corpus_root() is None, reason="there is no corpus")
RECORDED = [entry for entry in sound_images() if "info" in entry]
REFUSED = [entry for entry in bad_images(expect="refuse") if entry["at"] == "open"]


def describe(data: BuiltImage | bytes, *, format: str = "qcow2", path: str = "d/x.qcow2") -> Info:
    raw = data.to_bytes() if isinstance(data, BuiltImage) else data
    storage = MemoryStorage(raw)
    metadata = load_metadata(storage, format, budget=TRUSTED)
    return describe_image(Layer(storage=storage, metadata=metadata, path=Path(path)))


def describe_path(path: Path, *, format: str | None = None, chain: bool = False) -> list[Info]:
    layers = open_layers(
        path,
        format=format,
        gate=ReferenceGate.below_image(),
        budget=TRUSTED,
        follow_backing=chain,
        follow_data=False,
    )
    try:
        return describe_images(layers)
    finally:
        close_layers(layers)


def assert_contains(found: Any, recorded: Any, place: str = "info") -> None:
    """Whatever was recorded is there; later versions add keys."""
    if isinstance(recorded, dict):
        assert set(recorded) <= set(found), place
        for key, value in recorded.items():
            assert_contains(found[key], value, f"{place}.{key}")
    elif isinstance(recorded, list):
        assert len(found) == len(recorded), place
        for index, value in enumerate(recorded):
            assert_contains(found[index], value, f"{place}[{index}]")
    else:
        assert found == recorded, place


@needs_corpus
@pytest.mark.parametrize("entry", RECORDED, ids=entry_id)
def test_info_says_what_qemu_said(entry: Entry, tmp_path: Path) -> None:
    path = unpack(entry, tmp_path)
    (info,) = describe_path(path, format=entry["format"])
    assert_contains(info, entry["info"])
    assert info["filename"] == str(path)
    json.dumps(info)
    assert render_info(info)


@needs_corpus
@pytest.mark.parametrize("entry", REFUSED, ids=entry_id)
def test_info_refuses_a_malformed_image(entry: Entry, tmp_path: Path) -> None:
    path = unpack(entry, tmp_path)
    before = path.read_bytes()
    with pytest.raises(QcowkitError):
        describe_path(path, format=entry["format"])
    assert path.read_bytes() == before


@pytest.mark.peer("qemu-img")
def test_info_agrees_with_qemu_on_an_image_with_everything(tmp_path: Path) -> None:
    path = tmp_path / "full.qcow2"
    image = build_qcow2(
        clusters={0: b"one", 9: b"two"},
        backing_name="base.raw",
        backing_format="raw",
        lazy_refcounts=True,
        refcount_order=3,
        compression_type=1,
        snapshots=[SnapshotSpec(id="1", name="s", vm_clock_nsec=61_000_000_007, icount=3)],
        bitmaps=[BitmapSpec(name="b"), BitmapSpec(name="off", flags=0, granularity_bits=12)],
    )
    path.write_bytes(image.to_bytes())
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    recorded = json.loads(run_peer("qemu-img", "info", "-U", "--output=json", path))
    (info,) = describe_path(path)
    assert_contains(info, {key: value for key, value in recorded.items() if key != "actual-size"})


def test_a_chain_is_described_top_first(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    base.write_bytes(build_qcow2().to_bytes())
    top.write_bytes(build_qcow2(backing_name="base.qcow2", backing_format="qcow2").to_bytes())
    first, second = describe_path(top, chain=True)
    assert (first["filename"], second["filename"]) == (str(top), str(base))
    assert first["full-backing-filename"] == str(base)


@pytest.mark.parametrize(
    ("path", "name", "full"),
    [
        ("x.qcow2", "base", "base"),
        ("d/x.qcow2", "base", "d/base"),
        ("/a/x.qcow2", "../base", "/a/../base"),
        ("d/x.qcow2", "/etc/passwd", "/etc/passwd"),
        ("d/x.qcow2", "nbd:host", "d/nbd:host"),
    ],
)
def test_a_backing_name_is_joined_by_its_letters_alone(path: str, name: str, full: str) -> None:
    info = describe(build_qcow2(backing_name=name), path=path)
    assert info["backing-filename"] == name
    assert info["full-backing-filename"] == full
    assert "backing-filename-format" not in info


def test_the_file_itself_is_a_child() -> None:
    info = describe(bytes(1000), format="raw", path="x.raw")
    assert info["virtual-size"] == 1024
    assert info["children"] == [
        {
            "name": "file",
            "info": {
                "filename": "x.raw",
                "format": "file",
                "virtual-size": 1024,
                "actual-size": 1000,
                "dirty-flag": False,
                "format-specific": {"type": "file", "data": {}},
                "children": [],
            },
        }
    ]


def test_luks_is_described_without_a_key() -> None:
    luks = make_luks_area(mode="cbc-essiv:sha256", key_bytes=32, active=(0, 3))
    encrypt = describe(build_qcow2(luks=luks))["format-specific"]["data"]["encrypt"]
    slots = encrypt.pop("slots")
    assert encrypt == {
        "format": "luks",
        "cipher-alg": "aes-256",
        "cipher-mode": "cbc",
        "ivgen-alg": "essiv",
        "ivgen-hash-alg": "sha256",
        "hash-alg": "sha256",
        "uuid": "01234567-89ab-cdef-0123-456789abcdef",
        "payload-offset": 1052672,
        "master-key-iters": 1000,
        "detached-header": False,
    }
    assert slots[0] == {"active": True, "key-offset": 4096, "iters": 1000, "stripes": 4000}
    assert slots[1] == {"active": False, "key-offset": 135168}
    assert [slot["active"] for slot in slots] == [True, False, False, True] + [False] * 4


@pytest.mark.pinned("the options are what is shown")
def test_the_text_shows_everything_in_columns() -> None:
    image = build_qcow2(
        backing_name="base.raw",
        backing_format="raw",
        lazy_refcounts=True,
        snapshots=[
            SnapshotSpec(id="1", name="before", date_sec=1_700_000_000),
            SnapshotSpec(id="2", name="a", vm_state_size=5 << 20, vm_clock_nsec=3_661_500_000_000),
        ],
        bitmaps=[
            BitmapSpec(name="daily"),
            BitmapSpec(name="w", flags=0),
            BitmapSpec(name="x", flags=1),
        ],
    )
    bits = Incompatible.DIRTY | Incompatible.CORRUPT
    text = render_info(describe(image.set_field("incompatible_features", bits)))
    assert (
        text
        == """\
image         d/x.qcow2
format        qcow2, compat 1.1
virtual size  1 MiB (1048576 bytes)
disk usage    44 KiB
cluster size  4 KiB
backing file  base.raw (raw, found as d/base.raw)
features      zlib compression, 16-bit refcounts, lazy refcounts
dirty         refcounts may be out of date: check before writing
corrupt       marked as corrupt: only reading and repair are allowed

snapshots
  ID  NAME    DATE (UTC)           VM STATE  VM CLOCK
  1   before  2023-11-14 22:13:20  -         -
  2   a       1970-01-01 00:00:00  5 MiB     1:01:01.500

bitmaps
  NAME   GRANULARITY  STATE
  daily  64 KiB       recording
  w      64 KiB       disabled
  x      64 KiB       in use or not closed properly: not to be trusted"""
    )


def test_the_text_of_a_raw_disk_is_short() -> None:
    text = render_info(describe(bytes(512), format="raw", path="x.raw"))
    assert (
        text
        == """\
image         x.raw
format        raw
virtual size  512 B (512 bytes)
disk usage    512 B"""
    )


@pytest.mark.pinned(
    "the options are what is shown", "refcount_bits=1", "refcount_bits=64", "compression_type=zstd"
)
@pytest.mark.parametrize(
    ("image", "line"),
    [
        (
            build_qcow2(luks=make_luks_area()),
            "encryption    luks, aes-256 xts plain64, hash sha256, 1 of 8 key slots in use",
        ),
        (build_qcow2(crypt_method=1), "encryption    aes (legacy, not secure)"),
        (
            build_qcow2(data_file_name="x.data", data_file_raw=True),
            "data file     x.data (a raw image by itself)",
        ),
        (
            build_qcow2(extended_l2=True, cluster_bits=16),
            "features      zlib compression, 16-bit refcounts, extended L2 entries "
            "(subclusters of 2 KiB)",
        ),
        (build_qcow2(backing_name="b"), "backing file  b (format not declared, found as d/b)"),
        (build_qcow2(version=2), "format        qcow2, compat 0.10"),
    ],
)
def test_the_text_names_what_is_special(image: BuiltImage, line: str) -> None:
    assert line in render_info(describe(image)).splitlines()


def test_the_text_never_sends_control_characters_to_a_terminal() -> None:
    image = build_qcow2(
        snapshots=[SnapshotSpec(id="1", name="\x1b[2J\u202e")], backing_name="\udcff"
    )
    text = render_info(describe(image))
    assert "\\x1b[2J\\u202e" in text
    assert "\\udcff" in text
    assert text.replace("\n", "").isprintable()


def test_info_needs_no_numpy() -> None:
    code = "import qcowkit.operations.info, sys; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
