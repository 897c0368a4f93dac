"""Small sound images to start from, one changed element at a time, and everything that can be
asked of the result. Shared by the targets that fuzz whole files."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import islice

from qcowkit.budget import Budget
from qcowkit.codecs.qcow2.compression import make_compressor
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.errors import QcowkitError
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import Layer, close_layers, open_layers
from qcowkit.image.registry import build_chain
from qcowkit.operations.bitmap import Action, BitmapAction, edit_bitmap, list_bitmaps
from qcowkit.operations.check import Verdict, check_image, open_for_check
from qcowkit.operations.headers import allocation_json
from qcowkit.operations.info import describe_image, render_info
from qcowkit.operations.inspect import as_json, as_text, inspect_storage
from qcowkit.operations.map import iter_map_json, render_map_text
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import (
    BitmapSpec,
    Clusters,
    Compressed,
    Data,
    ImageSpec,
    SnapshotSpec,
    Zero,
    build_qcow2,
    make_luks_area,
)
from qcowkit.testing.vhd_builder import DIFFERENCING, FIXED, VhdBuilder
from qcowkit.units import KiB, MiB

BUDGET = Budget(metadata_bytes=4 * MiB, depth=4, table_cache=256 * KiB)
_READ = 64 * KiB
_ROWS = 1 << 12
_INTERESTING = (0, 1, 2, 7, 8, 255, 256, 511, 512, 513, 4095, 4096, 65535, 65536, 1 << 20)
_WIDE = tuple((1 << bits) + off for bits in (31, 32, 55, 56, 61, 62, 63) for off in (-1, 0))
VALUES = _INTERESTING + _WIDE + tuple((1 << 64) - 1 - value for value in _INTERESTING)


@cache
def qcow2_bases() -> tuple[bytes, ...]:
    """Sound images with all structures that a reader may meet."""
    zlib, zstd = make_compressor("zlib", None), make_compressor("zstd", None)
    page = bytes(range(256)) * 16
    clusters: Clusters = {
        0: page,
        3: Zero(),
        4: Zero(payload=page),
        7: Compressed(payload=zlib(page)),
    }
    snapshots = (SnapshotSpec(id="1", name="one"), SnapshotSpec(id="2", clusters={1: page}))
    bitmaps = (BitmapSpec(name="b", bits=b"\x05"), BitmapSpec(name="c"))
    specs = (
        ImageSpec(clusters=clusters, snapshots=snapshots, bitmaps=bitmaps),
        ImageSpec(version=2, clusters={0: page, 2: page}, backing_name="base"),
        ImageSpec(
            compression_type=1,
            clusters={1: Compressed(payload=zstd(page)), 2: Compressed(payload=zstd(page[::-1]))},
        ),
        ImageSpec(
            extended_l2=True,
            cluster_bits=14,
            clusters={0: Data(payload=page * 4, bitmap=0xF0_0000_000F), 2: Zero()},
        ),
        ImageSpec(cluster_bits=9, refcount_order=0, size=64 * KiB, clusters={5: b"x" * 512}),
        ImageSpec(data_file_name="data", clusters={0: page, 9: page}),
        ImageSpec(luks=make_luks_area(key_bytes=16), backing_name="b", backing_format="raw"),
    )
    return tuple(build_qcow2(spec).to_bytes() for spec in specs)


@cache
def vhd_bases() -> tuple[bytes, ...]:
    """Sound VHDs of all three kinds."""
    page = bytes(range(256)) * 16
    dynamic = VhdBuilder(size=40 * KiB).block(1, page).block(4, page, bitmap=b"\xa5")
    child = VhdBuilder(size=16 * KiB, disk_type=DIFFERENCING).block(0, page, bitmap=b"\x0f")
    child.locator(b"W2ru", "parent.vhd".encode("utf-16-le"))
    child.locator(b"MacX", b"file://./parent.vhd")
    fixed = VhdBuilder(size=8 * KiB, disk_type=FIXED)
    return bytes(dynamic.build()), bytes(child.build()), bytes(fixed.build(page))


def change(base: bytes, data: bytes) -> bytearray:
    """The base with changes that the fuzzer's bytes describe, 13 of them a change: how, where
    (4 bytes), and what (8 bytes). Places near the start, where the headers are, come more often."""
    image = bytearray(base)
    for at in range(0, len(data) - 12, 13):
        how, where, value = struct.unpack_from(">BIQ", data, at)
        _change_once(image, how, where, value)
    return image


def _change_once(image: bytearray, how: int, where: int, value: int) -> None:
    size = len(image)
    if not size:
        return
    place = where % size if how & 1 else where % min(size, 256)
    if how & 8:
        value = VALUES[value % len(VALUES)]
    match how >> 4 & 7:
        case 0:
            del image[where % size :]
        case 1:
            image.extend(bytes(where % (64 * KiB)))
        case 2:
            image[place] = value & 255
        case 3:
            image[place] ^= 1 << (value & 7)
        case kind:
            # A field in its place: entries and the fields of headers are aligned.
            width = (2, 4, 8, 8)[kind - 4]
            begin = place // width * width
            raw = (value & ((1 << 8 * width) - 1)).to_bytes(width, "big")
            image[begin : begin + width] = raw


def exercise(image: bytes | bytearray, format: str) -> None:
    """Ask everything of a file; any question may be refused. Raises all refusals as one."""
    refusals: list[str] = []
    for question in (_open, _check, _inspect, _bitmaps):
        try:
            refusals += question(MemoryStorage(image), format)
        except QcowkitError as error:
            refusals.append(str(error))
    if refusals:
        raise QcowkitError("; ".join(refusals))


def _open(storage: MemoryStorage, format: str) -> list[str]:
    layers = open_layers(
        storage,
        format=format,
        gate=ReferenceGate.deny_all(),
        budget=BUDGET,
        follow_backing=False,
        follow_data=False,
    )
    try:
        (layer,) = layers
        info = describe_image(layer)
        json.dumps(info)
        render_info(info)
        refusals = []
        for name in (None, *_snapshots(layer)):
            try:
                _read(layer, name)
            except QcowkitError as error:
                refusals.append(str(error))
    finally:
        close_layers(layers)
    return refusals


def _snapshots(layer: Layer) -> Sequence[str]:
    entries = getattr(layer.metadata, "snapshots", ())
    return [entry.id for entry in entries[:3]]


def _read(layer: Layer, snapshot: str | None) -> None:
    if getattr(layer.metadata, "data_file", False):
        layer = replace(layer, data_storage=MemoryStorage(bytes(_READ)))
    chain = build_chain((layer,), budget=BUDGET, snapshot=snapshot)
    chain.extents(limit=_ROWS).check()
    for start in {0, max(0, chain.size - _READ), chain.size // 2}:
        with contextlib.suppress(QcowkitError):
            chain.read(offset=start, length=min(_READ, chain.size - start))
    if chain.size <= 64 * MiB:
        _draw(chain)


def _draw(chain: Chain) -> None:
    json.loads(b"".join(iter_map_json(chain)))
    list(islice(render_map_text(chain), 100))
    json.loads(b"".join(allocation_json(chain, cluster_bits=16)))


def _check(storage: MemoryStorage, format: str) -> list[str]:
    result = check_image(open_for_check(storage, format=format, budget=BUDGET))
    json.dumps(result.as_json())
    list(result.render())
    assert result.verdict in Verdict
    return [str(finding) for finding in result.findings[:4]]


def _bitmaps(storage: MemoryStorage, format: str) -> list[str]:
    """List them, then let one more join them: all that writes metadata of the image but its own."""
    if format != "qcow2":
        return []
    layer = Layer(storage=storage, metadata=load_qcow2_metadata(storage, budget=BUDGET))
    found = list_bitmaps(layer, budget=BUDGET)
    json.dumps(found.as_json())
    for one in found.bitmaps:
        if one.bits is not None:
            list(islice(one.bits.iter_extents(start=0, stop=one.bits.size), 4))
    edit_bitmap(layer, "new", [BitmapAction(action=Action.ADD)], budget=BUDGET)
    assert "new" in {one.name for one in load_qcow2_metadata(storage).bitmaps}
    return []


def _inspect(storage: MemoryStorage, _: str) -> list[str]:
    verdict = inspect_storage(storage, budget=BUDGET)
    json.dumps(as_json(verdict))
    as_text(verdict)
    return [reason.code for reason in verdict.reasons]
