"""``namex-report``: the pictures of a patched folder, and one page with all of them."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..errors import RecipeError
from ..files import PICTURES, SMALL_BYTES
from ..printable import marked
from ..report.write import TOKENS, write_pictures
from .common import Parser, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``namex-report``."""
    parser = Parser(
        prog="namex-report",
        allow_abbrev=False,
        description="Draw what a patch did: one HTML page, and every picture as PNG and SVG. "
        "Nothing of the model is changed; it needs the extra 'report'.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder of namex-patch or sft_smoltalk.py")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where to write (default: DIR/{PICTURES})")
    parser.add_argument(
        "--layer", type=int, metavar="L", help="layer of picture 4 (default: where Nash and mean differ most)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="of packaged text that goes through the experts, for pictures 1 and 6; 0: none (default: as many as the "
        f"recipe read, or {TOKENS}; 0 for a folder above {SMALL_BYTES >> 20} MiB or without a tokenizer)",
    )
    parser.add_argument("--quiet", action="store_true", help="say nothing")
    return run(parser, arguments, _report)


def _report(options: argparse.Namespace) -> int:
    console = Console(stderr=True, quiet=options.quiet)
    if options.tokens is not None and options.tokens < 0:
        raise RecipeError(f"--tokens {options.tokens}: accepted: numbers from 0")
    written = write_pictures(options.folder, options.out, options.layer, options.tokens, console)
    Console(quiet=options.quiet).print(f"[bold]{marked(written)}[/bold]", soft_wrap=True)
    return 0
