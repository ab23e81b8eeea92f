"""The pictures of a patched folder, and one page with all of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..checkpoint.tokenizer_code import lack_of_tokenizer
from ..defaults import PICTURE_TOKENS, SMALL_BYTES
from ..errors import CheckpointError, UsageError, install
from ..files import PAGE, PICTURES, REPORT, write_text
from .answers import Answers, answers
from .distances import distances
from .folder import PatchedFolder, open_patched
from .page import page

if TYPE_CHECKING:
    from .pictures import Picture

SCORED_BYTES = SMALL_BYTES
DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError)


def write_pictures(
    path: Path,
    out: Path | None = None,
    layer: int | None = None,
    tokens: int | None = None,
    console: Console | None = None,
) -> Path:
    """Write the page and all pictures of a patched folder; returns the page, which without matplotlib has no picture.

    Args:
        path: the patched folder, which is only read.
        out: a folder to write into, made if need be (default: ``path/namex/pictures``).
        layer: whose experts bargain in picture 4 (default: the layer where Nash and mean differ most).
        tokens: of packaged text that goes through the experts (default: as many as the recipe read, or 4096; none for
            a folder above 256 MiB or without a tokenizer).

    Raises:
        CheckpointError, FamilyError, RecipeError: no patched folder, or a damaged one.
        UsageError: the folder has no MoE layer of that number.
    """
    console = console or Console(quiet=True)
    folder = open_patched(path)
    if layer is not None and layer not in folder.shape.layers:
        raise UsageError(f"--layer {layer}: accepted: a MoE layer of {path}, {_listed(folder.shape.layers)}")
    drawn = _drawing(folder, layer, tokens, console)
    with console.status("drawing"):
        try:
            pictures = drawn()
            text = page(folder.report, folder.recipe.to_yaml(), pictures, drawn is not list)
        except DAMAGED as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{REPORT} in {path} cannot be drawn, a record is damaged ({reason})") from error
        target = path / PICTURES if out is None else out
        target.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            picture.write(target)
        write_text(target / PAGE, text)
    return target / PAGE


def _drawing(
    folder: PatchedFolder, layer: int | None, tokens: int | None, console: Console
) -> "Callable[[], list[Picture]]":
    """What draws the pictures, once everything for them is computed; without matplotlib it draws none."""
    try:
        from .pictures import Material, draw
    except ImportError:
        console.print(f"no pictures: they need the extra 'report': {install('report')}", soft_wrap=True, markup=False)
        return list
    with console.status("the experts answer to text"):
        answered = _answered(folder, tokens, console)
    with console.status("the base experts by every method"):
        by_method = distances(folder)
    return lambda: draw(Material(folder, answered, by_method, layer))


def _answered(folder: PatchedFolder, tokens: int | None, console: Console) -> Answers | None:
    if tokens is None:
        tokens = folder.recipe.calibration.tokens if folder.recipe.needs_text else PICTURE_TOKENS
        if lack := lack_of_tokenizer(folder.path):
            console.print(f"{lack} in the folder: the experts answer to no text", soft_wrap=True)
            tokens = 0
        elif folder.checkpoint.size > SCORED_BYTES:
            size = f"{folder.checkpoint.size / 1e9:.1f} GB"
            console.print(
                f"{size} of experts answer to no text unless asked to: --tokens {PICTURE_TOKENS}", soft_wrap=True
            )
            tokens = 0
    return answers(folder, tokens) if tokens else None


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
