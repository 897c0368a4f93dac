"""The first cluster changed in place: what stays, what changes, and by which steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcowkit.codecs.qcow2.extensions import Extension, encode_first_cluster
from qcowkit.codecs.qcow2.header import Compatible
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.qcow2.first_cluster import (
    SKIP_TYPE,
    Part,
    Step,
    plan_first_cluster,
    rewrite_first_cluster,
)
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.errors import RequestError, StorageError
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.qcow2_builder import build_qcow2

pytestmark = pytest.mark.pinned("builds the first clusters that it is about")

UNKNOWN = (Extension(type=0x12345678, data=b"kept as it is"),)


def image(**spec: object) -> tuple[MemoryStorage, Qcow2Metadata]:
    storage = MemoryStorage(build_qcow2(**spec).to_bytes())
    return storage, load_qcow2_metadata(storage)


def rewrite(
    storage: MemoryStorage, metadata: Qcow2Metadata, **changes: object
) -> tuple[Qcow2Metadata, list[str]]:
    """The metadata afterwards, and the barriers on the way."""
    seen: list[str] = []
    barriers = Barriers(storage, observe=seen.append)
    after = rewrite_first_cluster(
        storage,
        metadata,
        barriers=barriers,
        **changes,  # type: ignore[arg-type]
    )
    return after, seen


def test_a_name_is_added_where_nothing_is_read() -> None:
    storage, metadata = image(cluster_bits=16)
    after, seen = rewrite(storage, metadata, backing_name=b"base.raw")
    assert after.backing_name == "base.raw"
    assert load_qcow2_metadata(storage) == after
    assert seen == [
        "rest of the first cluster before its switch",
        "switch of the first cluster",
    ]


def test_within_the_first_sector_one_write_does_it() -> None:
    storage, metadata = image(cluster_bits=12, backing_name="old", backing_format="raw")
    after, seen = rewrite(storage, metadata, backing_name=b"another")
    assert after.backing_name == "another"
    assert after.extensions == metadata.extensions
    assert seen == ["switch of the first cluster"]


def test_what_several_sectors_hold_is_changed_by_a_copy_and_a_detour() -> None:
    storage, metadata = image(cluster_bits=16, backing_name="old" * 300, backing_format="raw")
    extensions = replace(metadata.extensions, backing_format="qcow2")
    after, seen = rewrite(storage, metadata, extensions=extensions, backing_name=b"new" * 320)
    assert after.backing_name == "new" * 320
    assert after.extensions.backing_format == "qcow2"
    assert seen == [
        "copy of the first cluster before it is read",
        "detour to the copy of the first cluster",
        "rest of the first cluster before its switch",
        "switch of the first cluster",
    ]


def test_afterwards_the_cluster_is_what_a_new_image_would_have() -> None:
    storage, metadata = image(cluster_bits=16, backing_name="old" * 300, backing_format="raw")
    after, _ = rewrite(storage, metadata, backing_name=b"new")
    wanted = encode_first_cluster(metadata.header, metadata.extensions, "new")
    assert storage.pread(1 << 16, offset=0) == wanted
    assert after.header.backing_file_size == 3


def test_a_name_is_taken_away_and_nothing_of_it_stays() -> None:
    storage, metadata = image(cluster_bits=16, backing_name="secret.raw", backing_format="raw")
    extensions = replace(metadata.extensions, backing_format=None)
    after, _ = rewrite(storage, metadata, extensions=extensions, backing_name=None)
    assert after.backing_name is None
    assert after.header.backing_file_offset == 0
    assert b"secret" not in storage.pread(1 << 16, offset=0)


@pytest.mark.parametrize("version", [2, 3])
def test_unknown_extensions_and_header_bytes_stay(version: int) -> None:
    fields = b"later field." * 2 if version == 3 else b""
    storage, metadata = image(
        cluster_bits=12, version=version, unknown=UNKNOWN, unknown_fields=fields
    )
    after, _ = rewrite(storage, metadata, backing_name=b"name")
    assert after.extensions.unknown == UNKNOWN
    assert after.header.unknown == metadata.header.unknown
    assert after.backing_name == "name"


def test_a_name_that_is_no_text_stays_byte_for_byte() -> None:
    storage, metadata = image(cluster_bits=12)
    metadata, _ = rewrite(storage, metadata, backing_name=b"\xff\xfe")
    header = replace(metadata.header, compatible_features=int(Compatible.LAZY_REFCOUNTS))
    after, _ = rewrite(storage, metadata, header=header)
    assert after.lazy_refcounts
    begin = after.header.backing_file_offset
    assert storage.pread(after.header.backing_file_size, offset=begin) == b"\xff\xfe"


def test_fields_that_others_wrote_meanwhile_stay() -> None:
    storage, metadata = image(cluster_bits=12)
    built = build_qcow2(cluster_bits=12).patch(24, 512)
    storage.pwrite([built.to_bytes()[:512]], offset=0)
    after, _ = rewrite(storage, metadata, backing_name=b"name")
    assert after.header.size == 512


def test_nothing_is_written_where_nothing_changes() -> None:
    storage, metadata = image(cluster_bits=12, backing_name="base", backing_format="raw")
    metadata, _ = rewrite(storage, metadata, backing_name=b"base")
    before = storage.to_bytes()
    after, seen = rewrite(storage, metadata, backing_name=b"base")
    assert after == metadata
    assert seen == []
    assert storage.to_bytes() == before


def test_what_was_written_before_is_durable_before_the_header_names_it() -> None:
    storage, metadata = image(cluster_bits=12)
    seen: list[str] = []
    barriers = Barriers(storage, observe=seen.append)
    barriers.pending = True
    rewrite_first_cluster(storage, metadata, barriers=barriers, backing_name=b"x")
    assert seen == ["what the first cluster will name", "switch of the first cluster"]


def test_a_name_for_which_there_is_no_room_is_refused() -> None:
    storage, metadata = image(cluster_bits=9)
    before = storage.to_bytes()
    with pytest.raises(RequestError, match="the header needs 5[0-9]+ bytes"):
        rewrite(storage, metadata, backing_name=b"n" * 420)
    assert storage.to_bytes() == before


def test_a_change_without_room_for_its_copy_is_refused() -> None:
    storage, metadata = image(cluster_bits=10, backing_name="o" * 700)
    before = storage.to_bytes()
    with pytest.raises(RequestError) as caught:
        rewrite(storage, metadata, backing_name=b"n" * 700)
    assert str(caught.value).startswith("the first cluster has no room for a copy of its ")
    assert storage.to_bytes() == before


def test_a_detour_that_a_crash_left_is_dropped() -> None:
    storage, metadata = image(cluster_bits=16, backing_name="o" * 700, unknown=UNKNOWN)
    old = storage.pread(1 << 16, offset=0)
    new = encode_first_cluster(metadata.header, metadata.extensions, "n" * 700)
    for step in plan_first_cluster(old, new)[:2]:
        storage.pwrite([step.data], offset=step.offset)
    found = load_qcow2_metadata(storage)
    assert found.backing_name == "n" * 700
    assert SKIP_TYPE in {one.type for one in found.extensions.unknown}
    after, seen = rewrite(storage, found, backing_name=b"m" * 600)
    assert after.backing_name == "m" * 600
    assert after.extensions.unknown == UNKNOWN
    assert len(seen) == 2


def test_the_plan_names_each_step() -> None:
    storage, metadata = image(cluster_bits=16, backing_name="o" * 700)
    old = storage.pread(1 << 16, offset=0)
    new = encode_first_cluster(metadata.header, metadata.extensions, "n")
    steps = plan_first_cluster(old, new)
    assert [one.part for one in steps] == [
        Part.COPY,
        Part.DETOUR,
        Part.REST,
        Part.SWITCH,
        Part.CLEARING,
    ]
    content = bytearray(old)
    for step in steps:
        content[step.offset : step.offset + len(step.data)] = step.data
    assert content == new
    assert plan_first_cluster(new, new) == ()
    assert all(isinstance(one, Step) and one.data for one in steps)


@pytest.mark.parametrize(("call", "name"), [(2, "o" * 700), (4, "n" * 700)])
def test_a_switch_that_fails_leaves_what_was_read_before(call: int, name: str) -> None:
    storage, metadata = image(cluster_bits=16, backing_name="o" * 700)
    faulty = FaultyStorage(storage, Fault(operation="pwrite", call=call, written=40))
    with pytest.raises(StorageError):
        rewrite_first_cluster(faulty, metadata, barriers=Barriers(faulty), backing_name=b"n" * 700)
    assert load_qcow2_metadata(storage).backing_name == name
