"""The snapshot table, entry by entry."""

from __future__ import annotations

from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.codecs.qcow2.snapshots import (
    SnapshotEntry,
    check_snapshot,
    decode_snapshot,
    encode_snapshots,
)

_GEOMETRY = Geometry(cluster_bits=12)


def target(data: bytes) -> None:
    """data: the version (1 byte, odd for 3), then the table."""
    version = 3 if data[:1] and data[0] & 1 else 2
    raw, offset, entries = data[1:], 0, []
    for index in range(16):
        if offset >= len(raw):
            break
        before = offset
        entry, offset = decode_snapshot(
            raw, offset=offset, index=index, host_offset=0, version=version, image_size=1 << 20
        )
        assert offset > before, "an entry without a length"
        check_snapshot(entry, index=index, geometry=_GEOMETRY, host_offset=0)
        entries.append(entry)
    encode_snapshots(entries)


def seeds() -> list[bytes]:
    """Tables of one and of two entries."""
    entries = [
        SnapshotEntry(
            id=str(number),
            name="name",
            l1_offset=0x10000,
            l1_entries=2,
            date_sec=1,
            date_nsec=2,
            vm_clock_nsec=3,
            vm_state_size=4,
            disk_size=1 << 20,
            icount=5,
            unknown_extra=b"",
        )
        for number in (1, 2)
    ]
    return [
        version + encode_snapshots(entries[:count]) for version in (b"2", b"3") for count in (1, 2)
    ]
