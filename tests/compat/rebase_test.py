"""`qcow rebase` beside `qemu-img rebase`: the same disk over the same new base."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.command import qcow
from tests.peers import run_peer

pytestmark = [
    pytest.mark.peer("qemu-img", "qemu-io"),
    pytest.mark.pinned("the matrix says every option"),
]

OPTIONS = ("cluster_size=64k", "cluster_size=4k", "extended_l2=on", "compat=0.10")
# Sizes of the old base and of the new one; none for no base. The image has 4 MiB.
CASES = {
    "same size": ("4M", "4M"),
    "shorter": ("4M", "1M"),
    "longer": ("1M", "6M"),
    "to nothing": ("4M", None),
    "from nothing": (None, "4M"),
}


def scribble(path: Path, format: str, *, seed: int, size: int) -> None:
    """Through qemu-io: the peer's own writes."""
    rng = random.Random(seed)
    for _ in range(6):
        length = rng.choice((512, 4096, 69632))
        offset = rng.randrange(0, size - length, 512)
        verb = rng.choice((f"write -P {rng.randrange(1, 255)}", "write -z"))
        run_peer("qemu-io", "-f", format, "-c", f"{verb} {offset} {length}", path)


def make(folder: Path, case: str, options: str) -> tuple[Path, list[str]]:
    """An image over its old base, and the flags that name the new one."""
    folder.mkdir()
    old, new = CASES[case]
    for name, format, size, seed in (("old", "raw", old, 1), ("new", "qcow2", new, 2)):
        if size is not None:
            run_peer("qemu-img", "create", "-q", "-f", format, folder / name, size)
            scribble(folder / name, format, seed=seed, size=1 << 20)
    top = folder / "top.qcow2"
    backing = ("-b", "old", "-F", "raw") if old is not None else ()
    run_peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, top, "4M")
    scribble(top, "qcow2", seed=3, size=4 << 20)
    flags = ["-b", str(folder / "new"), "-F", "qcow2"] if new is not None else ["-b", ""]
    return top, flags


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_both_show_the_same_disk_as_before(tmp_path: Path, case: str, options: str) -> None:
    ours, our_flags = make(tmp_path / "ours", case, options)
    theirs, their_flags = make(tmp_path / "theirs", case, options)
    before = tmp_path / "before.raw"
    run_peer("qemu-img", "convert", "-O", "raw", ours, before)
    qcow("rebase", "-q", *our_flags, ours)
    run_peer("qemu-img", "rebase", "-q", *their_flags, theirs)
    # There qemu leaves zeros unallocated, and the new base shows in their place.
    lost = case == "from nothing" and options == "compat=0.10"
    for image in (ours,) if lost else (ours, theirs):
        run_peer("qemu-img", "compare", "-q", "-F", "raw", image, before)
        qcow("compare", "-q", "-F", "raw", image, before)
        qcow("check", "-q", image)
        run_peer("qemu-img", "check", "-q", image)
    # What qemu leaves out we leave out as well; zeros need no data.
    assert lost or ours.stat().st_blocks <= theirs.stat().st_blocks + 1024


@pytest.mark.parametrize("options", OPTIONS)
def test_qemu_reads_the_name_that_we_write(tmp_path: Path, options: str) -> None:
    top, flags = make(tmp_path / "one", "same size", options)
    qcow("rebase", "-q", "-u", *flags, top)
    assert f"backing file: {flags[1]}" in run_peer("qemu-img", "info", top)
    assert "backing file format: qcow2" in run_peer("qemu-img", "info", top)
    run_peer("qemu-img", "rebase", "-q", "-u", "-b", "old", "-F", "raw", top)
    qcow("rebase", "-q", "-b", "", top)
    assert "backing file" not in run_peer("qemu-img", "info", top)
