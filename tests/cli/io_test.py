"""`qcow io`: flags, standard input, exit codes, and how a session ends the process."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from qcowkit.units import KiB, MiB
from tests.command import qcow


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MiB))
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow("create", "-q", "-f", "qcow2", path, "1M")
    return path


def run(path: Path, *commands: str, code: int = 0, flags: tuple[object, ...] = ()) -> list[str]:
    """Lines of standard output without the figures."""
    words = [word for command in commands for word in ("-c", command)]
    done = qcow("io", *flags, *words, path, code=code)
    return [line for line in done.out.decode().splitlines() if ", 1 ops; " not in line]


def test_commands_run_in_order(image: Path) -> None:
    assert run(image, "write -P 7 64k 1k", "read -P 7 64k 1k", "length") == [
        "wrote 1024/1024 bytes at offset 65536",
        "read 1024/1024 bytes at offset 65536",
        "1 MiB",
    ]


def test_a_failure_is_told_and_the_rest_runs_all_the_same(image: Path) -> None:
    done = qcow("io", "-c", "read 1M 1", "-c", "what", "-c", "length", image, code=1)
    assert done.out.decode().splitlines() == ["read failed: Input/output error", "1 MiB"]
    assert done.err.splitlines() == [
        "qcow io: read: range 0x100000 + 0x1 is outside the disk of 0x100000 bytes",
        "qcow io: unknown command 'what' (see help)",
    ]


def test_nothing_runs_after_quit(image: Path) -> None:
    assert run(image, "length", "quit", "what") == ["1 MiB"]


def test_an_image_that_cannot_be_opened_ends_it_at_once(tmp_path: Path) -> None:
    done = qcow("io", "-c", "help", tmp_path / "missing", code=1)
    assert done.out == b""
    assert "No such file or directory" in done.err


def test_without_a_file_open_names_it(image: Path) -> None:
    lines = ["-c", f"open -r {image}", "-c", "length", "-c", "close", "-c", "length"]
    done = qcow("io", *lines, code=1)
    assert done.out == b"1 MiB\n"
    assert done.err == "qcow io: no image is open (see help open)\n"


def test_without_commands_they_come_from_standard_input(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("length\n\nread -q 0 1k\nfail\n"))
    done = qcow("io", image, code=1)
    assert done.out == b"1 MiB\n"
    assert done.err == "qcow io: unknown command 'fail' (see help)\n"


def test_a_terminal_gets_a_prompt(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("length\n"))
    assert qcow("io", image).out == b"qcow> 1 MiB\nqcow> \n"


def test_a_raw_disk_is_written_only_by_its_name(raw: Path) -> None:
    done = qcow("io", "-c", "write 0 1k", raw, code=1)
    assert "the content looks raw" in done.err
    run(raw, "write 0 1k", flags=("-f", "raw"))
    assert raw.read_bytes()[:KiB] == b"\xcd" * KiB
    assert run(raw, "read -P 0xcd 0 1k", flags=("-r",)) == ["read 1024/1024 bytes at offset 0"]


def test_read_only_is_read_only(image: Path) -> None:
    done = qcow("io", "-r", "-c", "write 0 1", image, code=1)
    assert (done.out, done.err) == (b"", "qcow io: write: the image is open read-only\n")


def test_a_snapshot_leaves_the_image_alone(image: Path) -> None:
    before = image.read_bytes()
    run(image, "write -P 9 0 1M", "read -P 9 0 1M", flags=("-s",))
    assert image.read_bytes() == before


@pytest.mark.pinned("lazy refcounts", "compat=0.10")
def test_options_reach_the_image(image: Path) -> None:
    flags = (
        "-o",
        "l2-cache-size=1M,lazy-refcounts=on",
        "-t",
        "none",
        "-d",
        "unmap",
        "-i",
        "native",
    )
    run(image, "write 0 64k", flags=flags)
    done = qcow("io", "-o", "l3-cache=1", "-c", "quit", image, code=1)
    assert done.err == "qcow io: -o: l3-cache= is not supported\n"


def test_a_description_names_the_image(image: Path) -> None:
    text = f"driver=qcow2,file.filename={image}"
    assert qcow("io", "--image-opts", "-c", "length", text).out == b"1 MiB\n"
    done = qcow("io", "-f", "qcow2", "--image-opts", "-c", "length", text, code=1)
    assert "excludes a format flag" in done.err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("open", "open: FILE is missing, and no option file.filename= names it"),
        ("open -o file.filename=a b", "-o file.filename= and FILE both name the image"),
        ("open -o driver=vmdk b", "-o driver: unknown format 'vmdk'; known are raw, qcow2"),
        ("open -o color=red b", "-o: color= is not supported"),
        ("open -t soon b", "cache mode is 'soon', expected one of none"),
    ],
)
def test_open_refuses_what_it_cannot_do(command: str, message: str) -> None:
    done = qcow("io", "-c", command, code=1)
    assert done.err.startswith(f"qcow io: {message}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("-T", "x"), "-T: there are no trace points here"),
        (("-t", "soon"), "argument -t/--cache: invalid choice: 'soon'"),
        (("-d", "some"), "argument -d/--discard: invalid choice: 'some'"),
    ],
)
def test_bad_usage_ends_with_two(flags: tuple[str, ...], message: str) -> None:
    done = qcow("io", *flags, "-c", "quit", code=2)
    assert done.err.startswith(f"qcow io: {message}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("-r", "-s"), "-s needs an image that is written, -r excludes that"),
        (("-r", "-C"), "-C needs an image that is written, -r excludes that"),
        (("-U",), "force-share is for reading, found writing"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(
    flags: tuple[str, ...], message: str, image: Path
) -> None:
    assert message in qcow("io", *flags, "-c", "quit", image, code=1).err


def test_the_standard_input_is_no_image() -> None:
    assert "-: standard input and output" in qcow("io", "-c", "quit", "-", code=1).err


def test_a_base_elsewhere_is_behind_the_gate(image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    top = folder / "top.qcow2"
    qcow("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "../disk.qcow2", top)
    assert "not admitted" in qcow("io", "-c", "length", top, code=1).err
    assert run(top, "length", flags=("--allow", tmp_path)) == ["1 MiB"]


def in_a_process(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    script = "import sys; from qcowkit.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False)


@pytest.mark.parametrize(("command", "status"), [("abort", -6), ("sigraise 9", -9)])
def test_a_crash_closes_nothing(image: Path, command: str, status: int) -> None:
    done = in_a_process("io", "-c", "write -P 1 0 64k", "-c", command, image)
    assert done.returncode == status
    assert done.stdout.startswith(b"wrote 65536/65536 bytes at offset 0\n")
    # What was acknowledged but not made durable is gone.
    run(image, "read -P 0 0 64k")


def test_a_signal_that_asks_to_end_closes_the_image(image: Path) -> None:
    done = in_a_process("io", "-c", "write -P 1 0 64k", "-c", "sigraise 15", image)
    assert done.returncode == 128 + 15
    run(image, "read -P 1 0 64k")


def test_there_are_not_that_many_signals(image: Path) -> None:
    done = qcow("io", "-c", "sigraise 1000", image, code=1)
    assert done.err == "qcow io: sigraise: there is no signal 1000\n"
