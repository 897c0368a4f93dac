"""Locks that we and qemu's tools both understand: who keeps whom out, both ways, and races."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcowkit.budget import TRUSTED
from qcowkit.errors import ImageBusy
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import close_layers, open_layers
from qcowkit.storage.atomic import AtomicOutput
from qcowkit.storage.file import FileStorage
from qcowkit.storage.locking import Role, acquire
from tests.command import qcow
from tests.locks import held_bytes
from tests.peers import peer, run_peer

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

FORMATS = ("qcow2", "vpc", "raw")
DISK = "disk"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(format: str, path: str = DISK, *options: str) -> str:
    run_peer("qemu-img", "create", "-q", "-f", format, *options, path, "1M")
    return path


def start_qemu(*arguments: str) -> subprocess.Popen[bytes]:
    """qemu-io with these arguments; `is_in` says whether it could open the image."""
    return subprocess.Popen(
        [peer("qemu-io"), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
    )


def is_in(child: subprocess.Popen[bytes]) -> bool:
    """Whether it answers; one that could not open the image has said why and ended."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(b"length\n")
    except BrokenPipeError:
        return False
    return b"MiB" in child.stdout.readline()


@contextmanager
def held_by_qemu(format: str, path: str = DISK, *flags: str) -> Iterator[None]:
    """qemu-io has the image open; for writing, unless the flags say something else."""
    with start_qemu(*flags, "-f", format, path) as child:
        assert is_in(child)
        yield
        child.communicate(b"quit\n", timeout=60)


@contextmanager
def held_by_us(format: str, path: str = DISK, *, writable: bool) -> Iterator[None]:
    """Our library has the image open."""
    layers = open_layers(
        path, format=format, gate=ReferenceGate.below_image(), budget=TRUSTED, writable=writable
    )
    try:
        yield
    finally:
        close_layers(layers)


def verbs(format: str, path: str = DISK) -> dict[str, list[str]]:
    """Every verb that reads, with what it needs behind its flags."""
    one = ["-f", format, path]
    found = {
        "info": one,
        "map": one,
        "check": one,
        "compare": ["-f", format, "-F", format, path, path],
        "convert": [*one, "-O", "qcow2", "out"],
        "measure": [*one, "-O", "qcow2"],
        "dd": ["-f", format, "-O", "raw", f"if={path}", "of=out"],
        "headers": one,
    }
    if format == "raw":
        del found["check"]
    return found


CASES = [(format, verb) for format in FORMATS for verb in verbs(format)]
QEMU_CASES = [
    (format, verb) for format in ("qcow2", "vpc") for verb in verbs(format) if verb != "headers"
]
# Theirs has no check of a VHD.
QEMU_CASES.remove(("vpc", "check"))


def failed(verb: str) -> int:
    return 2 if verb == "compare" else 1


# They hold it


@pytest.mark.parametrize(("format", "verb"), CASES)
def test_what_qemu_writes_is_read_with_force_share_only(format: str, verb: str) -> None:
    make(format)
    words = verbs(format)[verb]
    with held_by_qemu(format):
        done = qcow(verb, *words, code=failed(verb))
        assert done.err == (
            f"qcow {verb}: {DISK}: is open for writing elsewhere (see -U to read it all the same)\n"
        )
        assert not Path("out").exists()
        qcow(verb, "-U", *words)
    qcow(verb, *words)


@pytest.mark.parametrize("verb", verbs("qcow2"))
def test_what_qemu_only_reads_is_read_by_us_too(verb: str) -> None:
    make("qcow2")
    with held_by_qemu("qcow2", DISK, "-r"):
        qcow(verb, *verbs("qcow2")[verb])


@pytest.mark.parametrize("option", ["force-share=on", "file.locking=off", "locking=off"])
def test_a_description_may_say_that_locks_do_not_matter(option: str) -> None:
    make("qcow2")
    words = ["info", "--image-opts", f"driver=qcow2,file.filename={DISK}"]
    with held_by_qemu("qcow2"):
        qcow(*words, code=1)
        qcow(*words[:-1], f"{words[-1]},{option}")


@pytest.mark.parametrize("flags", [(), ("-r",)])
def test_what_qemu_has_open_is_not_written_by_us(flags: Sequence[str]) -> None:
    make("qcow2")
    with held_by_qemu("qcow2", DISK, *flags), pytest.raises(ImageBusy):
        held_by_us("qcow2", writable=True).__enter__()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("words", [("convert", "-O", "qcow2"), ("convert", "-n", "-O")])
def test_what_qemu_writes_is_not_replaced_by_a_conversion(
    format: str, words: Sequence[str]
) -> None:
    make(format)
    make("raw", "source")
    before = Path(DISK).read_bytes()
    format_word = [format] if words[-1] == "-O" else []
    with held_by_qemu(format):
        done = qcow(*words, *format_word, "-f", "raw", "source", DISK, code=1)
        assert f"{DISK}: is open for writing elsewhere, so it cannot be" in done.err
    assert Path(DISK).read_bytes() == before


@pytest.mark.parametrize("flags", [(), ("-r",)])
def test_what_qemu_has_open_is_not_replaced_by_a_new_image(flags: Sequence[str]) -> None:
    make("qcow2")
    before = Path(DISK).read_bytes()
    with held_by_qemu("qcow2", DISK, *flags):
        qcow("create", "-f", "qcow2", DISK, "2M", code=1)
        qcow("convert", "-O", "qcow2", "-U", DISK, "copy")
        qcow("convert", "-O", "raw", "copy", DISK, code=1)
    assert Path(DISK).read_bytes() == before


def test_what_qemu_writes_below_or_beside_the_top_counts_too() -> None:
    make("qcow2", "base")
    make("qcow2", "top", "-b", "base", "-F", "qcow2")
    make("qcow2", "external", "-o", "data_file=data,data_file_raw=on")
    with held_by_qemu("qcow2", "base"):
        assert "base: is open for writing" in qcow("map", "top", code=1).err
        qcow("map", "-U", "top")
        qcow("info", "top")
        qcow("info", "--backing-chain", "top", code=1)
    with held_by_qemu("raw", "data"):
        assert "data: is open for writing" in qcow("map", "external", code=1).err
        qcow("map", "-U", "external")


def test_a_base_that_qemu_reads_below_an_overlay_is_not_written() -> None:
    make("qcow2", "base")
    make("qcow2", "top", "-b", "base", "-F", "qcow2")
    with held_by_qemu("qcow2", "top"):
        qcow("info", "base")
        with pytest.raises(ImageBusy):
            held_by_us("qcow2", "base", writable=True).__enter__()


@pytest.mark.pinned("a data file is unsafe", "data_file")
def test_inspect_asks_for_no_lock() -> None:
    make("qcow2")
    with held_by_qemu("qcow2"):
        qcow("inspect", DISK)


# We hold it


@pytest.mark.parametrize(("format", "verb"), QEMU_CASES)
def test_what_we_write_is_read_by_qemu_with_force_share_only(format: str, verb: str) -> None:
    make(format)
    words = verbs(format)[verb]
    with held_by_us(format, writable=True):
        run_peer("qemu-img", verb, *words, status=failed(verb))
        run_peer("qemu-img", verb, "-U", *words)
    run_peer("qemu-img", verb, *words)


@pytest.mark.parametrize(("format", "verb"), QEMU_CASES)
def test_what_we_only_read_is_read_by_qemu_too(format: str, verb: str) -> None:
    make(format)
    with held_by_us(format, writable=False):
        run_peer("qemu-img", verb, *verbs(format)[verb])


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_what_we_have_open_is_not_written_by_qemu(format: str, writable: bool) -> None:
    make(format)
    words = ["-f", format, "-c", "write 0 64k", DISK]
    with held_by_us(format, writable=writable):
        run_peer("qemu-io", *words, status=1)
    run_peer("qemu-io", *words)


@pytest.mark.parametrize("writable", [True, False])
def test_what_we_have_open_is_not_made_anew_by_qemu(writable: bool) -> None:
    make("qcow2")
    before = Path(DISK).read_bytes()
    with held_by_us("qcow2", writable=writable):
        run_peer("qemu-img", "create", "-f", "qcow2", DISK, "2M", status=1)
    assert Path(DISK).read_bytes() == before


@pytest.mark.parametrize("flags", [(), ("-r",)])
@pytest.mark.parametrize("format", ["qcow2", "vpc"])
def test_what_we_are_about_to_replace_is_not_opened_by_qemu(
    format: str, flags: Sequence[str]
) -> None:
    make(format)
    with AtomicOutput(DISK), start_qemu(*flags, "-f", format, DISK) as child:
        assert not is_in(child)


def test_our_force_share_keeps_nobody_out() -> None:
    make("qcow2")
    with FileStorage.open(DISK) as storage:
        acquire(storage, Role.SHARED, name=DISK)
        run_peer("qemu-io", "-f", "qcow2", "-c", "write 0 64k", DISK)


def test_what_we_hold_for_an_overlay_is_what_qemu_holds() -> None:
    make("qcow2", "base")
    make("qcow2", "top", "-b", "base", "-F", "qcow2")
    files = ("top", "base")
    for flags, writable in (((), True), (("-r",), False)):
        with held_by_qemu("qcow2", "top", *flags):
            theirs = [held_bytes(path) for path in files]
        with held_by_us("qcow2", "top", writable=writable):
            ours = [held_bytes(path) for path in files]
        assert ours == theirs
    with held_by_qemu("qcow2", "top", "-r", "-U"):
        theirs = [held_bytes(path) for path in files]
    layers = open_layers("top", gate=ReferenceGate.below_image(), budget=TRUSTED, force_share=True)
    ours = [held_bytes(path) for path in files]
    close_layers(layers)
    assert ours == theirs


# Races


def our_turn() -> bool:
    """Open the image for writing, as we do it; whether we were in, and alone."""
    try:
        with held_by_us("qcow2", writable=True):
            enter_alone()
    except ImageBusy:
        return False
    return True


def their_turn() -> bool:
    """The same as qemu does it."""
    with start_qemu("-f", "qcow2", DISK) as child:
        if not is_in(child):
            return False
        enter_alone()
        child.communicate(b"write 0 1M\nquit\n", timeout=60)
    return True


def enter_alone() -> None:
    """Raise FileExistsError where another writer is in."""
    os.close(os.open("inside", os.O_CREAT | os.O_EXCL))
    os.unlink("inside")


def race(turns: Sequence[Callable[[], bool]], *, rounds: int) -> list[int]:
    """Take each turn in a thread of its own, again and again; how often each got in."""
    entered = [0] * len(turns)
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            for _ in range(rounds):
                entered[index] += turns[index]()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(turns))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    return entered


def check_race(*, ours: int, theirs: int, rounds: int) -> None:
    make("qcow2")
    entered = race([our_turn] * ours + [their_turn] * theirs, rounds=rounds)
    assert sum(entered[:ours]) > 0
    run_peer("qemu-img", "check", DISK)
    assert held_bytes(DISK) == []


def test_never_are_two_writers_in() -> None:
    check_race(ours=2, theirs=2, rounds=10)


@pytest.mark.soak
def test_never_are_two_writers_in_of_a_thousand() -> None:
    check_race(ours=2, theirs=4, rounds=250)
