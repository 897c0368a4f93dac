"""Rebase: the disk stays, its base changes; what is copied, compared, and refused."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from qcowkit.errors import Cancelled, RequestError, UnsupportedFeature
from qcowkit.extents.table import Flag
from qcowkit.operations.pairs import unequal_units
from qcowkit.operations.rebase import NewBase, Rebased, RebaseOptions, rebase_layers
from qcowkit.testing.crash_effects import Content
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.units import KiB
from tests.chain_disks import (
    EXTENDED,
    OPENING,
    QCOW2,
    RAW,
    SMALL,
    TINY,
    VHD,
    Kind,
    content,
    faults_of,
    layers_of,
    make_chain,
    open_disk,
    scribble,
)

pytestmark = pytest.mark.pinned("its kinds of images are its own")

LONG, SHORT = 200 * KiB, 72 * KiB
WIDE = Kind(options={"cluster_size": 64 * KiB})
OLD: dict[str, tuple[Kind, ...]] = {
    "raw": (QCOW2, RAW),
    "vhd": (QCOW2, VHD),
    "wide": (WIDE, QCOW2),
    "subclusters": (Kind(options=EXTENDED), QCOW2, RAW),
    "version 2": (Kind(options={"compat": "0.10", **SMALL}), QCOW2),
    "lazy": (Kind(options={"lazy_refcounts": True, **SMALL}), QCOW2),
    "nothing": (QCOW2,),
    "nothing, version 2": (Kind(options={"compat": "0.10", **SMALL}),),
    "short": (QCOW2, replace(RAW, size=SHORT)),
    "long": (Kind(options=TINY), replace(QCOW2, size=LONG)),
    "longer top": (Kind(size=LONG, options=SMALL), QCOW2),
}
NEW: dict[str, tuple[Kind, ...]] = {
    "raw": (RAW,),
    "chain": (Kind(options=TINY), VHD),
    "nothing": (),
    "short": (replace(QCOW2, size=SHORT),),
    "long": (replace(RAW, size=LONG),),
}


def make(old: Sequence[Kind], new: Sequence[Kind], *, seed: int = 1, count: int = 12) -> CrashFiles:
    """The files of the old chain, top first, then those of the new base's."""
    files = make_chain(old, seed=seed, count=count)
    others = make_chain(new, seed=seed + 50, count=count) if new else CrashFiles([])
    return CrashFiles([*files.live, *others.live], names=[*files.names, *others.names])


def parts(
    files: CrashFiles, old: Sequence[Kind], new: Sequence[Kind]
) -> tuple[CrashFiles, Sequence[Kind]]:
    """The image over its new base."""
    chosen = [files.live[0], *files.live[len(old) :]]
    return files.like(chosen), (old[0], *new)


def rebase(
    files: CrashFiles,
    old: Sequence[Kind],
    new: Sequence[Kind],
    *,
    compress: bool = False,
    cancel: threading.Event | None = None,
) -> Rebased:
    kinds = [*old, *new]
    depths = range(len(old), len(kinds))
    return rebase_layers(
        tuple(layers_of(files, kinds, writable=(0,), depths=range(len(old)))),
        tuple(layers_of(files, kinds, depths=depths)),
        NewBase(name="new base", format=new[0].format) if new else NewBase(name=None),
        opening=OPENING,
        options=RebaseOptions(compress=compress, threads=1),
        cancel=cancel,
    )


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("new_name", NEW)
@pytest.mark.parametrize("old_name", OLD)
def test_the_disk_shows_the_same_over_another_base(
    old_name: str, new_name: str, compress: bool
) -> None:
    old, new = OLD[old_name], NEW[new_name]
    for seed in range(2):
        files = make(old, new, seed=seed)
        before = content(files, old)
        others = [one.to_bytes() for one in files.live[1:]]
        rebase(files, old, new, compress=compress)
        assert content(*parts(files, old, new)) == before
        assert faults_of(*parts(files, old, new)) == []
        assert [one.to_bytes() for one in files.live[1:]] == others
        metadata = layers_of(files, old)[0].metadata
        names = [one.names for one in metadata.references]
        assert names == ([("new base",)] if new else [])


def test_the_same_content_needs_no_copies() -> None:
    old = (QCOW2, RAW)
    files = make_chain(old)
    files = CrashFiles([*files.live, files.live[1].copy()])
    done = rebase(files, old, (RAW,))
    assert (done.copied, done.zeroed) == (0, 0)
    assert done.compared > 0


def test_what_lies_above_a_shared_ancestor_is_copied_and_the_rest_is_not_even_read() -> None:
    old = (QCOW2, QCOW2, RAW)
    files = make_chain(old, count=0)
    with open_disk(files, old, depth=2, writable=True) as disk:
        disk.write(b"\1" * disk.size, offset=0)
    with open_disk(files, old, depth=1, writable=True) as disk:
        disk.write(b"\2" * 4096, offset=8192)
    before = content(files, old)
    layers = layers_of(files, old, writable=(0,))
    # The very same open file below both.
    new = (layers[2],)
    done = rebase_layers(tuple(layers), new, NewBase(name="base", format="raw"), opening=OPENING)
    assert (done.copied, done.zeroed, done.compared) == (4096, 0, 4096)
    assert content(files.like([files.live[0], files.live[2]]), (QCOW2, RAW)) == before


def test_only_the_subclusters_that_differ_are_copied() -> None:
    old, new = (Kind(options=EXTENDED), RAW), (RAW,)
    files = make_chain(old, count=0)
    other = bytearray(files.live[1].to_bytes())
    other[4096 : 4096 + 10] = b"x" * 10
    files = CrashFiles([*files.live, Content.of(bytes(other))])
    with open_disk(files, old, depth=1, writable=True) as disk:
        disk.write(b"y", offset=4100)
    done = rebase(files, old, new)
    assert (done.copied, done.zeroed) == (512, 0)


def test_zeros_of_the_old_base_become_zeros_without_data() -> None:
    old, new = (QCOW2, RAW), (RAW,)
    files = make_chain(old, count=0)
    files = CrashFiles([*files.live, Content.of(b"\1" * QCOW2.size)])
    done = rebase(files, old, new)
    assert (done.copied, done.zeroed) == (0, QCOW2.size)


def test_compressed_copies_are_compressed() -> None:
    old, new = (QCOW2, RAW), ()
    files = make_chain(old, count=0)
    with open_disk(files, old, depth=1, writable=True) as disk:
        disk.write(b"text " * 13000, offset=0)
    rebase(files, old, new, compress=True)
    with open_disk(*parts(files, old, new)) as disk:
        table = disk.extents(start=0, length=60 * KiB)
        assert bool((table.flags & Flag.COMPRESSED).all())


def test_the_disk_can_be_rebased_again_and_back() -> None:
    old, new = (QCOW2, RAW), (VHD,)
    files = make(old, new)
    before = content(files, old)
    rebase(files, old, new)
    back = files.like([files.live[0], files.live[2], files.live[1]])
    rebase(back, (QCOW2, VHD), (RAW,))
    assert content(back.like([back.live[0], back.live[2]]), old) == before


def test_internal_snapshots_are_refused() -> None:
    old, new = (QCOW2, RAW), (RAW,)
    files = make(old, new)
    layers = layers_of(files, old, writable=(0,))
    top = replace(layers[0], metadata=replace(layers[0].metadata, snapshots=(object(),)))
    with pytest.raises(RequestError, match="has 1 internal snapshots, which show the base too"):
        rebase_layers((top, layers[1]), (), NewBase(name=None), opening=OPENING)
    assert files.effects == []


def test_a_base_that_nobody_declared_is_not_copied_from() -> None:
    old = (QCOW2, RAW)
    files = make_chain(old)
    top, base = layers_of(files, old, writable=(0,))
    layers = (top, replace(base, format_probed=True))
    with pytest.raises(RequestError, match="declare it first"):
        rebase_layers(layers, (), NewBase(name=None), opening=OPENING)
    assert files.effects == []


def test_other_formats_keep_their_base() -> None:
    files = make_chain((VHD,))
    with pytest.raises(UnsupportedFeature, match="vpc images keep their base"):
        rebase(files, (VHD,), ())


@pytest.mark.parametrize(
    ("base", "text"),
    [
        (NewBase(name="a"), "the format of the backing file 'a' is missing"),
        (NewBase(name=None, format="raw"), "a format of the backing file needs a backing file"),
        (NewBase(name="a", format="ext4"), "'ext4' is not the name of a known format"),
        (NewBase(name="a\n", format="raw"), "backing file name 'a\\\\n' has control characters"),
        (NewBase(name="a" * 1024, format="raw"), "backing file name of 1024 bytes is longer"),
    ],
)
def test_what_no_header_can_say_is_refused(base: NewBase, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        base.check()


def test_what_was_cancelled_shows_the_same_over_the_old_base() -> None:
    old, new = (QCOW2, RAW), (VHD,)
    files = make(old, new)
    before = content(files, old)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        rebase(files, old, new, cancel=cancel)
    assert content(files, old) == before
    assert faults_of(files.like(files.live[:2]), old) == []


def test_units_are_compared_each_by_itself() -> None:
    rng = random.Random(1)
    raw = bytearray(rng.randbytes(5000))
    left = np.frombuffer(bytes(raw), dtype=np.uint8)
    raw[512] ^= 1
    raw[4999] ^= 1
    right = np.frombuffer(bytes(raw), dtype=np.uint8)
    found = unequal_units(left, right, 512).tolist()
    assert found == [index in (1, 9) for index in range(10)]


def test_writes_that_follow_show_nothing_of_the_new_base() -> None:
    old, new = (WIDE, RAW), (RAW,)
    files = make(old, new)
    rebase(files, old, new)
    moved, kinds = parts(files, old, new)
    before = content(moved, kinds)
    with open_disk(moved, kinds, writable=True) as disk:
        disk.write(b"z" * 512, offset=70 * KiB)
    after = bytearray(before)
    after[70 * KiB : 70 * KiB + 512] = b"z" * 512
    assert content(moved, kinds) == after
    scribble(moved, kinds, random.Random(3))
    assert faults_of(moved, kinds) == []


def test_a_name_without_room_is_refused_before_anything_is_copied() -> None:
    old, new = (Kind(options=TINY), RAW), (RAW,)
    files = make(old, new)
    kinds = [*old, *new]
    with pytest.raises(RequestError, match="but a cluster has 512"):
        rebase_layers(
            tuple(layers_of(files, kinds, writable=(0,), depths=range(2))),
            tuple(layers_of(files, kinds, depths=[2])),
            NewBase(name="n" * 500, format="raw"),
            opening=OPENING,
        )
    assert files.effects == []
