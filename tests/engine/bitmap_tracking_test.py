"""Bitmaps record what the guest changes, and say themselves whether they can be relied on."""

from __future__ import annotations

import contextlib
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from qcowkit.budget import TRUSTED, Budget
from qcowkit.codecs.qcow2.bitmaps import BitmapFlag
from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.bitmap_bits import load_bits
from qcowkit.engine.qcow2.bitmap_edit import BitmapEditor
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.errors import BudgetExceeded, CorruptMetadata, QcowkitError, RequestError
from qcowkit.extents.ranges import RangeSet
from qcowkit.operations.check import Verdict, check_image, open_for_check
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.qcow2_builder import BitmapSpec, build_qcow2
from qcowkit.units import GiB, KiB, MiB
from tests.engine.qcow2_rig import Rig

IN_USE = "bitmaps in use before the first change"
# Whole clusters of any variant.
UNIT = 16 * KiB
ON, OFF, BROKEN = int(BitmapFlag.AUTO), 0, int(BitmapFlag.IN_USE | BitmapFlag.AUTO)


def spec(name: str = "b", *, bits: bytes = b"", shift: int = 12, flags: int = ON) -> BitmapSpec:
    return BitmapSpec(name=name, bits=bits, granularity_bits=shift, flags=flags)


def rig_with(*bitmaps: BitmapSpec, **more: Any) -> Rig:
    return Rig(bitmaps=bitmaps or (spec(),), **more)


def flags_of(rig: Rig) -> dict[str, int]:
    """What the file says of its bitmaps."""
    metadata = load_qcow2_metadata(MemoryStorage(rig.memory.to_bytes()))
    return {one.name: one.flags for one in metadata.bitmaps}


def dirty(rig: Rig, name: str = "b") -> list[tuple[int, int]]:
    """Dirty bytes of a bitmap as the file has it."""
    storage = MemoryStorage(rig.memory.to_bytes())
    metadata = load_qcow2_metadata(storage)
    (entry,) = [one for one in metadata.bitmaps if one.name == name]
    bits = load_bits(
        storage,
        entry,
        geometry=metadata.geometry,
        size=metadata.virtual_size,
        budget=TRUSTED,
    )
    return list(bits.ranges())


def verdict(rig: Rig) -> Verdict:
    return rig.check().verdict


def test_a_write_is_recorded_and_stored_by_closing() -> None:
    rig = rig_with()
    rig.chain.write(b"x" * 100, offset=5000)
    rig.image.disk.close()
    assert dirty(rig) == [(4096, 8192)]
    assert flags_of(rig) == {"b": ON}
    assert verdict(rig) is Verdict.CLEAN


def test_what_was_dirty_stays_dirty() -> None:
    rig = rig_with(spec(bits=b"\x01"))
    rig.chain.write(b"x", offset=9 * 4096)
    rig.image.disk.close()
    assert dirty(rig) == [(0, 4096), (9 * 4096, 10 * 4096)]


@pytest.mark.parametrize("watch", [True, False])
def test_small_writes_are_recorded_by_either_way(watch: bool) -> None:
    rig = rig_with(watch=watch)
    for cluster in (3, 4, 3, 70):
        rig.chain.write(b"x" * 10, offset=cluster * 4096 + 7)
    assert list(rig.image.disk.bitmap("b").ranges()) == [
        (3 * 4096, 5 * 4096),
        (70 * 4096, 71 * 4096),
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda disk: disk.write(bytes(UNIT), offset=UNIT),
        lambda disk: disk.write_compressed(bytes(UNIT), offset=UNIT),
        lambda disk: disk.write_zeroes(offset=UNIT, length=UNIT),
        lambda disk: disk.write_zeroes(offset=UNIT, length=UNIT, unmap=True),
        lambda disk: disk.discard(offset=UNIT, length=UNIT),
    ],
    ids=["write", "write_compressed", "write_zeroes", "unmap", "discard"],
)
def test_every_kind_of_change_is_recorded(change: Any) -> None:
    rig = rig_with()
    change(rig.chain)
    rig.image.disk.close()
    assert dirty(rig) == [(UNIT, 2 * UNIT)]


def test_the_mark_is_durable_before_anything_changes() -> None:
    rig = rig_with()
    rig.chain.write(b"x", offset=0)
    assert rig.events[0] == IN_USE
    assert flags_of(rig) == {"b": BROKEN}
    names = [one.operation for one in rig.file.calls]
    assert names[: names.index("flush")].count("pwrite") == 1


def test_it_is_marked_once() -> None:
    rig = rig_with()
    for cluster in range(4):
        rig.chain.write(b"x", offset=cluster * 4096)
        rig.chain.flush()
    assert rig.events.count(IN_USE) == 1


def test_a_disk_that_is_not_changed_is_not_written() -> None:
    rig = rig_with(spec(), spec("off", flags=OFF))
    before = rig.memory.to_bytes()
    rig.chain.read(offset=0, length=4096)
    rig.chain.flush()
    rig.image.disk.close()
    assert rig.memory.to_bytes() == before
    assert rig.file.of("pwrite") == []


def test_a_disabled_bitmap_stays_as_it_is() -> None:
    rig = rig_with(spec(), spec("off", bits=b"\x02", flags=OFF))
    rig.chain.write(b"x", offset=0)
    assert flags_of(rig) == {"b": BROKEN, "off": OFF}
    rig.image.disk.close()
    assert flags_of(rig) == {"b": ON, "off": OFF}
    assert dirty(rig, "off") == [(4096, 8192)]


def test_an_inconsistent_bitmap_is_kept_and_records_nothing() -> None:
    rig = rig_with(spec(), spec("broken", bits=b"\x02", flags=BROKEN))
    rig.chain.write(b"x", offset=0)
    rig.image.disk.close()
    assert flags_of(rig) == {"b": ON, "broken": BROKEN}
    with pytest.raises(RequestError, match="bitmap 'broken' is inconsistent"):
        dirty(rig, "broken")
    assert verdict(rig) is Verdict.CLEAN


def test_without_a_clean_end_a_bitmap_is_inconsistent() -> None:
    rig = rig_with()
    rig.chain.write(b"x", offset=0)
    rig.chain.flush()
    again = Rig(storage=MemoryStorage(rig.memory.to_bytes()))
    with pytest.raises(RequestError, match="inconsistent"):
        again.image.disk.bitmap("b")


def test_opening_again_goes_on_with_what_was_stored() -> None:
    memory = MemoryStorage(build_qcow2(bitmaps=(spec(),)).to_bytes())
    for cluster in (1, 5, 9):
        rig = Rig(storage=memory)
        rig.chain.write(b"x", offset=cluster * 4096)
        rig.image.disk.close()
    again = Rig(storage=memory)
    wanted = [(cluster * 4096, (cluster + 1) * 4096) for cluster in (1, 5, 9)]
    assert list(again.image.disk.bitmap("b").ranges()) == wanted


def test_all_bitmaps_may_go_and_come_between_two_writers() -> None:
    memory = MemoryStorage(build_qcow2(version=3, bitmaps=(spec(),)).to_bytes())
    for name in ("b", "other"):
        rig = Rig(storage=memory)
        rig.chain.write(b"x", offset=0)
        rig.image.disk.close()
        editor = BitmapEditor(memory, load_qcow2_metadata(memory), budget=TRUSTED)
        assert [one.name for one in editor.entries] == [name]
        assert editor.bits(name).count == 1
        editor.remove(name)
        editor.commit()
        editor.add("other", granularity=4096)
        editor.commit()
    assert list(Rig(storage=memory).image.disk.bitmap("other").ranges()) == []


def test_stale_bitmaps_record_nothing_and_stay_stale() -> None:
    built = build_qcow2(bitmaps=(spec(),)).set_field("autoclear_features", 0)
    memory = MemoryStorage(built.to_bytes())
    rig = Rig(storage=memory)
    rig.chain.write(b"x", offset=0)
    rig.image.disk.close()
    metadata = load_qcow2_metadata(memory)
    assert metadata.bitmaps == ()
    assert "the bitmaps are stale and ignored" in metadata.warnings[0]
    assert IN_USE not in rig.events


def test_an_unknown_autoclear_bit_goes_and_that_of_the_bitmaps_stays() -> None:
    built = build_qcow2(bitmaps=(spec(),))
    built.set_field("autoclear_features", built.header.autoclear_features | 1 << 40)
    rig = Rig(built)
    rig.chain.write(b"x", offset=0)
    assert rig.events[:2] == ["autoclear bits before the first change", IN_USE]
    rig.image.disk.close()
    header = load_qcow2_metadata(rig.memory).header
    assert header.autoclear_features == built.header.autoclear_features
    assert dirty(rig) == [(0, 4096)]


def test_a_disk_without_bitmaps_pays_no_barrier_for_them() -> None:
    rig = Rig()
    rig.chain.write(b"x", offset=0)
    rig.image.disk.close()
    assert IN_USE not in rig.events
    assert "switch of the first cluster" not in rig.events


def test_the_old_bits_table_and_directory_are_given_back() -> None:
    memory = MemoryStorage(build_qcow2(bitmaps=(spec(bits=b"\x01"),)).to_bytes())
    sizes = set()
    for _ in range(6):
        rig = Rig(storage=memory)
        rig.chain.write(b"x", offset=0)
        rig.image.disk.close()
        sizes.add(memory.size())
    assert len(sizes) <= 3


def test_a_bitmap_that_became_clean_has_no_clusters_of_bits() -> None:
    rig = rig_with()
    rig.image.disk._bitmaps.begin()
    rig.image.disk.close()
    metadata = load_qcow2_metadata(rig.memory)
    assert rig.memory.pread(8, offset=metadata.bitmaps[0].table_offset) == bytes(8)


def test_entries_of_all_ones_are_read() -> None:
    built = build_qcow2(bitmaps=(spec(),))
    built.patch(built.places["bitmap_table"], 1)
    rig = Rig(built)
    assert list(rig.image.disk.bitmap("b").ranges()) == [(0, MiB)]


def test_bits_behind_the_end_of_the_file_are_corrupt() -> None:
    built = build_qcow2(bitmaps=(spec(),))
    built.patch(built.places["bitmap_table"], 1 << 30)
    with pytest.raises(CorruptMetadata, match="offset 0x40000000 lies behind the end of the file"):
        Rig(built)


@pytest.mark.parametrize("place", ["l2", "refcount_block"])
def test_a_directory_over_other_metadata_is_not_written(place: str) -> None:
    built = build_qcow2(bitmaps=(spec(),), clusters={0: b"data"})
    directory = built.data[built.places["bitmaps"] :][:32]
    built.patch(built.data.index(built.places["bitmaps"].to_bytes(8, "big")), built.places[place])
    built.patch(built.places[place], bytes(directory))
    rig = Rig(built)
    with pytest.raises(CorruptMetadata, match="overlaps the metadata that"):
        rig.chain.write(b"x", offset=MiB - 1)
    assert flags_of(rig) == {"b": ON}


def test_bitmaps_keep_to_the_budget() -> None:
    rig = rig_with(spec(shift=9), size=GiB)
    metadata = load_qcow2_metadata(rig.memory)
    with pytest.raises(BudgetExceeded, match="bitmap bytes: 262144 is above the limit of 4096"):
        load_bits(
            rig.memory,
            metadata.bitmaps[0],
            geometry=metadata.geometry,
            size=GiB,
            budget=Budget(metadata_bytes=4 * KiB),
        )


def test_growing_adds_what_is_dirty() -> None:
    rig = rig_with(spec(bits=b"\x01"), spec("off", bits=b"\x02", flags=OFF))
    rig.chain.resize(2 * MiB)
    rig.image.disk.close()
    assert dirty(rig) == [(0, 4096), (MiB, 2 * MiB)]
    assert dirty(rig, "off") == [(4096, 8192)]
    assert flags_of(rig) == {"b": ON, "off": OFF}
    assert verdict(rig) is Verdict.CLEAN


def test_shrinking_cuts_every_bitmap() -> None:
    full = b"\xff" * 32
    rig = rig_with(spec(bits=full), spec("off", bits=full, flags=OFF))
    rig.chain.resize(10 * 4096 - 512, shrink=True)
    rig.image.disk.close()
    assert dirty(rig) == dirty(rig, "off") == [(0, 10 * 4096 - 512)]
    assert verdict(rig) is Verdict.CLEAN


@pytest.mark.parametrize("size", [64 * MiB, 4 * KiB])
def test_a_table_of_another_length_is_made(size: int) -> None:
    rig = rig_with(spec(shift=9, bits=b"\x01"), size=16 * MiB, cluster_bits=9)
    rig.chain.resize(size, shrink=size < 16 * MiB)
    rig.image.disk.close()
    metadata = load_qcow2_metadata(rig.memory)
    assert metadata.bitmaps[0].table_entries == -(-size // (512 * 8 * 512))
    assert dirty(rig)[0] == (0, 512)
    assert verdict(rig) is Verdict.CLEAN


def test_a_resize_that_is_refused_changes_no_bitmap() -> None:
    rig = rig_with(spec(bits=b"\x01"))
    with pytest.raises(RequestError, match="shrinking"):
        rig.chain.resize(512)
    rig.image.disk.close()
    assert rig.file.of("pwrite") == []
    assert dirty(rig) == [(0, 4096)]
    assert flags_of(rig) == {"b": ON}


def test_a_disk_for_which_a_bitmap_would_be_too_long_is_refused() -> None:
    rig = rig_with(spec(shift=9), cluster_bits=16, size=MiB)
    with pytest.raises(RequestError, match="bitmap 'b' with a granularity of 512 bytes would take"):
        rig.chain.resize(4096 * GiB)


def test_lazy_refcounts_end_clean_with_bitmaps() -> None:
    rig = rig_with(lazy_refcounts=True, options=OpenOptions(lazy_refcounts=True))
    rng = random.Random(3)
    for _ in range(20):
        rig.chain.write(b"x" * 700, offset=rng.randrange(MiB - 700))
    rig.image.disk.close()
    assert not load_qcow2_metadata(rig.memory).dirty
    assert verdict(rig) is Verdict.CLEAN
    assert flags_of(rig) == {"b": ON}


def test_random_changes_are_recorded_to_the_granule() -> None:
    rng = random.Random(11)
    rig = rig_with(spec(shift=9), spec("coarse", shift=14))
    changed = RangeSet.empty()
    for _ in range(200):
        offset, length = rng.randrange(MiB - 20000), rng.choice((1, 512, 700, 4096, 20000))
        changed = changed.union(RangeSet.of([offset], [offset + length]))
        match rng.randrange(4):
            case 0:
                rig.chain.write_zeroes(offset=offset, length=length)
            case 1:
                rig.chain.discard(offset=offset, length=length)
            case _:
                rig.chain.write(rng.randbytes(length), offset=offset)
    rig.image.disk.close()
    for name, unit in (("b", 512), ("coarse", 1 << 14)):
        assert dirty(rig, name) == list(changed.scale_outward(unit).scale_up(unit).clip(0, MiB))


@pytest.mark.parametrize("operation", ["pwrite", "pread", "flush", "truncate"])
def test_whatever_fails_leaves_a_bitmap_that_tells_all_or_says_that_it_cannot(
    operation: str,
) -> None:
    raw = build_qcow2(bitmaps=(spec(),)).to_bytes()
    call, fired = 1, True
    while fired:
        memory = MemoryStorage(raw)
        faulty = FaultyStorage(memory, Fault(operation=operation, call=call, errno=28))
        with contextlib.suppress(QcowkitError):
            image = Rig(storage=faulty).image
            image.write(b"x", offset=8192)
            image.write(b"y" * 5000, offset=40000)
            image.disk.close()
        judge(memory)
        call, fired = call + 1, bool(faulty.fired)
    assert call > 2


def judge(memory: MemoryStorage) -> None:
    """The image is sound, and what has changed is in the bitmap if it can be relied on."""
    storage = MemoryStorage(memory.to_bytes())
    rig = Rig(storage=storage)
    content = rig.chain.read(offset=0, length=MiB)
    (entry,) = rig.metadata.bitmaps
    if not entry.in_use:
        recorded = rig.image.disk.bitmap("b").ranges()
        changed = [at for at in range(0, MiB, 512) if any(content[at : at + 512])]
        assert all(at in recorded for at in changed)
    layer = open_for_check(storage, format="qcow2")
    assert check_image(layer).verdict in (Verdict.CLEAN, Verdict.LEAKS)


def test_changes_of_several_threads_are_all_recorded() -> None:
    rig = rig_with(watch=False, size=4 * MiB)

    def write(number: int) -> None:
        for turn in range(32):
            rig.chain.write(b"x" * 100, offset=(turn * 8 + number) * 8192)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    rig.image.disk.close()
    wanted = {(turn * 8 + number) * 8192 for turn in range(32) for number in range(4)}
    assert {start for start, stop in dirty(rig)} == wanted
    assert all(stop - start == 4096 for start, stop in dirty(rig))
