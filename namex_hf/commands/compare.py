"""``namex-compare``: several recipes on one model, one table and one report."""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from ..checkpoint.companions import has_tokenizer
from ..checkpoint.resolve import resolve
from ..comparison.files import PAGE, write
from ..comparison.grid import field_options, grid, recipe_files
from ..comparison.run import BEGINS, KNOWN, Comparison, Event, How, compare, make_plan_of
from ..comparison.settings import ITEMS, TOKENS, settings
from ..comparison.table import Table as Titled
from ..comparison.table import costs, notes, quality
from ..errors import CheckpointError, RecipeError
from ..printable import marked, printable
from ..recipe import Recipe
from .common import MODEL_HELP, Parser, run

FAILED = 1
"""Exit status where a cell failed and the others stand."""
LABEL = 22  # characters of a label that are not wrapped
GAP = 2  # between the columns of a table on a screen


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``namex-compare``."""
    return run(_parser(), arguments, _compare)


def _parser() -> Parser:
    parser = Parser(
        prog="namex-compare",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Patch one model with several recipes, score each result beside the original, and write one table\n"
        "and one page. A run that was killed is continued by the same command; more recipes may be added to it.\n"
        "Exit status: 0, 1 where a recipe failed and the others stand, 2 for bad input.",
        epilog="examples:\n"
        "  namex-compare tiny --merge grouped --experts 12 8 4 --fit none router --out out/compared\n"
        "  namex-compare tiny --recipes recipes/ --experts 8 --seed 0 1 2 --out out/seeds",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="tables, page, and a file a cell")
    parser.add_argument(
        "--recipes",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="YAML files of the fields below, or folders of them (default: the default recipe alone)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--texts",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="a domain each (default: packaged held-out texts)",
    )
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help="scored of each text (default: %(default)s)"
    )
    parser.add_argument(
        "--problems",
        type=int,
        default=ITEMS,
        metavar="N",
        help="held-out word problems to answer (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="models side by side; times are then not comparable (default: 1)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the patched models, in DIR/models")
    parser.add_argument("--overwrite", action="store_true", help="begin anew, also in a folder of another run of ours")
    parser.add_argument("--quiet", action="store_true", help="no progress, no table")
    recipe = parser.add_argument_group(
        "recipe", "every field of a recipe, with one value or more; they go over what the files say"
    )
    for spec in fields(Recipe):
        choices = spec.metadata.get("choices")
        recipe.add_argument(
            f"--{spec.name.replace('_', '-')}",
            nargs=1 if spec.name == "device" else "+",
            metavar="|".join(choices) if choices else spec.metadata["kind"].__name__.upper(),
            help=spec.metadata["help"].replace("%", "%%"),
        )
    return parser


def _compare(options: argparse.Namespace) -> int:
    console = Console(stderr=True, quiet=options.quiet)
    if options.quiet:
        disable_progress_bars()
    if options.jobs < 1:
        raise RecipeError(f"--jobs {options.jobs}: accepted: numbers from 1")
    cells = grid(recipe_files(options.recipes), field_options(vars(options)))
    device = options.device[0] if options.device else "cpu"
    chosen = settings(options.texts, options.tokens, options.problems, device)
    checkpoint = resolve(options.model, options.revision)
    if not has_tokenizer(checkpoint.folder):
        raise CheckpointError(f"{checkpoint.name} has no tokenizer; without one no text can be scored")
    with console.status("checking recipes, reading calibration text"):
        plan = make_plan_of(checkpoint, chosen, cells)
    with Shown(len(plan.wanted), options.jobs, console) as shown:
        found = compare(plan, options.out, How(options.jobs, options.keep, options.overwrite), shown.hear)
    drawn = write(found, options.out)
    if not options.quiet:
        _print(found)
        if not drawn:
            console.print("no picture: it needs the extra 'report', pip install 'namex-hf[report]'", markup=False)
        Console().print(f"[bold]{marked(options.out / PAGE)}[/bold]", soft_wrap=True)
    for label, reason in found.failed.items():
        print(printable(f"namex-compare: {label} failed: {reason}"), file=sys.stderr)
    return FAILED if found.failed else 0


class Shown:
    """Progress: a bar for all, a line for each model under way; elsewhere than on a terminal a line a finished one."""

    def __init__(self, models: int, jobs: int, console: Console) -> None:
        self.models, self.jobs, self.console = models, jobs, console
        hidden = console.quiet or not console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self.progress = Progress(*columns, console=console, disable=hidden, transient=True)
        self.all = self.progress.add_task("models", total=models, left="")
        self.under_way: dict[str, tuple[TaskID, float]] = {}
        self.seconds: list[float] = []
        self.done = 0

    def __enter__(self) -> "Shown":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def hear(self, event: Event) -> None:
        """A model was known, began, went on, or ended."""
        if event.what == KNOWN:
            self.done += 1
        elif event.what == BEGINS:
            bar = self.progress.add_task(marked(event.label), total=None, left="")
            self.under_way[event.label] = bar, time.perf_counter()
        elif event.outcome is None:
            bar, _ = self.under_way[event.label]
            what = f"{marked(event.label)}: {marked(event.what)}"
            self.progress.update(bar, description=what, completed=event.done, total=event.of)
        else:
            self._ended(event, event.outcome.error)
        self.progress.update(self.all, completed=self.done, left=self._left())

    def _ended(self, event: Event, error: str | None) -> None:
        bar, start = self.under_way.pop(event.label)
        self.progress.remove_task(bar)
        self.seconds.append(time.perf_counter() - start)
        self.done += 1
        how = "failed" if error else f"{self.seconds[-1]:.0f} s"
        said = f"{self.done}/{self.models} {event.label}: {how}, {self._left()}".rstrip(", ")
        self.console.print(printable(said), soft_wrap=True, markup=False, highlight=False)

    def _left(self) -> str:
        """Time left, by what models took so far."""
        to_come = self.models - self.done
        if not self.seconds or not to_come:
            return ""
        seconds = statistics.fmean(self.seconds) * to_come / self.jobs
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"


def _print(found: Comparison) -> None:
    console = Console()
    for title, table in (
        ("perplexity, ratio to the original's, and exact answers", quality(found)),
        ("what each model takes", costs(found)),
    ):
        console.print(f"{title}:", highlight=False)
        for part in in_parts(table, console.width):
            console.print(_shown(part))
    for note in notes(found):
        console.print(f"* {printable(note)}", markup=False, highlight=False)


def in_parts(table: Titled, width: int) -> list[Titled]:
    """A table whose numbers are never broken: columns that a screen has no room for go to further tables.

    Args:
        table: the first two columns tell the rows, and are repeated; the first may be wrapped.
        width: of the screen, in characters.
    """
    titles, rows = table
    wide = widths(table)
    parts: list[list[int]] = [[]]
    for place in range(2, len(titles)):
        if parts[-1] and sum(wide[one] + GAP for one in (0, 1, *parts[-1], place)) > width:
            parts.append([])
        parts[-1].append(place)
    return [
        ([titles[place] for place in (0, 1, *part)], [[row[place] for place in (0, 1, *part)] for row in rows])
        for part in parts
    ]


def widths(table: Titled) -> list[int]:
    """Characters that each column needs: titles may be wrapped between words, numbers not, labels if they are long."""
    titles, rows = table
    found = [max(map(len, (*title.split(), *cells))) for title, *cells in zip(titles, *rows, strict=True)]
    return [min(found[0], LABEL), *found[1:]]


def _shown(table: Titled) -> Table:
    titles, rows = table
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, (name, width) in enumerate(zip(titles, widths(table), strict=True)):
        shown.add_column(marked(name), justify="right" if place else "left", width=width, overflow="fold")
    for row in rows:
        shown.add_row(*map(marked, row))
    return shown


if __name__ == "__main__":
    sys.exit(main())
