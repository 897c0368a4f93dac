"""Verdicts on files of strangers: each reason by a file that has it, and the price of a verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qcowkit.budget import UNTRUSTED
from qcowkit.codecs.qcow2.header import CryptMethod, Incompatible
from qcowkit.codecs.qcow2.snapshots import encode_snapshots
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.errors import StorageError
from qcowkit.operations.inspect import (
    Verdict,
    VerdictKind,
    as_json,
    as_text,
    inspect_file,
    inspect_storage,
)
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.qcow2_builder import (
    Compressed,
    ImageSpec,
    SnapshotSpec,
    Verbatim,
    build_qcow2,
)
from qcowkit.testing.recording import RecordingStorage
from qcowkit.testing.vhd_builder import DIFFERENCING, FIXED, VhdBuilder
from qcowkit.units import MiB, TiB


def judge(content: bytes | bytearray) -> Verdict:
    return inspect_storage(MemoryStorage(content, name="upload"))


def codes(content: bytes | bytearray) -> list[str]:
    return [reason.code for reason in judge(content).reasons]


def spec(**changes: object) -> bytes:
    return build_qcow2(ImageSpec(), **changes).to_bytes()


def test_a_sound_image_is_safe() -> None:
    verdict = judge(spec(clusters={0: b"x", 5: b"y"}, snapshots=[SnapshotSpec(id="1", name="a")]))
    assert (verdict.kind, verdict.verdict) == (VerdictKind.SAFE, "safe")
    assert (verdict.format, verdict.virtual_size, verdict.reasons) == ("qcow2", MiB, ())
    assert verdict.facts["snapshots"] == 1


@pytest.mark.parametrize(
    "image",
    [VhdBuilder(size=8192).block(1, b"x").build(), VhdBuilder(size=512, disk_type=FIXED).build()],
)
def test_a_sound_vhd_is_safe(image: bytearray) -> None:
    verdict = judge(image)
    assert (verdict.kind, verdict.format) == (VerdictKind.SAFE, "vpc")


@pytest.mark.parametrize("content", [b"", b"hello", bytes(4096), b"MZ" + bytes(5000)])
def test_a_file_without_any_magic_is_not_an_image(content: bytes) -> None:
    verdict = judge(content)
    assert (verdict.kind, verdict.format) == (VerdictKind.NOT_AN_IMAGE, None)


def test_a_backing_file_makes_unsafe() -> None:
    verdict = judge(spec(backing_name="/etc/passwd", backing_format="raw"))
    assert verdict.kind is VerdictKind.UNSAFE
    (reason,) = verdict.reasons
    assert (reason.code, reason.text) == (
        "backing-file",
        "the image names the backing file '/etc/passwd'",
    )


def test_a_data_file_makes_unsafe() -> None:
    assert codes(spec(data_file_name="/etc/shadow")) == ["data-file"]


@pytest.mark.pinned("writes the feature bits", "compression_type=zstd")
def test_a_data_file_that_is_named_and_not_used_makes_unsafe_too() -> None:
    image = build_qcow2(ImageSpec(data_file_name="/etc/shadow"))
    image.set_field("incompatible_features", 0)
    assert codes(image.to_bytes()) == ["data-file"]


def test_a_vhd_parent_makes_unsafe() -> None:
    child = VhdBuilder(size=8192, disk_type=DIFFERENCING)
    assert codes(child.build()) == ["parent"]


@pytest.mark.pinned("writes the feature bits", "compat=0.10", "compression_type=zstd")
@pytest.mark.parametrize(
    ("bit", "code"), [(Incompatible.DIRTY, "dirty"), (Incompatible.CORRUPT, "corrupt")]
)
def test_the_dirty_and_the_corrupt_bit_make_unsafe(bit: Incompatible, code: str) -> None:
    image = build_qcow2().set_field("incompatible_features", int(bit))
    assert codes(image.to_bytes()) == [code]


@pytest.mark.pinned("feature bits", "compat=0.10")
def test_an_unknown_feature_makes_unsafe() -> None:
    image = build_qcow2().set_field("incompatible_features", 1 << 40)
    assert codes(image.to_bytes()) == ["unknown-feature"]


def test_encryption_is_a_fact_and_no_reason() -> None:
    verdict = judge(spec(crypt_method=CryptMethod.AES))
    assert (verdict.kind, verdict.facts["encrypted"]) == (VerdictKind.SAFE, "aes")


def test_broken_metadata_makes_unsafe_in_the_words_of_the_loader() -> None:
    image = build_qcow2().set_field("cluster_bits", 3)
    (reason,) = judge(image.to_bytes()).reasons
    assert reason.code == "bad-metadata"
    assert reason.text.startswith("header field cluster_bits at host offset 0x14: 3, expected")


@pytest.mark.parametrize("size", [4, 8, 71, 100])
def test_a_stump_of_an_image_makes_unsafe(size: int) -> None:
    assert codes(spec()[:size]) == ["bad-metadata"]


def test_a_disk_above_the_budget_makes_unsafe() -> None:
    image = MemoryStorage(spec(size=2 * TiB, cluster_bits=16))
    budget = replace(UNTRUSTED, virtual_size=TiB)
    (reason,) = inspect_storage(image, budget=budget).reasons
    assert reason.code == "oversize"


@pytest.mark.parametrize(
    ("head", "name"),
    [(b"KDMV", "VMDK"), (b"vhdxfile", "VHDX"), (b"QFI\xfb\0\0\0\1", "qcow (version 1)")],
)
def test_an_image_of_another_format_is_unsafe_and_named(head: bytes, name: str) -> None:
    verdict = judge(head.ljust(4096, b"\0"))
    assert verdict.kind is VerdictKind.UNSAFE
    assert verdict.format == name
    assert [reason.code for reason in verdict.reasons] == ["foreign-format"]


def test_two_formats_in_one_file_make_unsafe() -> None:
    footer = VhdBuilder(size=512, disk_type=FIXED).encode_footer()
    verdict = judge(spec() + footer)
    assert "polyglot" in [reason.code for reason in verdict.reasons]
    assert verdict.reasons[0].text == "the content is qcow2 and vpc at once, expected one format"


@pytest.mark.pinned("clusters of 4 KiB", "extended_l2")
def test_an_l2_table_that_is_named_twice_makes_unsafe() -> None:
    image = build_qcow2(ImageSpec(size=8 * MiB, clusters={0: b"x"}))
    image.patch(image.places["l1"] + 8, image.places["l2"])
    (reason,) = judge(image.to_bytes()).reasons
    assert reason.code == "fan-in"
    assert reason.text == (f"2 L1 entries name the L2 table at host offset {image.places['l2']:#x}")


@pytest.mark.parametrize("extended", [False, True])
def test_one_cluster_that_fills_a_disk_makes_unsafe(extended: bool) -> None:
    bomb = Verbatim(word=0x4000 * 4, bitmap=0xFFFF_FFFF)
    clusters = {0: b"x", **dict.fromkeys(range(1, 18), bomb)}
    bits = 14 if extended else 12
    content = spec(clusters=clusters, extended_l2=extended, cluster_bits=bits)
    (reason,) = judge(content).reasons
    assert (reason.code, reason.text) == (
        "fan-in",
        "17 L2 entries name one plain cluster (0x10000)",
    )


def test_one_compressed_cluster_that_fills_a_disk_makes_unsafe() -> None:
    word = 1 << 62 | 0x4000
    clusters = {0: Compressed(payload=b"x"), **{i: Verbatim(word=word) for i in range(1, 100)}}
    (reason,) = judge(spec(clusters=clusters)).reasons
    assert reason.text == "99 L2 entries name one compressed cluster (0x4000)"


def test_snapshots_that_share_one_table_make_unsafe() -> None:
    spec = ImageSpec(snapshots=[SnapshotSpec(id="1"), SnapshotSpec(id="2")])
    image = build_qcow2(spec)
    first, second = load_qcow2_metadata(MemoryStorage(image.data)).snapshots
    table = encode_snapshots([first, replace(second, l1_offset=first.l1_offset)])
    image.patch(image.places["snapshots"], table)
    (reason,) = judge(image.to_bytes()).reasons
    assert (reason.code, reason.text) == (
        "fan-in",
        f"2 snapshots share the L1 table at host offset {first.l1_offset:#x}",
    )


def test_a_vhd_block_that_is_named_twice_makes_unsafe() -> None:
    builder = VhdBuilder(size=8192).block(0, b"x").block(1, b"y")
    image = builder.build()
    image[builder.table_offset + 4 : builder.table_offset + 8] = image[
        builder.table_offset : builder.table_offset + 4
    ]
    (reason,) = judge(image).reasons
    assert reason.code == "fan-in"
    assert reason.text.startswith("2 entries of the block allocation table name the sector")


@pytest.mark.pinned("writes the feature bits", "compat=0.10", "compression_type=zstd")
def test_several_reasons_are_all_given() -> None:
    image = build_qcow2(ImageSpec(backing_name="a", backing_format="raw"))
    image.set_field("incompatible_features", int(Incompatible.DIRTY))
    assert codes(image.to_bytes()) == ["backing-file", "dirty"]


def test_the_json_form_can_be_written_and_holds_everything() -> None:
    verdict = judge(spec(backing_name="b\u00e4se", backing_format="raw"))
    told = json.loads(json.dumps(as_json(verdict)))
    assert told["filename"] == "upload"
    assert told["verdict"] == "unsafe"
    assert told["format"] == "qcow2"
    assert told["virtual-size"] == MiB
    assert [reason["code"] for reason in told["reasons"]] == ["backing-file"]
    assert told["facts"]["backing-file"] == "b\u00e4se"


def test_the_text_form_escapes_what_comes_from_the_image() -> None:
    verdict = judge(spec(backing_name="b\u202ese", backing_format="raw"))
    lines = as_text(verdict).splitlines()
    assert lines[0] == "upload: unsafe (qcow2, 1 MiB virtual)"
    assert lines[1] == "  backing-file: the image names the backing file 'b\\u202ese'"
    assert all(line.isprintable() for line in lines)


def test_a_failing_disk_is_an_error_and_no_verdict() -> None:
    image = spec(clusters={0: b"x"})
    calls = RecordingStorage(MemoryStorage(image))
    inspect_storage(calls)
    for call in range(1, len(calls.of("pread")) + 1):
        faulty = FaultyStorage(MemoryStorage(image), Fault(operation="pread", call=call))
        with pytest.raises(StorageError):
            inspect_storage(faulty)


def test_nothing_is_written_and_little_is_read() -> None:
    calls = RecordingStorage(MemoryStorage(spec(clusters={0: b"x"}, size=64 * MiB)))
    inspect_storage(calls)
    assert {call.operation for call in calls.calls} == {"pread"}
    assert sum(call.length for call in calls.calls) < MiB


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="ENOENT"):
        inspect_file(tmp_path / "nothing")


def test_no_other_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "base").touch()
    path = tmp_path / "image"
    path.write_bytes(spec(backing_name=str(tmp_path / "base"), backing_format="raw"))
    script = """
import sys
from qcowkit.operations.inspect import inspect_file
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
verdict = inspect_file(sys.argv[1])
print(verdict.verdict, opened == [sys.argv[1]], "numpy" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, path],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.stdout == "unsafe True False\n"
