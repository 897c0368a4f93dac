"""A second opinion on a qcow2 file, independent of the engine: what it refers to, what it counts,
what its guest reads, and how dangerous it is to write it. Slow and plain; for small images.

It never refuses: what leads nowhere is told as that."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET = 0x00FF_FFFF_FFFF_FE00
RESERVED = 0x3F00_0000_0000_01FE
L1_RESERVED = 0x7F00_0000_0000_01FF
ALLOCATED = 0xFFFF_FFFF
KNOWN_AUTOCLEAR = 3

# What a guest reads of one cluster: a kind and what belongs to it.
Seen = tuple[object, ...]
Key = tuple[str, int]


@dataclass(slots=True, kw_only=True)
class View:
    """refs: references by host cluster; blocks: those of refcount blocks among them. touched:
    clusters that malformed entries lead into. links: (cluster, COPIED) of plain entries of the
    active tables. guest: what can be read."""

    size: int
    cluster: int
    refs: Counter[int] = field(default_factory=Counter)
    blocks: Counter[int] = field(default_factory=Counter)
    touched: set[int] = field(default_factory=set)
    links: list[tuple[int, bool]] = field(default_factory=list)
    guest: dict[Key, Seen] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    dirty: bool = False
    corrupt: bool = False
    autoclear: int = 0

    def danger(self, cluster: int) -> int:
        """0: whatever is written, no other data change. 1: a write in place may hit another's data,
        or a snapshot fails. 2: the cluster is given out, or given back, while it is in use."""
        stored, refs = self.counts.get(cluster, 0), self.refs[cluster]
        flags = [copied for place, copied in self.links if place == cluster]
        if not stored and (refs or cluster in self.touched):
            return 2
        if stored < refs and not all(flags):
            return 2
        return int(stored < refs or any(copied and (stored != 1 or refs != 1) for copied in flags))

    def dangers(self) -> dict[int, int]:
        """Every cluster that is not safe."""
        suspects = set(self.refs) | self.touched
        found = {cluster: self.danger(cluster) for cluster in suspects}
        return {cluster: level for cluster, level in found.items() if level}


def view_of(raw: bytes) -> View:
    """Walk the whole file."""
    return _Walk(raw).run()


class _Walk:
    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        head = struct.unpack_from(">4sIQIIQIIQQIIQ", raw)
        (_, self.version, _, _, self.bits, self.disk, _, self.l1_size, self.l1) = head[:9]
        self.table, self.table_clusters, self.snapshots, self.snapshot_table = head[9:13]
        features = struct.unpack_from(">QQQI", raw, 72) if self.version == 3 else (0, 0, 0, 4)
        self.features, _, autoclear, self.order = features
        self.extended = bool(self.features & 16)
        self.external = bool(self.features & 4)
        self.cluster = 1 << self.bits
        self.entry_bytes = 16 if self.extended else 8
        self.view = View(
            size=len(raw),
            cluster=self.cluster,
            dirty=bool(self.features & 1),
            corrupt=bool(self.features & 2),
            autoclear=autoclear,
        )

    def run(self) -> View:
        self._claim(0, self.cluster)
        self._claim(self.l1, self.l1_size * 8)
        self._claim(self.table, self.table_clusters << self.bits)
        self._tree("active", self.l1, self.l1_size, active=True)
        for name, offset, size in self._iter_snapshots():
            self._claim(offset, size * 8)
            self._tree(name, offset, size, active=False)
        self._refcounts()
        return self.view

    def _word(self, offset: int) -> int:
        return int.from_bytes(self.raw[offset : offset + 8].ljust(8, b"\0"), "big")

    def _claim(self, offset: int, length: int) -> None:
        for cluster in range(offset >> self.bits, (offset + length - 1 >> self.bits) + 1):
            self.view.refs[cluster] += 1

    def _iter_snapshots(self) -> Iterator[tuple[str, int, int]]:
        place = self.snapshot_table
        for _ in range(self.snapshots):
            fixed = self.raw[place : place + 40]
            if len(fixed) < 40:
                break
            l1, size, id_bytes, name_bytes = struct.unpack_from(">QIHH", fixed)
            extra = int.from_bytes(fixed[36:40], "big")
            begin = place + 40 + extra
            yield self.raw[begin : begin + id_bytes].decode(errors="replace"), l1, size
            place = -(-(begin + id_bytes + name_bytes) // 8) * 8
        if self.snapshots:
            self._claim(self.snapshot_table, place - self.snapshot_table)

    def _tree(self, name: str, offset: int, size: int, *, active: bool) -> None:
        per_table = self.cluster // self.entry_bytes
        for index in range(size):
            word = self._word(offset + index * 8)
            table = word & OFFSET
            if not table or table % self.cluster or table >= len(self.raw):
                continue
            cluster = table >> self.bits
            self.view.refs[cluster] += 1
            if active:
                self.view.links.append((cluster, bool(word & COPIED)))
            readable = not word & L1_RESERVED
            for slot in range(per_table):
                place = table + slot * self.entry_bytes
                key = (name, index * per_table + slot)
                self._entry(key, place, active=active, readable=readable)

    def _entry(self, key: Key, place: int, *, active: bool, readable: bool) -> None:
        word = self._word(place)
        bitmap = self._word(place + 8) if self.extended else 0
        if not word and not bitmap:
            return
        host = word & OFFSET
        if word & COMPRESSED:
            seen = self._packed(word, bitmap)
        elif self.external:
            seen = ("external", word & ~COPIED, bitmap)
        else:
            seen = self._plain(word, host, bitmap, active=active)
        if readable and seen is not None:
            self.view.guest[key] = seen

    def _packed(self, word: int, bitmap: int) -> Seen | None:
        shift = 62 - (self.bits - 8)
        host = word & ((1 << shift) - 1)
        length = ((word >> shift & ((1 << 62 - shift) - 1)) + 1) * 512 - host % 512
        if self.external or host >= len(self.raw) or host + length > len(self.raw) + 511:
            return None
        self._claim(host, length)
        if word & COPIED or bitmap:
            return None
        return ("packed", self.raw[host : host + length])

    def _plain(self, word: int, host: int, bitmap: int, *, active: bool) -> Seen | None:
        data = bool(bitmap & ALLOCATED) if self.extended else not word & 1
        sound = host % self.cluster == 0 and host < len(self.raw)
        if host and not sound and (host % self.cluster == 0 or host < len(self.raw)):
            last = host + self.cluster - 1 >> self.bits
            self.view.touched.update(range(host >> self.bits, last + 1))
        if host and sound:
            self.view.refs[host >> self.bits] += 1
            if active:
                self.view.links.append((host >> self.bits, bool(word & COPIED)))
        if not sound or word & RESERVED:
            return None
        content = self.raw[host : host + self.cluster].ljust(self.cluster, b"\0") if host else b""
        if self.extended:
            if bitmap & ALLOCATED & bitmap >> 32 or (bitmap & ALLOCATED and not host):
                return None
            return ("extended", bitmap, content if data else b"") if bitmap else None
        if word & 1:
            return ("zero",) if self.version == 3 else None
        return ("data", content) if host else None

    def _refcounts(self) -> None:
        per_block = (self.cluster * 8) >> self.order
        for index in range((self.table_clusters << self.bits) // 8):
            word = self._word(self.table + index * 8)
            if not word:
                continue
            if word % self.cluster or word >= len(self.raw):
                continue
            self.view.refs[word >> self.bits] += 1
            self.view.blocks[word >> self.bits] += 1
            block = self.raw[word : word + self.cluster].ljust(self.cluster, b"\0")
            for slot, count in self._iter_counts(block):
                if count:
                    self.view.counts[index * per_block + slot] = count

    def _iter_counts(self, block: bytes) -> Iterator[tuple[int, int]]:
        width = 1 << self.order
        if width >= 8:
            step = width // 8
            for start in range(0, len(block), step):
                yield start // step, int.from_bytes(block[start : start + step], "big")
            return
        per_byte = 8 // width
        for start, byte in enumerate(block):
            for slot in range(per_byte if byte else 0):
                yield start * per_byte + slot, byte >> slot * width & ((1 << width) - 1)


def worsened(before: View, raw: bytes, original: bytes) -> list[str]:
    """What is worse in `raw` than in `original`, whose view is `before`; empty for nothing.

    Space that is lost, and flags that make a writer copy for nothing, are not worse."""
    after = view_of(raw)
    end = -(-before.size // before.cluster)
    found = [
        f"cluster {cluster}: danger {level}, before {before.danger(cluster)}"
        for cluster, level in sorted(after.dangers().items())
        if level > before.danger(cluster)
        # A file that has grown may end behind a place to which only nonsense leads.
        and (
            cluster < end
            or after.refs[cluster] > after.blocks[cluster]
            or before.counts.get(cluster)
        )
    ]
    found += [
        f"{key}: reads {after.guest.get(key, ('nothing',))[:1]}, before {seen[:1]}"
        for key, seen in before.guest.items()
        if after.guest.get(key) != seen
    ]
    if after.autoclear & ~KNOWN_AUTOCLEAR and raw != original:
        found.append("written while an unknown autoclear bit is set")
    if after.dangers() and (after.dirty, after.corrupt) != (before.dirty, before.corrupt):
        found.append("a warning is gone while there is something to warn of")
    return found
