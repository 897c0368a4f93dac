"""The command as a whole: help, bad usage, exit codes, endings."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qcowkit
from qcowkit.cli import exits
from qcowkit.cli.main import main
from qcowkit.cli.table import BY_NAME, VERBS, Verb
from qcowkit.errors import RequestError, StorageError

QEMU_VERBS = ["info", "map", "convert", "check", "compare", "measure", "create", "dd", "resize"]
QEMU_VERBS += ["bench", "snapshot", "bitmap", "amend", "commit", "rebase"]


def ending_with(monkeypatch: pytest.MonkeyPatch, ending: Callable[[], int]) -> None:
    """Let every verb end as `ending` does."""
    monkeypatch.setattr(Verb, "run", lambda self, arguments: ending())


def raising(error: BaseException) -> Callable[[], int]:
    """An ending that raises."""

    def end() -> int:
        raise error

    return end


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {verb.name} ", text, re.MULTILINE) for verb in VERBS)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qcow {qcowkit.__version__}\n"


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_verb_has_a_help_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: qcow {verb}" in text
    assert "\nexamples:\n  " in text


def test_no_verb_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert capsys.readouterr().err == "qcow: a verb is missing (see qcow --help)\n"


def test_an_unknown_verb_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explode"]) == 1
    assert capsys.readouterr().err == "qcow: unknown verb 'explode' (see qcow --help)\n"


def test_a_global_flag_that_makes_no_sense_is_refused_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["-T", "x", "info"]) == 1
    assert capsys.readouterr().err == "qcow: -T: there are no trace points here\n"


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_an_unknown_flag_is_named_in_one_line(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    operands = {"compare": ["a", "b"], "convert": ["a", "b"], "completion": ["bash"]}
    operands |= {"resize": ["a", "1M"], "diff": ["a", "b"], "capsule": ["a", "b"]}
    code = main([verb, *operands.get(verb, ["a"]), "--no-such-flag"])
    error = capsys.readouterr().err
    assert error == (
        f"qcow {verb}: unrecognized arguments: --no-such-flag (see qcow {verb} --help)\n"
    )
    assert code == (1 if verb in QEMU_VERBS else 2)


def test_flags_may_stand_behind_operands() -> None:
    args = BY_NAME["convert"].parser().parse_verb(["a", "-O", "qcow2", "b", "-c", "c"])
    assert (args.sources, args.target) == (["a", "b"], "c")
    assert (args.target_format, args.compress) == ("qcow2", True)


def test_a_long_flag_may_be_shortened() -> None:
    args = BY_NAME["info"].parser().parse_verb(["--backing", "--outp=json", "a"])
    assert args.backing_chain
    assert args.output == "json"


def test_short_flags_may_be_joined() -> None:
    args = BY_NAME["convert"].parser().parse_verb(["-pcOqcow2", "a", "b"])
    assert (args.progress, args.compress, args.target_format) == ("bar", True, "qcow2")


def test_a_dash_is_an_operand() -> None:
    assert BY_NAME["info"].parser().parse_verb(["-"]).files == ["-"]


def test_vhd_is_another_name_of_vpc() -> None:
    assert BY_NAME["info"].parser().parse_verb(["-f", "vhd", "a"]).format == "vpc"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "-f", "vmdk", "a"], "argument -f/--format: unknown format 'vmdk'"),
        (["map", "-s", "many", "a"], "argument -s/--start-offset: size 'many' is not a number"),
        (["check", "--output=xml", "a"], "argument --output: invalid choice: 'xml'"),
        (["check", "-r", "some", "a"], "argument -r/--repair: invalid choice: 'some'"),
        (["convert", "-T", "fast", "a", "b"], "argument -T: invalid choice: 'fast'"),
    ],
)
def test_a_bad_value_is_told_with_its_flag(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"qcow {arguments[0]}: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-C", "-c", "-O", "qcow2", "a", "b"], "-C excludes -c"),
        (["-C", "-S", "4k", "a", "b"], "-C excludes -S"),
        (["-C", "--salvage", "a", "b"], "-C excludes --salvage"),
        (["-n", "-o", "size=1", "a", "b"], "-n excludes -o"),
        (["--target-is-zero", "a", "b"], "--target-is-zero needs -n"),
        (["--target-image-opts", "a", "b"], "--target-image-opts needs -n"),
        (["-B", "x", "a", "b"], "-B needs -F"),
        (["-F", "raw", "a", "b"], "-F needs -B"),
        (["-l", "s", "a", "b", "c"], "-l excludes several sources"),
        (["-c", "a", "b"], "-c: raw images cannot be compressed, only qcow2"),
        (["-m", "17", "a", "b"], "-m is 17, expected 1 to 16"),
        (["-S", "5", "a", "b"], "-S is 5, expected a multiple of 512 up to 16777216"),
        (["--threads", "0", "a", "b"], "--threads is 0, expected at least 1"),
        (["-O", "qcow2", "-o", "compression_level=3", "a", "b"], "-o compression_level needs -c"),
    ],
)
def test_flags_of_convert_that_do_not_go_together_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *arguments]) == 1
    assert capsys.readouterr().err == f"qcow convert: {message}\n"


def test_an_error_of_the_library_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ending_with(monkeypatch, raising(StorageError("open", path="a", errno=2)))
    assert main(["info", "a"]) == 1
    assert capsys.readouterr().err == "qcow info: a: open: No such file or directory (ENOENT)\n"


def test_an_error_cannot_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ending_with(monkeypatch, raising(RequestError("file '\x1b[2J\x9b'")))
    main(["info", "a"])
    assert capsys.readouterr().err == "qcow info: file '\\x1b[2J\\x9b'\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (exits.ExitError(63, "no"), 63, "no"),
        (PermissionError(13, "Permission denied", "a"), 1, "a: Permission denied"),
        (ValueError("x"), 1, "internal error: ValueError: x (QCOW_DEBUG=1 shows where)"),
    ],
)
def test_every_ending_has_its_line_and_code(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ending_with(monkeypatch, raising(error))
    assert main(["info", "a"]) == code
    assert capsys.readouterr().err == f"qcow info: {message}\n"


def test_debugging_shows_where_an_error_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    ending_with(monkeypatch, raising(RequestError("no")))
    with pytest.raises(RequestError):
        main(["--debug", "info", "a"])


def process(script: str, *, stdout: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    """The command in a process of its own, its verbs replaced by a script."""
    patched = (
        "import os, signal, sys, time\n"
        "from qcowkit.cli.main import main\n"
        "from qcowkit.cli.table import Verb\n"
        f"def run(self, arguments):\n{script}\n"
        "Verb.run = run\n"
        "sys.exit(main())\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", patched, "info"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_unwinds_the_work(number: signal.Signals, tmp_path: Path) -> None:
    part = tmp_path / "part"
    script = f"""
    open({str(part)!r}, "w").close()
    try:
        os.kill(os.getpid(), {int(number)})
        signal.pause()
    finally:
        os.unlink({str(part)!r})
    """
    done = process(script)
    done.communicate()
    assert done.returncode == 128 + number
    assert not part.exists()


def test_a_reader_that_leaves_ends_the_output_silently() -> None:
    script = """
    for _ in range(100000):
        sys.stdout.write("x" * 100)
    return 0
    """
    done = process(script)
    assert done.stdout is not None
    assert done.stderr is not None
    done.stdout.close()
    error = done.stderr.read()
    done.stderr.close()
    assert done.wait() == 128 + signal.SIGPIPE
    assert error == b""


@pytest.mark.parametrize("size", [10, 100000])
def test_a_full_standard_output_is_an_error(size: int) -> None:
    with Path("/dev/full").open("wb") as full:
        done = process(f"    sys.stdout.write('x' * {size}); return 0", stdout=full.fileno())
        _, error = done.communicate()
    assert done.returncode == 1
    assert re.fullmatch(rb"qcow( info)?: standard output: No space left on device\n", error)


def test_a_request_for_progress_does_not_kill_a_verb_without_any() -> None:
    done = process("    os.kill(os.getpid(), signal.SIGUSR1); return 0")
    done.communicate()
    assert done.returncode == 0
