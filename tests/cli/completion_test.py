"""Completion scripts: what they know, and that the shells accept them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qcowkit.cli.completion import SHELLS
from qcowkit.cli.main import main
from qcowkit.cli.table import VERBS


@pytest.fixture(params=list(SHELLS))
def shell(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def script_of(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `qcow completion` prints."""
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def test_a_script_knows_verbs_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = script_of(shell, capsys)
    assert all(verb.name in script for verb in VERBS)
    assert "backing-chain" in script


def test_refused_flags_are_not_offered(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    # `qcow io --trace`: there are no trace points here.
    assert "trace" not in script_of(shell, capsys)


def test_an_unknown_shell_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "csh"]) == 2
    assert "invalid choice: 'csh'" in capsys.readouterr().err


def completed(script: str, *words: str, folder: Path) -> list[str]:
    """What bash offers for the last of the words."""
    line = f"COMP_WORDS=(qcow {' '.join(words)}); COMP_CWORD={len(words)}; _qcow"
    done = subprocess.run(
        ["bash", "--norc", "-c", f'{script}\n{line}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["in"], {"info", "inspect"}),
        (["convert", "--sal"], {"--salvage"}),
        (["info", "--output", "j"], {"json"}),
        (["completion", "z"], {"zsh"}),
        (["info", "di"], {"disk.qcow2"}),
    ],
)
def test_bash_offers_what_can_follow(
    words: list[str], offered: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "disk.qcow2").touch()
    assert set(completed(script_of("bash", capsys), *words, folder=tmp_path)) == offered
