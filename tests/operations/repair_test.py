"""The verb repair: plans that keep their word, results that say what was done."""

from __future__ import annotations

from typing import Any

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.engine.findings import Severity
from qcowkit.engine.repairs import KEPT_CHANGES, ChangeGroup, RepairMode
from qcowkit.errors import CorruptMetadata, QcowkitError, RequestError, UnsupportedFeature
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import Layer, open_layers
from qcowkit.image.registry import build_chain
from qcowkit.operations.check import Verdict, check_image, open_for_check
from qcowkit.operations.repair import RepairPlan, RepairResult, plan_repair, repair_image
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.faulty import FaultyStorage
from qcowkit.testing.qcow2_builder import BuiltImage
from qcowkit.testing.vhd_builder import VhdBuilder
from qcowkit.units import KiB, MiB
from tests.damage import (
    COPIED,
    DAMAGES,
    TWO,
    Damage,
    flip,
    host_of,
    make,
    set_count,
    set_word,
    spoil_snapshots,
)

ALL, LEAKS = RepairMode.ALL, RepairMode.LEAKS


def open_layer(image: BuiltImage | Storage, format: str = "qcow2") -> Layer:
    storage = MemoryStorage(image.to_bytes()) if isinstance(image, BuiltImage) else image
    return open_for_check(storage, format=format, for_repair=True)


def leaky(count: int = 2) -> BuiltImage:
    image = make()
    set_count(image, host_of(image, 0), count)
    return image


@pytest.fixture(params=DAMAGES.values(), ids=DAMAGES)
def damage(request: pytest.FixtureRequest) -> Damage:
    found: Damage = request.param
    return found


def read_clusters(raw: bytes, snapshot: str | None) -> list[bytes | None]:
    """The guest disk by pieces of 512 bytes; None where it cannot be read."""
    try:
        layers = open_layers(
            MemoryStorage(raw), format="qcow2", gate=ReferenceGate.deny_all(), budget=TRUSTED
        )
        chain = build_chain(layers, snapshot=snapshot)
    except QcowkitError:
        return []
    found: list[bytes | None] = []
    for offset in range(0, min(chain.size, 64 * KiB), 512):
        try:
            found.append(chain.read(offset=offset, length=512))
        except QcowkitError:
            found.append(None)
    return found


@pytest.mark.parametrize("snapshot", [None, "1", "2"])
def test_what_could_be_read_reads_the_same_after_a_repair(
    damage: Damage, snapshot: str | None
) -> None:
    raw = damage.make().to_bytes()
    storage = MemoryStorage(raw)
    repair_image(open_layer(storage), mode=ALL)
    before, after = read_clusters(raw, snapshot), read_clusters(storage.to_bytes(), snapshot)
    assert len(after) >= len(before)
    for old, new in zip(before, after, strict=False):
        assert old is None or old == new


def test_a_plan_writes_nothing_and_keeps_its_word(damage: Damage) -> None:
    raw = damage.make().to_bytes()
    storage = FaultyStorage(MemoryStorage(raw, writable=False))
    plan = plan_repair(open_layer(storage), mode=ALL)
    assert not set(storage.calls) & {"pwrite", "truncate", "zero", "allocate", "flush"}
    result = repair_image(open_layer(MemoryStorage(raw)), mode=ALL)
    assert plan.changes == result.changes
    assert plan.before == result.before
    assert plan.after == result.after


def test_the_check_after_a_repair_is_that_of_another_check(damage: Damage) -> None:
    storage = MemoryStorage(damage.make().to_bytes())
    result = repair_image(open_layer(storage), mode=ALL)
    found = check_image(open_for_check(storage, format="qcow2"))
    assert result.after.findings == found.findings
    assert result.after.as_json() | {"corruptions-fixed": 0, "leaks-fixed": 0} == (
        found.as_json() | {"corruptions-fixed": 0, "leaks-fixed": 0}
    )


def test_what_was_repaired_is_counted_in_the_json() -> None:
    image = leaky()
    set_count(image, host_of(image, 1), 0)
    found = repair_image(open_layer(image), mode=ALL).as_json()
    assert (found["corruptions-fixed"], found["leaks-fixed"]) == (1, 1)
    assert "corruptions" not in found
    assert found["check-errors"] == 0


def test_the_json_of_a_plan_says_what_is_and_what_would_be() -> None:
    image = make(cluster_bits=12)
    set_word(image, 0, COPIED | host_of(image, 0) + 0x200)
    set_count(image, host_of(image, 1), 0)
    found = plan_repair(open_layer(image), mode=ALL).as_json()
    assert (found["corruptions"], found["leaks"]) == (3, 1)
    assert found["repair"] == "all"
    assert found["planned-changes"] == {"raised": 1}
    assert found["would-remain"] == {"corruptions": 1, "leaks": 1}


def render(found: RepairPlan | RepairResult) -> list[str]:
    return list(found.render())


def test_the_text_tells_what_was_found_and_what_was_done() -> None:
    image = leaky(3)
    flip(image, 0, COPIED)
    host = host_of(image, 0)
    lines = render(repair_image(open_layer(image), mode=LEAKS))
    assert lines[0] == "<memory>: found 1 leak"
    assert lines[2:8] == [
        "COPIED flags corrected          1",
        f"  L2 table at host offset {image.places['l2']:#x}, entry 0: {host:#x} -> "
        f"{COPIED | host:#x}",
        "refcounts lowered               1",
        f"  cluster at host offset {host:#x}: refcount 3 -> 1",
        "",
        "afterwards: clean, nothing to repair",
    ]


def test_the_text_of_a_plan_says_that_it_is_one() -> None:
    lines = render(plan_repair(open_layer(leaky()), mode=ALL))
    assert lines[0] == ("<memory>: dry run, nothing is written; found 1 corruption and 1 leak")
    assert "refcounts lowered               1" in lines


def test_the_text_says_when_nothing_was_changed() -> None:
    assert render(repair_image(open_layer(make()), mode=ALL))[:3] == [
        "<memory>: found nothing wrong",
        "",
        "nothing was changed",
    ]
    assert "nothing would be changed" in render(plan_repair(open_layer(make()), mode=ALL))


def test_leaks_that_are_kept_are_explained() -> None:
    image = make(cluster_bits=12)
    set_word(image, 0, COPIED | host_of(image, 0) + 0x200)
    result = repair_image(open_layer(image), mode=LEAKS)
    assert result.after.verdict is Verdict.CORRUPT
    assert result.after.notes == (
        "leaks are kept: entries lead nowhere, and these clusters may be what they lost",
    )


def test_only_the_first_changes_of_a_kind_are_told_one_by_one() -> None:
    image = make()
    for host in range(0, KEPT_CHANGES * 512 + 2048, 512):
        set_count(image, host, 9)
    (group,) = repair_image(open_layer(image), mode=ALL).changes
    assert isinstance(group, ChangeGroup)
    assert (group.count, len(group.texts)) == (KEPT_CHANGES + 4, KEPT_CHANGES)
    assert list(group.render())[-1] == "  and 4 more"


def test_a_damaged_snapshot_table_is_among_what_was_found() -> None:
    image = make(snapshots=TWO)
    spoil_snapshots(image, extra=1500)
    plan = plan_repair(open_layer(image), mode=ALL)
    place = int.from_bytes(image.data[64:72], "big")
    assert str(plan.before.findings[0]) == (
        f"snapshot table at host offset {place:#x}: entry 1: 1500 bytes of extra data, expected "
        "16 to 1024"
    )
    assert plan.before.findings[0].severity is Severity.CORRUPTION
    assert plan.before.verdict is Verdict.CORRUPT


def test_only_a_repair_of_all_lets_a_damaged_snapshot_table_through() -> None:
    image = make(snapshots=TWO)
    spoil_snapshots(image, extra=1500)
    with pytest.raises(CorruptMetadata, match="1500 bytes of extra data, expected at most 1024"):
        open_for_check(MemoryStorage(image.to_bytes()), format="qcow2")


def test_an_image_that_was_opened_for_reading_is_not_repaired() -> None:
    layer = open_layer(MemoryStorage(leaky().to_bytes(), writable=False))
    with pytest.raises(RequestError, match=r"<memory>: opened for reading, expected for writing\Z"):
        repair_image(layer, mode=ALL)


@pytest.mark.parametrize("format", ["raw", "vpc"])
def test_other_formats_cannot_be_repaired(format: str) -> None:
    raw = bytes(4096) if format == "raw" else VhdBuilder(size=4 * MiB).build()
    layer = open_layer(MemoryStorage(raw), format)
    options: Any = {"mode": ALL}
    with pytest.raises(UnsupportedFeature, match=rf"repair: {format} images can be checked only"):
        repair_image(layer, **options)
