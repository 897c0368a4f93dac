"""A snapshot table that keeps an image from being opened: found, and written anew elsewhere.

Repaired is what other tools repair as well (row 18 of docs/formats/qcow2.md): more than 65,536
snapshots, a table above 64 MiB, extra data above 1,024 bytes, or too few of them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from qcowkit.budget import TRUSTED, Budget
from qcowkit.codecs.qcow2.header import FIELD_OFFSETS, MAX_SNAPSHOTS, Header
from qcowkit.codecs.qcow2.snapshots import (
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_TABLE_BYTES,
    MIN_V3_EXTRA,
    SnapshotEntry,
    decode_snapshot,
    encode_snapshots,
)
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.engine.qcow2.repair_audit import Audit
from qcowkit.engine.qcow2.repair_counts import raise_counts
from qcowkit.engine.qcow2.repair_place import begin_of_room, check_room
from qcowkit.engine.qcow2.repair_rebuild import rebuild_refcounts
from qcowkit.engine.qcow2.repair_run import RepairRun
from qcowkit.engine.repairs import KEPT_CHANGES, ChangeKind
from qcowkit.errors import CorruptMetadata, OperationError
from qcowkit.storage.overlay import OverlayStorage
from qcowkit.storage.protocol import Storage
from qcowkit.units import align_up, ceil_div

# nb_snapshots and snapshots_offset stand side by side: one write switches both.
_PLACE = struct.Struct(">IQ")
_FIXED = 40
_EXTRA_SIZE = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotDamage:
    """reasons: what is wrong, the first of it. dropped: snapshots that no image can have.

    table, count: the entries that stay, as they will be written. old_bytes: of the table that is
    there, as far as it was read."""

    reasons: tuple[str, ...]
    dropped: int
    table: bytes
    count: int
    old_bytes: int


def load_for_repair(
    storage: Storage, *, budget: Budget = TRUSTED
) -> tuple[Qcow2Metadata, SnapshotDamage | None]:
    """The metadata as a check loads them; a snapshot table that a repair can mend is let through.

    With a damage the metadata describe the file as it is, but only the snapshots that stay. Raises
    what `load_qcow2_metadata` raises."""
    try:
        return load_qcow2_metadata(storage, budget=budget, for_check=True), None
    except CorruptMetadata:
        damage = _find_damage(storage, budget)
        if damage is None:
            raise
    place = align_up(storage.size(), 1 << _header_of(storage).cluster_bits)
    metadata = _load_switched(storage, damage, place=place, budget=budget)
    header = replace(metadata.header, snapshots_offset=_table_of(storage)[1])
    return replace(metadata, header=header, snapshot_table_bytes=damage.old_bytes), damage


def rewrite_snapshots(
    run: RepairRun, metadata: Qcow2Metadata, damage: SnapshotDamage, audit: Audit
) -> Qcow2Metadata:
    """Write the table anew, count its clusters, and switch to it. Returns the new metadata.

    Raises OperationError, with nothing changed, where it has no place."""
    size, file_size = metadata.cluster_size, run.storage.size()
    clusters = ceil_div(len(damage.table), size)
    first = begin_of_room(run, audit)
    check_room(run, audit, first=first, count=clusters)
    switched = _load_switched(run.storage, damage, place=first * size, budget=TRUSTED)
    if clusters:
        run.write(damage.table.ljust(clusters * size, b"\0"), offset=first * size)
    after = run.audit(switched)
    if after.rebuild:
        old = metadata.header.snapshots_offset, damage.old_bytes
        try:
            rebuild_refcounts(run, switched, after, old=old)
        except OperationError:
            # Nothing leads to the new table: a refusal leaves the file as it was.
            if not run.storage.caps.block_device:
                run.storage.truncate(file_size)
            raise
    elif after.raised:
        raise_counts(run, switched)
    run.wait("snapshot table written")
    place = _PLACE.pack(damage.count, switched.header.snapshots_offset)
    run.write(place, offset=FIELD_OFFSETS["nb_snapshots"])
    run.wait("snapshot table switched")
    run.changes.add_many(
        ChangeKind.SNAPSHOTS, len(damage.reasons), lambda number: damage.reasons[number]
    )
    return load_qcow2_metadata(run.storage, for_check=True)


def _load_switched(
    storage: Storage, damage: SnapshotDamage, *, place: int, budget: Budget
) -> Qcow2Metadata:
    """The metadata as they will be with the new table at host offset `place`: judged like all."""
    overlay = OverlayStorage(storage)
    if damage.table:
        overlay.pwrite([damage.table], offset=place)
    else:
        place = 0
    raw = _PLACE.pack(damage.count, place)
    overlay.pwrite([raw], offset=FIELD_OFFSETS["nb_snapshots"])
    return load_qcow2_metadata(overlay, budget=budget, for_check=True)


def _table_of(storage: Storage) -> tuple[int, int]:
    """(entries, host offset) of the snapshot table, as the header says."""
    raw = storage.pread(_PLACE.size, offset=FIELD_OFFSETS["nb_snapshots"])
    count, offset = _PLACE.unpack(raw.ljust(_PLACE.size, b"\0"))
    return count, offset


def _header_of(storage: Storage) -> Header:
    return Header.decode(storage.pread(1 << 16, offset=0))


def _find_damage(storage: Storage, budget: Budget) -> SnapshotDamage | None:
    """None where the rest of the image is at fault, or an entry that nobody can mend."""
    count, offset = _table_of(storage)
    overlay = OverlayStorage(storage)
    overlay.pwrite([bytes(_PLACE.size)], offset=FIELD_OFFSETS["nb_snapshots"])
    metadata = load_qcow2_metadata(overlay, budget=budget, for_check=True)
    if not count or offset % metadata.cluster_size or offset >= storage.size():
        return None
    reader = _Reader(storage, metadata, offset)
    while len(reader.entries) < min(count, MAX_SNAPSHOTS):
        if not reader.read_next():
            break
    kept = len(reader.entries)
    if kept < count:
        reader.reasons.append(
            f"{count} snapshots in a table of at most {MAX_SNAPSHOTS} entries and "
            f"{MAX_SNAPSHOT_TABLE_BYTES} bytes: the last {count - kept} are dropped"
        )
    if not reader.reasons:
        return None
    return SnapshotDamage(
        reasons=tuple(reader.reasons[-KEPT_CHANGES:]),
        dropped=count - kept,
        table=encode_snapshots(reader.entries),
        count=kept,
        old_bytes=reader.position,
    )


class _Reader:
    """Entries one by one, with extra data of any length."""

    def __init__(self, storage: Storage, metadata: Qcow2Metadata, offset: int) -> None:
        self._storage = storage
        self._metadata = metadata
        self._offset = offset
        self._bytes = 0
        self.position = 0
        self.entries: list[SnapshotEntry] = []
        self.reasons: list[str] = []

    def read_next(self) -> bool:
        """False, and nothing taken, where the new table would become too long."""
        index, place = len(self.entries), self._offset + self.position
        fixed = self._storage.pread(_FIXED, offset=place)
        extra = int.from_bytes(fixed[_EXTRA_SIZE:_FIXED], "big")
        names = int.from_bytes(fixed[12:14], "big") + int.from_bytes(fixed[14:16], "big")
        kept = min(extra, MAX_SNAPSHOT_EXTRA)
        raw = fixed[:_EXTRA_SIZE] + kept.to_bytes(4, "big")
        raw += self._storage.pread(kept, offset=place + _FIXED)
        raw += self._storage.pread(names, offset=place + _FIXED + extra)
        # Version 2 is the one that asks for no extra data.
        entry, _ = decode_snapshot(
            raw,
            offset=0,
            index=index,
            host_offset=place,
            version=2,
            image_size=self._metadata.virtual_size,
        )
        self._bytes += len(encode_snapshots([entry]))
        if self._bytes > MAX_SNAPSHOT_TABLE_BYTES:
            return False
        least = MIN_V3_EXTRA if self._metadata.header.version >= 3 else 0
        if not least <= extra <= MAX_SNAPSHOT_EXTRA:
            self.reasons.append(
                f"entry {index}: {extra} bytes of extra data, expected {least} to "
                f"{MAX_SNAPSHOT_EXTRA}"
            )
        self.position += align_up(_FIXED + extra + names, 8)
        self.entries.append(entry)
        return True
