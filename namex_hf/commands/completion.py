"""``namex completion``: what a shell asks for the words that may follow."""

import argparse
from collections.abc import Sequence
from importlib import import_module

from ..resources import packaged_models, packaged_recipes
from .common import Parser, command_parser, run
from .namex import COMMANDS

BASH = """_namex() {
    local IFS=$'\\n' word="${COMP_WORDS[COMP_CWORD]}"
    COMPREPLY=($(compgen -W "$(namex completion bash --after "${COMP_WORDS[@]:1:COMP_CWORD-1}")" -- "$word"))
}
complete -o default -F _namex namex
"""
SHELLS = {
    "bash": BASH,
    "zsh": f"autoload -U +X bashcompinit && bashcompinit\n{BASH}",
    "fish": "complete -c namex -a '(namex completion fish --after (commandline -opc)[2..])'\n",
}


def main(arguments: Sequence[str] | None = None, prog: str = "namex-completion") -> int:
    """Entry point of ``namex completion``."""
    return run(parser_of(prog), arguments, _completion)


def parser_of(prog: str = "namex completion") -> Parser:
    parser = command_parser(prog, "Print the completion of a shell.", usage="bash|zsh|fish")
    parser.epilog = (
        'bash, zsh:  eval "$(namex completion bash)"   in ~/.bashrc, or with zsh in ~/.zshrc\n'
        "fish:       namex completion fish | source    in ~/.config/fish/config.fish"
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    parser.add_argument("--after", nargs=argparse.REMAINDER, help="print the words that may follow these, a line each")
    return parser


def _completion(options: argparse.Namespace) -> int:
    if options.after is None:
        print(SHELLS[options.shell], end="")
    else:
        print("\n".join(words_after(options.after)))
    return 0


def words_after(words: Sequence[str]) -> list[str]:
    """Words that may follow those after ``namex``; none where a file or free text is to follow."""
    if not words:
        return list(COMMANDS)
    if words[0] not in COMMANDS:
        return []
    parser_of = getattr(import_module(f".{words[0]}", __package__), "parser_of", None)
    if parser_of is None:  # TRL reads the options
        return []
    options = parser_of(f"namex {words[0]}").options
    option = options.get(words[-1])
    if option is None or option.nargs == 0:
        models = packaged_models() if words[0] in ("patch", "compare", "inspect") else []
        return [*models, *options]
    if option.dest in ("recipe", "recipes"):
        return list(packaged_recipes())
    choices = str(option.metavar).split("|")
    return choices if len(choices) > 1 else []
