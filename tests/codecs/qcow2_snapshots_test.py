"""Entries of the snapshot table, one at a time."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.codecs.qcow2.snapshots import (
    SnapshotEntry,
    check_snapshot,
    decode_snapshot,
    encode_snapshots,
)
from qcowkit.errors import CorruptMetadata, RequestError

U32 = st.integers(0, 2**32 - 1)
U63 = st.integers(0, 2**63 - 1)
ENTRIES = st.builds(
    SnapshotEntry,
    id=st.text(max_size=10),
    name=st.text(max_size=30),
    l1_offset=st.integers(0, 2**64 - 1),
    l1_entries=U32,
    date_sec=U32,
    date_nsec=U32,
    vm_clock_nsec=U63,
    vm_state_size=U63,
    disk_size=U63,
    icount=st.none() | U63,
    unknown_extra=st.binary(max_size=60),
)
ONE = SnapshotEntry(id="1", name="n", l1_offset=0x10000, l1_entries=4, disk_size=1 << 20)


def decode_all(raw: bytes, count: int, *, version: int = 3) -> list[SnapshotEntry]:
    entries, offset = [], 0
    for index in range(count):
        entry, offset = decode_snapshot(
            raw, offset=offset, index=index, host_offset=offset, version=version, image_size=777
        )
        entries.append(entry)
    assert offset == len(raw)
    return entries


@given(st.lists(ENTRIES, max_size=4))
def test_a_table_comes_back_as_it_was(entries: list[SnapshotEntry]) -> None:
    raw = encode_snapshots(entries)
    assert len(raw) % 8 == 0
    assert decode_all(raw, len(entries)) == entries


def test_a_large_vm_state_leaves_the_old_field_zero() -> None:
    raw = encode_snapshots([replace(ONE, vm_state_size=1 << 32)])
    assert struct.unpack_from(">I", raw, 32) == (0,)
    assert decode_all(raw, 1)[0].vm_state_size == 1 << 32


def test_a_small_vm_state_is_in_both_fields() -> None:
    raw = encode_snapshots([replace(ONE, vm_state_size=77)])
    assert struct.unpack_from(">I", raw, 32) == (77,)


def old_entry(extra: bytes) -> bytes:
    raw = struct.pack(">QIHHIIQII", 0x10000, 4, 1, 1, 0, 0, 0, 55, len(extra)) + extra + b"in"
    return raw.ljust(-(-len(raw) // 8) * 8, b"\0")


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        (b"", (55, 777, None)),
        (struct.pack(">Q", 66), (66, 777, None)),
        (struct.pack(">QQ", 66, 88), (66, 88, None)),
        (struct.pack(">QQQ", 66, 88, 99), (66, 88, 99)),
        (struct.pack(">QQQ", 66, 88, 2**64 - 1), (66, 88, None)),
    ],
)
def test_extra_data_counts_as_far_as_it_goes(
    extra: bytes, found: tuple[int, int, int | None]
) -> None:
    (entry,) = decode_all(old_entry(extra), 1, version=2)
    assert (entry.vm_state_size, entry.disk_size, entry.icount) == found
    assert (entry.id, entry.name) == ("i", "n")


def test_a_name_above_64_kib_is_not_written() -> None:
    with pytest.raises(RequestError) as caught:
        encode_snapshots([replace(ONE, name="n" * 65536)])
    assert str(caught.value) == "the id or name of snapshot '1' is above 65535 bytes"


def test_a_table_above_64_mib_is_not_written() -> None:
    with pytest.raises(RequestError, match="is above the 67108864 allowed"):
        encode_snapshots([replace(ONE, name="n" * 65535)] * 1025)


def test_a_sound_entry_passes() -> None:
    check_snapshot(ONE, index=0, geometry=Geometry(cluster_bits=16), host_offset=0)


def test_a_refusal_says_which_entry() -> None:
    with pytest.raises(CorruptMetadata) as caught:
        check_snapshot(
            replace(ONE, l1_offset=0x100),
            index=3,
            geometry=Geometry(cluster_bits=16),
            host_offset=0,
        )
    assert caught.value.index == 3


@given(st.binary(max_size=120), st.sampled_from([2, 3]))
def test_arbitrary_bytes_decode_or_are_refused_by_us(raw: bytes, version: int) -> None:
    try:
        entry, end = decode_snapshot(
            raw, offset=0, index=0, host_offset=0, version=version, image_size=0
        )
    except CorruptMetadata:
        return
    # The padding of the last entry may lie beyond the bytes.
    assert 40 <= end <= len(raw) + 7
    assert len(entry.name) <= len(raw)
