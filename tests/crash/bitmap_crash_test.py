"""Power cuts while bitmaps record, and while they are changed: a bitmap tells all that has changed
or says that it is inconsistent; a change of bitmaps is there wholly or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcowkit.engine.events import QCOW2_BITMAP_BARRIERS
from qcowkit.engine.qcow2.bitmap_edit import BitmapEditor
from qcowkit.engine.qcow2.metadata import load_qcow2_metadata
from qcowkit.errors import QcowkitError
from qcowkit.extents.bits import GranuleBits
from qcowkit.image.lineage import Layer
from qcowkit.operations.check import Verdict, check_image
from qcowkit.storage.memory import MemoryStorage
from qcowkit.storage.protocol import Storage
from qcowkit.testing.crash_disks import DiskKind
from qcowkit.testing.crash_run import CrashPlan, judge_run
from qcowkit.testing.crash_states import iter_crash_states
from qcowkit.testing.crash_storage import Content, CrashFiles
from qcowkit.testing.crash_workload import USUAL, Plan, run_guest
from qcowkit.testing.mutation import without_barrier
from qcowkit.testing.qcow2_builder import BitmapSpec, build_qcow2
from qcowkit.units import KiB, align_up
from tests.crash.bitmap_kinds import KINDS, TellsAllChanges, bitmaps_of, edit
from tests.crash.crash_matrix import repair

pytestmark = pytest.mark.pinned("its kinds of images are its own")
PLANS = (
    Plan(operations=30, weights={**USUAL, "reopen": 20, "resize": 0}),
    Plan(operations=30, weights={**USUAL, "reopen": 12, "resize": 20, "discard": 20}),
)


def violations(kind: DiskKind, plan: Plan, *, seed: int, budget: int) -> tuple[object, ...]:
    recorded = run_guest(kind, seed=seed, plan=plan)
    crash = CrashPlan(
        workload=plan,
        budget=budget,
        recover=4,
        again=0,
        repair=repair,
        extra=[TellsAllChanges(kind, plan, closed=recorded.closed)],
    )
    return judge_run(kind, recorded, seed=seed, plan=crash).violations


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("plan", PLANS, ids=["reopening", "resizing"])
def test_a_bitmap_tells_all_or_says_that_it_cannot(name: str, plan: Plan) -> None:
    for seed in range(2):
        found = violations(KINDS[name], replace(plan, closing=1), seed=seed, budget=70)
        assert found == (), f"seed {seed}: {found[0]}"


@pytest.mark.soak
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", range(100, 110))
def test_many_crashes_leave_no_bitmap_too_clean(name: str, seed: int) -> None:
    for plan in PLANS:
        assert violations(KINDS[name], plan, seed=seed, budget=400) == ()


@pytest.mark.parametrize("name", QCOW2_BITMAP_BARRIERS)
def test_the_barrier_before_the_first_change_is_missed(name: str) -> None:
    kind, plan = KINDS["written in place"], Plan(operations=8, weights={"write": 4, "reopen": 1})
    with without_barrier(name):
        found = [one for seed in range(4) for one in violations(kind, plan, seed=seed, budget=150)]
    assert any("does not tell" in str(one) for one in found)


# Changes of the bitmaps themselves


def change(editor: BitmapEditor) -> None:
    editor.remove("first")
    editor.clear("second")
    editor.enable("third", enabled=False)
    editor.add("fourth", granularity=512)
    bits = GranuleBits(size=128 * KiB, granularity_bits=9)
    bits.mark(start=1000, length=70 * KiB)
    editor.merge("fourth", bits)
    editor.commit()


Told = dict[str, tuple[int, list[tuple[int, int]]]]


def told(storage: Storage) -> Told:
    flags = {one.name: one.flags for one in load_qcow2_metadata(storage).bitmaps}
    found = bitmaps_of(storage)
    return {
        name: (flags[name], [] if bits is None else list(bits.ranges()))
        for name, bits in found.items()
    }


@pytest.mark.parametrize("bits", [9, 12, 16])
@pytest.mark.parametrize("name", ["", "base" * 40])
def test_a_change_of_bitmaps_is_there_wholly_or_not_at_all(bits: int, name: str) -> None:
    specs = [BitmapSpec(name=one, bits=b"\x0f", granularity_bits=12) for one in ("first", "second")]
    specs.append(BitmapSpec(name="third", bits=b"\x01", granularity_bits=14))
    built = build_qcow2(size=128 * KiB, cluster_bits=bits, bitmaps=specs, backing_name=name or None)
    raw = built.to_bytes()
    raw = raw.ljust(align_up(len(raw), built.header.cluster_size), b"\0")
    before, done = told(MemoryStorage(raw)), MemoryStorage(raw)
    change(edit(done))
    after = told(done)
    files = CrashFiles([Content.of(raw)])
    change(edit(files.open()))
    seen = []
    for state in iter_crash_states(files, seed=1, budget=150):
        left = MemoryStorage(state.contents[0].to_bytes())
        try:
            seen.append(told(left))
            layer = Layer(storage=left, metadata=load_qcow2_metadata(left))
            verdict = check_image(layer).verdict
        except QcowkitError as error:
            pytest.fail(f"{state.label}: {error}")
        assert seen[-1] in (before, after), state.label
        assert verdict in (Verdict.CLEAN, Verdict.LEAKS), state.label
    assert before in seen
    assert after in seen
