"""Bitmaps planned in memory and stored by one switch."""

from __future__ import annotations

from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.bitmaps import BitmapFlag
from qcowkit.codecs.qcow2.extensions import Extension
from qcowkit.engine.qcow2 import bitmap_edit
from qcowkit.engine.qcow2.bitmap_edit import BitmapEditor, default_granularity
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.errors import QcowkitError, RequestError
from qcowkit.extents.bits import GranuleBits
from qcowkit.operations.check import Verdict, check_image, open_for_check
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.faulty import Fault, FaultyStorage
from qcowkit.testing.qcow2_builder import BitmapSpec, build_qcow2
from qcowkit.units import GiB, KiB, MiB

BROKEN = BitmapSpec(name="broken", flags=int(BitmapFlag.IN_USE))


def memory_with(*bitmaps: BitmapSpec, **more: Any) -> MemoryStorage:
    more = {"version": 3, **more}
    return MemoryStorage(build_qcow2(bitmaps=bitmaps, **more).to_bytes())


def edit(storage: Any) -> BitmapEditor:
    return BitmapEditor(storage, load_qcow2_metadata(storage), budget=TRUSTED)


def marked(*ranges: tuple[int, int], size: int = MiB, shift: int = 16) -> GranuleBits:
    bits = GranuleBits(size=size, granularity_bits=shift)
    for start, length in ranges:
        bits.mark(start=start, length=length)
    return bits


def assert_clean(storage: MemoryStorage) -> None:
    result = check_image(open_for_check(storage, format="qcow2"))
    assert result.verdict is Verdict.CLEAN, "\n".join(result.render())


def test_a_new_bitmap_is_enabled_and_clean() -> None:
    memory = memory_with()
    editor = edit(memory)
    editor.add("b")
    editor.commit()
    (entry,) = load_qcow2_metadata(memory).bitmaps
    assert (entry.name, entry.flags) == ("b", int(BitmapFlag.AUTO))
    assert edit(memory).bits("b").count == 0
    assert_clean(memory)


@pytest.mark.parametrize(
    ("cluster", "wanted"), [(512, 4 * KiB), (64 * KiB, 64 * KiB), (2 * MiB, 64 * KiB)]
)
def test_the_granularity_is_that_of_the_clusters_within_bounds(cluster: int, wanted: int) -> None:
    assert default_granularity(cluster) == wanted


def test_the_last_bitmap_takes_the_extension_along() -> None:
    memory = memory_with(BitmapSpec(name="b", bits=b"\1"))
    editor = edit(memory)
    editor.remove("b")
    editor.commit()
    metadata = load_qcow2_metadata(memory)
    assert metadata.extensions.bitmaps is None
    assert metadata.warnings == ()
    assert_clean(memory)


def test_an_inconsistent_bitmap_can_only_be_removed() -> None:
    memory = memory_with(BROKEN, BitmapSpec(name="b"))
    editor = edit(memory)
    for change in (
        lambda: editor.clear("broken"),
        lambda: editor.enable("broken"),
        lambda: editor.enable("broken", enabled=False),
        lambda: editor.merge("broken", marked()),
        lambda: editor.bits("broken"),
    ):
        with pytest.raises(RequestError, match="bitmap 'broken' is inconsistent"):
            change()
    editor.remove("broken")
    editor.commit()
    assert [one.name for one in load_qcow2_metadata(memory).bitmaps] == ["b"]
    assert_clean(memory)


def test_a_bitmap_with_a_malformed_table_is_removed_and_leaks() -> None:
    built = build_qcow2(bitmaps=(BitmapSpec(name="b", bits=b"\1"),))
    memory = MemoryStorage(built.patch(built.places["bitmap_table"], 1 << 60).to_bytes())
    editor = edit(memory)
    editor.remove("b")
    editor.commit()
    assert load_qcow2_metadata(memory).bitmaps == ()
    result = check_image(open_for_check(memory, format="qcow2"))
    assert result.verdict is Verdict.LEAKS


def test_enabling_and_disabling_keep_the_bits() -> None:
    memory = memory_with(BitmapSpec(name="b", bits=b"\5"))
    for enabled in (False, True):
        editor = edit(memory)
        editor.enable("b", enabled=enabled)
        editor.commit()
        (entry,) = load_qcow2_metadata(memory).bitmaps
        assert entry.auto is enabled
        assert edit(memory).bits("b").count == 2
        assert_clean(memory)


@pytest.mark.parametrize("enabled", [True, False])
def test_what_changes_nothing_writes_nothing(enabled: bool) -> None:
    memory = memory_with(BitmapSpec(name="b", flags=int(enabled) * int(BitmapFlag.AUTO)))
    before = memory.to_bytes()
    editor = edit(memory)
    editor.enable("b", enabled=enabled)
    editor.commit()
    assert memory.to_bytes() == before


def test_clearing_leaves_nothing_dirty() -> None:
    memory = memory_with(BitmapSpec(name="b", bits=b"\5"))
    editor = edit(memory)
    editor.clear("b")
    editor.commit()
    assert edit(memory).bits("b").count == 0
    assert_clean(memory)


@pytest.mark.parametrize("shift", [9, 16, 20])
def test_a_merge_widens_to_the_granularity_of_the_target(shift: int) -> None:
    memory = memory_with(BitmapSpec(name="b", bits=b"\1"))
    editor = edit(memory)
    editor.merge("b", marked((200 * KiB, 1), shift=shift))
    editor.commit()
    found = edit(memory).bits("b").ranges()
    assert all(start >= 0 and stop <= MiB for start, stop in found)
    assert 0 in found
    assert 200 * KiB in found


def test_a_bitmap_of_another_disk_size_is_not_merged() -> None:
    editor = edit(memory_with(BitmapSpec(name="b")))
    with pytest.raises(RequestError, match="is of a disk of 1048576 bytes, the source of one of"):
        editor.merge("b", marked(size=2 * MiB))


def test_plans_are_seen_by_later_ones() -> None:
    memory = memory_with()
    editor = edit(memory)
    editor.add("one", granularity=512)
    editor.merge("one", marked((0, 1)))
    editor.add("two")
    editor.merge("two", editor.bits("one"))
    editor.remove("one")
    editor.commit()
    assert [one.name for one in load_qcow2_metadata(memory).bitmaps] == ["two"]
    assert list(edit(memory).bits("two").ranges()) == [(0, 64 * KiB)]


@pytest.mark.pinned("the granularity of clusters of 4 KiB")
def test_without_a_word_a_bit_is_a_cluster() -> None:
    editor = edit(memory_with())
    editor.add("b")
    assert editor.entries[0].granularity == 4 * KiB


def test_many_bitmaps_take_a_directory_of_several_clusters() -> None:
    memory = memory_with(cluster_bits=9)
    editor = edit(memory)
    for number in range(40):
        editor.add(f"{'b' * 200}{number}")
    editor.commit()
    assert len(load_qcow2_metadata(memory).bitmaps) == 40
    assert_clean(memory)
    editor = edit(memory)
    for number in range(0, 40, 2):
        editor.remove(f"{'b' * 200}{number}")
    editor.commit()
    assert len(load_qcow2_metadata(memory).bitmaps) == 20
    assert_clean(memory)


def test_a_stale_extension_is_replaced() -> None:
    built = build_qcow2(bitmaps=(BitmapSpec(name="stale"),))
    memory = MemoryStorage(built.set_field("autoclear_features", 0).to_bytes())
    assert load_qcow2_metadata(memory).bitmaps == ()
    editor = edit(memory)
    editor.add("new")
    editor.commit()
    metadata = load_qcow2_metadata(memory)
    assert [one.name for one in metadata.bitmaps] == ["new"]
    assert metadata.warnings == ()


@pytest.mark.parametrize(
    ("name", "granularity", "message"),
    [
        ("there", None, "there is a bitmap 'there' already"),
        ("", None, "the bitmap name has 0 bytes, expected 1 to 1023"),
        ("ä" * 512, None, "the bitmap name has 1024 bytes, expected 1 to 1023"),
        ("\udc80", None, r"bitmap name '\\udc80' cannot be written as UTF-8"),
        ("b", 256, "granularity 256 is not a power of two from 512 bytes to 2 GiB"),
        ("b", 5000, "granularity 5000 is not a power of two"),
        ("b", 4 * GiB, "granularity 4294967296 is not a power of two"),
        ("b", 0, "granularity 0 is not a power of two"),
    ],
)
def test_what_cannot_be_added_is_refused_by_name(
    name: str, granularity: int | None, message: str
) -> None:
    editor = edit(memory_with(BitmapSpec(name="there")))
    with pytest.raises(RequestError, match=message):
        editor.add(name, granularity=granularity)


def test_version_2_images_hold_none() -> None:
    editor = edit(memory_with(version=2))
    with pytest.raises(RequestError, match="version 2 images"):
        editor.add("b")


def test_too_many_bits_are_refused() -> None:
    editor = edit(memory_with(size=4096 * GiB, cluster_bits=16))
    with pytest.raises(RequestError, match="would take 1073741824 bytes for a disk of"):
        editor.add("b", granularity=512)


def test_more_bitmaps_than_the_format_counts_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(bitmap_edit, "MAX_BITMAPS", 2)
    editor = edit(memory_with(BitmapSpec(name="one"), BitmapSpec(name="two")))
    with pytest.raises(RequestError, match="the image has 2 bitmaps, the most there can be"):
        editor.add("three")


def test_a_name_that_is_not_there_is_named() -> None:
    editor = edit(memory_with())
    with pytest.raises(RequestError, match="there is no bitmap 'b'"):
        editor.remove("b")


def test_where_the_header_has_no_room_nothing_changes() -> None:
    # Extensions that reach into the second sector, and a name behind them.
    unknown = [Extension(type=0x1234, data=bytes(500))]
    memory = memory_with(cluster_bits=10, unknown=unknown, backing_name="base" * 50)
    editor = edit(memory)
    editor.add("b")
    with pytest.raises(RequestError, match="the first cluster has no room"):
        editor.commit()
    assert load_qcow2_metadata(memory).bitmaps == ()
    assert_clean(memory)


@pytest.mark.parametrize("operation", ["pwrite", "pread", "flush", "truncate"])
def test_whatever_fails_leaves_all_bitmaps_as_they_were_or_as_they_were_to_be(
    operation: str,
) -> None:
    raw = memory_with(BitmapSpec(name="one", bits=b"\1"), BitmapSpec(name="two")).to_bytes()
    call, fired = 1, True
    seen = set()
    while fired:
        memory = MemoryStorage(raw)
        faulty = FaultyStorage(memory, Fault(operation=operation, call=call, errno=28))
        try:
            editor = edit(faulty)
            editor.remove("one")
            editor.add("three")
            editor.merge("three", marked((0, 1)))
            editor.commit()
        except QcowkitError:
            pass
        names = tuple(one.name for one in load_qcow2_metadata(memory).bitmaps)
        assert names in (("one", "two"), ("two", "three"))
        assert edit(memory).bits(names[0] if names[0] == "one" else "three").count > 0
        result = check_image(open_for_check(memory, format="qcow2"))
        assert result.verdict in (Verdict.CLEAN, Verdict.LEAKS)
        seen.add(names)
        call, fired = call + 1, bool(faulty.fired)
    assert ("two", "three") in seen
