"""`qcow completion`: the script that teaches a shell the verbs and flags."""

from __future__ import annotations

from argparse import Namespace

from qcowkit.cli.completion import SHELLS, describe
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_text
from qcowkit.cli.table import VERBS


def configure(parser: Parser) -> None:
    """One operand: the shell."""
    parser.add_argument("shell", metavar="SHELL", choices=tuple(SHELLS), help="bash, zsh or fish")
    parser.examples(
        'eval "$(qcow completion bash)"        in ~/.bashrc',
        'eval "$(qcow completion zsh)"         in ~/.zshrc, behind compinit',
        "qcow completion fish | source         in ~/.config/fish/config.fish",
    )


def run(args: Namespace) -> int:
    """Print the script."""
    entries = [describe(verb.name, verb.summary, verb.parser()) for verb in VERBS]
    write_text(SHELLS[args.shell](entries))
    return 0
