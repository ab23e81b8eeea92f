"""``namex-inspect``: what a checkpoint is, by its configuration and its headers."""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..checkpoint.resolve import peek
from ..files import size_text
from ..patching.inspect import inspection
from ..printable import marked
from .common import MODEL_HELP, Parser, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``namex-inspect``."""
    parser = Parser(prog="namex-inspect", description="Say what a checkpoint is, without reading its tensors.")
    parser.add_argument("model", metavar="DIR_OR_ID", help=MODEL_HELP)
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    return run(parser, arguments, _inspect)


def _inspect(options: argparse.Namespace) -> int:
    table = Table(show_header=False, min_width=60)
    for name, value in inspection(peek(options.model, options.revision)).items():
        table.add_row(name, size_text(value) if name.startswith("bytes") else marked(value))
    Console().print(table)
    return 0
