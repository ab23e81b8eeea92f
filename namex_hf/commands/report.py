"""``namex-report``: the pictures of a patched folder, and one page with all of them."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..checkpoint.companions import has_tokenizer
from ..cli import SCORED_BYTES, Parser, _run
from ..errors import CheckpointError, MissingExtraError, RecipeError
from ..files import PAGE, PICTURES, REPORT, write_bytes, write_text
from ..printable import marked
from ..report.answers import Answers, answers
from ..report.folder import PatchedFolder, open_patched
from ..report.page import page
from ..report.walks import distances

TOKENS = 4096  # of text that is read by the experts of a small folder whose recipe read none
DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError)


def report(arguments: Sequence[str] | None = None) -> int:
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
        f"recipe read, or {TOKENS}; 0 for a folder above {SCORED_BYTES >> 20} MiB or without a tokenizer)",
    )
    parser.add_argument("--quiet", action="store_true", help="say nothing")
    return _run(parser, arguments, _report)


def _report(options: argparse.Namespace) -> int:
    console = Console(stderr=True, quiet=options.quiet)
    if options.tokens is not None and options.tokens < 0:
        raise RecipeError(f"--tokens {options.tokens}: accepted: numbers from 0")
    written = write_pictures(options.folder, options.out, options.layer, options.tokens, console)
    Console(quiet=options.quiet).print(f"[bold]{marked(written)}[/bold]", soft_wrap=True)
    return 0


def write_pictures(
    path: Path,
    out: Path | None = None,
    layer: int | None = None,
    tokens: int | None = None,
    console: Console | None = None,
) -> Path:
    """Write the page and all pictures of a patched folder; returns the page.

    Args:
        path: the patched folder, which is only read.
        out: a folder to write into, made if need be (default: ``path/namex/pictures``).
        layer: whose experts bargain in picture 4 (default: the layer where Nash and mean differ most).
        tokens: of packaged text that goes through the experts (default: as many as the recipe read, or 4096; none for
            a folder above 256 MiB or without a tokenizer).

    Raises:
        MissingExtraError: no matplotlib.
        CheckpointError, FamilyError, RecipeError: no patched folder, a damaged one, or one without that layer.
    """
    try:
        from ..report.pictures import Material, draw
    except ImportError as error:
        raise MissingExtraError("namex-report", "report") from error
    console = console or Console(quiet=True)
    folder = open_patched(path)
    if layer is not None and layer not in folder.shape.layers:
        raise CheckpointError(f"--layer {layer}: accepted: a MoE layer of {path}, {_listed(folder.shape.layers)}")
    with console.status("the experts answer to text"):
        answered = _answered(folder, tokens, console)
    with console.status("the methods walk over the experts"):
        walked = distances(folder)
    with console.status("drawing"):
        try:
            pictures = draw(Material(folder, answered, walked, layer))
            text = page(folder.report, folder.recipe.to_yaml(), pictures)
        except DAMAGED as error:
            said = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{REPORT} in {path} cannot be drawn, a record is damaged ({said})") from error
        target = path / PICTURES if out is None else out
        target.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            for form, content in (("png", picture.png()), ("svg", picture.svg(ground="white"))):
                write_bytes(target / f"{picture.name}.{form}", content)
        write_text(target / PAGE, text)
    return target / PAGE


def _answered(folder: PatchedFolder, tokens: int | None, console: Console) -> Answers | None:
    if tokens is None:
        tokens = folder.recipe.calibration_tokens if folder.recipe.calibrated else TOKENS
        if not has_tokenizer(folder.path):
            console.print("no tokenizer in the folder: the experts answer to no text", soft_wrap=True)
            tokens = 0
        elif folder.checkpoint.size > SCORED_BYTES:
            size = f"{folder.checkpoint.size / 1e9:.1f} GB"
            console.print(f"{size} of experts answer to no text unless asked to: --tokens {TOKENS}", soft_wrap=True)
            tokens = 0
    return answers(folder, tokens) if tokens else None


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
