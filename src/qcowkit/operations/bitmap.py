"""Persistent bitmaps of one image file: listed, changed, taken over from another image.

Nothing but the files named is opened: a bitmap is about its own tables. All actions of one call are
carried out by one switch, or none is (docs/adr/0017)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import Any

from qcowkit.budget import TRUSTED, Budget
from qcowkit.codecs.qcow2.bitmaps import BitmapEntry
from qcowkit.engine.barriers import Barriers, Observer, ignore_event
from qcowkit.engine.qcow2.bitmap_bits import find_bitmap, load_bits
from qcowkit.engine.qcow2.bitmap_edit import BitmapEditor
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.engine.qcow2.recovery import recover_for_writing
from qcowkit.errors import CorruptMetadata, RequestError, UnsupportedFeature
from qcowkit.extents.bits import GranuleBits
from qcowkit.extents.table import ExtentTable, Flag
from qcowkit.image.lineage import Layer
from qcowkit.operations.info import describe_bitmap
from qcowkit.storage.protocol import Storage
from qcowkit.units import format_size


class Action(Enum):
    """What can be done to a bitmap, named as the flags of the command line."""

    ADD = "add"
    REMOVE = "remove"
    CLEAR = "clear"
    ENABLE = "enable"
    DISABLE = "disable"
    MERGE = "merge"


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapAction:
    """One step. source: the name of the bitmap to merge, in the source image if there is one."""

    action: Action
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedBitmap:
    """A bitmap and what it says. bits: None for an inconsistent one."""

    entry: BitmapEntry
    bits: GranuleBits | None

    def as_json(self) -> dict[str, Any]:
        """The object of `info`, with what is dirty: granules, and bytes of the disk."""
        found = describe_bitmap(self.entry)
        if self.bits is not None:
            found["dirty-granules"] = self.bits.count
            found["dirty-bytes"] = self.bits.dirty_bytes
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapList:
    """The bitmaps of one image, in the order of its directory."""

    filename: str
    bitmaps: tuple[ListedBitmap, ...]

    def as_json(self) -> list[dict[str, Any]]:
        """One object a bitmap."""
        return [one.as_json() for one in self.bitmaps]

    def render(self) -> Iterator[str]:
        """Lines to read, without line ends."""
        if not self.bitmaps:
            yield f"{self.filename}: no bitmaps"
            return
        yield f"{'granularity':>11}  {'dirty':>10}  {'granules':>10}  {'state':<12}  name"
        for one in self.bitmaps:
            size = format_size(one.entry.granularity)
            dirty = granules = "-"
            state = "enabled" if one.entry.auto else "disabled"
            if one.bits is None:
                state = "inconsistent"
            else:
                dirty = format_size(one.bits.dirty_bytes)
                granules = str(one.bits.count)
            name = one.entry.name.replace("\n", "\\n")
            yield f"{size:>11}  {dirty:>10}  {granules:>10}  {state:<12}  {name}"


def list_bitmaps(layer: Layer, *, budget: Budget = TRUSTED) -> BitmapList:
    """The bitmaps of an image that is open, with their content. Raises UnsupportedFeature for other
    formats, CorruptMetadata, BudgetExceeded and StorageError."""
    metadata = _metadata(layer)
    found = [
        ListedBitmap(
            entry=entry,
            bits=None if entry.in_use else _load(layer.storage, metadata, entry, budget),
        )
        for entry in metadata.bitmaps
    ]
    name = layer.storage.name if layer.path is None else str(layer.path)
    return BitmapList(filename=name, bitmaps=tuple(found))


def load_bitmap(layer: Layer, name: str, *, budget: Budget = TRUSTED) -> GranuleBits:
    """What one bitmap says. Raises RequestError where there is none, or an inconsistent one, and as
    `list_bitmaps`."""
    metadata = _metadata(layer)
    return _load(layer.storage, metadata, find_bitmap(metadata.bitmaps, name), budget)


def edit_bitmap(
    layer: Layer,
    name: str,
    actions: Sequence[BitmapAction],
    *,
    granularity: int | None = None,
    source: Layer | None = None,
    budget: Budget = TRUSTED,
    observe: Observer = ignore_event,
) -> None:
    """Carry out actions on one bitmap, in order; all of them or none.

    layer: open for writing. granularity: bytes of a bit of a bitmap that is added. source: another
    image, from which bitmaps are merged. Raises RequestError where one cannot be done, and as
    `BitmapEditor`."""
    editor = open_editor(layer, budget=budget, observe=observe)
    for step in actions:
        match step.action:
            case Action.ADD:
                editor.add(name, granularity=granularity)
            case Action.REMOVE:
                editor.remove(name)
            case Action.CLEAR:
                editor.clear(name)
            case Action.ENABLE | Action.DISABLE:
                editor.enable(name, enabled=step.action is Action.ENABLE)
            case Action.MERGE:
                find_bitmap(editor.entries, name)
                other = (
                    editor.bits(step.source)
                    if source is None
                    else load_bitmap(source, step.source, budget=budget)
                )
                editor.merge(name, other)
    editor.commit()


def open_editor(
    layer: Layer, *, budget: Budget = TRUSTED, observe: Observer = ignore_event
) -> BitmapEditor:
    """The bitmaps of an image that is open for writing, which is made sound first. Raises
    CorruptMetadata where it has to be repaired, UnsupportedFeature for capsules and other
    formats."""
    metadata = _metadata(layer)
    if metadata.header.capsule:
        raise UnsupportedFeature(
            "a change of bitmaps",
            reason="this is a capsule, a copy of an image without its guest data",
        )
    if metadata.corrupt:
        raise CorruptMetadata(
            "header field incompatible_features",
            host_offset=72,
            reason="the corrupt bit is set: the image has to be repaired (check -r all) before "
            "anything is written",
        )
    barriers = Barriers(layer.storage, observe=observe)
    metadata = recover_for_writing(layer.storage, metadata, barriers=barriers)
    return BitmapEditor(layer.storage, metadata, budget=budget, observe=observe)


def iter_bitmap_json(tables: Iterable[ExtentTable]) -> Iterator[bytes]:
    """The rows of `Chain.iter_bitmap_extents` as one JSON array, an object a line."""
    before = b"["
    for row in chain.from_iterable(tables):
        dirty = b"true" if row.flags & Flag.DIRTY else b"false"
        shown = (before, row.start, row.length, dirty)
        yield b'%s{"start": %d, "length": %d, "dirty": %s}' % shown
        before = b",\n "
    yield b"[]\n" if before == b"[" else b"]\n"


def render_bitmap_map(tables: Iterable[ExtentTable], *, size: int) -> Iterator[str]:
    """The same as lines to read, without line ends; the last one has the sum. size: of the disk."""
    digits = max(8, len(f"{size:x}")) + 2
    yield f"{'start':>{digits}}  {'end':>{digits}}  {'size':>9}  state"
    total = dirty = 0
    for row in chain.from_iterable(tables):
        is_dirty = bool(row.flags & Flag.DIRTY)
        total += row.length
        dirty += row.length if is_dirty else 0
        end, state = row.start + row.length, "dirty" if is_dirty else "clean"
        yield f"{row.start:#{digits}x}  {end:#{digits}x}  {format_size(row.length):>9}  {state}"
    yield f"{format_size(dirty)} of {format_size(total)} dirty"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiedBitmaps:
    """Bitmaps to be put into another image. skipped: names of those that are inconsistent."""

    bitmaps: tuple[ListedBitmap, ...]
    skipped: tuple[str, ...] = ()

    def store(self, storage: Storage, *, budget: Budget = TRUSTED) -> None:
        """Put them into a qcow2 image that is complete and open for writing. What lies beyond its
        disk is left out. Raises as `BitmapEditor`."""
        if not self.bitmaps:
            return
        layer = Layer(storage=storage, metadata=load_qcow2_metadata(storage))
        editor = open_editor(layer, budget=budget)
        for one in self.bitmaps:
            assert one.bits is not None
            bits = one.bits.copy()
            bits.resize(layer.metadata.virtual_size)
            name, size = one.entry.name, one.entry.granularity
            editor.add(name, granularity=size, enabled=one.entry.auto)
            editor.merge(name, bits)
        editor.commit()


def collect_bitmaps(
    layer: Layer, *, skip_broken: bool = False, budget: Budget = TRUSTED
) -> CopiedBitmaps:
    """The bitmaps of a source, before anything is copied. Raises RequestError for an inconsistent
    one unless `skip_broken`, and as `list_bitmaps`."""
    found = list_bitmaps(layer, budget=budget).bitmaps
    broken = tuple(one.entry.name for one in found if one.bits is None)
    if broken and not skip_broken:
        raise RequestError(
            f"bitmap {broken[0]!r} is inconsistent and cannot be copied: remove it "
            "(bitmap --remove), or leave such bitmaps out (--skip-broken-bitmaps)"
        )
    sound = tuple(one for one in found if one.bits is not None)
    return CopiedBitmaps(bitmaps=sound, skipped=broken)


def _load(
    storage: Storage, metadata: Qcow2Metadata, entry: BitmapEntry, budget: Budget
) -> GranuleBits:
    return load_bits(
        storage,
        entry,
        geometry=metadata.geometry,
        size=metadata.virtual_size,
        budget=budget,
    )


def _metadata(layer: Layer) -> Qcow2Metadata:
    metadata = layer.metadata
    if not isinstance(metadata, Qcow2Metadata):
        raise UnsupportedFeature(
            "persistent bitmaps", reason=f"{metadata.format} images have none, qcow2 images do"
        )
    return metadata
