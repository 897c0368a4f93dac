"""The documents tell the truth: their examples run, their links lead somewhere, no flag is missing.

Examples for the shell are blocks fenced as `console`, with commands behind `$ `. All blocks of a
document run in one folder, in order. What stands below a command is its whole output, in which
`...` stands for anything; where nothing does, the output is not looked at. A command ends with
0, unless it ends with the comment `# exit code N`."""

from __future__ import annotations

import argparse
import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcowkit.cli.table import VERBS, Verb

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_STATUS = re.compile(r"# exit code (\d+)$")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One command of a document, and what it says of its end."""

    command: str
    output: str
    status: int


def blocks(path: Path, kind: str) -> Iterator[str]:
    """The fenced blocks of one kind."""
    for found in _FENCE.finditer(path.read_text(encoding="utf-8")):
        if found[1] == kind:
            yield found[2]


def examples(path: Path) -> Iterator[Example]:
    """Every command of a document, in order."""
    for block in blocks(path, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            status = _STATUS.search(command)
            yield Example(command=command, output=output, status=int(status[1]) if status else 0)


def shell_environment(folder: Path) -> dict[str, str]:
    """An environment in which `qcow` is the code under test."""
    tools = folder / "bin"
    tools.mkdir()
    script = tools / "qcow"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nfrom qcowkit.cli.main import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(tools), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path))),
        "COLUMNS": "80",
        "LC_ALL": "C.UTF-8",
    }


def run(example: Example, folder: Path, environment: dict[str, str]) -> str | None:
    """Run one command; what it did and should have done, where the two differ."""
    done = subprocess.run(
        ["bash", "-c", example.command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=120,
    )
    output = done.stdout.decode()
    if output and not output.endswith("\n"):
        output += "\n"
    same = not example.output or doctest.OutputChecker().check_output(
        example.output, output, doctest.ELLIPSIS
    )
    if same and done.returncode == example.status:
        return None
    found = f"$ {example.command}\n{output}[exit code {done.returncode}]"
    return f"{found}\nexpected:\n{example.output}[exit code {example.status}]"


def run_examples(path: Path, folder: Path, environment: dict[str, str]) -> None:
    """Run every command of a document in `folder`; each must end as the document says."""
    assert list(examples(path))
    wrong = [said for example in examples(path) if (said := run(example, folder, environment))]
    assert not wrong, "\n\n".join(wrong)


def test_commands_run_as_written(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    run_examples(ROOT / "docs" / "cli.md", folder, shell_environment(tmp_path))


def test_the_tour_of_the_readme_runs_as_written_with_its_python_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    run_examples(ROOT / "README.md", folder, shell_environment(tmp_path))
    monkeypatch.chdir(folder)
    (snippet,) = blocks(ROOT / "README.md", "python")
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("1073741824 b'1\\n'")


def test_the_examples_of_the_api_are_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = doctest.testfile(str(ROOT / "docs" / "api.md"), module_relative=False)
    assert done.attempted > 20
    assert done.failed == 0


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_within_the_project_leads_somewhere(path: Path) -> None:
    links = _LINK.findall(path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("verb", VERBS, ids=[verb.name for verb in VERBS])
def test_every_flag_of_a_verb_is_described(verb: Verb) -> None:
    name, parser = verb.name, verb.parser()
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^##+ `?([^`\n]+)`?\n(.*?)(?=^##+ |\Z)", text, re.M | re.S))
    assert f"qcow {name}" in sections
    known = sections[f"qcow {name}"] + sections["Flags of every verb"]
    words = set(re.findall(r"`(--?[A-Za-z][A-Za-z-]*)", known))
    missing = [
        action.option_strings[0]
        for action in parser.actions()
        if action.option_strings
        and action.help != argparse.SUPPRESS
        and not words & set(action.option_strings)
    ]
    assert missing == []
