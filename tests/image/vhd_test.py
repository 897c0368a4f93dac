"""VHD files as layers: reading, chains of differencing disks, and the corpus."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.engine.vhd.metadata import load_vhd_metadata
from qcowkit.errors import CorruptMetadata, QcowkitError, RequestError
from qcowkit.extents.table import Flag
from qcowkit.image.chain import Chain
from qcowkit.image.vhd import VhdImage
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.vhd_builder import DIFFERENCING, FIXED, VhdBuilder
from tests.corpus import Entry, bad_images, entry_id, sound_images, unpack

BLOCK = 4096


def image(raw: bytes) -> VhdImage:
    storage = MemoryStorage(raw)
    return VhdImage(load_vhd_metadata(storage, budget=TRUSTED), storage)


def read(*layers: bytes) -> bytes:
    """The guest disk of a chain, top first, composed without any look-up of names."""
    chain = Chain([image(raw) for raw in layers])
    return chain.read(offset=0, length=chain.size)


def test_a_dynamic_disk_reads_its_blocks_and_zeros() -> None:
    builder = VhdBuilder(size=3 * BLOCK - 512).block(1, b"\x01" * BLOCK).block(2, b"\x02" * BLOCK)
    expected = bytes(BLOCK) + b"\x01" * BLOCK + b"\x02" * (BLOCK - 512)
    assert read(builder.build()) == expected


def test_clear_sectors_of_a_dynamic_disk_read_as_zeros() -> None:
    builder = VhdBuilder(size=BLOCK).block(0, b"\xee" * BLOCK, bitmap=b"\x0f")
    assert read(builder.build()) == bytes(2048) + b"\xee" * 2048


def test_clear_sectors_of_a_child_show_the_parent() -> None:
    parent = VhdBuilder(size=2 * BLOCK).block(0, b"p" * BLOCK).block(1, b"q" * BLOCK).build()
    child = VhdBuilder(size=2 * BLOCK, disk_type=DIFFERENCING)
    child.block(0, b"c" * BLOCK, bitmap=b"\xf0")
    assert read(child.build(), parent) == b"c" * 2048 + b"p" * 2048 + b"q" * BLOCK


def test_sectors_beyond_a_smaller_parent_read_as_zeros() -> None:
    parent = VhdBuilder(size=512).block(0, b"p" * 512).build()
    child = VhdBuilder(size=BLOCK, disk_type=DIFFERENCING).build()
    assert read(child, parent) == b"p" * 512 + bytes(BLOCK - 512)


def test_a_larger_parent_is_cut_at_the_size_of_the_child() -> None:
    parent = VhdBuilder(size=2 * BLOCK).block(0, b"p" * BLOCK).block(1, b"q" * BLOCK).build()
    assert read(VhdBuilder(size=1024, disk_type=DIFFERENCING).build(), parent) == b"p" * 1024


def test_a_fixed_disk_is_read_where_it_lies() -> None:
    raw = VhdBuilder(size=2 * BLOCK, disk_type=FIXED).build(b"boot")
    assert read(raw) == b"boot" + bytes(2 * BLOCK - 4)
    (row,) = image(raw).extents(start=512, length=1024)
    assert (row.start, row.length, row.flags, row.host) == (512, 1024, 5, 512)


class Holes(MemoryStorage):
    """Memory that reports one piece of data, as a sparse file does."""

    def iter_data(self, *, offset: int, length: int) -> Any:
        start, stop = max(offset, BLOCK), min(offset + length, 2 * BLOCK)
        if start < stop:
            yield start, stop - start


def test_the_holes_of_a_fixed_disk_are_zero_and_allocated() -> None:
    storage = Holes(VhdBuilder(size=3 * BLOCK, disk_type=FIXED).build())
    disk = VhdImage(load_vhd_metadata(storage, budget=TRUSTED), storage)
    rows = [(row.start, row.flags, row.host) for row in disk.extents(start=0, length=3 * BLOCK)]
    zero, data = Flag.ZERO | Flag.PRESENT, Flag.DATA | Flag.PRESENT
    assert rows == [(0, zero, 0), (BLOCK, data, BLOCK), (2 * BLOCK, zero, 2 * BLOCK)]


def test_cluster_sizes_are_blocks_and_sectors() -> None:
    assert image(VhdBuilder(size=BLOCK).build()).cluster_size == BLOCK
    assert image(VhdBuilder(size=BLOCK, disk_type=FIXED).build()).cluster_size == 512


def test_a_range_beyond_the_disk_is_refused() -> None:
    disk = image(VhdBuilder(size=BLOCK).build())
    with pytest.raises(RequestError, match="range 0x1000 \\+ 0x1 is outside the disk"):
        disk.extents(start=BLOCK, length=1)


def test_a_malformed_table_is_refused_at_the_first_look_at_it() -> None:
    raw = VhdBuilder(size=BLOCK).block(0, b"x").build()
    raw[1536:1540] = bytes(4)
    disk = image(raw)
    with pytest.raises(CorruptMetadata, match="entry 0: block at sector 0, expected 4 or more"):
        disk.extents(start=0, length=BLOCK)


def test_closing_the_image_closes_its_file() -> None:
    disk = image(VhdBuilder(size=BLOCK).build())
    disk.close()
    with pytest.raises(QcowkitError):
        disk.data_storage.size()


SOUND = sound_images(format="vpc")


def corpus_chain(entry: Entry, folder: Path) -> list[VhdImage]:
    """The image and its bases, top first, without following any name."""
    unpack(entry, folder)
    names = [entry["file"], *entry["open"]["needs"]]
    return [image((folder / name).read_bytes()) for name in names]


@pytest.mark.parametrize("entry", SOUND, ids=entry_id)
def test_the_corpus_reads_to_its_recorded_digests(entry: Entry, tmp_path: Path) -> None:
    chain = Chain(corpus_chain(entry, tmp_path))
    assert chain.size == entry["virtual_size"]
    if "guest_sha256" in entry:
        disk = chain.read(offset=0, length=chain.size)
        assert hashlib.sha256(disk).hexdigest() == entry["guest_sha256"]
    for offset, length, digest in entry.get("probes", ()):
        part = chain.read(offset=offset, length=length)
        assert hashlib.sha256(part).hexdigest() == digest


@pytest.mark.parametrize(
    "entry", [entry for entry in SOUND if entry["open"]["needs"]], ids=entry_id
)
def test_the_children_of_the_corpus_name_their_parents(entry: Entry, tmp_path: Path) -> None:
    child, parent = corpus_chain(entry, tmp_path)[:2]
    assert child.metadata.parent_id == parent.metadata.unique_id
    assert child.metadata.references[0].names == (entry["open"]["needs"][0],)
    assert child.metadata.warnings == ()


@pytest.mark.parametrize("entry", [entry for entry in SOUND if "map" in entry], ids=entry_id)
def test_the_corpus_has_its_recorded_map(entry: Entry, tmp_path: Path) -> None:
    """qemu ignores bitmaps: the sectors that we call zero and allocated are data to it."""
    (disk,) = corpus_chain(entry, tmp_path)
    found = []
    for row in disk.extents(start=0, length=disk.size):
        data = row.host >= 0
        last = found[-1] if found else (0, 0, 0, 0)
        if data and last[2] and last[3] + last[1] == row.host:
            found[-1] = (last[0], last[1] + row.length, True, last[3])
        else:
            found.append((row.start, row.length, data, row.host if data else 0))
    assert found == [
        (row["start"], row["length"], row["data"], row.get("offset", 0)) for row in entry["map"]
    ]


@pytest.mark.parametrize("entry", bad_images(format="vpc"), ids=entry_id)
def test_the_bad_images_of_the_corpus_are_refused(entry: Entry, tmp_path: Path) -> None:
    assert (entry["expect"], entry["at"]) == ("refuse", "open")
    raw = unpack(entry, tmp_path).read_bytes()
    with pytest.raises(QcowkitError):
        image(raw)
