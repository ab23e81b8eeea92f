"""``namex``: one program, every command by its name."""

import sys
from collections.abc import Sequence
from importlib import import_module

from ..printable import did_you_mean
from .common import command_parser

COMMANDS = {
    "patch": "make a checkpoint smaller, or merge its experts",
    "compare": "patch one model with several recipes, and score the results",
    "tune": "fine-tune a model on chats, with TRL",
    "score": "score models on lm-eval's tasks",
    "report": "draw what a patch did",
    "inspect": "say what a checkpoint is",
    "push": "publish a patched folder on the Hub",
    "answers": "let a model write calibration text for itself",
    "recipes": "list the recipes that come with the package",
    "env": "print versions and devices, for a bug report",
    "completion": "print the completion of a shell",
}
"""Each is the module of its name beside this one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``namex``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        command = import_module(f".{words[0]}", __package__)
        status: int = command.main(words[1:], f"namex {words[0]}")
        return status
    parser = command_parser(
        "namex",
        "Make Mixture-of-Experts checkpoints smaller, or merge their experts by Nash bargaining.\n\ncommands:\n"
        + "\n".join(f"  {name:<12}{what}" for name, what in COMMANDS.items())
        + "\n\n'namex COMMAND --help' has the options and examples of each.",
        ("patch tiny --out out/half --keep 0.5", "inspect out/half", "recipes"),
        usage="COMMAND ...",
    )
    if words and not words[0].startswith("-"):
        parser.error(f"no command {words[0]!r}; accepted: {', '.join(COMMANDS)}{did_you_mean(words[0], COMMANDS)}")
    parser.parse_args(words)
    parser.print_help()
    return 0
