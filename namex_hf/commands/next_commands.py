"""What can be done with a patched folder, as the commands that do it."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..files import RECIPE
from ..printable import printable
from ..recipe import Recipe

SHARES = ("0.75", "0.5", "0.25")


def print_next(options: argparse.Namespace, recipe: Recipe, folders: Sequence[Path]) -> None:
    """Print a command a line, on standard error.

    Args:
        options: of the run.
        folders: its results.
    """
    lines = [compare_with(options, recipe, folders[0]), ("score", *map(str, folders), options.model)]
    if options.push_to_hub is None:
        lines.append(("push", str(folders[0]), "--repo", "USER/NAME", "--dry-run"))
    for number, words in enumerate(lines):
        print(f"{'     ' if number else 'next:'} {printable(shlex.join(('namex', *words)))}", file=sys.stderr)


def compare_with(options: argparse.Namespace, recipe: Recipe, folder: Path) -> tuple[str, ...]:
    """A comparison of shares that stay where experts become narrower, else of the recipe with the original."""
    if recipe.merge.kind == "narrow" and not options.recipe:
        chosen = ["--keep", *SHARES, *(("--fit", options.fit) if options.fit else ())]
    else:
        chosen = ["--recipes", str(folder / RECIPE)]
    for option, value in (("--calibration-data", options.calibration_data), ("--revision", options.revision)):
        chosen += [option, value] if value else []
    return ("compare", options.model, *chosen, "--out", f"{options.out}-compared")
