"""Images that say which disk they are: created, converted, described, amended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.header import FIELD_OFFSETS, Incompatible
from qcowkit.codecs.qcow2.identity import BackingIdentity
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.engine.vhd.metadata import load_vhd_metadata
from qcowkit.errors import CorruptMetadata, StorageError, UnsupportedFeature
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import close_layers, open_layers
from qcowkit.operations.identity import amend_identity
from qcowkit.storage.file import FileStorage
from qcowkit.testing.qcow2_builder import build_qcow2
from qcowkit.testing.vhd_builder import DIFFERENCING, PARENT_ID, VhdBuilder
from qcowkit.units import MiB
from tests.command import qcow
from tests.peers import run_peer

OWN = UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")
GATE = ReferenceGate.below_image()


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(path: str) -> Qcow2Metadata:
    with FileStorage.open(path) as storage:
        return load_qcow2_metadata(storage)


def create(path: str, *arguments: object, guid: object = "auto", size: object = "1M") -> UUID:
    """A new image; its GUID."""
    options = ["-f", "qcow2", "-o", f"guid={guid}"]
    qcow("create", "-q", *options, *arguments, path, *([] if size is None else [size]))
    found = load(path).guid
    assert found is not None
    return found


def overlay(base: str = "base.qcow2", format: str = "qcow2") -> UUID:
    return create("top.qcow2", "-b", base, "-F", format, size=None)


def amend(path: str, guid: UUID | None, **options: Any) -> Qcow2Metadata:
    layers = open_layers(path, gate=GATE, budget=TRUSTED, writable=True, follow_backing=False)
    try:
        return amend_identity(layers[0], guid, gate=GATE, **options)
    finally:
        close_layers(layers)


@pytest.mark.pinned("compares two files, whose data files differ by name", "data_file")
def test_an_image_has_no_identity_unless_it_is_asked_for() -> None:
    qcow("create", "-q", "-f", "qcow2", "plain.qcow2", "1M")
    qcow("create", "-q", "-f", "qcow2", "-o", "guid=none", "none.qcow2", "1M")
    assert load("plain.qcow2").extensions.identity is None
    assert Path("plain.qcow2").read_bytes() == Path("none.qcow2").read_bytes()


def test_a_given_guid_is_kept_and_shown() -> None:
    done = qcow("create", "-f", "qcow2", "-o", f"guid={OWN}", "disk.qcow2", "1M")
    assert f" guid={OWN}" in done.out.decode()
    assert load("disk.qcow2").guid == OWN


def test_every_image_gets_a_random_guid_of_its_own() -> None:
    assert create("one.qcow2") != create("other.qcow2")


@pytest.mark.parametrize("format", ["vpc", "raw"])
def test_other_formats_take_no_guid(format: str) -> None:
    done = qcow("create", "-f", format, "-o", "guid=auto", "disk", "1M", code=1)
    assert f"-o guid: not an option of {format}" in done.err
    assert not Path("disk").exists()


def test_a_guid_that_is_none_is_refused_before_there_is_a_file() -> None:
    done = qcow("create", "-f", "qcow2", "-o", "guid=12", "disk.qcow2", "1M", code=1)
    assert "guid is '12', expected 32 hexadecimal digits" in done.err
    assert not Path("disk.qcow2").exists()


def test_an_overlay_records_which_disk_it_stands_on() -> None:
    base = create("base.qcow2")
    overlay()
    assert load("top.qcow2").backing_identity == BackingIdentity(guid=base, length=MiB)


def test_an_overlay_of_a_vhd_records_its_unique_id() -> None:
    qcow("create", "-q", "-f", "vpc", "base.vhd", "1M")
    overlay("base.vhd", "vpc")
    with FileStorage.open("base.vhd") as storage:
        metadata = load_vhd_metadata(storage, budget=TRUSTED)
    expected = BackingIdentity(guid=metadata.unique_id, length=metadata.virtual_size)
    assert load("top.qcow2").backing_identity == expected


def test_an_overlay_of_a_disk_that_says_nothing_records_nothing() -> None:
    qcow("create", "-q", "-f", "qcow2", "base.qcow2", "1M")
    overlay()
    assert load("top.qcow2").backing_identity is None


def test_a_base_that_was_not_opened_is_not_recorded() -> None:
    create("base.qcow2")
    create("top.qcow2", "-u", "-b", "base.qcow2", "-F", "qcow2")
    assert load("top.qcow2").backing_identity is None


def test_a_converted_image_records_its_base() -> None:
    base = create("base.qcow2")
    qcow("create", "-q", "-f", "raw", "disk.raw", "1M")
    flags = ["-B", "base.qcow2", "-F", "qcow2", "-o", f"guid={OWN}"]
    qcow("convert", "-f", "raw", "-O", "qcow2", *flags, "disk.raw", "top.qcow2")
    assert load("top.qcow2").guid == OWN
    assert load("top.qcow2").backing_identity == BackingIdentity(guid=base, length=MiB)


@pytest.mark.pinned("-n refuses images with a data file", "data_file")
def test_a_conversion_into_an_image_keeps_its_identity() -> None:
    create("base.qcow2")
    overlay()
    before = load("top.qcow2").extensions.identity
    qcow("create", "-q", "-f", "raw", "disk.raw", "1M")
    qcow("convert", "-n", "-f", "raw", "-O", "qcow2", "disk.raw", "top.qcow2")
    assert load("top.qcow2").extensions.identity == before


def test_a_delta_records_the_disk_that_it_is_put_over() -> None:
    base = create("base.qcow2")
    qcow("convert", "-O", "qcow2", "base.qcow2", "changed.qcow2")
    qcow("io", "-c", "write -P 7 0 64k", "changed.qcow2")
    flags = ["-q", "-O", "qcow2", "-o", "guid=auto"]
    qcow("diff", *flags, "base.qcow2", "changed.qcow2", "delta.qcow2")
    assert load("delta.qcow2").backing_identity == BackingIdentity(guid=base, length=MiB)


def test_a_rebased_image_records_its_new_base() -> None:
    create("base.qcow2")
    own, other = overlay(), create("other.qcow2")
    qcow("rebase", "-q", "-b", "other.qcow2", "-F", "qcow2", "top.qcow2")
    assert load("top.qcow2").guid == own
    assert load("top.qcow2").backing_identity == BackingIdentity(guid=other, length=MiB)
    create("other.qcow2")
    qcow("rebase", "-q", "-u", "-b", "other.qcow2", "-F", "qcow2", "top.qcow2")
    assert (load("top.qcow2").guid, load("top.qcow2").backing_identity) == (own, None)
    qcow("io", "-c", "write 0 64k", "top.qcow2")


@pytest.mark.pinned("looks at lines of the text by a word", "data_file")
def test_info_shows_both_guids() -> None:
    base, own = create("base.qcow2"), overlay()
    data = qcow("info", "--output=json", "top.qcow2").json()["format-specific"]["data"]
    assert (data["guid"], data["backing-guid"]) == (str(own), str(base))
    lines = qcow("info", "top.qcow2").out.decode().splitlines()
    assert [line.split()[-1] for line in lines if "guid" in line] == [str(own), str(base)]


def test_info_shows_the_unique_ids_of_vhds() -> None:
    child = VhdBuilder(size=8192, disk_type=DIFFERENCING)
    child.locator(b"W2ru", ".\\parent.vhd".encode("utf-16-le"))
    Path("child.vhd").write_bytes(child.build())
    with FileStorage.open("child.vhd") as storage:
        own = load_vhd_metadata(storage, budget=TRUSTED).unique_id
    found = qcow("info", "--output=json", "child.vhd").json()["format-specific"]
    assert found == {"type": "vpc", "data": {"guid": str(own), "backing-guid": str(PARENT_ID)}}
    lines = qcow("info", "child.vhd").out.decode().splitlines()
    assert [line.split()[-1] for line in lines if "guid" in line] == [str(own), str(PARENT_ID)]


def test_info_of_an_image_without_them_has_no_such_words() -> None:
    qcow("create", "-q", "-f", "qcow2", "disk.qcow2", "1M")
    assert b"guid" not in qcow("info", "disk.qcow2").out
    assert b"guid" not in qcow("info", "--output=json", "disk.qcow2").out


def test_info_of_a_chain_warns_of_another_disk() -> None:
    base = create("base.qcow2")
    overlay()
    other = create("base.qcow2")
    done = qcow("info", "--backing-chain", "top.qcow2")
    assert done.err == (
        f"warning: backing file 'base.qcow2': the GUID is {other}, expected {base} as recorded\n"
    )


@pytest.mark.pinned("takes snapshots", "data_file", "refcount_bits=1")
def test_what_rewrites_metadata_keeps_the_identity() -> None:
    create("base.qcow2")
    overlay()
    before = load("top.qcow2").extensions.identity
    qcow("io", "-c", "write -P 7 0 64k", "top.qcow2")
    for arguments in (["-c", "one"], ["-a", "one"], ["-d", "one"]):
        qcow("snapshot", "-q", *arguments, "top.qcow2")
    qcow("resize", "-q", "top.qcow2", "4M")
    qcow("check", "-q", "-r", "all", "top.qcow2")
    qcow("compact", "-q", "top.qcow2")
    assert load("top.qcow2").extensions.identity == before


def test_amending_records_the_backing_file_that_is_there() -> None:
    create("base.qcow2")
    overlay()
    other = create("base.qcow2", size="2M")
    after = amend("top.qcow2", OWN)
    assert after.guid == OWN
    assert after.backing_identity == BackingIdentity(guid=other, length=2 * MiB)
    qcow("io", "-c", "write 0 64k", "top.qcow2")


def test_amending_takes_the_identity_away() -> None:
    create("base.qcow2")
    overlay()
    Path("base.qcow2").unlink()
    assert amend("top.qcow2", None).extensions.identity is None


def test_amending_needs_the_backing_file_that_it_is_to_record() -> None:
    create("base.qcow2")
    overlay()
    before = Path("top.qcow2").read_bytes()
    Path("base.qcow2").unlink()
    with pytest.raises(StorageError, match="'base.qcow2': open: No such file"):
        amend("top.qcow2", OWN)
    assert Path("top.qcow2").read_bytes() == before


def test_only_qcow2_images_are_amended() -> None:
    qcow("create", "-q", "-f", "vpc", "disk.vhd", "1M")
    with pytest.raises(UnsupportedFeature, match="vpc images have no place"):
        amend("disk.vhd", OWN)


@pytest.mark.pinned("sets a bit that version 2 does not have", "compat=0.10")
def test_a_corrupt_image_is_not_amended() -> None:
    raw = bytearray(build_qcow2().to_bytes())
    raw[FIELD_OFFSETS["incompatible_features"] + 7] |= Incompatible.CORRUPT
    Path("disk.qcow2").write_bytes(raw)
    with pytest.raises(CorruptMetadata, match="the corrupt bit is set"):
        amend("disk.qcow2", OWN)


def test_the_command_amends_and_says_so() -> None:
    create("base.qcow2")
    overlay()
    other = create("base.qcow2")
    assert "nothing is written above another disk" in (
        qcow("io", "-c", "write 0 64k", "top.qcow2", code=1).err
    )
    done = qcow("amend", "-o", f"guid={OWN}", "top.qcow2")
    assert done.out.decode() == f"top.qcow2: guid={OWN}\n"
    assert load("top.qcow2").guid == OWN
    backing = load("top.qcow2").backing_identity
    assert backing is not None
    assert backing.guid == other
    qcow("io", "-c", "write 0 64k", "top.qcow2")
    assert qcow("amend", "-o", "guid=none", "top.qcow2").out == b"top.qcow2: guid=none\n"
    assert load("top.qcow2").extensions.identity is None


@pytest.mark.pinned("version 2 has no other options", "compat=0.10")
def test_an_identity_is_amended_together_with_other_options() -> None:
    create("disk.qcow2")
    qcow("io", "-c", "write -P 7 0 64k", "disk.qcow2")
    qcow("amend", "-o", f"guid={OWN},refcount_bits=8,compression_type=zstd", "disk.qcow2")
    after = load("disk.qcow2")
    assert (after.guid, after.geometry.refcount_bits, after.compression_type) == (OWN, 8, "zstd")
    qcow("io", "-c", "read -P 7 0 64k", "disk.qcow2")
    qcow("check", "disk.qcow2")


def test_other_amendments_keep_the_identity() -> None:
    create("base.qcow2")
    overlay()
    before = load("top.qcow2").extensions.identity
    qcow("amend", "-q", "-o", "extended_l2=on,cluster_size=128k,compat=1.1", "top.qcow2")
    qcow("amend", "-q", "-o", "extended_l2=off", "top.qcow2")
    assert load("top.qcow2").extensions.identity == before


def test_a_guid_that_is_none_changes_nothing() -> None:
    create("disk.qcow2")
    before = Path("disk.qcow2").read_bytes()
    done = qcow("amend", "-o", "guid=x,refcount_bits=8", "disk.qcow2", code=1)
    assert "guid is 'x', expected" in done.err
    assert Path("disk.qcow2").read_bytes() == before


def test_a_committed_overlay_keeps_its_identity() -> None:
    create("base.qcow2")
    overlay()
    before = load("top.qcow2").extensions.identity, load("base.qcow2").guid
    qcow("io", "-c", "write -P 7 0 64k", "top.qcow2")
    qcow("commit", "-q", "top.qcow2")
    assert (load("top.qcow2").extensions.identity, load("base.qcow2").guid) == before


def test_nothing_is_committed_into_another_disk() -> None:
    create("base.qcow2")
    overlay()
    qcow("io", "-c", "write -P 7 0 64k", "top.qcow2")
    create("base.qcow2")
    before = Path("base.qcow2").read_bytes()
    for flags in ([], ["-d"]):
        done = qcow("commit", *flags, "top.qcow2", code=1)
        assert "nothing is written above another disk" in done.err
    assert Path("base.qcow2").read_bytes() == before


@pytest.mark.pinned("takes snapshots, amends", "data_file", "compat=0.10", "refcount_bits=1")
@pytest.mark.peer("qemu-img", "qemu-io")
def test_qemu_uses_the_image_and_keeps_the_identity() -> None:
    create("base.qcow2")
    overlay()
    before = load("top.qcow2").extensions.identity
    assert before is not None
    run_peer("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", "top.qcow2")
    run_peer("qemu-img", "amend", "-o", "lazy_refcounts=on", "top.qcow2")
    run_peer("qemu-img", "snapshot", "-c", "one", "top.qcow2")
    run_peer("qemu-img", "resize", "top.qcow2", "4M")
    run_peer("qemu-img", "check", "-r", "all", "top.qcow2")
    assert load("top.qcow2").extensions.identity == before
    info = json.loads(run_peer("qemu-img", "info", "--output=json", "top.qcow2"))
    assert info["backing-filename"] == "base.qcow2"


@pytest.mark.peer("qemu-img")
def test_what_qemu_rebased_has_lost_its_recorded_backing_only() -> None:
    create("base.qcow2")
    own = overlay()
    create("other.qcow2")
    run_peer("qemu-img", "rebase", "-u", "-b", "other.qcow2", "-F", "qcow2", "top.qcow2")
    after = load("top.qcow2")
    assert (after.guid, after.backing_identity) == (own, None)
    assert qcow("info", "--backing-chain", "top.qcow2").err == ""
    run_peer("qemu-img", "rebase", "-u", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    assert load("top.qcow2").backing_identity is not None
