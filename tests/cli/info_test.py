"""`qcow info`: several files, chains, the gate, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcowkit.cli.main import main
from qcowkit.units import MiB


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MiB))
    return path


def test_json_of_one_file_is_an_object(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--output=json", str(raw)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["filename"], found["format"]) == (str(raw), "raw")
    assert found["virtual-size"] == MiB


def test_json_of_a_chain_is_an_array(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(raw), "--backing-chain", "--output=json"]) == 0
    assert [entry["format"] for entry in json.loads(capsys.readouterr().out)] == ["raw"]


def test_a_missing_file_does_not_hide_the_others(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--output=json", f"{raw}.none", str(raw)]) == 1
    captured = capsys.readouterr()
    assert [entry["filename"] for entry in json.loads(captured.out)] == [str(raw)]
    assert captured.err.startswith("qcow info: ")
    assert "No such file or directory" in captured.err


def test_image_opts_describe_the_file(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--image-opts", f"driver=raw,file.filename={raw}"]) == 0
    assert "raw" in capsys.readouterr().out


def test_image_opts_exclude_a_format(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--image-opts", "-f", "raw", f"driver=raw,file.filename={raw}"]) == 1
    assert "excludes a format flag" in capsys.readouterr().err


def test_image_opts_that_no_image_knows_are_refused_by_name(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--image-opts", f"driver=raw,file.filename={raw},offset=1"]) == 1
    assert "offset= is not supported" in capsys.readouterr().err


def test_a_raw_disk_is_no_image_to_inspect(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--output=json", str(raw)]) == 2
    assert json.loads(capsys.readouterr().out)["verdict"] == "not an image"


def test_inspect_takes_no_format(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "-f", "raw", str(raw)]) == 2
    assert capsys.readouterr().err.startswith("qcow inspect: -f: the content decides")
