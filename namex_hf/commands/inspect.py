"""``namex inspect``: what a checkpoint is, by its configuration and its headers."""

import argparse
from collections.abc import Sequence

from ..files import size_text
from .common import MODEL_HELP, Parser, command_parser, loading, print_json, run


def main(arguments: Sequence[str] | None = None, prog: str = "namex-inspect") -> int:
    """Entry point of ``namex-inspect`` and ``namex inspect``."""
    return run(parser_of(prog), arguments, _inspect)


def parser_of(prog: str = "namex inspect") -> Parser:
    parser = command_parser(prog, "Say what a checkpoint is, without reading its tensors.")
    parser.add_argument("model", metavar="DIR_OR_ID", help=MODEL_HELP)
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--json", action="store_true", help="print JSON, with bytes as numbers")
    return parser


def _inspect(options: argparse.Namespace) -> int:
    with loading():
        from rich.console import Console

        from ..checkpoint.resolve import peek
        from ..evaluation.table import facts
        from ..patching.inspect import inspection

    found = inspection(peek(options.model, options.revision))
    if options.json:
        print_json(found)
        return 0
    values = {name: size_text(value) if name.startswith("bytes") else value for name, value in found.items()}
    Console().print(facts(values))
    return 0
