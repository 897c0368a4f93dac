"""Completion scripts, generated from the same parsers that read the command line. Numpy-free."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qcowkit.cli.parsing import Parser


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag: its spellings, its help, whether it takes a value, and the words for it."""

    spellings: tuple[str, ...]
    help: str
    takes_value: bool
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What can follow a verb."""

    verb: str
    summary: str
    flags: tuple[Flag, ...]
    # Words for the first operand where they are a closed set; files otherwise.
    words: tuple[str, ...] = ()


def describe(verb: str, summary: str, parser: Parser) -> Completion:
    """Read a configured parser; refused and hidden flags are left out."""
    flags = []
    words: tuple[str, ...] = ()
    for action in parser.actions():
        if action.help == argparse.SUPPRESS:
            continue
        choices = tuple(map(str, action.choices)) if action.choices else ()
        if not action.option_strings:
            words = words or choices
            continue
        flags.append(
            Flag(
                spellings=tuple(action.option_strings),
                help=_first_clause(action.help or ""),
                takes_value=action.nargs != 0,
                choices=choices,
            )
        )
    return Completion(verb=verb, summary=summary, flags=tuple(flags), words=words)


def _first_clause(text: str) -> str:
    """Enough of a help text for a menu, free of what shells would read as their own."""
    for stop in (";", ". ", ": "):
        text = text.partition(stop)[0]
    return "".join(char for char in text if char not in "\"'`$[]\\:")


def bash(completions: Sequence[Completion]) -> str:
    """A script for bash: verbs, flags, words of flags, and files everywhere else."""
    flags, values, words = [], [], []
    for entry in completions:
        spellings = " ".join(text for flag in entry.flags for text in flag.spellings)
        flags.append(f'        {entry.verb}) words="{spellings}" ;;')
        if entry.words:
            words.append(f'        {entry.verb}) words="{" ".join(entry.words)}" ;;')
        for flag in entry.flags:
            if flag.takes_value:
                pattern = "|".join(f"{entry.verb}:{text}" for text in flag.spellings)
                values.append(f'        {pattern}) words="{" ".join(flag.choices)}" ;;')
    verbs = " ".join(entry.verb for entry in completions)
    return _BASH.format(
        verbs=verbs,
        flags="\n".join(flags),
        values="\n".join(values),
        words="\n".join(words),
    )


_BASH = """\
# Completion of qcow for bash: eval "$(qcow completion bash)"
_qcow() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    local verb=${{COMP_WORDS[1]}} words=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{verbs} --help --version" -- "$current"))
        return
    fi
    case $verb:$before in
{values}
        *) before="" ;;
    esac
    if [ -z "$before" ] && [[ $current == -* ]]; then
        case $verb in
{flags}
        esac
    elif [ -z "$before" ]; then
        case $verb in
{words}
        esac
    fi
    if [ -n "$words" ]; then
        COMPREPLY=($(compgen -W "$words" -- "$current"))
    else
        compopt -o filenames 2>/dev/null
        local IFS=$'\\n'
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}}
complete -F _qcow qcow
"""


def zsh(completions: Sequence[Completion]) -> str:
    """A script for zsh, with the summaries as descriptions."""
    cases = []
    for entry in completions:
        lines = [f"        {entry.verb}) _arguments -s \\"]
        for flag in entry.flags:
            value = ""
            if flag.takes_value:
                value = f":value:({' '.join(flag.choices)})" if flag.choices else ":value:_files"
            lines += [f"            '{text}[{flag.help}]{value}' \\" for text in flag.spellings]
        target = f"({' '.join(entry.words)})" if entry.words else "_files"
        lines.append(f"            '*:operand:{target}' ;;")
        cases.append("\n".join(lines))
    verbs = "\n".join(f"        '{entry.verb}:{_plain(entry.summary)}'" for entry in completions)
    return _ZSH.format(verbs=verbs, cases="\n".join(cases))


def _plain(text: str) -> str:
    return text.replace("'", "").replace(":", " -")


_ZSH = """\
#compdef qcow
# Completion of qcow for zsh: eval "$(qcow completion zsh)"
_qcow() {{
    local -a verbs
    verbs=(
{verbs}
    )
    if (( CURRENT == 2 )); then
        _describe verb verbs
        return
    fi
    local verb=$words[2]
    shift words
    (( CURRENT-- ))
    case $verb in
{cases}
    esac
}}
compdef _qcow qcow
"""


def fish(completions: Sequence[Completion]) -> str:
    """A script for fish, one line a verb and a flag."""
    lines = ["# Completion of qcow for fish: qcow completion fish | source"]
    for entry in completions:
        summary = _plain(entry.summary)
        lines.append(f"complete -c qcow -n __fish_use_subcommand -a {entry.verb} -d '{summary}'")
    for entry in completions:
        seen = f"complete -c qcow -n '__fish_seen_subcommand_from {entry.verb}'"
        if entry.words:
            lines.append(f"{seen} -f -a '{' '.join(entry.words)}'")
        for flag in entry.flags:
            names = " ".join(
                f"-l {text[2:]}" if text.startswith("--") else f"-s {text[1:]}"
                for text in flag.spellings
            )
            value = " -r" if flag.takes_value else ""
            if flag.choices:
                value = f" -x -a '{' '.join(flag.choices)}'"
            lines.append(f"{seen} {names}{value} -d '{flag.help}'")
    return "\n".join(lines) + "\n"


SHELLS: dict[str, Callable[[Sequence[Completion]], str]] = {
    "bash": bash,
    "zsh": zsh,
    "fish": fish,
}
