"""The thin verbs: what they make of flags and operands, and how they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcowkit.cli.commands.compare import failure_code
from qcowkit.cli.commands.create import formatting_line
from qcowkit.cli.commands.dd import DdOperands, parse_operands
from qcowkit.cli.main import main
from qcowkit.errors import CorruptMetadata, QcowkitError, RequestError, StorageError
from qcowkit.units import KiB, MiB


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\x11" * (128 * KiB) + bytes(MiB - 128 * KiB))
    return path


def test_map_as_json_covers_the_range_that_was_asked_for(
    raw: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["map", "--output=json", "-f", "raw", "-s", "64k", "-l", "64k", str(raw)]) == 0
    rows = json.loads(capsysbinary.readouterr().out)
    assert [(row["start"], row["length"]) for row in rows] == [(64 * KiB, 64 * KiB)]


@pytest.mark.parametrize(("name", "head"), [("m.svg", b"<svg"), ("m.PNG", b"\x89PNG")])
def test_map_draws_into_the_kind_of_file_that_its_name_says(
    raw: Path, tmp_path: Path, name: str, head: bytes
) -> None:
    picture = tmp_path / name
    assert main(["map", "-f", "raw", "--plot-file", str(picture), str(raw)]) == 0
    assert head in picture.read_bytes()[:200]


def test_map_draws_into_no_other_file(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", "--plot-file", "m.gif", str(raw)]) == 1
    assert capsys.readouterr().err == (
        "qcow map: --plot-file: 'm.gif' ends in neither .svg nor .png\n"
    )


def test_a_drawing_that_is_no_terminal_has_no_colours(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["map", "-f", "raw", "--plot", str(raw)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_headers_counts_a_raw_disk_in_64_kib(
    raw: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["headers", "-f", "raw", str(raw)]) == 0
    assert json.loads(capsysbinary.readouterr().out)["cluster_bits"] == 16


def test_create_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.qcow2"
    assert main(["create", "-f", "qcow2", str(path), "-o", "cluster_size=128k", "1.5M"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"Formatting '{path}', fmt=qcow2 ")
    assert " cluster_size=131072 " in line
    assert " size=1572864" in line


def test_create_is_silent_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["create", "-q", str(tmp_path / "disk.raw"), "1M"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("verb", ["create", "convert", "measure"])
def test_option_help_needs_no_image(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    operands = {"convert": ["a", "b"]}.get(verb, [])
    flag = "-f" if verb == "create" else "-O"
    assert main([verb, flag, "qcow2", "-o", "help", *operands]) == 0
    assert "cluster_size=<size>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "FILE is missing"),
        (["-f", "qcow2", "-b", "base", "new"], "a base image needs its format: -F raw"),
        (["-f", "qcow2", "-F", "raw", "new"], "-F names the format of a base image; -b is missing"),
        (["-b", "base", "-F", "raw", "new"], "-b: raw images are not created with a base image"),
        (["-o", "size=1M", "new", "2M"], "SIZE and -o size differ: 2097152 and 1048576"),
        (
            ["-f", "qcow2", "-o", "compression_level=9", "new", "1M"],
            "-o compression_level: an empty image compresses nothing, see convert",
        ),
    ],
)
def test_create_refuses_what_contradicts_itself(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["create", *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"qcow create: {message}")
    assert list(tmp_path.iterdir()) == []


def test_switches_are_printed_as_on_and_off() -> None:
    line = formatting_line("a", "qcow2", {"extended_l2": True, "lazy_refcounts": False, "size": 5})
    assert line == "Formatting 'a', fmt=qcow2 extended_l2=on lazy_refcounts=off size=5"


def test_dd_reads_its_operands() -> None:
    found = parse_operands(["if=a=b", "of=c", "bs=1M", "count=3", "skip=2"])
    assert found == DdOperands(source="a=b", target="c", block_size=MiB, count=3, skip=2)


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        (["of=b"], "operand if= is missing"),
        (["if=a"], "operand of= is missing"),
        (["if=a", "of=b", "seek=1"], "operand 'seek=1' is unknown"),
        (["if=a", "of=b", "bs=0"], "bs is 0, expected 1 to 2147483647"),
        (["if=a", "of=b", "count=x"], "count 'x' is not a number"),
    ],
)
def test_dd_names_a_bad_operand(operands: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_operands(operands)


@pytest.mark.parametrize(
    ("skip", "count", "part"),
    [
        (0, None, (0, 1000)),
        (1, None, (512, 488)),
        (1, 0, (512, 0)),
        (0, 1, (0, 512)),
        (9, 1, (1000, 0)),
    ],
)
def test_dd_copies_no_more_than_there_is(
    skip: int, count: int | None, part: tuple[int, int]
) -> None:
    operands = DdOperands(source="a", target="b", block_size=512, count=count, skip=skip)
    assert operands.part_of(1000) == part


def test_dd_copies_the_part(raw: Path, tmp_path: Path) -> None:
    target = tmp_path / "part.raw"
    code = main(["dd", "-f", "raw", "bs=64k", "skip=1", "count=2", f"if={raw}", f"of={target}"])
    assert code == 0
    assert target.read_bytes() == b"\x11" * (64 * KiB) + bytes(64 * KiB)


def test_convert_writes_the_same_disk(raw: Path, tmp_path: Path) -> None:
    packed, again = tmp_path / "disk.qcow2", tmp_path / "again.raw"
    assert main(["convert", "-q", "-f", "raw", str(raw), "-O", "qcow2", "-c", str(packed)]) == 0
    assert main(["convert", "-q", str(packed), str(again)]) == 0
    assert again.read_bytes() == raw.read_bytes()


def test_a_failed_convert_leaves_the_target_as_it_was(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    assert main(["convert", str(raw) + ".none", "-O", "qcow2", str(target)]) == 1
    assert "No such file or directory" in capsys.readouterr().err
    assert target.read_bytes() == b"old"


def test_compare_tells_same_from_different(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(raw.read_bytes()[:-1] + b"x")
    assert main(["compare", "-f", "raw", "-F", "raw", str(raw), str(raw)]) == 0
    assert main(["compare", "-q", "-f", "raw", "-F", "raw", str(raw), str(other)]) == 1
    capsys.readouterr()
    arguments = ["compare", "--output=json", "-f", "raw", "-F", "raw", str(raw), str(other)]
    assert main(arguments) == 1
    assert json.loads(capsys.readouterr().out)["offset"] == MiB - 1


def test_compare_ends_with_2_where_an_image_cannot_be_opened(raw: Path) -> None:
    assert main(["compare", str(raw), f"{raw}.none"]) == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CorruptMetadata("L2 table", reason="x"), 3),
        (CorruptMetadata("zlib compressed cluster", reason="x"), 4),
        (StorageError("read", path="a", errno=5), 4),
    ],
)
def test_compare_tells_a_bad_mapping_from_bad_data(error: QcowkitError, code: int) -> None:
    assert failure_code(error) == code


def test_measure_is_exact_for_an_empty_disk(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "-O", "raw", "--size", "1M", "--output=json"]) == 0
    assert json.loads(capsys.readouterr().out)["required"] == MiB


def test_measure_wants_one_source(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "--size", "1M", str(raw)]) == 1
    assert capsys.readouterr().err == "qcow measure: give either FILE or --size\n"
