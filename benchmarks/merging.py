"""What each ingredient of merging to a smaller checkpoint buys: ``python benchmarks/merging.py [--quick]``.

Every row is a recipe of ``merge: grouped``; the first table states each in full. All that read calibration text read
the same. The numbers are perplexities as ratios to the original's, a domain each and their geometric mean, on the first
tokens of the packaged held-out texts, and the held-out word problems answered exactly by generation.

Rows are printed as they are done. Two rows are no stock checkpoint of a recipe: the routed experts taken out, and
HC-SMoE's operator as it was published, which keeps all of the router's rows over fewer experts.
"""

import argparse
import copy
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from methods import without_routed_experts
from transformers import AutoTokenizer

from namex_hf import Recipe, patch_checkpoint, patch_model
from namex_hf.calibration.sources import PACKAGED
from namex_hf.checkpoint.resolve import local_folder, packaged_models
from namex_hf.scoring.arithmetic import exact_answers, held_out_problems
from namex_hf.scoring.compare import load
from namex_hf.scoring.perplexity import held_out_texts, perplexities

STATED = (
    "method",
    "weighting",
    "grouping",
    "curvature",
    "align",
    "down",
    "fit",
    "metric",
    "power",
    "disagreement",
    "calibrate",
    "seed",
)
"""Fields in which the rows differ."""

SOME = ("prose", "dictionary")
"""Domains of the calibration text of the row that does not see the others."""


@dataclass(frozen=True)
class Row:
    """One way to make a model smaller."""

    name: str
    fields: dict[str, Any]
    main: bool = False  # measured at every number of experts
    quick: bool = False
    only: tuple[str, ...] = ()  # domains of its calibration text; all where none is named
    all_rows: bool = False  # of the router are kept

    def recipe(self, experts: int, tokens: int, folder: Path, ridge: float) -> Recipe:
        """In full, with calibration text where it reads any."""
        recipe = Recipe.from_dict({"merge": "grouped", "experts": experts, **self.fields})
        if not recipe.calibrated:
            return recipe
        if recipe.curvature != "identity" or recipe.down == "refit":
            recipe = replace(recipe, ridge=ridge)
        data = str(some_text(folder, self.only)) if self.only else "packaged"
        return replace(recipe, calibration_tokens=tokens, calibration_data=data)


PLAIN: dict[str, Any] = {"fit": "none", "curvature": "identity", "align": "none", "down": "merge"}
HC: dict[str, Any] = {**PLAIN, "method": "ep-camex", "grouping": "outputs", "weighting": "usage"}
MC: dict[str, Any] = {**HC, "grouping": "router", "align": "weights"}
FULL: dict[str, Any] = {
    "fit": "router",
    "grouping": "damage",
    "curvature": "calibrated",
    "align": "activations",
    "down": "refit",
}
CLOSED = {**FULL, "fit": "none"}
MERGED = {**CLOSED, "down": "merge"}
STEP = {**MERGED, "align": "none"}
LOSSES = {**FULL, "metric": "calibrated"}

ROWS = (
    Row(
        "no text: plain average, groups by weights", {**PLAIN, "method": "ep-camex", "grouping": "weights"}, True, True
    ),
    Row("HC-SMoE's operator", HC, True, True),
    Row("HC-SMoE's operator, all rows of the router kept", {**HC, "calibrate": "before"}, all_rows=True),
    Row("HC-SMoE's operator + router fitted", {**HC, "fit": "router"}, True, True),
    Row("HC-SMoE's operator + router fitted + down refitted", {**HC, "fit": "router", "down": "refit"}, True),
    Row("MC-SMoE's idea: groups by router, usage, aligned", MC),
    Row("steps: groups by damage", {**PLAIN, "grouping": "damage"}),
    Row("steps: + curvature diagonal", {**STEP, "curvature": "diagonal"}),
    Row("steps: + curvature calibrated", STEP, True),
    Row("steps: + aligned by activations", MERGED, True),
    Row("steps: + down refitted", CLOSED, True, True),
    Row("steps: + router fitted = full", FULL, True, True),
    Row("full, seed 1", {**FULL, "seed": 1}, True),
    Row("full, seed 2", {**FULL, "seed": 2}),
    Row("full, no game (EP-CAMEx)", {**FULL, "method": "ep-camex"}),
    Row("full, game over losses", LOSSES),
    Row("full, text of prose and dictionary alone", FULL, only=SOME),
    Row("full, groups by outputs", {**FULL, "grouping": "outputs"}),
    Row("full, groups by router", {**FULL, "grouping": "router"}),
    Row("full, groups by weights", {**FULL, "grouping": "weights"}),
    Row("full, statistics before", {**FULL, "calibrate": "before"}),
    Row("full, down merged", {**FULL, "down": "merge"}),
    Row("full, curvature identity", {**FULL, "curvature": "identity"}),
    Row("full, not aligned", {**FULL, "align": "none"}),
    Row("full, aligned by weights", {**FULL, "align": "weights"}),
    Row("full, weights by usage", {**FULL, "weighting": "usage"}),
    Row("full, game over losses, power by usage", {**LOSSES, "power": "usage"}),
    Row("full, game over losses, power by loss", {**LOSSES, "power": "loss"}),
    Row("full, game over losses, mean disagreement", {**LOSSES, "disagreement": "mean"}),
    Row("curvature and alignment, all rows of the router kept", {**MERGED, "calibrate": "before"}, all_rows=True),
)


def some_text(folder: Path, domains: tuple[str, ...]) -> Path:
    """A folder with the packaged calibration text of some domains only."""
    place = folder / "-".join(domains)
    place.mkdir(exist_ok=True)
    for domain in domains:
        shutil.copy(PACKAGED / f"{domain}.txt", place)
    return place


def with_all_rows(model: Any, name: str, recipe: Recipe) -> Any:
    """Merged experts under the router as it was: every member's place holds a copy of its group's expert."""
    with tempfile.TemporaryDirectory() as out:
        report = patch_checkpoint(name, out, recipe)
        small = load(out)
    for record in report.layers:
        merged = small.model.layers[record["layer"]].mlp.experts
        experts = model.model.layers[record["layer"]].mlp.experts
        for place, group in enumerate(record["groups"]):
            for member in group:
                experts.gate_up_proj.data[member] = merged.gate_up_proj.data[place]
                experts.down_proj.data[member] = merged.down_proj.data[place]
    return model


class Bench:
    """A packaged model and what it is scored on."""

    def __init__(self, name: str, tokens: int, problems: int, texts: list[Path] | None):
        folder = local_folder(name)
        assert folder is not None
        self.name, self.tokens = name, tokens
        self.original, self.tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
        self.texts = {path.stem: path.read_text("utf-8") for path in texts} if texts else held_out_texts()
        self.problems = held_out_problems()[:problems]
        self.reference, self.right = self.scores(self.original)

    def scores(self, model: Any) -> tuple[dict[str, float], int]:
        found = perplexities(model, self.tokenizer, self.texts, self.tokens)
        return found, sum(exact_answers(model, self.tokenizer, self.problems, batch=100))

    def head(self, title: str) -> None:
        """The original in perplexities; all rows below it are ratios."""
        say(f"\n{self.name}, {title}: perplexity on the first {self.tokens} tokens of each text as a ratio")
        say(f"to the original's; problems exact, of {len(self.problems)}; seconds to merge\n")
        columns = [*self.reference, "exact", "seconds"]
        line("", *columns)
        say("|---|" + "---:|" * len(columns))
        line("original: perplexity", *(f"{self.reference[d]:.2f}" for d in self.reference), str(self.right), "")

    def row(self, name: str, model: Any, seconds: float | None) -> None:
        found, right = self.scores(model)
        ratios = (f"{found[domain] / self.reference[domain]:.3f}" for domain in self.reference)
        line(name, *ratios, str(right), "" if seconds is None else f"{seconds:.0f}")

    def measure(self, row: Row, recipe: Recipe) -> None:
        model = copy.deepcopy(self.original)
        start = time.perf_counter()
        model = with_all_rows(model, self.name, recipe) if row.all_rows else patch_model(model, recipe, self.tokenizer)
        self.row(row.name, model, time.perf_counter() - start)


def say(text: str) -> None:
    print(text, flush=True)


def line(*cells: str) -> None:
    """A line of a markdown table, at once: a run that is killed leaves what it has measured."""
    say("| " + " | ".join(cells) + " |")


def state(rows: list[Row], recipes: list[Recipe], tokens: int, ridge: float) -> None:
    """Every recipe in full."""
    say(f"`merge: grouped`, `calibration_tokens: {tokens}`, `ridge: {ridge}`, all else not named here by default.\n")
    line("row", *STATED)
    say("|---|" + "---|" * len(STATED))
    for row, recipe in zip(rows, recipes, strict=True):
        values = {field: getattr(recipe, field) for field in STATED} | {"weighting": recipe.weights_by}
        unused = () if recipe.calibrated else ("calibrate", "seed")
        line(row.name, *("" if field in unused else str(value) for field, value in values.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = packaged_models()
    parser.add_argument(
        "--models", nargs="+", default=names, choices=names, metavar="MODEL", help=f"of {', '.join(names)}; all"
    )
    parser.add_argument(
        "--experts",
        nargs="+",
        type=int,
        default=[8, 12, 1],
        help="that stay, of 16; the first with all rows, the others with the main ones (default: 8 12 1)",
    )
    parser.add_argument("--texts", nargs="+", type=Path, metavar="FILE", help="to score instead of the packaged ones")
    parser.add_argument("--tokens", type=int, default=4096, help="scored of each text (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=100, help="of 200 (default: %(default)s)")
    parser.add_argument("--calibration-tokens", type=int, default=32768, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--ridge", type=float, default=0.01, help="of all rows that have one (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only rows whose name holds one of these")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few rows, one number of experts, fewer tokens")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.experts, options.tokens, options.problems = options.experts[:1], 2048, 32
        options.calibration_tokens = min(options.calibration_tokens, 8192)
    rows = [row for row in ROWS if row.quick or not options.quick]
    if options.rows:
        rows = [row for row in rows if any(part in row.name for part in options.rows)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def recipe(row: Row, experts: int) -> Recipe:
            return row.recipe(experts, options.calibration_tokens, folder, options.ridge)

        state(rows, [recipe(row, 8) for row in rows], options.calibration_tokens, options.ridge)
        for name in options.models:
            bench = Bench(name, options.tokens, options.problems, options.texts)
            for experts in options.experts:
                bench.head(f"{experts} of 16 experts")
                if experts == options.experts[0]:
                    bench.row("routed experts removed", without_routed_experts(copy.deepcopy(bench.original)), None)
                for row in rows:
                    if row.main or experts == options.experts[0]:
                        bench.measure(row, recipe(row, experts))


if __name__ == "__main__":
    main()
