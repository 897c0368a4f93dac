"""`qcow commit` beside `qemu-img commit`: the same base, the same view through the top."""

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

CASES = {
    "raw": ("raw", "", "4M", "4M"),
    "qcow2": ("qcow2", "", "4M", "4M"),
    "longer top": ("qcow2", "cluster_size=4k", "4M", "6M"),
    "longer base": ("raw", "", "6M", "4M"),
    "subclusters": ("qcow2", "extended_l2=on", "4M", "4M"),
    "vhd": ("vpc", "force_size=on", "4M", "4M"),
}


def scribble(path: Path, format: str, *, seed: int, size: int) -> None:
    """Through qemu-io: the peer's own writes."""
    rng = random.Random(seed)
    for _ in range(8):
        length = rng.choice((512, 4096, 70000 // 512 * 512))
        offset = rng.randrange(0, size - length, 512)
        verb = rng.choice((f"write -P {rng.randrange(1, 255)}", "write -z"))
        run_peer("qemu-io", "-f", format, "-c", f"{verb} {offset} {length}", path)


def make(folder: Path, case: str, *, seed: int) -> tuple[Path, Path]:
    format, options, base_size, top_size = CASES[case]
    folder.mkdir()
    base, top = folder / "base", folder / "top.qcow2"
    words = ["-o", options] if options else []
    run_peer("qemu-img", "create", "-q", "-f", format, *words, base, base_size)
    scribble(base, format, seed=seed, size=4 << 20)
    words = ["-o", "extended_l2=on"] if "extended" in options else []
    backing = ("-b", "base", "-F", format)
    run_peer("qemu-img", "create", "-q", "-f", "qcow2", *words, *backing, top, top_size)
    scribble(top, "qcow2", seed=seed + 100, size=4 << 20)
    return base, top


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", CASES)
def test_both_leave_the_same_base_and_the_same_view(tmp_path: Path, case: str, seed: int) -> None:
    format = CASES[case][0]
    ours = make(tmp_path / "ours", case, seed=seed)
    theirs = make(tmp_path / "theirs", case, seed=seed)
    qcow("commit", "-q", ours[1])
    run_peer("qemu-img", "commit", "-q", theirs[1])
    for one, other, kind in zip(ours, theirs, (format, "qcow2"), strict=True):
        run_peer("qemu-img", "compare", "-q", "-f", kind, "-F", kind, one, other)
        if kind == "qcow2":
            run_peer("qemu-img", "check", "-q", one)
    assert (
        qcow("info", "--output=json", ours[0]).json()["virtual-size"]
        == (qcow("info", "--output=json", theirs[0]).json()["virtual-size"])
    )


def test_qemu_goes_on_with_an_overlay_that_we_emptied(tmp_path: Path) -> None:
    _, top = make(tmp_path / "one", "qcow2", seed=3)
    qcow("commit", "-q", top)
    run_peer("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 128k", top)
    run_peer("qemu-img", "check", "-q", top)
    run_peer("qemu-img", "commit", "-q", top)
    qcow("check", "-q", top)
    qcow("io", "-c", "read -q -P 7 1M 128k", top)
