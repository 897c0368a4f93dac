"""What an image is, as data and as text. Pure, and free of numpy: a process that only asks pays
for nothing else. The data have the schema of `qemu-img info --output=json`, version 8 and later."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from qcowkit.engine.luks.metadata import LuksMetadata
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.vhd.metadata import VhdMetadata
from qcowkit.references import Reference, ReferenceKind
from qcowkit.units import SECTOR, align_up, format_size

if TYPE_CHECKING:
    from qcowkit.codecs.qcow2.bitmaps import BitmapEntry
    from qcowkit.codecs.qcow2.luks_header import LuksHeader, LuksSlot
    from qcowkit.codecs.qcow2.snapshots import SnapshotEntry
    from qcowkit.image.lineage import Layer
    from qcowkit.storage.protocol import Storage

Info = dict[str, Any]
_SECOND = 1_000_000_000


def describe_image(layer: Layer) -> Info:
    """One layer as `qemu-img info --output=json` describes it; sizes in bytes.

    Nothing is opened: what the image names is reported as it stands there, with the path that it
    stands for under `full-backing-filename`. Raises StorageError."""
    metadata = layer.metadata
    filename = _filename(layer)
    info: Info = {
        "filename": filename,
        "format": metadata.format,
        "virtual-size": metadata.virtual_size,
        "actual-size": layer.storage.allocated(),
    }
    if isinstance(metadata, Qcow2Metadata):
        info["cluster-size"] = metadata.cluster_size
        info["dirty-flag"] = metadata.dirty
        if metadata.encrypted:
            info["encrypted"] = True
        info |= _backing(filename, metadata.references)
        if metadata.snapshots:
            info["snapshots"] = [describe_snapshot(entry) for entry in metadata.snapshots]
        info["format-specific"] = {"type": "qcow2", "data": _qcow2_data(metadata)}
    else:
        info["dirty-flag"] = False
        if isinstance(metadata, LuksMetadata):
            info["encrypted"] = True
            data = {key: value for key, value in _luks(metadata.header).items() if key != "format"}
            info["format-specific"] = {"type": "luks", "data": data}
        if isinstance(metadata, VhdMetadata):
            info["format-specific"] = {"type": "vpc", "data": _vhd_data(metadata)}
        # A fixed disk has no clusters to speak of.
        if getattr(metadata, "subformat", "fixed") != "fixed":
            info["cluster-size"] = getattr(metadata, "cluster_size", 0)
        info |= _backing(filename, metadata.references)
    info["children"] = list(_children(layer, filename))
    return info


def describe_images(layers: Iterable[Layer]) -> list[Info]:
    """A whole chain, top first: what `--backing-chain` prints."""
    return [describe_image(layer) for layer in layers]


def _filename(layer: Layer) -> str:
    return layer.storage.name if layer.path is None else str(layer.path)


def _backing(filename: str, references: Sequence[Reference]) -> Info:
    kinds = (ReferenceKind.BACKING, ReferenceKind.PARENT)
    for reference in references:
        if reference.kind in kinds:
            name = reference.names[0]
            found: Info = {
                "backing-filename": name,
                # Joined by letters alone: whether such a file exists is not asked.
                "full-backing-filename": posixpath.join(posixpath.dirname(filename), name),
            }
            if reference.format is not None:
                found["backing-filename-format"] = reference.format
            return found
    return {}


def describe_snapshot(entry: SnapshotEntry) -> Info:
    """One snapshot under the keys of `qemu-img info --output=json`."""
    info: Info = {
        "id": entry.id,
        "name": entry.name,
        "vm-state-size": entry.vm_state_size,
        "date-sec": entry.date_sec,
        "date-nsec": entry.date_nsec,
        "vm-clock-sec": entry.vm_clock_nsec // _SECOND,
        "vm-clock-nsec": entry.vm_clock_nsec % _SECOND,
    }
    if entry.icount is not None:
        info["icount"] = entry.icount
    return info


def _qcow2_data(metadata: Qcow2Metadata) -> Info:
    modern = metadata.header.version >= 3
    data: Info = {
        "compat": "1.1" if modern else "0.10",
        "compression-type": metadata.compression_type,
        "refcount-bits": metadata.geometry.refcount_bits,
    }
    if modern:
        data["lazy-refcounts"] = metadata.lazy_refcounts
        data["corrupt"] = metadata.corrupt
        data["extended-l2"] = metadata.geometry.extended_l2
    if metadata.bitmaps:
        data["bitmaps"] = [describe_bitmap(entry) for entry in metadata.bitmaps]
    if metadata.data_file:
        data["data-file"] = metadata.extensions.data_file
        data["data-file-raw"] = metadata.data_file_raw
    if metadata.guid is not None:
        data["guid"] = str(metadata.guid)
    if metadata.backing_identity is not None:
        data["backing-guid"] = str(metadata.backing_identity.guid)
    if metadata.luks is not None:
        data["encrypt"] = _luks(metadata.luks)
    elif metadata.encrypted:
        data["encrypt"] = {"format": metadata.encrypted}
    return data


def describe_bitmap(entry: BitmapEntry) -> Info:
    """One bitmap under the keys of `qemu-img info --output=json`."""
    flags = {"in-use": entry.in_use, "auto": entry.auto}
    names = [name for name, is_set in flags.items() if is_set]
    return {"name": entry.name, "granularity": entry.granularity, "flags": names}


def _vhd_data(metadata: VhdMetadata) -> Info:
    """Ours alone: qemu has nothing to say of a VHD. The words are those of qcow2 images."""
    data: Info = {"guid": str(metadata.unique_id)}
    if metadata.parent_id is not None:
        data["backing-guid"] = str(metadata.parent_id)
    return data


def _luks(header: LuksHeader) -> Info:
    info: Info = {
        "format": "luks",
        "cipher-alg": header.cipher_name,
        "cipher-mode": header.cipher_mode,
        "ivgen-alg": header.ivgen,
        "hash-alg": header.hash,
        "uuid": header.uuid,
        "payload-offset": header.payload_offset,
        "master-key-iters": header.digest_iterations,
        "detached-header": False,
        "slots": [_slot(slot) for slot in header.slots],
    }
    if header.ivgen_hash is not None:
        info["ivgen-hash-alg"] = header.ivgen_hash
    return info


def _slot(slot: LuksSlot) -> Info:
    info: Info = {"active": slot.active, "key-offset": slot.key_offset}
    if slot.active:
        info |= {"iters": slot.iterations, "stripes": slot.stripes}
    return info


def _children(layer: Layer, filename: str) -> Iterator[Info]:
    """The files themselves, as qemu shows its protocol nodes. Backing images are not children."""
    yield {"name": "file", "info": _describe_file(layer.storage, filename)}
    if layer.data_storage is not None:
        data = layer.data_storage
        yield {"name": "data-file", "info": _describe_file(data, data.name)}


def _describe_file(storage: Storage, filename: str) -> Info:
    kind = "host_device" if storage.caps.block_device else "file"
    return {
        "filename": filename,
        "format": kind,
        "virtual-size": align_up(storage.size(), SECTOR),
        "actual-size": storage.allocated(),
        "dirty-flag": False,
        "format-specific": {"type": kind, "data": {}},
        "children": [],
    }


def render_info(info: Info) -> str:
    """One description as lines of text for people, without a final newline.

    Names come from the image: control characters are shown as escapes."""
    rows = list(_rows(info))
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {_printable(text)}" for label, text in rows]
    data = info.get("format-specific", {}).get("data", {})
    if info.get("snapshots"):
        lines += ["", "snapshots", *render_snapshots(info["snapshots"])]
    if data.get("bitmaps"):
        lines += ["", "bitmaps", *_table(_BITMAP_TITLES, map(_bitmap_row, data["bitmaps"]))]
    return "\n".join(lines)


def _rows(info: Info) -> Iterator[tuple[str, str]]:
    data = info.get("format-specific", {}).get("data", {})
    if info["format"] == "luks":
        data = {"encrypt": {"format": "luks", **data}}
    size = info["virtual-size"]
    yield "image", info["filename"]
    yield "format", _format_text(info, data)
    yield "virtual size", f"{format_size(size)} ({size} bytes)"
    yield "disk usage", format_size(info["actual-size"])
    if "cluster-size" in info:
        yield "cluster size", format_size(info["cluster-size"])
    if "backing-filename" in info:
        yield "backing file", _backing_text(info)
    if data.get("data-file") is not None:
        raw = " (a raw image by itself)" if data["data-file-raw"] else ""
        yield "data file", f"{data['data-file']}{raw}"
    if "guid" in data:
        yield "guid", data["guid"]
    if "backing-guid" in data:
        yield "backing guid", data["backing-guid"]
    if "encrypt" in data:
        yield "encryption", _encryption_text(data["encrypt"])
    features = list(_feature_texts(info, data))
    if features:
        yield "features", ", ".join(features)
    if info.get("dirty-flag"):
        yield "dirty", "refcounts may be out of date: check before writing"
    if data.get("corrupt"):
        yield "corrupt", "marked as corrupt: only reading and repair are allowed"


def _format_text(info: Info, data: Info) -> str:
    if "compat" not in data:
        return str(info["format"])
    return f"{info['format']}, compat {data['compat']}"


def _backing_text(info: Info) -> str:
    name, full = info["backing-filename"], info["full-backing-filename"]
    declared = info.get("backing-filename-format", "format not declared")
    place = "" if full == name else f", found as {full}"
    return f"{name} ({declared}{place})"


def _encryption_text(encrypt: Info) -> str:
    if encrypt["format"] != "luks":
        return f"{encrypt['format']} (legacy, not secure)"
    used = sum(slot["active"] for slot in encrypt["slots"])
    parts = [encrypt["cipher-alg"], encrypt["cipher-mode"], encrypt["ivgen-alg"]]
    if "ivgen-hash-alg" in encrypt:
        parts.append(encrypt["ivgen-hash-alg"])
    slots = f"{used} of {len(encrypt['slots'])} key slots in use"
    return f"luks, {' '.join(parts)}, hash {encrypt['hash-alg']}, {slots}"


def _feature_texts(info: Info, data: Info) -> Iterator[str]:
    if "compat" in data:
        yield f"{data['compression-type']} compression"
        yield f"{data['refcount-bits']}-bit refcounts"
    if data.get("lazy-refcounts"):
        yield "lazy refcounts"
    if data.get("extended-l2"):
        yield f"extended L2 entries (subclusters of {format_size(info['cluster-size'] // 32)})"


_SNAPSHOT_TITLES = ("ID", "NAME", "DATE (UTC)", "VM STATE", "VM CLOCK")
_BITMAP_TITLES = ("NAME", "GRANULARITY", "STATE")


def render_snapshots(entries: Iterable[Info]) -> Iterator[str]:
    """A table of described snapshots, a line each, without line ends."""
    return _table(_SNAPSHOT_TITLES, map(_snapshot_row, entries))


def _snapshot_row(entry: Info) -> tuple[str, ...]:
    date = datetime.fromtimestamp(entry["date-sec"], UTC).strftime("%Y-%m-%d %H:%M:%S")
    state = format_size(entry["vm-state-size"]) if entry["vm-state-size"] else "-"
    minutes, seconds = divmod(entry["vm-clock-sec"], 60)
    hours, minutes = divmod(minutes, 60)
    thousandths = entry["vm-clock-nsec"] // 1_000_000
    clock = f"{hours}:{minutes:02}:{seconds:02}.{thousandths:03}"
    running = entry["vm-clock-sec"] or entry["vm-clock-nsec"]
    return entry["id"], entry["name"], date, state, clock if running else "-"


def _bitmap_row(entry: Info) -> tuple[str, ...]:
    if "in-use" in entry["flags"]:
        state = "in use or not closed properly: not to be trusted"
    else:
        state = "recording" if "auto" in entry["flags"] else "disabled"
    return entry["name"], format_size(entry["granularity"]), state


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their widest cell, indented."""
    cells = [tuple(titles), *(tuple(map(_printable, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        yield ("  " + "  ".join(padded)).rstrip()


def _printable(text: str) -> str:
    """The text with everything escaped that a terminal could take as a command."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
