"""``namex report``: the pictures of a patched folder, and one page with all of them."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..defaults import PICTURE_TOKENS, SMALL_BYTES
from ..errors import UsageError
from ..files import PICTURES
from ..printable import marked
from .common import Parser, command_parser, loading, print_json, run


def main(arguments: Sequence[str] | None = None, prog: str = "namex-report") -> int:
    """Entry point of ``namex-report`` and ``namex report``."""
    return run(parser_of(prog), arguments, _report)


def parser_of(prog: str = "namex report") -> Parser:
    parser = command_parser(
        prog,
        "Draw what a patch did: one HTML page, and every picture as PNG and SVG.\n"
        "Nothing of the model is changed. The pictures need the extra 'report'; without it the page has its tables.",
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
        f"recipe read, or {PICTURE_TOKENS}; 0 for a folder above {SMALL_BYTES >> 20} MiB or without a tokenizer)",
    )
    parser.add_argument("--json", action="store_true", help="print the files that were written as JSON")
    parser.add_argument("--quiet", action="store_true", help="say nothing")
    return parser


def _report(options: argparse.Namespace) -> int:
    if options.tokens is not None and options.tokens < 0:
        raise UsageError(f"--tokens {options.tokens}: accepted: numbers from 0")
    with loading():
        from rich.console import Console

        from ..report.write import write_pictures

    console = Console(stderr=True, quiet=options.quiet)
    written = write_pictures(options.folder, options.out, options.layer, options.tokens, console)
    if options.json:
        print_json({"page": str(written), "pictures": sorted(map(str, written.parent.glob("*.png")))})
    else:
        Console(quiet=options.quiet).print(f"[bold]{marked(written)}[/bold]", soft_wrap=True)
    return 0
