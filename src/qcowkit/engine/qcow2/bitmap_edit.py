"""Bitmaps added, removed, cleared, enabled, disabled and merged: planned in memory, stored by one
switch. Nobody else has the image open, and its guest's disk is not touched."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qcowkit.budget import Budget
from qcowkit.codecs.qcow2.bitmaps import (
    MAX_BITMAP_NAME,
    MAX_GRANULARITY_BITS,
    MIN_GRANULARITY_BITS,
    BitmapEntry,
    BitmapFlag,
    encode_bitmap_directory,
)
from qcowkit.codecs.qcow2.entries import EntryRules
from qcowkit.codecs.qcow2.extensions import MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS
from qcowkit.engine.barriers import Observer, ignore_event
from qcowkit.engine.options import DEFAULT_OPTIONS
from qcowkit.engine.qcow2.bitmap_bits import check_bitmap_size, find_bitmap, require_consistent
from qcowkit.engine.qcow2.bitmap_store import BitmapStore, StoredBitmap
from qcowkit.engine.qcow2.cache_sizes import plan_cache_sizes
from qcowkit.engine.qcow2.disk import open_state
from qcowkit.engine.qcow2.mapping import Mapping
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.state import Places
from qcowkit.engine.qcow2.tables import L2Tables, load_l1
from qcowkit.errors import RequestError
from qcowkit.extents.bits import GranuleBits
from qcowkit.storage.protocol import Storage
from qcowkit.units import KiB


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A bitmap as it is going to be. bits: None while nobody has asked for them."""

    entry: BitmapEntry
    bits: GranuleBits | None = None
    changed: bool = False


class BitmapEditor:
    """Changes of the bitmaps of one image, which has been made sound. Carried out by `commit`.

    Methods raise RequestError for what cannot be, CorruptMetadata, BudgetExceeded and StorageError;
    the file is as it was then."""

    def __init__(
        self,
        storage: Storage,
        metadata: Qcow2Metadata,
        *,
        budget: Budget,
        observe: Observer = ignore_event,
    ) -> None:
        """observe: told of barriers and metadata steps by name, before they happen."""
        places = Places(
            storage=storage,
            # Guest data are left alone, wherever they lie.
            data=storage,
            metadata=metadata,
            mapping=_open_mapping(storage, metadata, budget),
        )
        self._state = open_state(places, options=DEFAULT_OPTIONS, observe=observe)
        self._store = BitmapStore(self._state)
        self._budget = budget
        self._size = metadata.virtual_size
        self._drafts = {one.name: _Draft(entry=one) for one in self._store.entries}
        self._changed = False

    def add(self, name: str, *, granularity: int | None = None, enabled: bool = True) -> None:
        """A new bitmap, all clean. granularity: bytes of a bit; None for that of qemu, the cluster
        size within 4 KiB and 64 KiB."""
        if self._state.header.header.version < 3:
            raise RequestError(
                f"bitmap {name!r}: version 2 images (compat=0.10) hold none, version 3 ones do"
            )
        _check_name(name)
        if name in self._drafts:
            raise RequestError(f"there is a bitmap {name!r} already")
        if len(self._drafts) >= MAX_BITMAPS:
            raise RequestError(f"the image has {MAX_BITMAPS} bitmaps, the most there can be")
        if granularity is None:
            granularity = default_granularity(self._state.geometry.cluster_size)
        bits = _granularity_bits(granularity)
        check_bitmap_size(name, size=self._size, granularity=granularity)
        entry = BitmapEntry(
            name=name,
            table_offset=0,
            table_entries=0,
            granularity_bits=bits,
            flags=int(BitmapFlag.AUTO) if enabled else 0,
        )
        clean = GranuleBits(size=self._size, granularity_bits=bits)
        self._drafts[name] = _Draft(entry=entry, bits=clean, changed=True)
        self._changed = True

    def remove(self, name: str) -> None:
        """A bitmap is no more, an inconsistent one as well."""
        find_bitmap(self.entries, name)
        del self._drafts[name]
        self._changed = True

    def clear(self, name: str) -> None:
        """Nothing is dirty."""
        draft = self._change(name)
        shift = draft.entry.granularity_bits
        draft.bits = GranuleBits(size=self._size, granularity_bits=shift)

    def enable(self, name: str, *, enabled: bool = True) -> None:
        """Whether it records changes from now on."""
        draft = self._consistent(name)
        flags = draft.entry.flags & ~int(BitmapFlag.AUTO)
        if enabled:
            flags |= int(BitmapFlag.AUTO)
        if flags != draft.entry.flags:
            draft.entry = replace(draft.entry, flags=flags)
            self._changed = True

    def merge(self, name: str, source: GranuleBits) -> None:
        """What is dirty in `source`, of a disk of the same size, is dirty here as well."""
        draft = self._consistent(name)
        if source.size != self._size:
            raise RequestError(
                f"bitmap {name!r} is of a disk of {self._size} bytes, the source of one of "
                f"{source.size}: they cannot be merged"
            )
        bits = self.bits(name)
        bits.merge(source)
        draft.bits, draft.changed = bits, True
        self._changed = True

    def bits(self, name: str) -> GranuleBits:
        """A copy of what a bitmap says, with all that was planned."""
        draft = self._consistent(name)
        if draft.bits is not None:
            return draft.bits.copy()
        return self._store.load(draft.entry, size=self._size, budget=self._budget)

    @property
    def entries(self) -> tuple[BitmapEntry, ...]:
        """The bitmaps, with all that was planned."""
        return tuple(draft.entry for draft in self._drafts.values())

    def commit(self) -> None:
        """Carry out what was planned; durable. Nothing is written where nothing changes."""
        if not self._changed:
            return
        length = len(encode_bitmap_directory(self.entries))
        if length > MAX_BITMAP_DIRECTORY_BYTES:
            raise RequestError(
                f"the bitmap directory would take {length} bytes, expected at most "
                f"{MAX_BITMAP_DIRECTORY_BYTES}"
            )
        self._state.begin()
        self._store.replace(
            [
                StoredBitmap(entry=draft.entry, bits=draft.bits if draft.changed else None)
                for draft in self._drafts.values()
            ]
        )
        self._changed = False
        self._drafts = {one.name: _Draft(entry=one) for one in self._store.entries}

    def _consistent(self, name: str) -> _Draft:
        require_consistent(find_bitmap(self.entries, name))
        return self._drafts[name]

    def _change(self, name: str) -> _Draft:
        draft = self._consistent(name)
        draft.changed = self._changed = True
        return draft


def default_granularity(cluster_size: int) -> int:
    """Bytes of a bit where nobody says so."""
    return min(max(cluster_size, 4 * KiB), 64 * KiB)


def _granularity_bits(granularity: int) -> int:
    low, high = 1 << MIN_GRANULARITY_BITS, 1 << MAX_GRANULARITY_BITS
    if granularity & (granularity - 1) or not low <= granularity <= high:
        raise RequestError(
            f"granularity {granularity} is not a power of two from {low} bytes to 2 GiB"
        )
    return granularity.bit_length() - 1


def _check_name(name: str) -> None:
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        raise RequestError(f"bitmap name {name!r} cannot be written as UTF-8") from None
    if not 1 <= len(raw) <= MAX_BITMAP_NAME:
        raise RequestError(f"the bitmap name has {len(raw)} bytes, expected 1 to {MAX_BITMAP_NAME}")


def _open_mapping(storage: Storage, metadata: Qcow2Metadata, budget: Budget) -> Mapping:
    """The L1 table, of which only the places of its tables are of interest."""
    header, geometry, size = metadata.header, metadata.geometry, metadata.virtual_size
    count = min(header.l1_size, geometry.l1_entries(size))
    budget.spend("L1 table bytes", value=count * 8, limit=budget.metadata_bytes)
    file_size = storage.size()
    l1 = load_l1(
        storage,
        offset=header.l1_table_offset,
        count=count,
        geometry=geometry,
        file_size=file_size,
    )
    sizes = plan_cache_sizes(geometry, virtual_size=size, options=DEFAULT_OPTIONS)
    tables = L2Tables(
        storage,
        l1=l1,
        geometry=geometry,
        slice_size=sizes.l2_entry_bytes,
        cache_bytes=sizes.l2_bytes,
    )
    rules = EntryRules(
        geometry=geometry,
        version=header.version,
        external_data=metadata.data_file,
        file_size=file_size,
    )
    return Mapping(tables=tables, rules=rules, size=size)
